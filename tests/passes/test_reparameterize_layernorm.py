"""reparameterize-layernorm: float parity, equal codes (the oracle of RepQ-ViT), and readers that forbid it."""

from typing import Any

import numpy as np
import pytest

from tests.builders import Dialect, Feed, Sizes, changes_of, compilation, difference, feed_of, graph_of, run_model, run_passes, vit
from vitq_compiler.annotations import understand
from vitq_compiler.calibration import CalibrationTable, ChannelStatistics
from vitq_compiler.graph import value
from vitq_compiler.passes.reparameterize_layernorm import CODES, MIDDLE, ReparameterizeLayernorm
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge, QuantParams, QuantSpec, quantize

WIDTH, OUT = 6, 4
RANDOM = np.random.default_rng(3)
W, BIAS = RANDOM.normal(size=(WIDTH, OUT)).astype(np.float32), RANDOM.normal(size=OUT).astype(np.float32)
GAMMA = np.array([0.1, 1, -3, 20, 0.5, 2], np.float32)  # channels of very different size, as behind real LayerNorms
BETA = np.array([0, 1, -2, 5, 30, -0.5], np.float32)
ONE = "a = LayerNormalization(x, gamma, beta) m = MatMul(a, w) y = Add(m, c)"
TWO = "a = LayerNormalization(x, gamma, beta) m = MatMul(a, w) n = MatMul(a, w2) o = Relu(n) p = Add(m, c) y = Add(p, o)"


def observed(text: str = ONE, **weights: np.ndarray) -> Compilation:
    """A compilation whose Linears all have specs and whose LayerNorm outputs have been calibrated."""
    held = {"gamma": GAMMA, "beta": BETA, "w": W, "w2": W[:, ::-1].copy(), "c": BIAS} | weights
    c = compilation(graph_of(f"g (float[B, 5, {WIDTH}] x) => (float y) {{ {text} }}", **held))
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    for linear in c.annotations.linears:
        c.specs[Edge(linear.name, 0)] = QuantSpec()
        c.specs[Edge(linear.name, 1)] = QuantSpec(signed=True, symmetric=True)
    values = activation(c, feed_of(c.graph, batch=16))
    c.table = CalibrationTable({"a": ChannelStatistics(values.min((0, 1)), values.max((0, 1)), values.mean((0, 1)))}, 16)
    return c


def activation(c: Compilation, feed: Feed) -> np.ndarray:
    """Values of ``a``."""
    copy = c.graph.snapshot()
    copy.set_outputs([copy.tensor("a")])
    return np.asarray(run_model(copy, feed)[0])


def rewritten(c: Compilation, strength: float = 0.5) -> int:
    """The changes; outputs are kept to 1e-5."""
    feed = feed_of(c.graph, seed=7)
    before = run_model(c.graph, feed)
    changes = ReparameterizeLayernorm(strength=strength).run(c)
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    return changes


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    "text",
    [
        ONE,
        TWO,
        "a = LayerNormalization(x, gamma) m = MatMul(a, w) y = Add(m, c)",
        "a = LayerNormalization(x, gamma, beta) m = MatMul(a, w) y = Relu(m)",
        "a = LayerNormalization(x, gamma) y = MatMul(a, w)",
        "a = LayerNormalization <axis = 2> (x, gamma, beta) m = MatMul(a, w) y = Add(m, c)",
    ],
    ids=["plain", "two readers", "no beta", "no bias", "neither", "axis counted from the front"],
)
def test_the_outputs_stay(text: str, strength: float) -> None:
    c = observed(text)
    assert rewritten(c, strength) == 1
    assert all(linear.bias is not None for linear in c.annotations.linears)
    assert len(c.graph.find("LayerNormalization")[0].inputs) == 3
    assert c.notes == []


def test_the_table_follows() -> None:
    c = observed()
    feed = feed_of(c.graph, batch=16)
    rewritten(c)
    values, table = activation(c, feed), c.table.statistics["a"]
    reach = np.abs(values).max()
    np.testing.assert_allclose(table.low, values.min((0, 1)), atol=1e-5 * reach)
    np.testing.assert_allclose(table.high, values.max((0, 1)), atol=1e-5 * reach)
    np.testing.assert_allclose(table.mean, values.mean((0, 1)), atol=1e-5 * reach)


def test_full_strength_makes_channel_ranges_equal() -> None:
    c = observed()
    widths = c.table.statistics["a"].high - c.table.statistics["a"].low
    assert widths.max() / widths.min() > 100
    rewritten(c, 1.0)
    widths = c.table.statistics["a"].high - c.table.statistics["a"].low
    assert widths.max() / widths.min() < 1.001


def test_codes_per_tensor_are_the_codes_per_channel() -> None:
    """Quantizing a' with one (S, Z) gives the integers of quantizing a with the channels' own (s, z); Z is an integer."""
    c = observed()
    feed = feed_of(c.graph, batch=16)
    before, seen = activation(c, feed), c.table.statistics["a"]
    step = np.maximum((seen.high - seen.low).astype(np.float64), 1e-3 * np.median(seen.high - seen.low)) / CODES
    own = np.rint(-seen.low / step)
    shift, scale = ReparameterizeLayernorm(strength=1.0).factors(seen)
    np.testing.assert_allclose(shift / step, np.rint(shift / step), atol=1e-3, err_msg="r2 is a vector of integers")
    rewritten(c, 1.0)
    after = activation(c, feed)
    per_tensor = QuantParams(np.float32(step.mean()).reshape(()), np.int32(MIDDLE).reshape(()), None, 0, 255)
    per_channel = np.rint(before / step) + own
    codes = quantize(after, per_tensor).astype(int)
    inside = (per_channel >= 0) & (per_channel <= 255)
    assert inside.mean() > 0.99
    different = codes[inside] != per_channel[inside]
    assert different.mean() < 2e-3, "but for values that lie on the border of two codes in float32"
    assert np.abs(codes[inside] - per_channel[inside]).max() <= 1
    np.testing.assert_allclose(scale * step.mean(), step, rtol=1e-5)


def test_without_strength_only_the_centres_move() -> None:
    _, scale = ReparameterizeLayernorm(strength=0.0).factors(observed().table.statistics["a"])
    np.testing.assert_array_equal(scale, 1)


@pytest.mark.parametrize("dead", [[2], [0, 3], [0, 1, 2, 3, 4, 5]])
def test_channels_that_never_change(dead: list[int]) -> None:
    gamma = GAMMA.copy()
    gamma[dead] = 0
    c = observed(gamma=gamma)
    assert rewritten(c, 1.0) == 1
    shift, scale = ReparameterizeLayernorm(strength=1.0).factors(observed(gamma=gamma).table.statistics["a"])
    assert np.isfinite(shift).all()
    assert (scale > 0).all()
    for linear in c.annotations.linears:
        assert np.isfinite(value(linear.weight)).all()
    low, high = c.table.statistics["a"].low, c.table.statistics["a"].high
    assert np.isfinite([low, high]).all()


REFUSED = {
    "residual": (ONE.replace("y = Add(m, c)", "o = Add(m, c) q = MatMul(a, square) y = Add(q, a)"), "its output is also read by Add"),
    "residual of the output": (
        "a = LayerNormalization(x, gamma, beta) m = MatMul(a, square) y = Add(m, a)",
        "its output is also read by Add",
    ),
    "gate": ("a = LayerNormalization(x, gamma, beta) m = MatMul(a, square) y = Mul(m, a)", "its output is also read by Mul"),
    "shape": (
        "a = LayerNormalization(x, gamma, beta) s = Shape(a) m = MatMul(a, square) y = Reshape(m, s)",
        "its output is also read by Shape",
    ),
    "product of activations": (
        "a = LayerNormalization(x, gamma, beta) t = Transpose <perm = [0, 2, 1]> (a) m = MatMul(a, square) y = MatMul(m, t)",
        "its output is also read by Transpose",
    ),
    "no reader": ("a = LayerNormalization(x, gamma, beta) y = Relu(a)", "its output is also read by Relu"),
    "all axes": (
        "a = LayerNormalization <axis = 1> (x, full, full2) m = MatMul(a, w) y = Add(m, c)",
        "it normalizes more than the last axis",
    ),
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_other_readers_forbid_it(text: str, reason: str) -> None:
    extra: dict[str, Any] = {
        "square": np.eye(WIDTH, dtype=np.float32),
        "full": np.ones((5, WIDTH), np.float32),
        "full2": np.ones((5, WIDTH), np.float32),
    }
    c = observed(text, **extra)
    before = c.graph.text()
    assert rewritten(c) == 0
    assert c.graph.text() == before
    (note,) = c.notes
    assert note.where == c.graph.find("LayerNormalization")[0].name
    assert note.reason.startswith(f"LayerNormalization keeps its ranges: {reason}")


def test_a_graph_output_forbids_it() -> None:
    c = observed()
    c.graph.set_outputs([c.graph.tensor("y"), c.graph.tensor("a")])
    assert rewritten(c) == 0
    assert c.notes[0].reason == "LayerNormalization keeps its ranges: a is a graph output"


@pytest.mark.parametrize("index", [0, 1])
def test_a_reader_in_float_is_rewritten_too(index: int) -> None:
    c = observed(TWO)
    linear = c.annotations.linears[index]
    before = value(linear.weight)
    del c.specs[Edge(linear.name, 0)]
    assert rewritten(c) == 1
    assert not np.array_equal(value(linear.weight), before)


def test_readers_in_float_alone_need_no_other_ranges() -> None:
    c = observed(TWO)
    for linear in c.annotations.linears:
        c.specs.pop(Edge(linear.name, 0), None)
    before = c.graph.text()
    assert rewritten(c) == 0
    assert c.notes[0].reason == "LayerNormalization keeps its ranges: no Linear that is to be quantized reads it"
    assert c.graph.text() == before


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf")])
def test_strengths_outside_zero_to_one(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must lie in 0 to 1"):
        ReparameterizeLayernorm(strength=strength)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qkv", ["gather", "separate"])
def test_in_a_vision_transformer(qkv: str, bias: bool) -> None:
    c = compilation(vit(Sizes(depth=2, bias=bias), Dialect(qkv=qkv)))
    run_passes(c, "canonicalize,recover-gelu,separate-linears,annotate,calibrate")
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    assert changes_of(c, "reparameterize-layernorm") == 4, "not the last one, whose class token alone is read"
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    assert [note.stage for note in c.notes] == ["annotate", "reparameterize-layernorm"], "the head and the LayerNorm before it"


WINDOWS = "a = LayerNormalization(x4, gamma, beta) {} r = Reshape(t, rows) m = MatMul(r, w) y = Add(m, c)"
MOVES = {
    "window partition": "p = Reshape(a, cut) t = Transpose <perm = [0, 1, 3, 2, 4, 5]> (p)",
    "roll": "f = Slice(a, zero, two, one) b = Slice(a, two, four, one) t = Concat <axis = 1> (b, f)",
    "rows in another order": "t = Gather <axis = 1> (a, order)",
}
ARGUMENTS = {
    "cut": np.array([-1, 2, 2, 2, 2, WIDTH]),
    "rows": np.array([-1, 4, WIDTH]),
    "order": np.array([3, 1, 0, 2]),
    **{name: np.array([number]) for name, number in (("zero", 0), ("one", 1), ("two", 2), ("four", 4))},
    "pads": np.array([0, 0, 0, 0, 0, 1, 0, 0]),
    "token": np.ones((2, 4, 4, WIDTH), np.float32),
}


def windowed(moves: str) -> Compilation:
    text = WINDOWS.format(moves)
    held = {"gamma": GAMMA, "beta": BETA, "w": W, "c": BIAS} | {name: array for name, array in ARGUMENTS.items() if name in text}
    c = compilation(graph_of(f"g (float[B, 4, 4, {WIDTH}] x4) => (float y) {{ {text} }}", **held))
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    (linear,) = c.annotations.linears
    c.specs[Edge(linear.name, 0)] = QuantSpec()
    values = activation(c, feed_of(c.graph)).reshape(-1, WIDTH)
    c.table = CalibrationTable({"r": ChannelStatistics(values.min(0), values.max(0), values.mean(0))}, 2)
    return c


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_tokens_may_be_moved_on_the_way(moves: str) -> None:
    c = windowed(moves)
    before = c.table.statistics["r"]
    assert rewritten(c) == 1
    after = c.table.statistics["r"]
    spread = [np.ptp(seen.high - seen.low) / np.mean(seen.high - seen.low) for seen in (before, after)]
    assert spread[1] < spread[0], "the statistics follow"


@pytest.mark.parametrize(
    ("moves", "reason"),
    [
        ("t = Pad(a, pads)", "its output is also read by Pad"),
        ("t = Transpose <perm = [0, 1, 3, 2]> (a)", "its output is also read by Transpose"),
        ("t = Concat <axis = 1> (a, token)", "its output is joined with others by Concat"),
        ("h, i = Split <axis = 3, num_outputs = 2> (a) t = Concat <axis = 3> (h, i)", "its output is also read by"),
    ],
)
def test_channels_must_stay_whole_and_alone(moves: str, reason: str) -> None:
    c = windowed(moves)
    assert rewritten(c) == 0
    (note,) = c.notes
    assert reason in note.reason
