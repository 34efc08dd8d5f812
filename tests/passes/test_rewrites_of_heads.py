"""The exact rewrites of attention operands: outputs kept, ranges as promised, refusals with their reason."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from tests.builders import QKV, SCALES, Dialect, Sizes, changes_of, compilation, difference, feed_of, find_pass, run_model, run_passes, vit
from vitq_compiler.calibration import glance
from vitq_compiler.graph import Array, value
from vitq_compiler.pipeline import Compilation, _build

FRONT = "canonicalize,recover-gelu,separate-linears,annotate"
SIZES = Sizes(depth=2, width=12, heads=3)
PASSES = (
    "fold-attention-scale",
    "rotate-heads",
    "rotate-heads{values=false}",
    "center-keys",
    "center-values",
    "equalize-heads",
    "equalize-heads{per-head}",
)


def prepared(
    dialect: Dialect, sizes: Sizes = SIZES, *, fuse: bool = False, edit: Callable[[onnx.GraphProto], None] | None = None
) -> Compilation:
    model = vit(sizes, dialect)
    if edit is not None:
        edit(model.graph)
        model = onnx.shape_inference.infer_shapes(model)
    c = compilation(model)
    run_passes(c, FRONT + (",fuse-attention" if fuse else ""))
    return c


def rewritten(c: Compilation, text: str) -> int:
    """The changes; outputs are kept to 1e-5."""
    feed = feed_of(c.graph, seed=9)
    before = run_model(c.graph, feed)
    name, _, options = text.partition("{")
    changes = _build(find_pass(name), options.rstrip("}")).run(c)
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    return changes


def ranges(c: Compilation, letter: str) -> list[tuple[Array, Array]]:
    """Smallest and largest value of each feature of an operand, attention by attention."""
    views = [getattr(attention, letter) for attention in c.annotations.attentions]
    seen = glance(c.graph, {view.linear.output.name for view in views}, c.data.calibration(), threads=1)
    return [(seen[v.linear.output.name].low[v.columns], seen[v.linear.output.name].high[v.columns]) for v in views]


@pytest.mark.parametrize("text", PASSES)
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qkv", QKV)
def test_outputs_stay(qkv: str, bias: bool, fuse: bool, text: str) -> None:
    c = prepared(Dialect(qkv=qkv), Sizes(depth=1, width=12, heads=3, bias=bias), fuse=fuse)
    assert rewritten(c, text) == (2 if text == "rotate-heads" else 1)
    assert [note.stage for note in c.notes] == ["annotate"], "nothing refused"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("fuse", [False, True])
def test_the_scale_is_gone(scale: str, fuse: bool) -> None:
    c = prepared(Dialect(qkv="split", scale=scale), fuse=fuse)
    before = len(c.graph.find("Mul", "Div"))
    assert rewritten(c, "fold-attention-scale") == 2
    assert {attention.scale for attention in c.annotations.attentions} == {1.0}
    if fuse:
        assert {node.attrs["scale"] for node in c.graph.find("Attention")} == {1.0}
    else:
        assert before - len(c.graph.find("Mul", "Div")) == (4 if scale == "both" else 2)
        assert changes_of(c, "annotate")
        assert {attention.scale for attention in c.annotations.attentions} == {1.0}
    assert rewritten(c, "fold-attention-scale") == 0


@pytest.mark.parametrize(("text", "letter"), [("center-keys", "k"), ("center-values", "v")])
def test_channels_are_centred(text: str, letter: str) -> None:
    c = prepared(Dialect(qkv="split"))
    assert max(np.abs(low + high).max() for low, high in ranges(c, letter)) > 0.5
    rewritten(c, text)
    for low, high in ranges(c, letter):
        np.testing.assert_allclose(low, -high, atol=1e-4)


def test_centred_values_centre_the_input_of_the_projection() -> None:
    c = prepared(Dialect(qkv="split"))
    name = c.annotations.attentions[0].proj.input.name
    before = glance(c.graph, [name], c.data.calibration(), threads=1)[name]
    rewritten(c, "center-values")
    after = glance(c.graph, [name], c.data.calibration(), threads=1)[name]
    assert np.abs(after.low + after.high).mean() < np.abs(before.low + before.high).mean()


def test_partners_get_the_same_range() -> None:
    c = prepared(Dialect(qkv="split"))
    rewritten(c, "equalize-heads")
    for (q_low, q_high), (k_low, k_high) in zip(ranges(c, "q"), ranges(c, "k"), strict=True):
        np.testing.assert_allclose(np.maximum(-q_low, q_high), np.maximum(-k_low, k_high), rtol=1e-4)


def test_one_factor_for_a_head() -> None:
    c = prepared(Dialect(qkv="separate"))
    before = value(c.annotations.attentions[0].q.linear.weight)
    rewritten(c, "equalize-heads{per-head}")
    factors = (value(c.annotations.attentions[0].q.linear.weight) / before)[0].reshape(3, 4)
    np.testing.assert_allclose(factors, factors[:, :1] * np.ones(4), rtol=1e-5)
    assert np.ptp(factors[:, 0]) > 1e-3


def test_a_rotation_spreads_an_outlier() -> None:
    c = prepared(Dialect(qkv="separate"), Sizes(depth=1, width=16, heads=2))
    view = c.annotations.attentions[0].v
    view.linear.weight.values = value(view.linear.weight) * np.where(np.arange(16) == 3, 50, 1).astype(np.float32)
    ((low, high),) = ranges(c, "v")
    spread = np.maximum(-low, high)[:8]
    assert spread.max() / np.median(spread) > 10
    rewritten(c, "rotate-heads")
    ((low, high),) = ranges(c, "v")
    spread = np.maximum(-low, high)[:8]
    assert spread.max() / np.median(spread) < 3


def output_of(kind: str, index: int, shape: list[int]) -> Callable[[onnx.GraphProto], None]:
    """Make the output of the ``index``-th node of a kind a graph output as well."""

    def edit(graph: onnx.GraphProto) -> None:
        node = [node for node in graph.node if node.op_type == kind][index]
        graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], 1, shape))

    return edit


@pytest.mark.parametrize("text", PASSES)
def test_features_that_are_an_output_too(text: str) -> None:
    c = prepared(Dialect(qkv="split", dynamic=False), Sizes(depth=1, width=12, heads=3), edit=output_of("Add", 1, [2, 5, 36]))
    before = c.graph.text()
    assert rewritten(c, text) == 0
    assert "is read by more than this attention" in c.notes[-1].reason
    assert c.graph.text() == before


def test_keys_that_are_the_values() -> None:
    """One Linear whose features serve as k and v at once."""

    def share(graph: onnx.GraphProto) -> None:
        gathers = [node for node in graph.node if node.op_type == "Gather" and node.input[0].startswith("t")][-4:-1]
        gathers[2].input[1] = gathers[1].input[1]

    c = prepared(Dialect(dynamic=False), Sizes(depth=1, width=12, heads=3), edit=share)
    attention = c.annotations.attentions[0]
    np.testing.assert_array_equal(attention.k.columns, attention.v.columns)
    for text, reason in {
        "center-keys": "keys are not centred: v is made of the same features as k",
        "center-values": "values are not centred: k is made of the same features as v",
        "rotate-heads{keys=false}": "v are not rotated: k is made of the same features as v",
        "equalize-heads": "queries and keys keep their ranges: v is made of the same features as k",
    }.items():
        assert rewritten(c, text) == 0
        assert c.notes[-1].reason == reason


def test_scaled_scores_that_are_an_output_too() -> None:
    c = prepared(Dialect(dynamic=False), Sizes(depth=1, width=12, heads=3), edit=output_of("Mul", 0, [2, 3, 5, 5]))
    assert rewritten(c, "fold-attention-scale") == 0
    assert "scales more than this attention" in c.notes[-1].reason


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_strengths_outside_zero_to_one(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must lie in 0 to 1"):
        find_pass("equalize-heads")(strength=strength)  # type: ignore[call-arg]
