"""Values of attention whose queries and keys are turned by positions, or divided by their lengths: rewritten all the same."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from tests.builders import QKV, Dialect, Sizes, compilation, difference, feed_of, find_pass, run_model, run_passes, vit
from vitq_compiler.blocks.attention import Values
from vitq_compiler.calibration import glance
from vitq_compiler.graph import Array, value
from vitq_compiler.pipeline import Compilation, _build

PASSES = ("rotate-heads{keys=false}", "center-values", "equalize-values{strength=1}")


def prepared(
    queries: str, qkv: str = "separate", *, dynamic: bool = True, edit: Callable[[onnx.GraphProto], None] | None = None
) -> Compilation:
    model = vit(Sizes(depth=2, width=16, heads=2, queries=queries), Dialect(qkv=qkv, dynamic=dynamic))
    if edit is not None:
        edit(model.graph)
        model = onnx.shape_inference.infer_shapes(model)
    c = compilation(model)
    run_passes(c, "canonicalize,recover-gelu,annotate,calibrate")
    assert not c.annotations.attentions
    return c


def halves(c: Compilation) -> list[Values]:
    return [attention.values for attention in c.annotations.computed_attentions if isinstance(attention.values, Values)]


def rewritten(c: Compilation, text: str) -> int:
    """The changes; outputs are kept to 1e-5."""
    feed = feed_of(c.graph, seed=9)
    before = run_model(c.graph, feed)
    name, _, options = text.partition("{")
    changes = _build(find_pass(name), options.rstrip("}")).run(c)
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    return changes


def ranges(c: Compilation) -> tuple[Array, Array]:
    """Smallest and largest value of each value channel of the first block."""
    view = halves(c)[0].v
    seen = glance(c.graph, [view.linear.output.name], c.data.calibration(), threads=1)[view.linear.output.name]
    return seen.low[view.columns], seen.high[view.columns]


@pytest.mark.parametrize("text", PASSES)
@pytest.mark.parametrize("qkv", QKV)
@pytest.mark.parametrize("queries", ["rotary", "cosine"])
def test_outputs_stay(queries: str, qkv: str, text: str) -> None:
    c = prepared(queries, qkv)
    before = [value(half.v.linear.weight).copy() for half in halves(c)]
    assert rewritten(c, text) == len(before) == 2
    assert not [note for note in c.notes if note.stage == text.partition("{")[0]], "nothing refused"
    if text != "center-values":
        assert not any(np.allclose(old, value(half.v.linear.weight)) for old, half in zip(before, halves(c), strict=True))


def test_channels_are_centred() -> None:
    c = prepared("rotary", "gather")
    assert np.abs(np.add(*ranges(c))).max() > 0.5
    rewritten(c, "center-values")
    low, high = ranges(c)
    np.testing.assert_allclose(low, -high, atol=1e-4)


def test_an_outlier_is_spread() -> None:
    c = prepared("cosine")
    weight = halves(c)[0].v.linear.weight
    weight.values = value(weight) * np.where(np.arange(16) == 3, 50, 1).astype(np.float32)
    for _ in range(2):
        low, high = ranges(c)
        spread = np.maximum(-low, high)[:8]
        if (ratio := spread.max() / np.median(spread)) > 10:
            rewritten(c, "rotate-heads{keys=false}")
    assert ratio < 3


@pytest.mark.parametrize("text", ["rotate-heads{values=false}", "center-keys", "equalize-heads", "fold-attention-scale"])
@pytest.mark.parametrize(("queries", "reason"), [("rotary", "are rotated by their positions"), ("cosine", "comes from Div")])
def test_queries_and_keys_are_left_alone(queries: str, reason: str, text: str) -> None:
    c = prepared(queries)
    before = c.graph.text()
    assert rewritten(c, text) == 0
    assert reason in c.notes[-1].reason
    assert c.graph.text() == before


@pytest.mark.parametrize("text", PASSES)
def test_values_that_something_else_reads(text: str) -> None:
    """The features of q, k and v as an output: of the second block they are private."""

    def expose(graph: onnx.GraphProto) -> None:
        split = next(node for node in graph.node if node.op_type == "Split")
        graph.output.append(onnx.helper.make_tensor_value_info(split.output[2], 1, [2, 5, 16]))

    c = prepared("rotary", "split", dynamic=False, edit=expose)
    assert rewritten(c, text) == 1
    assert [n.reason for n in c.notes if "is read by more than this attention" in n.reason]


def test_other_features_of_the_same_linear_may_be_read() -> None:
    """Queries as an output: they are not touched."""

    def expose(graph: onnx.GraphProto) -> None:
        split = next(node for node in graph.node if node.op_type == "Split")
        graph.output.append(onnx.helper.make_tensor_value_info(split.output[0], 1, [2, 5, 16]))

    assert rewritten(prepared("rotary", "split", dynamic=False, edit=expose), "center-values") == 2


def test_a_softmax_along_another_axis() -> None:
    """Then the probabilities of a query do not sum to one."""

    def turn(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "Softmax")
        node.attribute[0].i = 2

    c = prepared("rotary", edit=turn)
    assert rewritten(c, "center-values") == 1
    assert "softmax runs along another axis than the last" in c.notes[-1].reason
