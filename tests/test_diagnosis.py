"""`--diagnose` and `--sensitivity` on tiny models with known ailments."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from tests.builders import HUGGINGFACE, TIMM, Dialect, Sizes, compilation, run_passes, vit
from vitq_compiler.catalog import FRONT
from vitq_compiler.cli import main
from vitq_compiler.diagnosis import REWRITES, Diagnosis, TensorRow, diagnose, recommended
from vitq_compiler.recipe import load_recipe
from vitq_compiler.sensitivity import groups_of, sensitivity

SIZES = Sizes(width=16, hidden=24)
ROLES = ["stream", "qkv", "q", "k", "probs", "v", "proj", "stream", "fc1", "fc2"]


def saved(folder: Path, dialect: Dialect = TIMM, sizes: Sizes = SIZES) -> Path:
    onnx.save(vit(sizes, dialect), folder / "vit.onnx")
    return folder / "vit.onnx"


def diagnosed(model: Path, **options: object) -> Diagnosis:
    return diagnose(model, samples=4, threads=1, **options)  # type: ignore[arg-type]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)


@pytest.mark.parametrize("dialect", [TIMM, HUGGINGFACE])
def test_every_activation_once_in_order(tmp_path: Path, dialect: Dialect) -> None:
    found = diagnosed(saved(tmp_path, dialect))
    assert [row.role for row in found.tensors if row.block in ("attention 0", "mlp 0")] == ROLES
    assert {row.role for row in found.tensors if row.quantized} == {"qkv", "proj", "fc1", "fc2"}
    assert [row.name for row in found.rewrites] == list(REWRITES)
    for rewrite in found.rewrites:  # the same places before and after
        assert rewrite.changes == 0 or [(r.block, r.role) for r in rewrite.tensors] == [(r.block, r.role) for r in found.tensors]
    assert found.sensitivity == ()


def test_the_recipe_decides_what_counts_as_quantized(tmp_path: Path) -> None:
    found = diagnosed(saved(tmp_path), recipe="fast-w4a4")
    assert all(row.quantized == (row.role != "stream") for row in found.tensors)


def test_an_offset_of_keys_is_found_and_cured(tmp_path: Path) -> None:
    model = vit(SIZES, HUGGINGFACE)
    found = compilation(onnx.ModelProto.FromString(model.SerializeToString()))
    run_passes(found, FRONT)
    keys = found.annotations.attentions[0].k.linear
    assert keys.bias is not None
    bias = next(i for i in model.graph.initializer if i.name == keys.bias.name)
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(16, 40, np.float32), bias.name))
    onnx.save(model, tmp_path / "vit.onnx")
    outcome = diagnosed(tmp_path / "vit.onnx")
    (row,) = [r for r in outcome.tensors if (r.block, r.role) == ("attention 0", "k")]
    assert row.offset is not None
    assert row.offset > 5
    assert any(line.startswith("center-keys: offset of channels of k falls from") for line in outcome.recommendations)


def test_a_refused_rewrite_says_why(tmp_path: Path) -> None:
    model = vit(SIZES)
    stream = next(n for n in model.graph.node if n.op_type == "LayerNormalization").input[0]
    model.graph.node.append(onnx.helper.make_node("Relu", [stream], ["extra"], "extra"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("extra", onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "vit.onnx")
    row = next(r for r in diagnosed(tmp_path / "vit.onnx").rewrites if r.name == "rotate-residual")
    assert row.changes == 0
    assert row.tensors == ()
    assert any("is not rotated" in reason for reason in row.reasons)


def test_text_models_too() -> None:
    model = Path(__file__).parent / "data" / "zoo" / "bert.onnx"
    found = diagnose(model, samples=8, threads=1)
    assert found.data == "8 random token ids"
    assert {row.block for row in found.tensors} >= {"attention 0", "mlp 1"}


def test_values_are_looked_at_where_queries_are_rotated_by_their_positions() -> None:
    found = diagnosed(Path(__file__).parent / "data" / "zoo" / "dinov3.onnx")
    assert [row.role for row in found.tensors if row.block == "attention 0"] == ["stream", "qkv", "probs", "v", "proj"]
    changes = {row.name: row.changes for row in found.rewrites}
    assert (changes["center-keys"], changes["center-values"], changes["rotate-heads"]) == (0, 2, 2)


def test_registers_and_idle_heads_are_told() -> None:
    healthy = TensorRow("m", "mlp 1", "fc2", True, 3, 4, 2, 0.1, 2)
    assert recommended([healthy], []) == []
    rows = [replace(healthy, tokens=55.0), TensorRow("c", "attention 1", "probs", False, 3, 4, idle_heads=(0, 2))]
    registers, idle = recommended(rows, [])
    assert "the worst fc2 inputs of mlp 1, 55 times the median token" in registers
    assert idle.startswith("2 heads do nothing")
    assert idle.endswith("2 of attention 1")


def test_sensitivity_names_every_edge_in_one_role() -> None:
    c = compilation(vit(SIZES), recipe=load_recipe("fast-w4a4"))
    run_passes(c, f"{FRONT},calibrate,compute-qparams")
    groups = groups_of(c)
    by_role = [edge for (kind, _, _), edges in groups.items() if kind == "role" for edge in edges]
    assert sorted(map(str, by_role)) == sorted(map(str, c.params))
    assert {name for kind, name, _ in groups if kind == "block"} == {"attention 0", "mlp 0", "attention 1", "mlp 1"}
    assert {(name, part) for kind, name, part in groups if name in ("probs", "head")} == {
        ("probs", "activations"),
        ("head", "weights"),
        ("head", "activations"),
    }


def test_sensitivity_finds_the_role_with_the_fewest_bits() -> None:
    recipe = load_recipe("w8a8")
    recipe = replace(recipe, roles={"fc1": {"weight": {"bits": 2}}})
    c = compilation(vit(SIZES), recipe=recipe)
    run_passes(c, FRONT)
    c.data.validation_count = 0
    rows = sensitivity(c)
    levels = [row.sqnr_db for row in rows if row.sqnr_db is not None]
    assert levels == sorted(levels)
    assert next((row.name, row.part) for row in rows if row.kind == "role") == ("fc1", "weights")


def test_fewer_bits_are_worse(tmp_path: Path) -> None:
    model = saved(tmp_path)
    total = [
        next(r.sqnr_db for r in diagnosed(model, bits=b, with_sensitivity=True).sensitivity if r.kind == "all") for b in ("w8a8", "w4a4")
    ]
    assert total[0] is not None
    assert total[1] is not None
    assert total[0] > total[1] + 10


def test_the_command_prints_and_reports(tmp_path: Path) -> None:
    model, report = saved(tmp_path), tmp_path / "r.json"
    words = ("--diagnose", "--sensitivity", model, "--samples", 4, "--threads", 1)
    result = run(*words, "--report", report)
    assert result.exit_code == 0
    for text in ("kurtosis", "attention 1", "rotate-residual", "everything", "SQNR"):
        assert text in result.stdout
    table = json.loads(report.read_text())
    assert len(table["tensors"]) == 22
    assert table["sensitivity"][0]["sqnr_db"] is not None
    assert json.loads(run(*words[0:1], *words[2:], "--report", "-").stdout)["sensitivity"] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "vit.onnx"]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("vit.onnx --sensitivity", "--sensitivity needs --diagnose"),
        ("vit.onnx --plot p.png", "--plot needs --diagnose"),
        ("none.onnx --diagnose --plot none/p.png", "picture none/p.png: the folder none does not exist"),
        ("vit.onnx --diagnose --inspect", "leave out --inspect"),
        ("vit.onnx --diagnose -o x.onnx", "leave out --output"),
        ("vit.onnx --diagnose --passes annotate", "leave out --passes"),
        ("vit.onnx --diagnose --min-sqnr 0", "leave out --min-sqnr"),
        ("--diagnose", "MODEL is missing"),
        ("none.onnx --diagnose", "none.onnx"),
        ("none.onnx --diagnose --report none/r.json", "does not exist"),
    ],
)
def test_what_does_not_go_together(words: str, fault: str) -> None:
    result = run(*words.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert fault in line
