"""round-weights: every method ends on the grid, and no output is further from the float layer than nearest rounding leaves it."""

from pathlib import Path

import numpy as np
import pytest

from tests.builders import compilation, feed_of, find_pass, run_model, run_passes, vit
from tests.passes.test_compensate_weights import prepared, quality
from vitq_compiler.graph import value
from vitq_compiler.passes.round_weights import METHODS
from vitq_compiler.pipeline import Compilation
from vitq_compiler.qdq import simulate
from vitq_compiler.quant import Edge, fake_quantize, quantize
from vitq_compiler.repair import deployed


def rounded(method: str, **options: object) -> Compilation:
    c = prepared("w3a8")
    find_pass("round-weights")(method=method, **options).run(c)
    return c


@pytest.mark.parametrize("method", METHODS)
def test_codes_are_on_the_grid_and_the_weight_stays(method: str) -> None:
    c, fresh = rounded(method), prepared("w3a8")
    for linear, other in zip(c.annotations.linears, fresh.annotations.linears, strict=True):
        np.testing.assert_array_equal(value(linear.weight), value(other.weight))
        params = c.params.get(Edge(linear.name, 1))
        if params is None:
            assert linear.role == "head"
            continue
        codes = c.rounding[Edge(linear.name, 1)]
        assert codes.dtype == params.dtype
        assert codes.min() >= params.quant_min
        assert codes.max() <= params.quant_max
        same = np.array_equal(codes, quantize(value(linear.weight), params))
        assert same == (method == "nearest")


@pytest.mark.parametrize("method", ["gptq", "gptaq", "greedy"])
def test_it_helps_on_unseen_samples(method: str) -> None:
    assert quality(rounded(method)) > quality(rounded("nearest")) + 0.5


def test_flips_after_gptq_never_lose_on_the_samples() -> None:
    """Shown on the layer with the patches: before it, nothing differs."""
    front = "canonicalize,recover-gelu,separate-linears,annotate,linearize-patch-embedding,calibrate,compute-qparams"
    errors = []
    for flips in (0, 20):
        c = prepared("w3a8")
        run_passes(c, f"{front},round-weights{{method=gptq flips={flips}}}")
        linear, floating = c.annotations.linears[0], c.reference
        assert linear.role == "patch_embed"
        assert floating is not None
        part = floating.part(["image"], [linear.input.name])
        x = np.concatenate([run_model(part, feed)[0].reshape(-1, linear.in_features) for feed in c.data.calibration()])
        difference = x @ value(linear.weight) - fake_quantize(x, c.params[Edge(linear.name, 0)]) @ deployed(c, linear)
        errors.append(difference.var(0))
    assert (errors[1] <= errors[0] * 1.001).all()
    assert errors[1].sum() < errors[0].sum()


def test_the_order_of_the_network_is_followed_and_the_disk_changes_nothing(tmp_path: Path) -> None:
    plain, other = prepared(), prepared()
    other.work_dir = tmp_path / "work"
    for c in (plain, other):
        run_passes_on(c)
    feed = feed_of(plain.graph, batch=4)
    np.testing.assert_array_equal(run_model(simulate(plain), feed)[0], run_model(simulate(other), feed)[0])
    assert list(other.work_dir.iterdir()) == []


def run_passes_on(c: Compilation) -> None:
    for name in ("compensate-weights", "round-weights"):
        find_pass(name)().run(c)


def test_it_follows_into_the_compiled_graph() -> None:
    c = compilation(vit())
    front = "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate,linearize-patch-embedding"
    run_passes(c, front + ",calibrate,compute-qparams,round-weights,insert-qdq,legalize")
    for edge, name in c.codes.items():
        np.testing.assert_array_equal(value(c.graph.tensor(name)), c.rounding[edge])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "up"}, "method must be one of nearest, gptq"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"samples": -1}, "not negative"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        find_pass("round-weights")(**options)
