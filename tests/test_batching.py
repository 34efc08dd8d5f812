"""A batch of one written into a graph whose batch axis is open: freed where that is safe, else said."""

import numpy as np
import onnx
import pytest

from tests.builders import DIALECTS, Sizes, difference, feed_of, graph_of, run_model, shapes_at, vit
from vitq_compiler.batching import free_batch
from vitq_compiler.errors import ModelError
from vitq_compiler.graph import Graph
from vitq_compiler.passes._observed import observe
from vitq_compiler.sizes import Probe

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "w": RANDOM.normal(size=(6, 3, 4, 4)).astype(np.float32),
    "token": RANDOM.normal(size=(1, 1, 6)).astype(np.float32),
    "rows": np.array([1, 6, 4]),
    "rest": np.array([1, 6, -1]),
    "heads": np.array([5, 2, 3]),
    "back": np.array([1, 5, 6]),
    "flat": np.array([5, 6]),
    "matrix": RANDOM.normal(size=(6, 6)).astype(np.float32),
    "one": np.array([1, 1, 1]),
    "zero": np.array([0]),
    "first": np.array(0),
}
START = "c = Conv <strides = [4, 4]> (x, w) r = Reshape(c, rows) t = Transpose <perm = [0, 2, 1]> (r) "
FREED = {
    "reshape": START.replace("rows", "rest") + "y = Relu(t)",
    "fixed reshape": START + "y = Relu(t)",
    "class token": START + "y = Concat <axis = 1> (token, t)",
    "class token, from behind": START + "y = Concat <axis = -2> (token, t)",
    "expanded token": START + "e = Expand(token, one) y = Concat <axis = 1> (e, t)",
    "token behind Identity": START + "e = Identity(token) y = Concat <axis = 1> (e, t)",
    "rows": START + "a = Concat <axis = 1> (token, t) f = Reshape(a, flat) m = MatMul(f, matrix) y = Reshape(m, back)",
    "heads in front": START + "a = Concat <axis = 1> (token, t) f = Reshape(a, heads) m = Relu(f) y = Reshape(m, back)",
    "constant nodes": "k = Constant <value_ints = [1, 6, 4]> () " + START.replace("rows", "k") + "y = Relu(t)",
}


def baked(text: str, output: str = "float y") -> Graph:
    return graph_of(f"g (float[N, 3, 8, 8] x) => ({output}) {{ {text} }}", **WEIGHTS)


def each(graph: Graph, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What the graph gives for each sample, put together."""
    parts = [run_model(graph, {name: array[i : i + 1] for name, array in feed.items()}) for i in range(len(feed["x"]))]
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


@pytest.mark.parametrize("text", FREED.values(), ids=FREED)
def test_freed(text: str) -> None:
    graph = baked(text)
    feed = feed_of(graph)
    expected = each(graph, feed)
    assert free_batch(graph, feed, 1) != []
    assert difference(expected, run_model(graph, feed)) <= 1e-6
    onnx.checker.check_model(graph.to_proto())
    for count in (1, 5):
        assert run_model(graph, feed_of(graph, count))[0].shape[0] == count


def test_declared_outputs_are_freed_too() -> None:
    graph = baked(FREED["class token"], "float[1, 5, 6] y")
    free_batch(graph, feed_of(graph), 1)
    assert graph.outputs[0].shape == ["N", 5, 6]


LEFT: dict[str, tuple[str, str]] = {
    "first sample": (START + "a = Slice(t, zero, ends, zero) y = Relu(a)", "is not what it gives for each"),
    "over samples": (START + "y = Softmax <axis = 0> (t)", "is not what it gives for each"),
    "the rest behind rows": (
        START + "a = Concat <axis = 1> (token, t) f = Reshape(a, flat) m = MatMul(f, matrix) y = Reshape(m, rest_of_tokens)",
        "although its batch axis is open",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_safe(name: str) -> None:
    text, fault = LEFT[name]
    more = {"ends": np.array([1]), "rest_of_tokens": np.array([1, -1, 6])}
    graph = graph_of(f"g (float[N, 3, 8, 8] x) => (float y) {{ {text} }}", **WEIGHTS, **more)
    before = graph.text()
    with pytest.raises(ModelError, match="pass --batch-size 1") as error:
        free_batch(graph, feed_of(graph), 1)
    assert fault in str(error.value)
    assert graph.text() == before


@pytest.mark.parametrize(
    ("text", "size", "count"),
    [
        ("m = MatMul(x, matrix) y = Relu(m)", "N, 3, 8, 8", 2),  # takes no single one either
        (FREED["reshape"], "N, 3, 8, 8", 1),
        (FREED["reshape"], "1, 3, 8, 8", 2),
    ],
    ids=["another fault", "one sample", "fixed batch"],
)
def test_what_it_is_not_about(text: str, size: str, count: int) -> None:
    graph = graph_of(f"g (float[{size}] x) => (float y) {{ {text} }}", **WEIGHTS)
    before = graph.text()
    assert free_batch(graph, {"x": np.ones((count, 3, 8, 8), np.float32)}, 1) == []
    assert graph.text() == before


def baked_vit(model: onnx.ModelProto) -> onnx.ModelProto:
    """The sizes that every Reshape and Expand has for one sample, written into it."""
    graph = Graph.from_proto(model)
    nodes = {node.outputs[0].name: node for node in graph.find("Reshape", "Expand")}
    seen = observe(graph, [Probe(1, shapes_at(graph.inputs))], [], [node.outputs[0] for node in nodes.values()], 1)
    for name, node in nodes.items():
        node.inputs[1] = graph.constant(f"{name}/fixed", np.array(seen.shapes[name][0], np.int64))
    return graph.clean().to_proto()


@pytest.mark.parametrize("name", [name for name, dialect in DIALECTS.items() if dialect.dynamic])
def test_whole_models(name: str) -> None:
    model = vit(Sizes(depth=1), DIALECTS[name])
    graph = Graph.from_proto(baked_vit(model))
    feed = feed_of(model)
    assert free_batch(graph, feed, 1) != []
    assert difference(run_model(model, feed), run_model(graph, feed)) <= 1e-5
