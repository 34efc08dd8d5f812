"""reconstruct-blocks: training lowers the error, leaves plain quantizers behind, and goes on where it was interrupted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import Batches, Sizes, compilation, feed_of, find_pass, run_model, run_passes, vit
from vitq_compiler.errors import DataError, RecipeError
from vitq_compiler.graph import is_constant, value
from vitq_compiler.metrics import sqnr
from vitq_compiler.pipeline import Compilation
from vitq_compiler.qdq import simulate
from vitq_compiler.quant import Edge, quantize
from vitq_compiler.recipe import Recipe, load_recipe
from vitq_compiler.target import Target
from vitq_compiler.targets.tensorrt import Tensorrt
from vitq_compiler.training.batches import split
from vitq_compiler.training.loop import pick_device

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate,calibrate,compute-qparams"
RATES: dict[str, Any] = {"code_rate": 0.01, "scale_rate": 0.01, "bias_rate": 0.01}


def prepared(
    sizes: Sizes | None = None,
    *,
    batches: int = 8,
    recipe: Recipe | None = None,
    bits: str | None = "w4a4",
    target: Target | None = None,
) -> Compilation:
    c = compilation(vit(sizes or Sizes()), target=target)
    c.recipe = (recipe or c.recipe).with_bits(bits)
    c.data = Batches(c.graph.inputs, batches=batches, batch_size=8)
    run_passes(c, FRONT)
    return c


def quality(c: Compilation, sizes: Sizes | None = None) -> float:
    feed = feed_of(c.graph, batch=64, seed=5)
    return sqnr(run_model(vit(sizes or Sizes()), feed)[0], run_model(simulate(c), feed)[0])


@pytest.mark.parametrize(("unit", "helped"), [("network", 1), ("block", 2), ("layer", 6)])
def test_training_helps_on_unseen_samples(unit: str, helped: int) -> None:
    c = prepared()
    before = quality(c)
    assert find_pass("reconstruct-blocks")(steps=60, unit=unit, **RATES).run(c) >= helped
    assert sum(row.after < row.before for row in c.training) >= helped
    assert quality(c) > before + 1
    for edge, codes in c.rounding.items():
        assert codes.min() >= c.params[edge].quant_min
        assert codes.max() <= c.params[edge].quant_max


def test_products_in_bfloat16_train_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both precisions end at other numbers and at the same quality; what is judged is never computed with less than float32."""
    found, types = [], set()
    for bfloat16 in (False, True):
        monkeypatch.setattr("vitq_compiler.training.loop.has_bfloat16", lambda device, chosen=bfloat16: chosen)
        product = torch.matmul

        def seen(a: torch.Tensor, b: torch.Tensor, product: Any = product) -> torch.Tensor:
            y = product(a, b)
            types.add((y.dtype, torch.is_grad_enabled()))
            return y

        monkeypatch.setattr(torch, "matmul", seen)
        c = prepared()
        find_pass("reconstruct-blocks")(steps=60, **RATES).run(c)
        monkeypatch.setattr(torch, "matmul", product)
        found.append(quality(c))
        assert not any(dtype == torch.bfloat16 and not training for dtype, training in types)
    assert (torch.bfloat16, True) in types
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], abs=0.5)


def test_training_starts_at_the_codes_that_were_chosen() -> None:
    """Without a step nothing changes, also after another rounding than to nearest."""
    c = prepared()
    find_pass("round-weights")(method="gptq").run(c)
    codes, params = dict(c.rounding), dict(c.params)
    find_pass("reconstruct-blocks")(steps=1, code_rate=0.0, scale_rate=0.0, bias_rate=1e-30).run(c)
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


@pytest.mark.parametrize(
    "options",
    [
        {"round": "adaround"},
        {"drop": 0.5},
        {"prefix": "float"},
        {"loss": "mse"},
        {"loss": "fisher"},
        {"loss": "hessian"},
        {"loss": "low-rank"},
        {"loss": "output"},
    ],
    ids=lambda options: "-".join(options.values()) if "drop" not in options else "drop",
)
def test_every_way_of_training_helps(options: dict[str, Any]) -> None:
    c = prepared()
    before = quality(c)
    rates = {**RATES, "code_rate": 0.1} if "round" in options else RATES
    assert find_pass("reconstruct-blocks")(steps=40, unit="block", **rates, **options).run(c) >= 1
    assert quality(c) > before


def test_only_what_has_a_rate_changes() -> None:
    """Bias tuning: codes and scales stay, biases move."""
    c = prepared()
    params, codes = dict(c.params), {e: simulate_codes(c, e) for e in c.params if weight_at(c, e) is not None}
    biases = [value(linear.bias).copy() for linear in c.annotations.linears]
    find_pass("reconstruct-blocks")(steps=30, loss="output", code_rate=0.0, scale_rate=0.0, bias_rate=0.01).run(c)
    assert all(np.allclose(c.params[e].scale, params[e].scale, rtol=1e-6) for e in params)
    for edge, before in codes.items():
        np.testing.assert_array_equal(simulate_codes(c, edge), before)
    assert any((value(linear.bias) != b).any() for linear, b in zip(c.annotations.linears, biases, strict=True))


def weight_at(c: Compilation, edge: Edge) -> Any:
    tensor = c.graph.node(edge.node).inputs[edge.index]
    return value(tensor) if is_constant(tensor) else None


def simulate_codes(c: Compilation, edge: Edge) -> Any:
    return c.rounding[edge] if edge in c.rounding else quantize(weight_at(c, edge), c.params[edge])


@pytest.mark.parametrize("recipe", ["repq-vit", "is-vit", "adalog", "dopq-vit", "ptq4vit"])
def test_curves_are_computed_as_they_will_be_deployed(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The feature in torch is that of the runtime under quantizers that are no straight lines, and training keeps their numbers."""
    c = prepared(recipe=load_recipe(recipe))
    curves = {edge: params for edge, params in c.params.items() if params.curve is not None}
    assert curves
    seen: list[Any] = []
    monkeypatch.setattr("vitq_compiler.passes.reconstruct_blocks.train", lambda q, loss, *_, **__: (seen.append((q, loss)), (1.0, 0.5))[1])
    assert find_pass("reconstruct-blocks")().run(c) == 1
    (learned, loss), feed = seen[0], next(iter(c.data.calibration()))
    (feature,) = loss._finals
    (expected,) = run_model(simulate(c).part(["image"], [feature]), feed)
    with torch.no_grad():
        found = loss._part({"image": torch.from_numpy(feed["image"])}, learned.taps())
    np.testing.assert_allclose(found[feature].numpy(), expected, atol=2e-4 * np.abs(expected).max())
    assert {edge: c.params[edge] for edge in curves} == curves


def test_floats_for_codes_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"training needs integer codes, and those of .* are 8-bit floats: leave reconstruct-blocks out"):
        find_pass("reconstruct-blocks")().run(prepared(recipe=load_recipe("fp8"), bits=None, target=Tensorrt()))


def test_a_loss_of_answers_needs_a_head() -> None:
    c = prepared()
    for linear in c.annotations.linears:
        linear.role = "linear" if linear.role == "head" else linear.role
    with pytest.raises(RecipeError, match="loss=fisher compares the answers of a head, and the model has none: take loss=feature"):
        find_pass("reconstruct-blocks")(loss="fisher").run(c)


def test_a_single_batch_is_refused() -> None:
    with pytest.raises(DataError, match="reconstruct-blocks holds samples back: give more of them, or a smaller --batch-size"):
        find_pass("reconstruct-blocks")().run(prepared(batches=1))


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("samples", [2, 7, 20])
def test_what_is_held_back_is_held_back_with_its_copies(samples: int, copies: int) -> None:
    fitted, held_back = split(samples * copies, copies)
    assert sorted(fitted + held_back) == list(range(samples * copies))
    assert not {b // copies for b in fitted} & {b // copies for b in held_back}
    assert len(held_back) == max(1, samples // 8) * copies


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"drop": 1.0}, {"margin": 0.5}, {"local": -1.0}, {"code_rate": float("nan")}, dict.fromkeys(RATES, 0.0)]
)
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps and one of the rates must be positive"):
        find_pass("reconstruct-blocks")(**options)


def test_a_device_that_torch_has_not_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"device 'no-such' cannot be used: .*; --device auto"):
        pick_device("no-such")
