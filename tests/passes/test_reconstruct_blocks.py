"""reconstruct-blocks: training lowers the error, leaves plain quantizers behind, and goes on where it was interrupted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import Batches, Sizes, compilation, feed_of, find_pass, run_model, run_passes, vit
from vitq_compiler import reconstruction
from vitq_compiler.errors import DataError, RecipeError
from vitq_compiler.metrics import sqnr
from vitq_compiler.pipeline import Compilation
from vitq_compiler.qdq import simulate

pytest.importorskip("torch")
pytestmark = pytest.mark.torch
FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate,calibrate,compute-qparams"
RATES: dict[str, Any] = {"weight_rate": 0.01, "scale_rate": 0.01}


def prepared(sizes: Sizes | None = None, batches: int = 8) -> Compilation:
    c = compilation(vit(sizes or Sizes()))
    c.recipe = c.recipe.with_bits("w4a4")
    c.data = Batches(c.graph.inputs, batches=batches, batch_size=8)
    run_passes(c, FRONT)
    return c


def quality(c: Compilation, sizes: Sizes | None = None) -> float:
    feed = feed_of(c.graph, batch=64, seed=5)
    return sqnr(run_model(vit(sizes or Sizes()), feed)[0], run_model(simulate(c), feed)[0])


@pytest.mark.parametrize("blocks", [0, 1])
def test_training_helps_on_unseen_samples(blocks: int) -> None:
    c = prepared()
    before = quality(c)
    assert find_pass("reconstruct-blocks")(steps=60, blocks=blocks, **RATES).run(c) == (2 if blocks else 1)
    assert quality(c) > before + 1
    for edge, codes in c.rounding.items():
        assert codes.min() >= c.params[edge].quant_min
        assert codes.max() <= c.params[edge].quant_max


def test_training_starts_at_the_codes_that_were_chosen() -> None:
    """Without a step nothing changes, also after another rounding than to nearest."""
    c = prepared()
    find_pass("round-weights")(method="gptq").run(c)
    codes, params = dict(c.rounding), dict(c.params)
    find_pass("reconstruct-blocks")(steps=1, weight_rate=0.0, scale_rate=0.0).run(c)
    assert {n.reason for n in c.notes if n.stage == "reconstruct-blocks"} == {
        "training lowers no error on samples it does not see; codes and scales stay as they were"
    }
    assert c.params == params
    for edge in codes:
        np.testing.assert_array_equal(c.rounding[edge], codes[edge])


def test_the_simulation_in_torch_is_that_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss before training, from torch, is the error of the final feature in ONNX Runtime."""
    c = prepared()
    seen: list[Any] = []
    monkeypatch.setattr("vitq_compiler.passes.reconstruct_blocks.train", lambda q, loss, *_, **__: (seen.append(loss), (1.0, 1.0))[1])
    find_pass("reconstruct-blocks")().run(c)
    loss = seen[0]
    feature = next(linear for linear in c.annotations.linears if linear.role == "head").input.name
    feeds = list(c.data.calibration())
    graphs = [graph.part(["image"], [feature]) for graph in (c.graph, simulate(c))]
    pairs = [[run_model(graph, feed)[0] for graph in graphs] for feed in feeds]
    energy = np.mean([x.var() for x, _ in pairs])
    errors = [np.square(x - y).mean() / energy for x, y in pairs]
    assert float(loss._before[1]) == pytest.approx(errors[0], rel=1e-3)


def test_an_interrupted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepared()
    find_pass("reconstruct-blocks")(steps=24, **RATES).run(whole)
    parts = prepared()
    parts.work_dir = tmp_path
    parts.progress = stop_at(13)
    with pytest.raises(KeyboardInterrupt):
        find_pass("reconstruct-blocks")(steps=24, **RATES).run(parts)
    (checkpoint,) = tmp_path.glob("*.pt")
    seen: list[int] = []
    parts.progress = lambda label, done, total: seen.append(done)
    find_pass("reconstruct-blocks")(steps=24, **RATES).run(parts)
    assert min(seen) == 13, "12 steps were saved"
    assert list(tmp_path.iterdir()) == [checkpoint]
    for edge in whole.rounding:
        np.testing.assert_array_equal(parts.rounding[edge], whole.rounding[edge])
        np.testing.assert_allclose(parts.params[edge].scale, whole.params[edge].scale, rtol=1e-6)


def stop_at(step: int) -> Any:
    def progress(label: str, done: int, total: int) -> None:
        if label == "training" and done >= step:
            raise KeyboardInterrupt

    return progress


def test_layers_that_read_one_tensor_keep_one_quantizer() -> None:
    from tests.builders import DIALECTS

    c = compilation(vit(Sizes(), DIALECTS["huggingface"]))
    c.recipe = c.recipe.with_bits("w4a4")
    c.data = Batches(c.graph.inputs, batches=8, batch_size=8)
    run_passes(c, FRONT)
    before = sum(n.op == "QuantizeLinear" for n in simulate(c).nodes)
    find_pass("reconstruct-blocks")(steps=30, **RATES).run(c)
    assert sum(n.op == "QuantizeLinear" for n in simulate(c).nodes) == before


def test_a_single_batch_is_refused() -> None:
    with pytest.raises(DataError, match="reconstruct-blocks holds samples back: give more of them, or a smaller --batch-size"):
        find_pass("reconstruct-blocks")().run(prepared(batches=1))


@pytest.mark.parametrize("options", [{"steps": 0}, {"blocks": -1}, {"local": -1.0}, {"weight_rate": float("nan")}])
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1"):
        find_pass("reconstruct-blocks")(**options)


def test_a_device_that_torch_has_not_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"device 'no-such' cannot be used: .*; --device auto"):
        reconstruction.pick_device("no-such")
