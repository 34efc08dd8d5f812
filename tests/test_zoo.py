"""The zoo: how multiplications are counted, how rows are kept and put together, and one model through its processes."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import zoo
from benchmarks.architectures import ARCHITECTURES, HIERARCHICAL
from benchmarks.products import KINDS, dense_products, kernels_of
from tests.builders import Sizes, model_of, vit
from vitq_compiler.compiler import compile
from vitq_compiler.targets.onnxruntime import Onnxruntime

INTEGER = Onnxruntime.integer_kernels


def options(*words: str) -> argparse.Namespace:
    """Parsed words of the command."""
    parser = argparse.ArgumentParser()
    zoo.add_options(parser)
    return parser.parse_args(words)


def row(model: str, **changes: Any) -> zoo.Row:
    """A row of a results file."""
    base = {"model": model, "exporter": "dynamo", "small": False, "status": "compiled", "reason": "", "linears": 4, "quantized": 3}
    sums = {"macs": dict.fromkeys(KINDS, 0) | {"linear": 200}, "macs_integer": dict.fromkeys(KINDS, 0) | {"linear": 150}}
    return base | sums | {"integer": 3, "refused": {"kept": 1}, "sqnr": 30.0, "ratio": 0.5} | changes


def test_products_are_counted_from_their_shapes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shapes = {"w": (4, 6), "g": (5, 6), "e": (6, 3), "one": (7, 2, 1, 1), "three": (6, 1, 3, 3)}
    model = model_of(
        """g (float[B, 3, 4] x, float[B, 2, 5, 5] image) => (float a, float b, float c, float d, float[B, 3, 3] s) {
            wt = Transpose <perm = [1, 0]> (w)
            wtt = Transpose <perm = [1, 0]> (wt)
            folded = MatMul(wt, w)
            a = MatMul(x, wtt)
            rows = Reshape(a, minus)
            b = Gemm <transB = 1> (rows, g)
            c = Einsum <equation = "bik,kj->bij"> (a, e)
            p = Conv(image, one)
            d = Conv <group = 2> (image, grouped)
            at = Transpose <perm = [0, 2, 1]> (c)
            s = MatMul(c, at)
        }""",
        minus=np.array([-1, 6]),
        grouped=random.standard_normal((6, 1, 3, 3)).astype(np.float32),
        **{name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
    )
    model.graph.output.extend([onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("p", "folded")])
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    feed = {"x": np.zeros((1, 3, 4), np.float32), "image": np.zeros((1, 2, 5, 5), np.float32)}
    found = {(p.kind, p.macs) for p in dense_products(path, feed, {}, INTEGER)}
    assert found == {
        ("linear", 3 * 4 * 6),
        ("linear", 3 * 6 * 5),
        ("linear", 3 * 6 * 3),
        ("1x1", 7 * 25 * 2),
        ("conv", 6 * 9 * 9),
    }


def test_integer_products_are_those_of_integer_kernels(tmp_path: Path) -> None:
    source, compiled = tmp_path / "vit.onnx", tmp_path / "int8.onnx"
    sizes = Sizes(image=8, width=16, hidden=32)
    onnx.save(vit(sizes), source)
    report = compile(source, compiled, samples=4, threads=1)
    feed = {"image": np.zeros((1, 3, sizes.image, sizes.image), np.float32)}
    before = dense_products(source, feed, kernels_of(source), INTEGER)
    after = dense_products(compiled, feed, kernels_of(compiled), INTEGER)
    assert not any(p.integer for p in before)
    assert sum(p.integer for p in after) == sum(len(row.parts) for row in report.linears if row.integer)
    assert [p.macs for p in after if not p.integer] == [sizes.width * sizes.classes]  # the head
    assert sum(p.macs for p in after) <= sum(p.macs for p in before)  # tokens that nobody reads are not computed


def test_models_are_chosen_by_pattern() -> None:
    assert [a.name for a in zoo.choose(["hf_bert", "hf_dinov3*"], None)] == ["hf_dinov3", "hf_dinov3_gated", "hf_bert"]
    assert {a.family for a in zoo.choose(["*"], "flat")} == {"flat"}
    with pytest.raises(SystemExit, match="none of the zoo"):
        zoo.choose(["resnet*"], None)


def test_names_are_unique() -> None:
    assert len(ARCHITECTURES) == len(zoo.choose(["*"], "flat")) + len(HIERARCHICAL)


def test_the_later_row_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("\n".join(json.dumps(row(name)) for name in ("hf_vit", "hf_bert")) + "\n", encoding="utf-8")
    second.write_text(json.dumps(row("hf_vit", sqnr=12.0)) + "\n", encoding="utf-8")
    rows = zoo.read_rows([first, second, tmp_path / "none.jsonl"])
    assert {key[0]: value["sqnr"] for key, value in rows.items()} == {"hf_vit": 12.0, "hf_bert": 30.0}


def test_sums_and_refusals() -> None:
    shown, left, others = zoo.tables([row("hf_vit"), row("hf_bert", status="refused", reason="no"), row("hf_clip_text", sqnr=None)])
    assert shown.rows[0] == ("hf_vit", "dynamo", 4, 3, 75.0, None, None, 30.0, 0.5)
    assert [cells[0] for cells in shown.rows] == ["hf_vit", "hf_clip_text"]
    assert shown.notes == ("2 compiled, 1 refused. MACs in integer kernels over all: linear: 75.0 % of 0.0 G.",)
    assert [cells[1:] for cells in left.rows] == [(2, 2)]
    assert others.rows == (("hf_bert", "dynamo", "refused: no"),)


def test_reasons_are_shortened() -> None:
    assert zoo.shortened("exit 1: KeyError: 'none'") == "KeyError: 'none'"
    assert zoo.shortened("model a/b.onnx: no transformer block found") == "no transformer block found"
    long = zoo.shortened("word " * 50)
    assert long.endswith("word ...")
    assert len(long) <= zoo.LONGEST + 4


def test_rows_that_are_there_are_shown(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    results.write_text(json.dumps(row("hf_vit")) + "\n", encoding="utf-8")
    table, _ = zoo.measure(options("--show", "--results", str(results)))
    assert [cells[0] for cells in table.rows] == ["hf_vit"]
    with pytest.raises(SystemExit, match="no model is left"):
        zoo.measure(options("--show"))


def test_a_model_that_fails_is_a_row(tmp_path: Path) -> None:
    chosen = options("--exports", str(tmp_path))
    good, bad = tmp_path / "hf_vit_dynamo.onnx", tmp_path / "hf_bert_dynamo.onnx"
    onnx.save(vit(Sizes(image=8, width=16, hidden=32)), good)
    onnx.save(model_of("g (float[B, 3, 8, 8] x) => (float[B, 3, 8, 8] y) { y = Relu(x) }"), bad)
    result = zoo.measure_one("hf_vit", "dynamo", False, chosen)
    assert (result["status"], result["linears"], result["integer"]) == ("compiled", 10, 9)
    assert result["macs_integer"]["linear"] > 0.9 * result["macs"]["linear"]
    assert result["refused"] == {"role head stays in float in recipe w8a8": 1}
    refused = zoo.measure_one("hf_bert", "dynamo", False, chosen)
    assert refused["status"] == "refused"
    assert "no transformer block found" in refused["reason"]
    assert "exit 1: KeyError: 'none'" in zoo.job("zoo_export", "none", "dynamo", tmp_path / "x.onnx", 1, 0, timeout=60)[1]
    assert zoo.job("zoo_export", "none", "dynamo", "x", 1, 0, timeout=0)[1] == "export took more than 0 s"
