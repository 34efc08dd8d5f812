"""reparameterize-layernorm: float parity, equal codes (the oracle of RepQ-ViT), and readers that forbid it."""

import re
from typing import Any

import numpy as np
import pytest

from tests.builders import Dialect, Feed, Sizes, changes_of, compilation, difference, feed_of, graph_of, run_model, run_passes, vit
from tests.swin import SwinSizes, swin
from vitq_compiler.annotations import understand
from vitq_compiler.calibration import CalibrationTable, ChannelStatistics
from vitq_compiler.graph import value
from vitq_compiler.passes.reparameterize_layernorm import ReparameterizeLayernorm
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


def rewritten(c: Compilation, strength: float = 0.5, **options: Any) -> int:
    """The changes; outputs are kept to 1e-5."""
    feed = feed_of(c.graph, seed=7)
    before = run_model(c.graph, feed)
    changes = ReparameterizeLayernorm(strength=strength, **options).run(c)
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


SPECS = {"asymmetric": QuantSpec(), "symmetric": QuantSpec(signed=True, symmetric=True)}
GRIDS = {"asymmetric": (255, 128, 0), "symmetric": (254, 127, -127)}  # steps, middle, the first code of the tensor


@pytest.mark.parametrize("common", ["mean", "median"])
@pytest.mark.parametrize("kind", SPECS)
def test_codes_per_tensor_are_the_codes_per_channel(kind: str, common: str) -> None:
    """Quantizing a' with one (S, Z) gives the integers of quantizing a with the channels' own (s, z); Z is an integer.

    Of a symmetric quantizer too, whose Z is zero: its codes are those of the channels, shifted.
    """
    c = observed()
    c.specs.update({edge: SPECS[kind] for edge in c.specs if edge.index == 0})
    steps, middle, first = GRIDS[kind]
    feed = feed_of(c.graph, batch=16)
    before, seen = activation(c, feed), c.table.statistics["a"]
    step = np.maximum((seen.high - seen.low).astype(np.float64), 1e-3 * np.median(seen.high - seen.low)) / steps
    own = np.rint(-seen.low / step)
    fold_to_one = ReparameterizeLayernorm(strength=1.0, common=common)
    shift, scale = fold_to_one.factors(seen, SPECS[kind])
    np.testing.assert_allclose(shift / step, np.rint(shift / step), atol=1e-3, err_msg="r2 is a vector of integers")
    rewritten(c, 1.0, common=common)
    after = activation(c, feed)
    target = step.mean() if common == "mean" else np.median(step)
    per_tensor = QuantParams(np.float32(target).reshape(()), np.int32(middle + first).reshape(()), None, first, first + steps)
    per_channel = np.rint(before / step) + own
    codes = quantize(after, per_tensor).astype(int) - first
    inside = (per_channel >= 0) & (per_channel <= steps)
    assert inside.mean() > 0.99
    different = codes[inside] != per_channel[inside]
    assert different.mean() < 2e-3, "but for values that lie on the border of two codes in float32"
    assert np.abs(codes[inside] - per_channel[inside]).max() <= 1
    np.testing.assert_allclose(scale * target, step, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_symmetric_quantizer_loses_nothing(strength: float) -> None:
    """All channels end up around zero, so the range without a zero point is no wider than the one with it."""
    c = observed()
    c.specs.update({edge: SPECS["symmetric"] for edge in c.specs if edge.index == 0})
    seen = c.table.statistics["a"]
    assert (np.abs(seen.high + seen.low) / (seen.high - seen.low)).max() > 5
    rewritten(c, strength)
    seen = c.table.statistics["a"]
    assert (np.abs(seen.high + seen.low) / (seen.high - seen.low)).max() < 1 / 250
    assert np.abs([seen.low, seen.high]).max() * 2 < 1.004 * (seen.high.max() - seen.low.min())


def test_without_strength_only_the_centres_move() -> None:
    _, scale = ReparameterizeLayernorm(strength=0.0).factors(observed().table.statistics["a"], QuantSpec())
    np.testing.assert_array_equal(scale, 1)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_without_centring_only_the_scales_move(strength: float) -> None:
    c = observed("a = LayerNormalization(x, gamma, beta) y = MatMul(a, w)")
    seen = c.table.statistics["a"]
    shift, scale = ReparameterizeLayernorm(strength=strength, center=False).factors(seen, QuantSpec())
    assert not shift.any()
    reach = np.maximum(np.abs(seen.low), np.abs(seen.high))
    np.testing.assert_allclose(scale, (reach / reach.mean()) ** strength, rtol=1e-5)
    rewritten(c, strength, center=False)
    assert c.annotations.linears[0].bias is None, "nothing to take out of it"


def test_the_common_scale_keeps_its_channel() -> None:
    """The median channel of an odd number keeps its size however large the others are; the mean follows the largest."""
    width = np.array([1, 2, 3, 4, 1000], np.float32)
    seen = ChannelStatistics(-width, width, np.zeros(5, np.float32))
    factor = {common: ReparameterizeLayernorm(strength=1.0, common=common).factors(seen, QuantSpec())[1] for common in ("mean", "median")}
    np.testing.assert_allclose(factor["median"], width / 3, rtol=1e-6)
    np.testing.assert_allclose(factor["mean"], width / 202, rtol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("limit", [1.0, 4.0, 1e6])
def test_a_limit_of_the_factors(limit: float, strength: float) -> None:
    seen = observed().table.statistics["a"]
    free, bounded = (ReparameterizeLayernorm(strength=strength, **o).factors(seen, QuantSpec())[1] for o in ({}, {"limit": limit}))
    assert bounded.max() / bounded.min() <= limit * (1 + 1e-5)
    if free.max() / free.min() <= limit:
        np.testing.assert_array_equal(bounded, free)
    assert (np.argsort(bounded) == np.argsort(free)).all() or limit == 1


@pytest.mark.parametrize("spread", [1.0, 5.0, 100.0, 1e4])
def test_even_channels_are_left_alone(spread: float) -> None:
    c = observed()
    widths = c.table.statistics["a"].high - c.table.statistics["a"].low
    ratio = widths.max() / np.median(widths)
    assert 5 < ratio < 100
    assert rewritten(c, spread=spread) == (ratio >= spread)
    if ratio < spread:
        assert c.notes[0].reason == f"LayerNormalization keeps its ranges: its widest channel is but {ratio:.2g} times the median one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"common": "largest"}, "common must be mean or median, got largest"),
        ({"limit": 0.5}, "limit and spread must be at least 1, got 0.5 and 1.0"),
        ({"limit": float("nan")}, "must be at least 1, got nan"),
        ({"spread": 0.9}, "must be at least 1, got inf and 0.9"),
    ],
)
def test_refuses_other_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReparameterizeLayernorm(**options)


@pytest.mark.parametrize("dead", [[2], [0, 3], [0, 1, 2, 3, 4, 5]])
def test_channels_that_never_change(dead: list[int]) -> None:
    gamma = GAMMA.copy()
    gamma[dead] = 0
    c = observed(gamma=gamma)
    assert rewritten(c, 1.0) == 1
    shift, scale = ReparameterizeLayernorm(strength=1.0).factors(observed(gamma=gamma).table.statistics["a"], QuantSpec())
    assert np.isfinite(shift).all()
    assert (scale > 0).all()
    for linear in c.annotations.linears:
        assert np.isfinite(value(linear.weight)).all()
    low, high = c.table.statistics["a"].low, c.table.statistics["a"].high
    assert np.isfinite([low, high]).all()


REFUSED = {
    "residual": (ONE.replace("y = Add(m, c)", "o = Add(m, c) q = MatMul(a, square) y = Add(q, a)"), "Add .* reads it"),
    "residual of the output": ("a = LayerNormalization(x, gamma, beta) m = MatMul(a, square) y = Add(m, a)", "Add .* reads it"),
    "gate": ("a = LayerNormalization(x, gamma, beta) m = MatMul(a, square) y = Mul(m, a)", "Mul .* reads it"),
    "product of activations": (
        "a = LayerNormalization(x, gamma, beta) t = Transpose <perm = [0, 2, 1]> (a) m = MatMul(a, square) y = MatMul(m, t)",
        "MatMul .* reads it",
    ),
    "no reader": ("a = LayerNormalization(x, gamma, beta) y = Relu(a)", "Relu .* reads it"),
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
    assert re.fullmatch(f"LayerNormalization keeps its ranges: {reason}", note.reason)


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
        ("t = Pad(a, pads)", "Pad .* reads it"),
        ("t = Transpose <perm = [0, 1, 3, 2]> (a)", "Reshape .* takes its channels apart"),
        ("t = Concat <axis = 1> (a, token)", "Concat .* adds to its output"),
        ("h, i = Split <axis = 3, num_outputs = 2> (a) t = Concat <axis = 3> (h, i)", "Split .* does not treat its channels alike"),
    ],
)
def test_channels_must_stay_whole_and_alone(moves: str, reason: str) -> None:
    c = windowed(moves)
    assert rewritten(c) == 0
    (note,) = c.notes
    assert re.search(reason, note.reason)


@pytest.mark.parametrize("merging", ["reshape", "slices"])
@pytest.mark.parametrize("options", [{}, {"common": "median", "strength": 1.0}, {"limit": 2.0}, {"center": False}], ids=str)
def test_patch_merging_gets_a_bias(options: dict[str, Any], merging: str) -> None:
    """The LayerNormalization of patch merging holds four tokens; the Linear behind it comes without a bias."""
    c = compilation(swin(SwinSizes(grid=4, merging=merging)))
    run_passes(c, "canonicalize,separate-linears,annotate,calibrate")
    (merge,) = [linear for linear in c.annotations.linears if linear.bias is None]
    assert merge.in_features == 32
    norms = len(c.graph.find("LayerNormalization"))
    assert rewritten(c, **options) == norms - 1, "all but that of the head, which stays in float"
    assert (merge.bias is not None) == options.get("center", True)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_root_mean_squares_have_no_shift(strength: float) -> None:
    c = observed("a = RMSNormalization(x, gamma) m = MatMul(a, w) y = Add(m, c)")
    spread = [np.ptp(np.log(seen.high - seen.low)) for seen in (c.table.statistics["a"],)]
    assert rewritten(c, strength) == 1
    seen = c.table.statistics["a"]
    assert np.ptp(np.log(seen.high - seen.low)) < spread[0]
    assert len(c.graph.find("RMSNormalization")[0].inputs) == 2


def test_a_reader_of_means_and_of_tokens() -> None:
    """The head of a DINOv2 classifier reads the class token beside the mean of the patches: both share the factors."""
    c = compilation(
        graph_of(
            f"""g (float[B, 5, {WIDTH}] x) => (float y) {{
                a = LayerNormalization(x, gamma, beta) c = Gather <axis = 1> (a, zero)
                p = Slice(a, one, end, one) m = ReduceMean <keepdims = 0> (p, one) h = Concat <axis = -1> (c, m) y = MatMul(h, w)
            }}""",
            gamma=GAMMA,
            beta=BETA,
            w=np.concatenate([W, W[::-1]]),
            zero=np.array(0),
            one=np.array([1]),
            end=np.array([5]),
        )
    )
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    c.specs[Edge(c.annotations.linears[0].name, 0)] = QuantSpec()
    values = np.random.default_rng(0).normal(size=(64, 2 * WIDTH)).astype(np.float32) * np.tile(GAMMA, 2) + np.tile(BETA, 2)
    c.table = CalibrationTable({"h": ChannelStatistics(values.min(0), values.max(0), values.mean(0))}, 64)
    assert rewritten(c, 1.0) == 1
    one, other = c.table.statistics["h"].split(2)
    widths = np.maximum(one.high, other.high) - np.minimum(one.low, other.low)
    assert widths.max() / widths.min() < 1.001
