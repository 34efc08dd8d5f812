"""What exporters and scripts leave behind and the runtime refuses: put right, and said."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, parser

from tests.builders import difference, feed_of, model_of, run_model, vit
from vitq_compiler.errors import ModelError
from vitq_compiler.mending import mend
from vitq_compiler.model_io import read_mended

FOLDER = Path(__file__).parent / "data" / "zoo"


def same_names(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name = "node"


def reversed_nodes(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def stale_sizes(model: onnx.ModelProto) -> None:
    inferred = onnx.shape_inference.infer_shapes(model)
    model.graph.value_info.extend(inferred.graph.value_info)
    changed = [v for v in model.graph.value_info if len(v.type.tensor_type.shape.dim) == 3]
    assert changed
    for value in changed:
        value.type.tensor_type.shape.dim[1].dim_value = 99


def stale_rank(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim.add(dim_value=7)


def stale_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value += 1


def stale_type(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64


def no_type(model: onnx.ModelProto) -> None:
    model.graph.output[0].ClearField("type")


WRONG: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "names": (same_names, "nodes had the name of another one: renamed"),
    "order": (reversed_nodes, "nodes stood before those whose outputs they read: sorted"),
    "sizes": (stale_sizes, "contradict what the graph computes"),
    "rank": (stale_rank, "(logits is float32 [batch, 5], not float32 [batch, 5, 7]): inferred again"),
    "output": (stale_output, "(logits is float32 [batch, 5], not float32 [batch, 6]): inferred again"),
    "type": (stale_type, "(logits is float32 [batch, 5], not int64 [batch, 5]): inferred again"),
    "no type": (no_type, "output logits had no type: inferred float32 [batch, 5]"),
}


def runs(model: onnx.ModelProto) -> bool:
    """Whether the runtime takes a model, and it gives what it declares."""
    try:
        run_model(model, feed_of(model))
    except (ort.capi.onnxruntime_pybind11_state.Fail, ort.capi.onnxruntime_pybind11_state.InvalidGraph):
        return False
    return True


@pytest.mark.parametrize("name", WRONG)
def test_mended(tmp_path: Path, name: str) -> None:
    spoil, note = WRONG[name]
    whole, model = vit(), vit()
    spoil(model)
    assert runs(model) is (name not in ("names", "sizes", "type")), "the runtime passes over the others with a warning, or in silence"
    onnx.save(model, tmp_path / "vit.onnx")
    mended, (found,) = read_mended(tmp_path / "vit.onnx")
    assert note in found
    onnx.checker.check_model(mended, full_check=True)
    feed = feed_of(whole)
    assert difference(run_model(whole, feed), run_model(mended, feed)) == 0
    assert read_mended(save(mended, tmp_path / "again.onnx"))[1] == []


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def test_several_at_once(tmp_path: Path) -> None:
    model = vit()
    for spoil in (same_names, stale_output, reversed_nodes):
        spoil(model)
    _, notes = read_mended(save(model, tmp_path / "vit.onnx"))
    assert [note.split(" ")[-1] for note in notes] == ["sorted", "renamed", "again"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.onnx")), ids=lambda path: path.stem)
def test_what_is_right_stays(path: Path) -> None:
    model = onnx.load(path)
    before = model.SerializeToString(deterministic=True)
    assert mend(model) == []
    assert model.SerializeToString(deterministic=True) == before


def test_a_fixed_size_under_an_open_one_is_stale() -> None:
    model = model_of("g (float[N, 4] x) => (float[1, 4] y) { y = Relu(x) }", opset=20)
    (note,) = mend(model)
    assert note == "sizes of 1 tensors contradict what the graph computes (y is float32 [N, 4], not float32 [1, 4]): inferred again"
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_sizes_that_inference_does_not_know_stay() -> None:
    text = "g (float[N, 4] x, int64[2] shape) => (float[7, 9] y) { y = Reshape(x, shape) }"
    assert mend(model_of(text, opset=20)) == []


def test_graphs_inside_nodes() -> None:
    model = parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20]> g (float[4] x, bool c) => (float[4] y) {
            y = If (c) <
                then_branch = t () => (float[4] a) { a = Neg(b) b = Relu(z) },
                else_branch = e () => (float[4] d) { d = Abs(z) }
            >
            z = Relu(x)
        }"""
    )
    for node in model.graph.node[0].attribute[0].g.node:
        node.name = "inner"
    assert mend(model) == ["nodes stood before those whose outputs they read: sorted", "1 nodes had the name of another one: renamed"]
    assert [node.op_type for node in model.graph.node] == ["Relu", "If"]
    (branch,) = (a.g for a in model.graph.node[1].attribute if a.name == "then_branch")
    assert [node.op_type for node in branch.node] == ["Relu", "Neg"]
    (result,) = run_model(model, {"x": np.array([1, -2, 3, -4], np.float32), "c": np.array(True)})
    np.testing.assert_array_equal(result, [-1, 0, -3, 0])


def test_sorting_changes_no_more_than_it_must() -> None:
    model = model_of("g (float[4] x) => (float[4] y) { a = Relu(x) b = Neg(x) d = Abs(c) c = Exp(x) y = Sum(a, b, d) }", opset=20)
    assert mend(model)[0].endswith("sorted")
    assert [node.op_type for node in model.graph.node] == ["Relu", "Neg", "Exp", "Abs", "Sum"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a = Relu(b) b = Neg(a) y = Abs(x)", "reads what is computed from its own results; export it again"),
        ("y = Add(x, lost)", "reads lost, which nothing gives; export it again"),
    ],
)
def test_what_cannot_be_mended(text: str, fault: str) -> None:
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> g (float[4] x) => (float[4] y) {{ {text} }}')
    with pytest.raises(ModelError, match=fault):
        mend(model)


def test_an_output_whose_type_nobody_knows() -> None:
    node = helper.make_node("Mystery", ["x"], ["y"], domain="com.vendor")
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    graph = helper.make_graph([node], "g", [given], [onnx.ValueInfoProto(name="y")])
    with pytest.raises(ModelError, match="output y has no type, and none can be inferred"):
        mend(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.vendor", 1)]))
