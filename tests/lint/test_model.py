"""The view of a ModelProto: constants wherever they are, scopes, functions, types, and weights left where they lie."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.builders import model_of
from vitq_compiler.errors import ModelError
from vitq_compiler.lint.model import Model, Value

LONG = np.arange(2048, dtype=np.float32)


def input_of(model: Model, op: str, index: int = 1) -> Value:
    """An input of the only node of that operator."""
    (node,) = model.find(op)
    value = node.input(index)
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = Add (x, w)", LONG[:4]),
        ("c = Constant <value = float[4] {0, 1, 2, 3}> () y = Add (x, c)", LONG[:4]),
        ("c = Constant <value_floats = [0.0, 1.0, 2.0, 3.0]> () y = Add (x, c)", LONG[:4]),
        ("c = Constant <value_float = 2.0> () y = Add (x, c)", np.float32(2)),
        ("c = Identity (w) d = Identity (c) y = Add (x, d)", LONG[:4]),
    ],
)
def test_constants_wherever_they_are(text: str, expected: np.ndarray) -> None:
    model = Model(model_of(f"g (float[4] x) => (float[4] y) {{ {text} }}", w=LONG[:4]))
    value = input_of(model, "Add")
    np.testing.assert_array_equal(model.array(value), expected)
    assert model.is_static(value)


def test_what_is_computed_from_constants_is_static_but_has_no_numbers() -> None:
    model = Model(model_of("g (float[4] x) => (float[4] y) { c = Neg (w) y = Add (x, c) }", w=LONG[:4]))
    assert model.is_static(input_of(model, "Add"))
    assert model.array(input_of(model, "Add")) is None
    assert not model.is_static(input_of(model, "Add", 0))


def test_weights_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    proto = model_of("g (float[2048] x) => (float[2048] y) { y = Add (x, w) }", w=LONG)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    light = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    model = Model(light, folder=tmp_path)
    assert input_of(model, "Add").shape == (2048,)
    np.testing.assert_array_equal(model.array(input_of(model, "Add")), LONG)
    (tmp_path / "m.data").unlink()
    model = Model(light, folder=tmp_path)
    with pytest.raises(ModelError, match=r"^tensor w: cannot be read \(.*\); export the model again$"):
        model.array(input_of(model, "Add"))


def test_the_model_is_not_changed() -> None:
    proto = model_of("g (float[2048] x) => (float[2048] y) { y = Add (x, w) }", w=LONG)
    before = proto.SerializeToString(deterministic=True)
    model = Model(proto)
    np.testing.assert_array_equal(model.array(input_of(model, "Add")), LONG)
    assert proto.SerializeToString(deterministic=True) == before


def test_large_constants_of_nodes_are_kept_out_of_inference() -> None:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(LONG, "c"))
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2048]) for name in "xy"]
    graph = helper.make_graph([constant, helper.make_node("Add", ["x", "c"], ["y"])], "g", infos[:1], infos[1:])
    model = Model(helper.make_model(graph))
    np.testing.assert_array_equal(model.array(input_of(model, "Add")), LONG)


def test_memory_holds_weights_declared_as_external() -> None:
    from vitq_compiler.graph import Graph

    proto, weights = Graph.from_proto(model_of("g (float[2048] x) => (float[2048] y) { y = Add (x, w) }", w=LONG)).without_weights()
    model = Model(proto, weights=weights)
    np.testing.assert_array_equal(model.array(input_of(model, "Add")), LONG)


BRANCH = """g (float[4] x, bool b) => (float[4] y) {
    y = If (b) <
        then_branch = left () => (float[4] r) { t = Relu (x) r = Add (t, w) },
        else_branch = right () => (float[4] r) { t = Neg (x) r = Sub (t, w) }
    >
}"""


def test_branches_see_outside_and_not_each_other() -> None:
    model = Model(model_of(BRANCH, w=LONG[:4]))
    assert [node.op for node in model.nodes] == ["If", "Relu", "Add", "Neg", "Sub"]
    np.testing.assert_array_equal(model.array(input_of(model, "Sub")), LONG[:4])
    assert input_of(model, "Relu", 0) is model.inputs[0]
    assert input_of(model, "Add", 0).producer in list(model.find("Relu"))
    assert input_of(model, "Sub", 0).producer in list(model.find("Neg"))
    assert not model.is_static(next(model.find("If")).output)


FUNCTION = """g (float[4] x) => (float[4] y) {{ y = my.f (x, w) }}
<domain: "my", opset_import: ["" : 23]> f (a, c) => (r) {{ t = Relu (a) r = Add (t, c) }}"""


def test_functions_are_seen_through() -> None:
    model = Model(model_of(FUNCTION.format(), imports={"my": 1}, w=LONG[:4]))
    assert [node.op for node in model.nodes] == ["Relu", "Add"]
    assert model.functions == (("my", "f"),)
    np.testing.assert_array_equal(model.array(input_of(model, "Add")), LONG[:4])


def test_types_and_shapes_are_inferred() -> None:
    proto = model_of("g (float16[B, 4] x) => (float16 y) { t = Relu (x) y = Reshape (t, s) }", s=np.array([-1, 2, 2]))
    del proto.graph.value_info[:]
    value = input_of(Model(proto), "Reshape", 0)
    assert (value.dtype, value.shape, value.rank, value.size(-1), value.size(0), value.size(2)) == (10, (None, 4), 2, 4, None, None)


def test_nodes_without_names_are_called_after_what_they_make() -> None:
    proto = model_of("g (float[4] x) => (float[4] y) { t = Relu (x) y = Neg (t) }")
    assert [node.label for node in Model(proto).nodes] == ["t", "y"]


def test_initializers_that_are_inputs_too_are_constants() -> None:
    proto = model_of("g (float[4] x) => (float[4] y) { y = Add (x, w) }", w=LONG[:4])
    proto.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4]))
    model = Model(proto)
    assert [value.name for value in model.inputs] == ["x"]
    assert model.is_static(input_of(model, "Add"))


def test_a_file_that_is_not_sorted() -> None:
    proto = model_of("g (float[4] x) => (float[4] y) { t = Relu (x) y = Neg (t) }")
    relu, neg = proto.graph.node
    swapped = [onnx.NodeProto.FromString(neg.SerializeToString()), onnx.NodeProto.FromString(relu.SerializeToString())]
    del proto.graph.node[:]
    proto.graph.node.extend(swapped)
    producer = input_of(Model(proto), "Neg", 0).producer
    assert producer is not None
    assert producer.op == "Relu"
