"""Recipes that fit weights, the whole way: better than without, plain QDQ, and the same from memory and from disk."""

from pathlib import Path

import onnx
import pytest

from tests.e2e.command import WIDE, write_vit
from vitq_compiler.catalog import FRONT, load_target
from vitq_compiler.compiler import compile
from vitq_compiler.errors import OutputError
from vitq_compiler.recipe import load_recipe
from vitq_compiler.report import CompileReport

PLAIN = {"QuantizeLinear", "DequantizeLinear", "Clip"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vit(tmp_path_factory.mktemp("model") / "vit.onnx", WIDE)


def quality(report: CompileReport) -> float:
    return report.validation.outputs[0].sqnr_db


def test_fitted_weights_are_better_and_plain(model: Path, tmp_path: Path) -> None:
    recipe = load_recipe("fast-w4a4")
    without = recipe.passes.partition(",compensate-weights")[0]
    bare = tmp_path / "bare.toml"
    bare.write_text(
        f"""description = "the same without repair"
        passes = "{without}"
        weight = {{ bits = 4, signed = true, symmetric = true, granularity = "per_channel" }}
        activation = {{ bits = 4 }}
        definition = "strict"
        attention = {{ q = {{}}, k = {{}}, probs = {{}}, v = {{}} }}""",
        encoding="utf-8",
    )
    reports = {}
    for name, choice, work in (("bare", str(bare), None), ("fast", "fast-w4a4", None), ("disk", "fast-w4a4", tmp_path / "work")):
        output = tmp_path / f"{name}.onnx"
        reports[name] = compile(model, output, recipe=choice, samples=32, threads=1, work_dir=work)
    assert quality(reports["fast"]) > quality(reports["bare"]) + 1
    assert all(row.quantized for row in reports["fast"].linears)
    assert (tmp_path / "fast.onnx").read_bytes() == (tmp_path / "disk.onnx").read_bytes()
    before, after = ({n.op_type for n in onnx.load(tmp_path / f"{name}.onnx").graph.node} for name in ("bare", "fast"))
    assert before == after, "repair leaves no operator behind"


def test_a_work_directory_that_is_a_file_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("mine")
    with pytest.raises(OutputError, match=r"work directory .*: File exists; give another one"):
        compile(model, tmp_path / "out.onnx", work_dir=tmp_path / "work")
    assert (tmp_path / "work").read_text() == "mine"
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.torch
@pytest.mark.parametrize("bits", ["w4a4", "w3a3"])
def test_training_repairs_too(model: Path, tmp_path: Path, bits: str) -> None:
    """Alone and with fewer steps: the whole recipe takes minutes."""
    recipe = load_recipe(f"best-{bits}")
    assert recipe.bits == bits
    names = [text.partition("{")[0] for text in recipe.passes.split(",")]
    assert names[-1] == "reconstruct-blocks"
    assert "compensate-weights" in names
    bare = recipe.passes.partition(",compensate-weights")[0]
    trained = f"{bare},reconstruct-blocks{{steps=60 code-rate=0.01 scale-rate=0.003}}"
    target, options = load_target("onnxruntime"), {"recipe": f"best-{bits}", "samples": 64, "threads": 1}
    before, after = (
        compile(model, tmp_path / "out.onnx", passes=",".join((FRONT, target.rewrites, passes, target.lowering)), **options)
        for passes in (bare, trained)
    )
    assert quality(after) > quality(before) + 3
    assert {n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node} >= PLAIN


@pytest.mark.torch
def test_training_layer_by_layer_adds_to_ranges(model: Path, tmp_path: Path) -> None:
    """Recipe adaquant with fewer steps, against itself without its two trainings."""
    target, passes = load_target("onnxruntime"), load_recipe("adaquant").passes
    bare = passes.partition(",reconstruct-blocks")[0]
    short = passes.replace("steps=200", "steps=30").replace("steps=100", "steps=20")
    assert short.count("reconstruct-blocks") == 2
    qualities = [
        quality(
            compile(
                model,
                tmp_path / "out.onnx",
                recipe="adaquant",
                samples=64,
                threads=1,
                passes=",".join((FRONT, target.rewrites, text, target.lowering)),
            )
        )
        for text in (bare, short)
    ]
    assert qualities[1] > qualities[0] + 1
