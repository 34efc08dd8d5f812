"""split-weight-scales: the same numbers in float32, no overflow where sums of codes are written as halves, and what is left alone."""

import numpy as np
import pytest

from tests.builders import Dialect, Sizes, compilation, feed_of, graph_of, ops, run_model, run_passes, vit
from vitq_compiler.catalog import pipeline_for
from vitq_compiler.graph import Graph, is_constant, producer, value
from vitq_compiler.passes.split_weight_scales import SplitWeightScales
from vitq_compiler.recipe import load_recipe
from vitq_compiler.targets.tensorrt import Tensorrt

RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(-127, 128, (64, 48)).astype(np.int8)
SCALES = np.exp(RANDOM.normal(-7, 1, 48)).astype(np.float32)
NUMBERS = {
    "s": np.float32(0.02),
    "z": np.int8(0),
    "w": CODES,
    "sn": SCALES,
    "zn": np.zeros(48, np.int8),
    "b": RANDOM.normal(size=48).astype(np.float32),
}
ACTIVATION = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
WEIGHT = "dw = DequantizeLinear <axis = 1> (w, sn, zn)"


def linear(text: str = f"{ACTIVATION} {WEIGHT} m = MatMul(d, dw) y = Add(m, b)", head: str = "float[B, 5, 64] x") -> Graph:
    return graph_of(f"g ({head}) => (float y) {{ {text} }}", **NUMBERS)


def split(graph: Graph) -> int:
    return SplitWeightScales().run(compilation(graph))


def test_the_same_numbers() -> None:
    graph, feed = linear(), {"x": RANDOM.normal(size=(2, 5, 64)).astype(np.float32)}
    before = run_model(graph, feed)[0]
    assert split(graph) == 1
    graph.clean()
    assert ops(graph) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Mul", "Add"]
    np.testing.assert_allclose(run_model(graph, feed)[0], before, rtol=2e-6, atol=2e-6)
    (weight,) = [n for n in graph.find("DequantizeLinear") if is_constant(n.inputs[0])]
    np.testing.assert_array_equal(value(weight.inputs[0]), CODES)
    common = float(value(weight.inputs[1]))
    assert common == 2.0 ** round(float(np.log2(SCALES).mean()))
    assert "axis" not in weight.attrs
    (multiply,) = graph.find("Mul")
    np.testing.assert_array_equal(value(multiply.inputs[1]) * np.float32(common), SCALES)


def late(codes: np.ndarray, scale: float) -> np.ndarray:
    """What a kernel makes of it that writes halves, multiplied by ``scale`` inside and by channel behind."""
    with np.errstate(over="ignore"):
        return (codes * scale).astype(np.float16).astype(np.float32)


def test_sums_of_codes_do_not_fit_halves_but_products_do() -> None:
    x = RANDOM.normal(size=(100, 64)).astype(np.float32) * 0.8
    sums = np.clip(np.rint(x / 0.02), -127, 127) @ CODES.astype(np.float32)
    exact = sums * 0.02 * SCALES
    assert np.abs(sums).max() > 65504
    with np.errstate(invalid="ignore"):
        unscaled = late(sums, 1.0) * (0.02 * SCALES).astype(np.float16).astype(np.float32)
    assert not np.isfinite(unscaled).all()
    graph = linear()
    split(graph)
    (weight,) = [n for n in graph.find("DequantizeLinear") if is_constant(n.inputs[0])]
    ratio = value(graph.find("Mul")[0].inputs[1]).astype(np.float16).astype(np.float32)
    scaled = late(sums, 0.02 * float(value(weight.inputs[1]))) * ratio
    assert np.abs(scaled - exact).max() <= 2e-3 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("text", "head"),
    [
        (f"{ACTIVATION} dw = DequantizeLinear(w, s, z) y = MatMul(d, dw)", "float[B, 5, 64] x"),
        (f"{WEIGHT} y = MatMul(x, dw)", "float[B, 5, 64] x"),
        (f"{ACTIVATION} {WEIGHT} m = MatMul(d, dw) n = Identity(dw) y = MatMul(m, n)", "float[48, 64] x"),
        (
            "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear <axis = 0> (k, sk, zk) y = MatMul(d, e)",
            "float[B, 64] x",
        ),
    ],
    ids=["one scale", "float activation", "another reader", "scales of inputs"],
)
def test_what_is_left_alone(text: str, head: str) -> None:
    more = {"k": CODES, "sk": np.full(64, 0.01, np.float32), "zk": np.zeros(64, np.int8)}
    graph = graph_of(f"g ({head}) => (float y) {{ {text} }}", **NUMBERS, **more)
    before = ops(graph)
    assert split(graph) == 0
    assert ops(graph) == before


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution(bias: bool) -> None:
    text = f"{ACTIVATION} dk = DequantizeLinear <axis = 0> (k, sn, zn) y = Conv <strides = [2, 2]> (d, dk{', b' if bias else ''})"
    kernel = RANDOM.integers(-127, 128, (48, 3, 2, 2)).astype(np.int8)
    graph = graph_of(f"g (float[B, 3, 4, 4] x) => (float y) {{ {text} }}", **NUMBERS, k=kernel)
    feed = {"x": RANDOM.normal(size=(2, 3, 4, 4)).astype(np.float32)}
    before = run_model(graph, feed)[0]
    assert split(graph) == 1
    graph.clean()
    assert ops(graph)[3:] == ["Conv", "Mul", "Add"] if bias else ["Conv", "Mul"]
    np.testing.assert_allclose(run_model(graph, feed)[0], before, rtol=2e-6, atol=2e-6)


def test_a_weight_of_two_products() -> None:
    graph = linear(f"{ACTIVATION} {WEIGHT} m = MatMul(d, dw) n = MatMul(d, dw) y = Add(m, n)")
    feed = {"x": RANDOM.normal(size=(2, 5, 64)).astype(np.float32)}
    before = run_model(graph, feed)[0]
    assert split(graph) == 1
    np.testing.assert_allclose(run_model(graph, feed)[0], before, rtol=2e-6, atol=4e-6)


def test_a_product_that_is_an_output() -> None:
    graph = linear(f"{ACTIVATION} {WEIGHT} y = MatMul(d, dw)")
    split(graph)
    assert graph.output_names == ["y"]
    assert producer(graph.outputs[0]).op == "Mul"  # type: ignore[union-attr]


def test_tiny_scales_stay_normal_halves() -> None:
    graph = graph_of(f"g (float[B, 64] x) => (float y) {{ {ACTIVATION} {WEIGHT} y = MatMul(d, dw) }}", **NUMBERS | {"sn": SCALES * 1e-6})
    split(graph)
    (weight,) = [n for n in graph.find("DequantizeLinear") if is_constant(n.inputs[0])]
    assert float(value(weight.inputs[1])) == 2.0**-14


@pytest.mark.parametrize("recipe", ["w8a8", "fp8"])
@pytest.mark.parametrize(("target", "splits"), [(Tensorrt(), True), (Tensorrt("8.6"), False), (Tensorrt("11", "fp32"), False)])
def test_in_the_pipeline_of_half_precision(target: Tensorrt, splits: bool, recipe: str) -> None:
    if target.version == "8.6" and recipe == "fp8":
        pytest.skip("8.6 has no 8-bit floats")
    plan = load_recipe(recipe)
    assert ("split-weight-scales" in str(pipeline_for(plan, target))) == splits
    c = compilation(vit(Sizes(depth=1, width=32, heads=2, hidden=48), Dialect()), target=target, recipe=plan)
    counts = run_passes(c, str(pipeline_for(plan, target)))
    assert counts.get("split-weight-scales", splits) == (4 + (recipe == "w8a8")) * splits, "qkv, proj, fc1, fc2, and the patch embedding"
    assert np.isfinite(run_model(c.graph, feed_of(c.graph))[0]).all()
