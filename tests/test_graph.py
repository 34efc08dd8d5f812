"""The graph: surgery, names, text, metadata."""

import numpy as np
import onnx
import pytest

from tests.builders import difference, feed_of, graph_of, model_of, ops, run_model, vit
from vitq_compiler.graph import Graph, is_constant, producer, readers, scalar, unique, value

CHAIN = "g (float[B, 4] x) => (float[B, 4] y) { a = Relu(x) b = Add(a, a) y = Neg(b) }"


def test_round_trip_keeps_the_outputs() -> None:
    model = vit()
    feed = feed_of(model)
    assert difference(run_model(model, feed), run_model(Graph.from_proto(model), feed)) == 0


def test_scopes_and_ir_version_survive() -> None:
    model = model_of(CHAIN)
    model.graph.node[1].name = "sum"
    scopes = "['', 'blocks.0', 'blocks.0.attn', 'add']"
    model.graph.node[1].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    graph = Graph.from_proto(model)
    assert graph.scope(graph.node("sum")) == "blocks.0.attn", "the module the node belongs to"
    assert graph.scope(graph.nodes[0]) == ""
    assert graph.snapshot().scope(graph.node("sum")) == "blocks.0.attn"
    proto = graph.to_proto()
    assert proto.ir_version == model.ir_version
    kept = {node.name: {p.key: p.value for p in node.metadata_props} for node in proto.graph.node}
    assert kept["sum"] == {"pkg.torch.onnx.name_scopes": scopes}


def test_without_weights_carries_shapes_but_no_numbers() -> None:
    w = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    graph = graph_of("g (float[B, 64] x) => (float[B, 64] y) { a = MatMul(x, w) y = Add(a, b) }", w=w, b=np.ones(64, np.float32))
    light, weights = graph.without_weights()
    assert set(weights) == {"w"}
    np.testing.assert_array_equal(weights["w"], w)
    assert light.ByteSize() < 1000
    assert {t.name: list(t.dims) for t in light.graph.initializer} == {"w": [64, 64], "b": [64]}
    np.testing.assert_array_equal(value(graph.tensor("w")), w, "the graph itself keeps them")
    x = np.ones((1, 64), np.float32)
    np.testing.assert_allclose(run_model(graph, {"x": x})[0], x @ w + 1, rtol=1e-6)


def test_nameless_nodes_get_unique_names() -> None:
    model = model_of("g (float[4] x) => (float[4] y) { a = Relu(x) b = Relu(a) y = Relu(b) }")
    for node in model.graph.node:
        node.name = ""
    model.graph.node[0].name = model.graph.node[2].name = "same"
    names = [node.name for node in Graph.from_proto(model).nodes]
    assert names[0] == "same"
    assert all(names)
    assert len(set(names)) == 3


def test_names_never_collide() -> None:
    graph = graph_of(CHAIN)
    first = graph.constant("a", np.float32(1))
    assert first.name == "a_1", "a is a tensor of the graph"
    assert graph.constant("a", np.float32(1)).name == "a_2"
    assert graph.insert("Relu", [first], name="y").inputs[0].name == "y_1"


def test_inputs_and_outputs() -> None:
    graph = graph_of("g (float[N, 3, 8, 8] image, int64[2] k) => (float[N, 3, 8, 8] y) { y = Relu(image) }")
    assert [(s.name, s.dtype, s.shape) for s in graph.inputs] == [
        ("image", np.dtype(np.float32), ("N", 3, 8, 8)),
        ("k", np.dtype(np.int64), (2,)),
    ]
    assert graph.output_names == ["y"]
    assert graph.is_input(graph.tensor("image"))
    assert not graph.is_input(graph.tensor("y"))
    assert graph.is_output(graph.tensor("y"))
    assert not graph.is_output(graph.tensor("image"))


def test_an_unused_input_stays() -> None:
    graph = graph_of("g (float[4] x, float[4] unused) => (float[4] y) { y = Relu(x) }")
    assert [spec.name for spec in graph.clean().inputs] == ["x", "unused"]


def test_missing_things_are_key_errors() -> None:
    graph = graph_of(CHAIN)
    with pytest.raises(KeyError):
        graph.node("none")
    with pytest.raises(KeyError):
        graph.tensor("none")


def test_replace_counts_every_edge() -> None:
    graph = graph_of(CHAIN)
    assert graph.replace(graph.tensor("a"), graph.tensor("x")) == 2
    assert ops(graph.clean()) == ["Add", "Neg"]


def test_an_operator_is_put_behind_a_tensor() -> None:
    graph = graph_of("g (float[4] x) => (float[4] y, float[4] a) { a = Relu(x) y = Neg(a) }")
    behind = graph.insert("Abs", [graph.tensor("a")], name="behind", like=graph.tensor("a"))
    assert graph.replace(graph.tensor("a"), behind) == 2, "the reader and the output, not the Abs itself"
    assert graph.output_names == ["y", "a"]
    feed = {"x": np.array([-1, 2, -3, 4], np.float32)}
    y, a = run_model(graph.clean(), feed)
    np.testing.assert_array_equal(y, [0, -2, 0, -4])
    np.testing.assert_array_equal(a, [0, 2, 0, 4])


def test_replace_only_some_readers() -> None:
    graph = graph_of("g (float[4] x) => (float[4] y, float[4] z) { a = Relu(x) y = Neg(a) z = Abs(a) }")
    assert graph.replace(graph.tensor("a"), graph.tensor("x"), only=lambda node: node.op == "Abs") == 1
    feed = {"x": np.array([-1, 2, -3, 4], np.float32)}
    y, z = run_model(graph, feed)
    np.testing.assert_array_equal(y, [0, -2, 0, -4])
    np.testing.assert_array_equal(z, [1, 2, 3, 4])


@pytest.mark.parametrize("new", ["x", "a", "constant", "z"])
def test_replacing_a_graph_output_keeps_its_name(new: str) -> None:
    graph = graph_of("g (float[4] x) => (float[4] y, float[4] z) { a = Abs(x) y = Neg(a) z = Relu(x) }")
    replacement = graph.constant("c", np.arange(4, dtype=np.float32)) if new == "constant" else graph.tensor(new)
    assert graph.replace(graph.tensor("y"), replacement) == 1
    graph.clean()
    assert graph.output_names == ["y", "z"]
    assert [spec.name for spec in graph.inputs] == ["x"]
    x = np.array([-1, 2, -3, 4], np.float32)
    expected = {"x": x, "a": np.abs(x), "constant": np.arange(4), "z": np.maximum(x, 0)}
    y, z = run_model(graph, {"x": x})
    np.testing.assert_array_equal(y, expected[new])
    np.testing.assert_array_equal(z, expected["z"])
    onnx.checker.check_model(graph.to_proto(), full_check=True)


def test_replacing_an_output_that_is_also_read() -> None:
    graph = graph_of("g (float[4] x) => (float[4] y, float[4] z) { y = Abs(x) z = Neg(y) }")
    new = graph.insert("Relu", [graph.tensor("x")], name="new", like=graph.tensor("y"))
    assert graph.replace(graph.tensor("y"), new) == 2
    y, z = run_model(graph.clean(), {"x": np.array([-1, 2, -3, 4], np.float32)})
    np.testing.assert_array_equal(y, [0, 2, 0, 4])
    np.testing.assert_array_equal(z, [0, -2, 0, -4])


def test_a_snapshot_is_independent() -> None:
    graph = graph_of("g (float[4] x) => (float[4] y) { y = Mul(x, w) }", w=np.ones(4, np.float32))
    copy = graph.snapshot()
    graph.tensor("w").values = np.full(4, 5, np.float32)
    graph.replace(graph.tensor("y"), graph.insert("Neg", [graph.tensor("x")], name="n", like=graph.tensor("y")))
    x = np.array([1, 2, 3, 4], np.float32)
    np.testing.assert_array_equal(run_model(copy, {"x": x})[0], x)
    np.testing.assert_array_equal(run_model(graph.clean(), {"x": x})[0], -x)


def test_add_with_several_outputs() -> None:
    graph = graph_of("g (float[6] x) => (float[3] y) { y, z = Split <num_outputs = 2> (x) }")
    sizes = graph.constant("sizes", np.array([3, 3]))
    parts = graph.add("Split", [graph.tensor("x"), sizes], name="s", outputs=2, axis=0, num_outputs=None)
    assert isinstance(parts, list)
    assert [t.name for t in parts] == ["s/out_0", "s/out_1"]
    assert set(parts[0].inputs[0].attrs) == {"axis"}, "attributes that are None are left out"
    graph.replace(graph.tensor("y"), parts[1])
    np.testing.assert_array_equal(run_model(graph.clean(), {"x": np.arange(6, dtype=np.float32)})[0], [3, 4, 5])


def test_text_elides_large_weights_only() -> None:
    graph = graph_of(
        "g (float[2, 3] x) => (float[2, 3] y) { a = MatMul(x, w) y = Add(a, b) }",
        w=np.arange(9, dtype=np.float32).reshape(3, 3),
        b=np.array([1, 2, 4], np.float32),
    )
    text = graph.text()
    assert "{1,2,4}" in text
    assert "float[3,3] w" in text
    assert "0,1,2,3" not in text
    np.testing.assert_array_equal(value(graph.tensor("w")).reshape(-1), np.arange(9), "the graph keeps its weights")


def test_shape_inference_fills_in_and_keeps() -> None:
    graph = graph_of("g (float[B, 4] x) => (float[B, 8] y) { a = MatMul(x, w) y = Relu(a) }", w=np.ones((4, 8), np.float32))
    made = graph.insert("Reshape", [graph.tensor("a"), graph.constant("shape", np.array([-1, 2, 4]))], name="r")
    kept = graph.insert("Relu", [made], name="keep", like=graph.tensor("y"))
    graph.set_outputs([kept])
    assert made.shape is None
    graph.infer_shapes()
    assert made.dtype == np.float32
    assert made.shape[1:] == [2, 4]


def test_constants() -> None:
    graph = graph_of(
        "g (float[4] x) => (float[4] y) { a = Mul(x, one) y = Add(a, four) }", one=np.float32([3]), four=np.ones(4, np.float32)
    )
    assert is_constant(graph.tensor("one"))
    assert not is_constant(graph.tensor("x"))
    assert scalar(graph.tensor("one")) == 3
    assert scalar(graph.tensor("four")) is None
    assert scalar(graph.tensor("x")) is None


def test_neighbours() -> None:
    graph = graph_of(CHAIN)
    add = graph.find("Add")[0]
    assert producer(graph.tensor("x")) is None
    assert producer(graph.tensor("b")) is add
    assert [n.op for n in readers(graph.tensor("a"))] == ["Add"], "a node that reads a tensor twice is one reader"
    assert len(unique([add, add, graph.nodes[0]])) == 2


def test_removing_a_node_takes_what_only_it_needed() -> None:
    graph = graph_of("g (float[4] x) => (float[4] y) { a = Relu(x) b = Neg(a) y = Add(x, x) z = Mul(b, w) }", w=np.ones(4, np.float32))
    graph.remove(graph.find("Mul")[0])
    assert ops(graph.clean()) == ["Add"]
