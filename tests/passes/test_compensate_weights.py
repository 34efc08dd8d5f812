"""compensate-weights: layers expect the errors of those before them, and no output gets worse on the samples it was fitted to."""

import numpy as np
import pytest

from tests.builders import Batches, Sizes, compilation, feed_of, find_pass, run_model, run_passes, vit
from vitq_compiler.graph import value
from vitq_compiler.metrics import sqnr
from vitq_compiler.moments import Moments
from vitq_compiler.passes.compensate_weights import STRENGTHS, CompensateWeights
from vitq_compiler.pipeline import Compilation
from vitq_compiler.qdq import simulate
from vitq_compiler.repair import Target

FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate,calibrate,compute-qparams"


def prepared(bits: str = "w4a4", *, bias: bool = True, granularity: str = "per_channel") -> Compilation:
    c = compilation(vit(Sizes(bias=bias)))
    c.recipe = c.recipe.with_bits(bits)
    object.__setattr__(c.recipe.weight, "granularity", granularity)
    c.data = Batches(c.graph.inputs, batches=6, batch_size=8)
    run_passes(c, FRONT)
    return c


def quality(c: Compilation, seed: int = 5) -> float:
    feed = feed_of(c.graph, batch=64, seed=seed)
    return sqnr(run_model(vit(Sizes()), feed)[0], run_model(simulate(c), feed)[0])


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("gptq", [False, True])
def test_it_helps_on_unseen_samples(granularity: str, gptq: bool) -> None:
    c = prepared(granularity=granularity)
    before = quality(c)
    assert find_pass("compensate-weights")(gptq=gptq).run(c) == 8
    assert quality(c) > before + 1
    assert bool(c.rounding) == gptq


def test_the_reference_is_the_float_model() -> None:
    c = prepared()
    feed = feed_of(c.graph)
    expected = run_model(c.graph, feed)[0]
    find_pass("compensate-weights")().run(c)
    assert c.reference is not None
    np.testing.assert_array_equal(run_model(c.reference, feed)[0], expected)
    assert np.abs(run_model(c.graph, feed)[0] - expected).max() > 1e-3


def test_almost_no_error_changes_almost_nothing() -> None:
    c = prepared("w8a8")
    weights = {linear.name: value(linear.weight) for linear in c.annotations.linears}
    find_pass("compensate-weights")(strength=10.0).run(c)
    for linear in c.annotations.linears:
        np.testing.assert_allclose(value(linear.weight), weights[linear.name], atol=0.02 * np.abs(weights[linear.name]).max())


def test_layers_without_a_bias_get_one() -> None:
    c = prepared(bias=False)
    assert any(linear.bias is None for linear in c.annotations.linears)
    find_pass("compensate-weights")().run(c)
    assert all(linear.bias is not None for linear in c.annotations.linears)
    assert np.isfinite(run_model(simulate(c), feed_of(c.graph))[0]).all()


@pytest.mark.parametrize("option", ["strength", "samples"])
def test_negative_numbers_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=r"must not be negative, got .*-1"):
        find_pass("compensate-weights")(**{option: -1})


def test_samples_are_the_first_of_them() -> None:
    """8 of 48 samples are the first batch, 5 a part of it."""
    found = []
    for count, size, samples in ((1, 8, 0), (6, 8, 8), (1, 5, 0), (6, 8, 5), (6, 8, 0)):
        c = prepared()
        c.data = Batches(c.graph.inputs, batches=count, batch_size=size)
        find_pass("compensate-weights")(samples=samples).run(c)
        found.append(np.concatenate([value(linear.weight).reshape(-1) for linear in c.annotations.linears]))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[3], found[2])
    assert not np.array_equal(found[4], found[0])


@pytest.mark.parametrize("rows", [20, 2000])
def test_the_strength_is_the_one_for_unseen_samples(rows: int) -> None:
    """Few samples want a strong hold on the old weight, many a weak one."""
    random = np.random.default_rng(0)
    target = Target(random.standard_normal((32, 8)), np.zeros(8))

    def pairs(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        x = random.standard_normal((2, count, 32)).astype(np.float32)
        return [(one, one + 0.7 * random.standard_normal(one.shape).astype(np.float32)) for one in x]

    seen, unseen = Moments.gather(pairs(rows), halves=True), Moments.gather(pairs(20_000))
    errors = {strength: unseen.error(target.weight, seen.regress(target.weight, strength)).sum() for strength in STRENGTHS}
    chosen = CompensateWeights(validated=True)._strength(target, seen)
    assert (chosen >= 0.5) == (rows == 20)
    assert unseen.error(target.weight, seen.regress(target.weight, chosen)).sum() < 1.1 * min(errors.values())
    assert max(errors.values()) > 1.3 * min(errors.values())


def test_without_a_second_batch_the_given_strength_holds() -> None:
    weights = []
    for validated in (False, True):
        c = prepared()
        c.data = Batches(c.graph.inputs, batches=1, batch_size=8)
        find_pass("compensate-weights")(strength=0.7, validated=validated).run(c)
        weights.append([value(linear.weight) for linear in c.annotations.linears])
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)
