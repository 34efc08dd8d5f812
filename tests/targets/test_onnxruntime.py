"""The onnxruntime target: form of the lowered graph, its numbers, its rules, and the kernels that really run."""

from dataclasses import replace

import numpy as np
import pytest

from tests.builders import (
    DIALECTS,
    Dialect,
    Sizes,
    assert_golden,
    changes_of,
    compilation,
    difference,
    feed_of,
    graph_of,
    ops,
    run_model,
    run_passes,
    vit,
)
from vitq_compiler import runtime
from vitq_compiler.annotations import understand
from vitq_compiler.catalog import pipeline_for
from vitq_compiler.errors import RecipeError
from vitq_compiler.graph import Graph, producer, readers, value
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.rule import SILENT, WARNING, Finding, Platform, check
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge, QuantParams, QuantSpec, fake_quantize, from_range
from vitq_compiler.targets.onnxruntime import Onnxruntime
from vitq_compiler.validation import kernels

WEIGHT = Onnxruntime().fit_weight(QuantSpec(signed=True, symmetric=True, granularity="per_channel"), QuantSpec())
RANDOM = np.random.default_rng(0)
W, BIAS = RANDOM.normal(size=(8, 6)).astype(np.float32), RANDOM.normal(size=6).astype(np.float32)


def lowered(
    text: str = "m = MatMul(x, w) y = Add(m, c)", shape: str = "B, 5, 8", low: float = -3, high: float = 3.3, **weights: np.ndarray
) -> Compilation:
    """All Linears of a text quantized with one activation range and lowered."""
    held = {"w": W, "c": BIAS} | weights
    c = compilation(graph_of(f"g (float[{shape}] x) => (float y) {{ {text} }}", **held))
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    for linear in c.annotations.linears:
        weight = value(linear.weight)
        c.params[Edge(linear.name, 0)] = from_range(np.float32(low), np.float32(high), QuantSpec())
        c.params[Edge(linear.name, 1)] = from_range(weight.min(0), weight.max(0), WEIGHT, 1)
    changes_of(c, "insert-qdq")
    changes_of(c, "legalize")
    return c


def truth(x: np.ndarray, c: Compilation, weight: np.ndarray = W, bias: np.ndarray | None = BIAS) -> np.ndarray:
    """What numpy says: fake-quantized operands, the bias in units of the accumulator."""
    name = c.annotations.linears[0].name
    activation, columns = c.params[Edge(name, 0)], c.params[Edge(name, 1)]
    y = fake_quantize(x, activation).astype(np.float64) @ fake_quantize(weight, columns).astype(np.float64)
    if bias is not None:
        scale = (activation.scale * columns.scale).astype(np.float32).astype(np.float64)
        y += np.rint(bias / scale) * scale
    return np.asarray(y)


def test_golden() -> None:
    c = lowered()
    assert_golden(c.graph, "onnxruntime_linear", weights=False)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(("shape", "batch"), [("B, 5, 8", 3), ("B, 8", 4), ("2, 5, 8", 2), ("B, 3, 4, 8", 2)])
def test_numbers_are_those_of_numpy(shape: str, batch: int, optimize: bool) -> None:
    c = lowered(shape=shape)
    feed = feed_of(c.graph, batch)
    y = run_model(c.graph, feed, optimize=optimize)[0]
    assert difference([truth(feed["x"], c)], [y]) <= 1e-5


def test_numbers_without_a_bias() -> None:
    c = lowered("m = MatMul(x, w) y = Identity(m)")
    feed = feed_of(c.graph)
    assert difference([truth(feed["x"], c, bias=None)], run_model(c.graph, feed, optimize=True)) <= 1e-5
    assert len(c.graph.find("Gemm")[0].inputs) == 2


def test_the_form_of_a_linear() -> None:
    c = lowered()
    assert sorted(ops(c.graph)) == ["DequantizeLinear"] * 3 + ["Gemm", "QuantizeLinear", "Reshape", "Reshape"]
    (gemm,) = c.graph.find("Gemm")
    activation, weight, bias = (producer(t) for t in gemm.inputs)
    assert (activation.inputs[0].dtype, value(activation.inputs[2]).dtype) == (np.uint8, np.uint8)
    assert (value(weight.inputs[0]).dtype, weight.attrs["axis"], value(weight.inputs[0]).shape) == (np.int8, 1, (8, 6))
    assert (value(bias.inputs[0]).dtype, bias.attrs["axis"], value(bias.inputs[0]).shape) == (np.int32, 0, (6,))
    np.testing.assert_array_equal(value(bias.inputs[2]), 0)
    assert [n.op for n in readers(gemm.outputs[0])] == ["Reshape"], "no QuantizeLinear follows: the kernel writes float"


def test_the_bias_is_rounded_by_at_most_half_a_step() -> None:
    c = lowered()
    bias = producer(c.graph.find("Gemm")[0].inputs[2])
    codes, scale = value(bias.inputs[0]).astype(np.float64), value(bias.inputs[1]).astype(np.float64)
    name = c.annotations.linears[0].name
    np.testing.assert_allclose(scale, c.params[Edge(name, 0)].scale * c.params[Edge(name, 1)].scale, rtol=1e-6)
    assert (np.abs(BIAS - codes * scale) <= scale / 2).all()


def test_a_bias_beyond_int32_is_added_in_float() -> None:
    """A nearly dead weight has a scale in which its bias has no code; cut off, it would leave hardly anything of the output."""
    bias = np.array([1e5, -1e5, 0, 1, -1, 1e-6], np.float32)
    c = lowered(w=W * 1e-6, c=bias, low=-1e-3, high=1e-3)
    assert len(c.graph.find("Gemm")[0].inputs) == 2
    feed = feed_of(c.graph)
    y = run_model(c.graph, {name: array * np.float32(1e-3) for name, array in feed.items()}, optimize=True)[0]
    np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape), atol=1e-6, rtol=1e-6)


def test_one_number_for_all_weights() -> None:
    """Per-tensor weights: scales and the bias scale are numbers."""
    graph = graph_of("g (float[B, 5, 8] x) => (float y) { m = MatMul(x, w) y = Add(m, c) }", w=W, c=BIAS)
    c = compilation(graph)
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    name = c.annotations.linears[0].name
    c.params = {
        Edge(name, 0): from_range(np.float32(-3), np.float32(3), QuantSpec()),
        Edge(name, 1): from_range(W.min(), W.max(), replace(WEIGHT, granularity="per_tensor")),
    }
    changes_of(c, "insert-qdq")
    changes_of(c, "legalize")
    feed = feed_of(c.graph)
    assert difference([truth(feed["x"], c)], run_model(c.graph, feed, optimize=True)) <= 1e-5
    assert "QGemm" in [node.op_type for node in runtime.optimized(c.graph.to_proto()).graph.node]


def test_readers_of_one_tensor_share_one_quantizer() -> None:
    c = lowered("q = MatMul(x, w) k = MatMul(x, w2) v = MatMul(x, w3) a = Mul(q, k) y = Mul(a, v)", w2=W + 1, w3=W - 1)
    assert ops(c.graph).count("QuantizeLinear") == 1
    assert ops(c.graph).count("Reshape") == 2, "one to flatten, one to restore the product of the three"
    assert ops(c.graph).count("Gemm") == 3


def test_a_dynamic_token_count_is_taken_from_the_input() -> None:
    c = lowered("a = MatMul(x, w) b = MatMul(x, w2) y = Add(a, b)", shape="B, T, 8", w2=W)
    assert (ops(c.graph).count("Gemm"), ops(c.graph).count("Shape")) == (2, 1)
    kernels = [node.op_type for node in runtime.optimized(c.graph.to_proto()).graph.node]
    assert kernels.count("QGemm") == 2


def test_a_dynamic_token_count_keeps_the_numbers() -> None:
    c = lowered(shape="B, T, 8")
    assert not c.warnings
    x = np.random.default_rng(5).normal(size=(2, 7, 8)).astype(np.float32)
    name = c.annotations.linears[0].name
    expected = fake_quantize(x, c.params[Edge(name, 0)]) @ fake_quantize(W, c.params[Edge(name, 1)]) + BIAS
    assert difference([expected], run_model(c.graph, {"x": x}, optimize=True)) <= 1e-4, "but for the rounding of the bias"


def test_layers_without_params_are_left_alone() -> None:
    c = compilation(graph_of("g (float[B, 5, 8] x) => (float[B, 5, 6] y) { y = MatMul(x, w) }", w=W))
    c.annotations = understand(c.graph)
    assert changes_of(c, "legalize") == 0
    assert ops(c.graph) == ["MatMul"]


# Rules


QDQ = "q = QuantizeLinear(x, s, {zero}) a = DequantizeLinear(q, s, {zero}) "
GEMM = "b = DequantizeLinear <axis = 1> (wq, ws, wz) y = Gemm({activation}, b{bias})"


def violating(text: str) -> Graph:
    held = {
        "s": np.float32(0.1).reshape(()),
        "u": np.uint8(128).reshape(()),
        "i": np.int8(0).reshape(()),
        "wq": np.ones((8, 6), np.int8),
        "ws": np.ones(6, np.float32),
        "wz": np.zeros(6, np.int8),
        "loud": np.full((8, 6), 100, np.int8),
        "least": np.where(np.arange(16)[:, None] % 8 == 3, -128, 1).astype(np.int8) * np.ones((1, 6), np.int8),
        "wu": np.ones((8, 6), np.uint8),
        "wuz": np.zeros(6, np.uint8),
        "cq": np.ones(6, np.int32),
        "cz": np.zeros(6, np.int32),
        "c": BIAS,
    }
    return graph_of(f"g (float[B, K] x) => (float[B, N] y) {{ {text} }}", **held)


INTEGER = QDQ.format(zero="u") + "b = DequantizeLinear <axis = 1> ({weight}, ws, {zero}) y = Gemm(a, b)"
GOOD = QDQ.format(zero="u") + "d = DequantizeLinear <axis = 0> (cq, ws, cz) " + GEMM.format(activation="a", bias=", d")
VIOLATIONS: dict[str, tuple[str, str, str]] = {
    "Q without zero point": ("q = QuantizeLinear(x, s) y = DequantizeLinear(q, s, u)", "R01", "QuantizeLinear"),
    "DQ without zero point": ("q = QuantizeLinear(x, s, u) y = DequantizeLinear(q, s)", "R01", "DequantizeLinear"),
    "int8 activation": ("q = QuantizeLinear(x, s, i) y = DequantizeLinear(q, s, i)", "R02", "QuantizeLinear"),
    "float bias": (QDQ.format(zero="u") + GEMM.format(activation="a", bias=", c"), "R03", "Gemm"),
    "float activation": (GEMM.format(activation="x", bias=""), "R04", "Gemm"),
    "loud weights": (INTEGER.format(weight="loud", zero="wz"), "R05", "Gemm"),
    "loud weights of an integer operator": (
        "q = QuantizeLinear(x, s, u) p = MatMulInteger(q, loud, u) y = Cast <to = 1> (p)",
        "R05",
        "MatMulInteger",
    ),
    "computed codes of both types": (
        "q = QuantizeLinear(x, s, u) t = Transpose(q) k = Cast <to = 3> (t) p = MatMulInteger(q, k, u) y = Cast <to = 1> (p)",
        "R05",
        "MatMulInteger",
    ),
    "unsigned weights": (INTEGER.format(weight="wu", zero="wuz"), "R06", "Gemm"),
    "least codes": (INTEGER.format(weight="least", zero="wz"), "R07", "Gemm"),
}
SEVERITIES = {"R05": SILENT, "R07": SILENT}


def findings(text: str, cpu: str = "any") -> list[Finding]:
    """What is found in a text, whatever its severity."""
    return check(Model(violating(text).to_proto()), Onnxruntime.rules, Platform(cpu=cpu))


def test_a_graph_that_keeps_all_rules() -> None:
    for graph in (
        violating(GOOD),
        violating(QDQ.format(zero="u") + GEMM.format(activation="a", bias="")),
        graph_of("g (float[B, 8] x) => (float[B, 6] y) { y = Gemm(x, w, c) }", w=W, c=BIAS),
    ):
        assert Onnxruntime().check(graph) == []


@pytest.mark.parametrize(("text", "rule", "op"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_every_rule_is_found_broken(text: str, rule: str, op: str) -> None:
    assert [(found.rule.id, found.op, found.severity) for found in findings(text)] == [(rule, op, SEVERITIES.get(rule, WARNING))]


@pytest.mark.parametrize("name", ["loud weights", "least codes"])
def test_cpus_that_are_exact_take_all_codes(name: str) -> None:
    assert findings(VIOLATIONS[name][0], "vnni") == []


def test_depthwise_convolutions_and_weights_of_unlike_sign_are_exact() -> None:
    model = graph_of(
        "g (uint8[B, 4, 5, 5] x) => (float y, int32 z) { y = QLinearConv <group = 4> (x, s, u, w, s, i, s, u) z = MatMulInteger(x, m, u) }",
        s=np.float32(0.1),
        u=np.uint8(3),
        i=np.int8(0),
        w=np.full((4, 1, 2, 2), 127, np.int8),
        m=np.tile(np.int8([[127], [-127]]), (3, 2))[:5],
    )
    assert check(Model(model.to_proto()), Onnxruntime.rules, Platform()) == []


@pytest.mark.parametrize(("dtype", "first"), [("probabilities", False), ("anything", True)])
def test_probabilities_sum_to_one(dtype: str, first: bool) -> None:
    """Two codes of a softmax sum to 256 at most, so that no int8 values saturate."""
    source = "p = Softmax(x)" if dtype == "probabilities" else "p = Relu(x)"
    text = f"g (float[B, 8, 8] x, int8[B, 8, 4] v) => (int32 y) {{ {source} q = QuantizeLinear(p, s, z) y = MatMulInteger(q, v, z) }}"
    model = graph_of(text, s=np.float32(1 / 255), z=np.uint8(0))
    assert bool(check(Model(model.to_proto()), Onnxruntime.rules, Platform())) == first


def test_an_unknown_kind_of_cpu_is_refused() -> None:
    with pytest.raises(RecipeError, match="known are any, vnni"):
        Onnxruntime(cpu="sse")


@pytest.mark.parametrize(
    ("weight", "activation", "limit"),
    [
        (QuantSpec(8, signed=True, symmetric=True), QuantSpec(8), 128),
        (QuantSpec(8, signed=True), QuantSpec(8), 128),
        (QuantSpec(8, signed=True, symmetric=True), QuantSpec(8, symmetric=True), 128),
        (QuantSpec(8, signed=True, symmetric=True), QuantSpec(7), 0),
        (QuantSpec(7, signed=True, symmetric=True), QuantSpec(8), 0),
        (QuantSpec(7, signed=True), QuantSpec(8), 0),
        (QuantSpec(8), QuantSpec(8), 0),
        (QuantSpec(8, format="e4m3"), QuantSpec(8), 0),
    ],
)
def test_which_weights_get_a_limit(weight: QuantSpec, activation: QuantSpec, limit: int) -> None:
    fitted = Onnxruntime().fit_weight(weight, activation)
    assert fitted.pair_limit == limit
    assert fitted.symmetric or not limit
    assert Onnxruntime(cpu="vnni").fit_weight(weight, activation) == weight


def test_every_rule_has_a_violation() -> None:
    assert {rule for _, rule, _ in VIOLATIONS.values()} == {rule.id for rule in Onnxruntime.rules}


# Whole models


def compiled(dialect: Dialect, sizes: Sizes | None = None) -> Compilation:
    c = compilation(vit(sizes or Sizes(depth=1, width=16, hidden=32), dialect))
    run_passes(c, str(pipeline_for(c.recipe, c.target)))
    return c


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_every_block_linear_runs_as_an_integer_kernel(dialect: Dialect) -> None:
    c = compiled(dialect)
    found = kernels(runtime.optimized(c.graph.to_proto()))
    for linear in c.annotations.linears:
        if linear.role == "head":
            continue
        assert found[c.codes[Edge(linear.name, 1)]] == "QGemm", f"{linear.role} {linear.name}"
    assert c.warnings == []


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_the_compiled_model_is_close_to_float(dialect: Dialect) -> None:
    sizes = Sizes(depth=2, width=16, hidden=32)
    model, c = vit(sizes, dialect), compiled(dialect, sizes)
    feed = next(iter(c.data.calibration()))
    error = difference(run_model(model, feed), run_model(c.graph, feed, optimize=True))
    assert 0 < error < 0.1
    assert difference(run_model(c.graph, feed), run_model(c.graph, feed, optimize=True)) < 0.02, "fused kernels round as the graph says"


def test_params_are_plain_numbers() -> None:
    c = compiled(Dialect())
    assert all(isinstance(params, QuantParams) and params.axis is None for edge, params in c.params.items() if edge.index == 0)
