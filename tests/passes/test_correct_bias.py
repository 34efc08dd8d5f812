"""correct-bias: the mean error of every output channel vanishes."""

import numpy as np
import pytest

from tests.builders import Sizes, changes_of, compilation, graph_of, run_model, run_passes, vit
from vitq_compiler.annotations import understand
from vitq_compiler.calibration import CalibrationTable, ChannelStatistics
from vitq_compiler.graph import value
from vitq_compiler.passes.correct_bias import CorrectBias
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge, QuantSpec, fake_quantize, quantize
from vitq_compiler.repair import deployed

RANDOM = np.random.default_rng(0)
W, BIAS = RANDOM.normal(size=(6, 4)).astype(np.float32), RANDOM.normal(size=4).astype(np.float32)
X = (RANDOM.normal(size=(200, 6)) + np.array([5, -3, 0, 1, 2, 0])).astype(np.float32)


def prepared(*, bias: bool) -> Compilation:
    text = "m = MatMul(x, w) y = Add(m, c)" if bias else "m = MatMul(x, w) y = Relu(m)"
    c = compilation(graph_of(f"g (float[B, 6] x) => (float[B, 4] y) {{ {text} }}", w=W, **({"c": BIAS} if bias else {})))
    c.annotations = understand(c.graph)
    name = c.annotations.linears[0].name
    c.specs = {Edge(name, 0): QuantSpec(), Edge(name, 1): QuantSpec(4, signed=True, symmetric=True, granularity="per_channel")}
    c.table = CalibrationTable({"x": ChannelStatistics(X.min(0), X.max(0), X.mean(0))}, 200)
    changes_of(c, "compute-qparams")
    return c


@pytest.mark.parametrize("bias", [True, False])
def test_the_mean_of_every_channel_is_right(bias: bool) -> None:
    c = prepared(bias=bias)
    linear = c.annotations.linears[0]
    quantized = fake_quantize(W, c.params[Edge(linear.name, 1)])
    before = (X @ quantized - X @ W).mean(0)
    assert np.abs(before).max() > 0.05
    assert changes_of(c, "correct-bias") == 1
    assert linear.bias is not None
    correction = value(linear.bias) - (BIAS if bias else 0)
    np.testing.assert_allclose(correction, -before, atol=1e-5)
    np.testing.assert_array_equal(value(linear.weight), W, err_msg="the weight is quantized later")
    if not bias:
        assert [node.op for node in c.graph.clean().nodes] == ["MatMul", "Add", "Relu"]
        np.testing.assert_allclose(run_model(c.graph, {"x": X})[0], np.maximum(X @ W - before, 0), atol=1e-4)


def test_float_layers_are_left_alone() -> None:
    c = compilation(vit(Sizes(depth=1)))
    run_passes(c, "canonicalize,recover-gelu,separate-linears,annotate,calibrate,compute-qparams")
    head = c.annotations.linears[-1]
    assert head.bias is not None
    before = value(head.bias)
    assert changes_of(c, "correct-bias") == len(c.annotations.linears) - 1
    np.testing.assert_array_equal(value(head.bias), before)


def test_the_affine_goes_into_scale_and_bias() -> None:
    """On the samples it was fitted to, every output of the first layer has the mean of the float one and is no further from it."""
    c = compilation(vit(Sizes(depth=1)))
    c.recipe = c.recipe.with_bits("w3a8")
    run_passes(c, "canonicalize,recover-gelu,separate-linears,annotate,linearize-patch-embedding,calibrate,compute-qparams")
    linear = c.annotations.linears[0]  # it reads the patches, the same in both graphs
    edge = Edge(linear.name, 1)
    codes = quantize(value(linear.weight), c.params[edge])
    part = c.graph.part(["image"], [linear.input.name])
    x = np.concatenate([run_model(part, feed)[0].reshape(-1, linear.in_features) for feed in c.data.calibration()])
    assert linear.bias is not None
    wanted, before = x @ value(linear.weight) + value(linear.bias), x @ deployed(c, linear) + value(linear.bias)
    assert CorrectBias(method="affine").run(c) == len(c.annotations.linears) - 1
    np.testing.assert_array_equal(quantize(value(linear.weight), c.params[edge]), codes, err_msg="the factor is in the scale")
    after = fake_quantize(x, c.params[Edge(linear.name, 0)]) @ deployed(c, linear) + value(linear.bias)
    np.testing.assert_allclose(after.mean(0), wanted.mean(0), atol=1e-4)
    assert (np.square(after - wanted).mean(0) <= np.square(before - wanted).mean(0) * 1.01).all()


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method must be one of mean, affine, got median"):
        CorrectBias(method="median")
