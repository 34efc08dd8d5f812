"""What opset a graph needs, and what it is written as in an older one."""

import ml_dtypes
import numpy as np
import onnx
import pytest

from tests.builders import difference, feed_of, graph_of, model_of, ops, run_model
from vitq_compiler.errors import TargetError
from vitq_compiler.graph import Graph
from vitq_compiler.opset import form_of, lower_opset, lowest_opset, oldest_opset, opset_of, raise_opset, stuck_nodes

ROIS = {"rois": np.array([[0, 0, 2, 2]], np.float32), "picture": np.array([0])}
BRANCHES = (
    "y = If (truth) <then_branch = t () => (float[2, 1, 4, 4] a) {{ {} }}, else_branch = e () => (float[2, 1, 4, 4] b) {{ b = Relu(x) }}>"
)
QDQ = "q = QuantizeLinear{}(x, s, z) y = DequantizeLinear{}(q, s, z)"


def at(text: str, opset: int = 23, kind: str = "float", **weights: np.ndarray) -> Graph:
    return Graph.from_proto(model_of(f"g ({kind}[2, 1, 4, 4] x) => ({kind} y) {{ {text} }}", opset=opset, **weights))


def test_forms() -> None:
    assert [form_of("Gelu", opset) for opset in (19, 20, 23)] == [0, 20, 20]
    assert [form_of("ReduceMean", opset) for opset in (13, 17, 18)] == [13, 13, 18]
    assert opset_of(model_of("g (float[1] x) => (float y) { y = Relu(x) }", opset=19)) == 19
    assert opset_of(onnx.ModelProto()) == 0


NEEDS = {
    "nothing new": ("y = Relu(x)", 13),
    "types alone": ("y = Transpose(x)", 13),
    "an operator": ("y = Gelu(x)", 20),
    "an attribute": ("s = Shape <start = 2> (x) y = Expand(x, s)", 15),
    "an attribute that says nothing": ("y = Reshape <allowzero = 0> (x, shape)", 13),
    "an attribute that says something": ("y = Reshape <allowzero = 1> (x, shape)", 14),
    "an input": ("y = Pad(x, pads, zero, axes)", 18),
    "a word": ('y = Pad <mode = "wrap"> (x, pads4)', 19),
    "an older word": ('y = Pad <mode = "edge"> (x, pads4)', 13),
    "another meaning": ("y = RoiAlign <output_height = 2, output_width = 2> (x, rois, picture)", 16),
    "a later form of the same": ("y = AveragePool <kernel_shape = [2, 2]> (x)", 13),
    "a rule that was corrected": ("y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x)", 19),
    "axes that can be written as before": ("y = ReduceMean(x, axes)", 13),
    "axes that are computed": ("s = Shape <start = 0, end = 1> (x) y = ReduceMean(x, s)", 18),
    "no axes": ("y = ReduceMean(x)", 13),
    "equal parts": ("y, b = Split <num_outputs = 2, axis = 2> (x)", 13),
    "unequal parts": ("y, b, c = Split <num_outputs = 3, axis = 2> (x)", 18),
    "a plane": ("y = GridSample(x, grid)", 16),
    "a branch": (BRANCHES.format("a = Gelu(x)"), 20),
    "axes in a branch": (BRANCHES.format("m = ReduceMean(x, axes) a = Sub(x, m)"), 18),
}
WEIGHTS = ROIS | {
    "shape": np.array([2, -1]),
    "pads": np.array([1, 1]),
    "pads4": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "zero": np.float32(0),
    "axes": np.array([2]),
    "grid": np.zeros((2, 3, 3, 2), np.float32),
    "truth": np.array(True),
}


@pytest.mark.parametrize(("text", "opset"), NEEDS.values(), ids=NEEDS)
def test_the_lowest_opset(text: str, opset: int) -> None:
    graph = at(text, **WEIGHTS)
    assert lowest_opset(graph) == opset
    feed = feed_of(graph)
    after = at(text, **WEIGHTS)
    assert lower_opset(after, opset) == 0
    assert (after.opset, ops(after)) == (opset, ops(graph)), "the same operators"
    if "RoiAlign" not in text:  # of which the runtime has no kernel where it begins
        assert difference(run_model(graph, feed), run_model(after, feed)) <= 1e-6
    else:
        assert run_model(after, feed)[0].shape == (1, 1, 2, 2)


def test_the_newest_operator_counts() -> None:
    graph = at("a = ReduceMean(x, axes) b = Gelu(a) y = Add(x, b)", **WEIGHTS)
    assert lowest_opset(graph) == 20
    assert [oldest_opset(node, graph.opset) for node in graph.nodes] == [13, 20, 13]
    lower_opset(graph, 20)
    assert len(graph.find("ReduceMean")[0].inputs) == 2, "as it is in that opset"


TYPES = {
    "uint8": (QDQ.format("", ""), "float", np.float32, np.uint8, 13),
    "scales in half precision": (QDQ.format("", ""), "float16", np.float16, np.int8, 19),
    "8-bit floats": (QDQ.format("", ""), "float", np.float32, ml_dtypes.float8_e4m3fn, 19),
    "16 bits": (QDQ.format("", ""), "float", np.float32, np.uint16, 21),
    "what the zero point says": (QDQ.format(" <output_dtype = 3> ", ""), "float", np.float32, np.int8, 13),
    "what the scale says": (QDQ.format("", " <output_dtype = 1> "), "float", np.float32, np.int8, 13),
    "blocks": (QDQ.format(" <block_size = 2, axis = 3> ", " <block_size = 2, axis = 3> "), "float", np.float32, np.int8, 21),
}


@pytest.mark.parametrize(("text", "kind", "scale", "code", "opset"), TYPES.values(), ids=TYPES)
def test_quantizers(text: str, kind: str, scale: type, code: type, opset: int) -> None:
    shape = (2, 1, 4, 2) if "block_size" in text else ()
    graph = at(text, 23, kind, s=np.full(shape, 0.1, scale), z=np.zeros(shape, code))
    assert lowest_opset(graph) == opset
    lower_opset(graph, opset)
    onnx.checker.check_model(graph.to_proto(), full_check=True)


def test_weights_of_four_bits() -> None:
    graph = at("c = Cast <to = 3> (w) d = DequantizeLinear <axis = 1> (c, s, z) y = MatMul(x, d)", 21, w=np.ones((4, 2), ml_dtypes.int4))
    assert lowest_opset(graph) == 21
    assert [n.op for n in stuck_nodes(graph, 20)] == ["Cast"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s = Shape <start = 3> (x) y = ReduceMean(x, s)", "opset 17 cannot say what it does, as its axes are computed"),
        ("y = Col2Im(x, size, size)", "Col2Im node .*: opset 17 has no such operator; name a later version of the target"),
        ("y = Pad(x, pads, zero, axes)", "Pad node .*: opset 17 cannot say what it does; name a later version"),
    ],
)
def test_what_has_no_older_form(text: str, message: str) -> None:
    graph = at(text, 20, size=np.array([2, 2]), **WEIGHTS)
    before = graph.text()
    with pytest.raises(TargetError, match=message):
        lower_opset(graph, 17)
    assert graph.text() == before


def test_nothing_is_raised_by_lowering() -> None:
    graph = at("y = Relu(x)", 17)
    assert lower_opset(graph, 20) == 0
    assert graph.opset == 17


def test_operators_of_a_newer_opset_can_be_added() -> None:
    """GroupNormalization, which means something else there, becomes other operators."""
    graph = at("y = GroupNormalization <num_groups = 1> (x, one, one)", 20, one=np.array([2], np.float32))
    feed = feed_of(graph)
    before = run_model(graph, feed)
    raise_opset(graph, 23)
    assert graph.opset == 23
    assert "GroupNormalization" not in ops(graph)
    assert difference(before, run_model(graph, feed)) <= 1e-5
    raise_opset(graph, 21)
    assert graph.opset == 23
    graph = at("y = Relu(x)", 17)
    with pytest.raises(TargetError, match="at opset 17 already, and cannot get operators of 21: do this before legalize"):
        raise_opset(graph, 21)


def test_grid_samples_in_older_words() -> None:
    graph = at('y = GridSample <mode = "cubic"> (x, grid)', 20, grid=np.zeros((2, 3, 3, 2), np.float32))
    lower_opset(graph, 17)
    assert graph.nodes[0].attrs["mode"] == "bicubic"


def test_other_domains_are_left_alone() -> None:
    graph = graph_of("g (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }")
    graph.nodes[0].domain = "com.vendor"
    assert lowest_opset(graph) == 13
    lower_opset(graph, 13)
    assert ops(graph) == ["Relu"]
