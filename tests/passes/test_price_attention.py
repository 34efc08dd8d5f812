"""price-attention: prices are what a compile with that choice would get, and nothing is changed."""

from dataclasses import replace
from math import isfinite
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.builders import Sizes, compilation, feed_of, run_model, run_passes, vit
from tests.e2e.command import FAST, run, write_vit
from vitq_compiler.catalog import FRONT, pipeline_for
from vitq_compiler.compiler import compile
from vitq_compiler.metrics import sqnr
from vitq_compiler.passes.price_attention import PriceAttention
from vitq_compiler.pipeline import Compilation
from vitq_compiler.qdq import simulate
from vitq_compiler.recipe import load_recipe
from vitq_compiler.targets.onnxruntime import Onnxruntime
from vitq_compiler.targets.tensorrt import Tensorrt

SIZES = Sizes(depth=2, width=32, heads=2, hidden=48, classes=16)
BEFORE = f"{FRONT},stack-heads,calibrate,equalize-values,compute-qparams"


def priced(target: Tensorrt, attention: str | None = None, sizes: Sizes = SIZES, recipe: str = "w8a8") -> Compilation:
    model = vit(sizes)
    c = compilation(model, target=target, recipe=load_recipe(recipe).with_attention(attention))
    c.floating = c.graph.snapshot()
    run_passes(c, f"{BEFORE},price-attention")
    return c


@pytest.mark.parametrize("choice", ["float", "int8", "fp8"])
def test_a_price_is_what_the_choice_gets(choice: str) -> None:
    """The same number whether the choice is only priced, or compiled; and that of the simulated graph."""
    c = priced(Tensorrt(), choice)
    rows = {row.choice: row for row in c.prices}
    assert [row.choice for row in c.prices if row.chosen] == [choice]
    others = {row.choice: row for row in priced(Tensorrt(), None if choice != "float" else "int8").prices}
    assert rows[choice].sqnr_db == pytest.approx(others[choice].sqnr_db, abs=1e-6)
    feeds = [{name: array[:rest] for name, array in feed.items()} for feed, rest in zip(c.data.calibration(), (3, 1), strict=True)]
    reference, noisy = (np.concatenate([run_model(graph, feed)[0] for feed in feeds]) for graph in (vit(SIZES), simulate(c)))
    assert rows[choice].sqnr_db == pytest.approx(sqnr(reference, noisy), abs=0.2)
    assert rows[choice].images == 4
    assert {row.quantized for row in c.prices if row.choice != "float"} == {2}


def test_coarser_is_dearer() -> None:
    rows = {row.choice: row.sqnr_db for row in priced(Tensorrt()).prices}
    assert rows["float"] > rows["int8"]  # type: ignore[operator]
    assert rows["float"] > rows["fp8"]  # type: ignore[operator]


def test_nothing_is_changed() -> None:
    c = compilation(vit(SIZES), target=Tensorrt())
    run_passes(c, BEFORE)
    params, specs, feed = dict(c.params), dict(c.specs), feed_of(c.graph)
    before = run_model(c.graph, feed)
    assert PriceAttention().run(c) == 3
    assert (c.params, c.specs) == (params, specs)
    np.testing.assert_array_equal(before[0], run_model(c.graph, feed)[0])


def test_what_the_target_cannot_take() -> None:
    rows = {row.choice: row for row in priced(Tensorrt(compute_capability=8.0)).prices}
    assert rows["fp8"].sqnr_db is None
    assert rows["fp8"].reason == "compute capability 8.0 has no 8-bit floats, 8.9 and above have: take int8"
    assert isfinite(rows["int8"].sqnr_db or np.nan)
    rows = {row.choice: row for row in priced(Tensorrt(), sizes=Sizes(depth=1, width=24, heads=2, hidden=48)).prices}
    assert (rows["int8"].quantized, rows["int8"].blocks) == (0, 1)
    assert rows["int8"].reason == "there is no fused int8 kernel for heads of 12, only of 16, 32, 64"
    assert rows["int8"].sqnr_db == rows["float"].sqnr_db


def test_excluded_attention_stays_out() -> None:
    c = compilation(vit(SIZES), target=Tensorrt())
    run_passes(c, f"{FRONT}")
    name = c.annotations.attentions[0].softmax.name
    c = compilation(vit(SIZES), target=Tensorrt(), recipe=load_recipe("w8a8").excluding((f"^{name}$",)))
    run_passes(c, f"{BEFORE},price-attention")
    row = next(row for row in c.prices if row.choice == "int8")
    assert (row.quantized, row.reason) == (1, f"excluded by '^{name}$'")


def test_a_recipe_with_a_choice_of_its_own() -> None:
    recipe = replace(load_recipe("w8a8"), attention={"probs": {"bits": 5}, "q": {"bits": 5}, "k": {"bits": 5}, "v": {"bits": 5}})
    c = compilation(vit(SIZES), target=Tensorrt(), recipe=recipe)
    run_passes(c, f"{BEFORE},price-attention")
    assert [(row.choice, row.chosen) for row in c.prices] == [("recipe", True), ("float", False), ("int8", False), ("fp8", False)]
    assert c.prices[0].sqnr_db < c.prices[2].sqnr_db  # type: ignore[operator]


def test_a_target_without_choices() -> None:
    c = compilation(vit(SIZES), target=Onnxruntime())
    run_passes(c, f"{FRONT},calibrate,compute-qparams")
    assert PriceAttention().run(c) == 0
    assert c.prices == []
    assert "price-attention" not in str(pipeline_for(load_recipe("w8a8"), Onnxruntime()))


def test_images_outside_the_possible() -> None:
    with pytest.raises(ValueError, match="images must be at least 1"):
        PriceAttention(images=0)


def test_the_report_of_a_compile(tmp_path: Path) -> None:
    path = tmp_path / "vit.onnx"
    onnx.save(vit(Sizes(depth=2, width=32, heads=2, hidden=48, classes=16)), path)
    report = compile(path, None, target="tensorrt", target_options={"compute_capability": 8.9}, attention="fp8", threads=1, samples=4)
    assert [(row.choice, row.chosen, row.quantized) for row in report.attention] == [
        ("float", False, 0),
        ("int8", False, 2),
        ("fp8", True, 2),
    ]
    assert len({row.sqnr_db for row in report.attention}) == 3


def test_the_command(tmp_path: Path) -> None:
    model = write_vit(tmp_path / "vit.onnx", Sizes(depth=2, width=32, heads=2, hidden=48, classes=16))
    words = (model, *FAST, "--target", "tensorrt", "--attention", "fp8")
    result = run(*words, "--compute-capability", "8.9")
    assert result.exit_code == 0
    assert "Attention | in blocks" in result.stdout
    before = (tmp_path / "vit_int8.onnx").read_bytes()
    result = run(*words, "--compute-capability", "8.0")
    assert result.exit_code == 2
    assert result.stderr.endswith("vitq-compile: error: compute capability 8.0 has no 8-bit floats, 8.9 and above have: take int8\n")
    assert (tmp_path / "vit_int8.onnx").read_bytes() == before
