"""equalize-values: float parity, equal channel ranges, and values that others read."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from tests.builders import QKV, Dialect, Sizes, changes_of, compilation, difference, feed_of, run_model, run_passes, vit
from vitq_compiler.calibration import ChannelStatistics, collect
from vitq_compiler.graph import value
from vitq_compiler.passes.equalize_values import EqualizeValues
from vitq_compiler.pipeline import Compilation, silent
from vitq_compiler.quant import Edge

FRONT = "canonicalize,recover-gelu,separate-linears,annotate"
SIZES = Sizes(depth=1, width=12, heads=3)


def observed(
    dialect: Dialect, sizes: Sizes = SIZES, *, fuse: bool = False, edit: Callable[[onnx.GraphProto], None] | None = None
) -> Compilation:
    model = vit(sizes, dialect)
    if edit is not None:
        edit(model.graph)
        model = onnx.shape_inference.infer_shapes(model)
    c = compilation(model)
    run_passes(c, FRONT + (",fuse-attention" if fuse else "") + ",calibrate")
    return c


def equalized(c: Compilation, strength: float = 1.0) -> int:
    """The changes; outputs are kept to 1e-5."""
    feed = feed_of(c.graph, seed=9)
    before = run_model(c.graph, feed)
    changes = EqualizeValues(strength=strength).run(c)
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    return changes


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qkv", QKV)
def test_the_outputs_stay_and_ranges_become_equal(qkv: str, bias: bool, fuse: bool) -> None:
    c = observed(Dialect(qkv=qkv), Sizes(depth=1, width=12, heads=3, bias=bias), fuse=fuse)
    name = c.annotations.attentions[0].proj.input.name
    table = c.table.statistics[name]
    assert np.ptp(np.maximum(np.abs(table.low), np.abs(table.high))) > 0.1
    assert equalized(c) == 1
    table = c.table.statistics[name]
    np.testing.assert_allclose(
        np.maximum(np.abs(table.low), np.abs(table.high)), np.abs(table.low).max().clip(np.abs(table.high).max()), rtol=1e-4
    )
    again = c.table
    changes_of(c, "calibrate")
    np.testing.assert_allclose(c.table.statistics[name].high, again.statistics[name].high, atol=1e-5)
    np.testing.assert_allclose(c.table.statistics[name].mean, again.statistics[name].mean, atol=1e-5)


@pytest.mark.parametrize("axes", [(1, -1), (-1,)], ids=["by head", "all heads together"])
def test_ranges_of_quantized_values_follow(axes: tuple[int, ...]) -> None:
    c = observed(Dialect())
    name = c.annotations.attentions[0].context.inputs[1].name

    def seen() -> ChannelStatistics:
        return collect(c.graph, {name: axes}, c.data.calibration(), 6, threads=1, progress=silent).statistics[name]

    c.table.statistics[name] = seen()
    assert equalized(c) == 1
    told, real = c.table.statistics[name], seen()
    assert (told.low <= real.low + 1e-5).all()
    assert (told.high >= real.high - 1e-5).all()
    if len(axes) > 1:
        np.testing.assert_allclose(told.high, real.high, atol=1e-5)
        np.testing.assert_allclose(told.mean, real.mean, atol=1e-5)


def test_queries_and_keys_are_not_touched() -> None:
    c = observed(Dialect(qkv="split"))
    linear = c.annotations.attentions[0].v.linear
    before = value(linear.weight)
    equalized(c)
    np.testing.assert_array_equal(value(linear.weight)[:, :24], before[:, :24])
    assert not np.array_equal(value(linear.weight)[:, 24:], before[:, 24:])


def test_no_strength_changes_nothing() -> None:
    c = observed(Dialect())
    before = value(c.annotations.attentions[0].proj.weight)
    equalized(c, 0.0)
    np.testing.assert_array_equal(value(c.annotations.attentions[0].proj.weight), before)


def output_of(kind: str, index: int, shape: list[int]) -> Callable[[onnx.GraphProto], None]:
    """Make the output of the ``index``-th node of a kind a graph output as well."""

    def edit(graph: onnx.GraphProto) -> None:
        node = [node for node in graph.node if node.op_type == kind][index]
        graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], 1, shape))

    return edit


def test_values_that_are_an_output_too() -> None:
    c = observed(Dialect(qkv="split", dynamic=False), edit=output_of("Add", 1, [2, 5, 36]))
    assert equalized(c) == 0
    assert "is read by more than this attention" in c.notes[-1].reason


@pytest.mark.parametrize("fuse", [False, True])
def test_merged_heads_that_are_an_output_too(fuse: bool) -> None:
    edit = output_of("Reshape", 2, [2, 5, 12])
    c = observed(Dialect(dynamic=False), edit=edit, fuse=fuse)
    name = c.annotations.attentions[0].proj.input.name
    assert name in c.graph.output_names
    assert equalized(c) == 0
    assert c.notes[-1].reason == f"values keep their ranges: {name} is a graph output"


def test_proj_in_float() -> None:
    c = observed(Dialect())
    proj = c.annotations.attentions[0].proj
    del c.specs[Edge(proj.name, 0)]
    assert equalized(c) == 0
    assert c.notes[-1].reason == "values keep their ranges: proj stays in float"


def test_keys_that_are_the_values() -> None:
    """One Linear whose features serve as k and v at once: scaling v would scale k."""

    def share(graph: onnx.GraphProto) -> None:
        gathers = [node for node in graph.node if node.op_type == "Gather" and node.output[0] in _operands(graph)]
        gathers[2].input[1] = gathers[1].input[1]

    def _operands(graph: onnx.GraphProto) -> set[str]:
        return {name for node in graph.node if node.op_type in ("MatMul", "Transpose") for name in node.input}

    c = observed(Dialect(dynamic=False), edit=share)
    attention = c.annotations.attentions[0]
    np.testing.assert_array_equal(attention.k.columns, attention.v.columns)
    assert equalized(c) == 0
    assert c.notes[-1].reason == "values keep their ranges: k is made of the same features as v"


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_strengths_outside_zero_to_one(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must lie in 0 to 1"):
        EqualizeValues(strength=strength)
