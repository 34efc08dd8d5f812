"""Tokens as rows: where Reshapes cancel, to the last bit, and what keeps its axes; and Sum before LayerNormalization."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import DIALECTS, Dialect, Sizes, compilation, difference, feed_of, graph_of, ops, run_model, run_passes, vit
from vitq_compiler import runtime
from vitq_compiler.catalog import pipeline_for
from vitq_compiler.graph import Graph, producer, readers
from vitq_compiler.pipeline import Compilation
from vitq_compiler.targets._flat_stream import flatten_stream, merge_reshapes
from vitq_compiler.targets._leading import merge_shapes
from vitq_compiler.targets.onnxruntime import Onnxruntime

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "w": RANDOM.normal(size=(8, 8)).astype(np.float32),
    "u": RANDOM.normal(size=(8, 8)).astype(np.float32),
    "g": RANDOM.normal(size=8).astype(np.float32),
    "b": RANDOM.normal(size=8).astype(np.float32),
    "flat": np.array([-1, 8]),
    "pairs": np.array([-1, 16]),
    "halves": np.array([-1, 10, 4]),
    "tokens": np.array([-1, 5, 8]),
    "grid": np.array([-1, 5, 1, 8]),
    "number": np.float32(1.5),
    "number1": np.full(1, 1.5, np.float32),
    "number2": np.full((1, 1), 1.5, np.float32),
    "number3": np.full((1, 1, 1), 1.5, np.float32),
    "row": RANDOM.normal(size=(1, 8)).astype(np.float32),
    "position": RANDOM.normal(size=(1, 5, 8)).astype(np.float32),
    "column": RANDOM.normal(size=(5, 1)).astype(np.float32),
    "g58": RANDOM.normal(size=(5, 8)).astype(np.float32),
    "axis": np.array([1]),
}
BEFORE = "f = Reshape(x, flat) m = Gemm(f, w, b) t = Reshape(m, tokens) "
AFTER = " r = Reshape(h, flat) n = Gemm(r, u) y = Reshape(n, tokens)"


def graph_from(text: str, outputs: str = "float y") -> Graph:
    graph = graph_of(f"g (float[B, 5, 8] x) => ({outputs}) {{ {text} }}", **WEIGHTS)
    graph.infer_shapes()
    return graph


def flattened(graph: Graph) -> int:
    """The changes; outputs stay the same bit by bit, in name and shape, and a second run does nothing."""
    feed, names = feed_of(graph, 3), graph.output_names
    before = run_model(graph, feed)
    changes = flatten_stream(graph)
    for a, b in zip(before, run_model(graph, feed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert graph.output_names == names
    count = ops(graph).count("Reshape")
    flatten_stream(graph)
    assert ops(graph).count("Reshape") == count
    return changes


ROWWISE = {
    "Gelu": "h = Gelu(t)",
    "Relu": "h = Relu(t)",
    "Sigmoid": "h = Sigmoid(t)",
    "LayerNormalization": "h = LayerNormalization <axis = -1> (t, g, b)",
    "LayerNormalization of axis 2": "h = LayerNormalization <axis = 2> (t, g, b)",
    "vector": "h = Add(t, g)",
    "vector first": "h = Mul(g, t)",
    "number": "h = Mul(t, number)",
    "number of one axis": "h = Mul(t, number1)",
    "number of two axes": "h = Mul(t, number2)",
    "itself": "h = Add(t, t)",
}


@pytest.mark.parametrize("text", ROWWISE.values(), ids=ROWWISE)
def test_reshapes_around_a_rowwise_operation_cancel(text: str) -> None:
    graph = graph_from(BEFORE + text + AFTER)
    assert flattened(graph) == 1
    kind = text.split("= ")[1].split("(")[0].split()[0]
    assert ops(graph) == ["Reshape", "Gemm", kind, "Gemm", "Reshape"]
    assert graph.find(kind)[0].outputs[0].shape[1:] == [8]


def test_a_chain() -> None:
    graph = graph_from(BEFORE + "a = Gelu(t) c = Mul(a, g) d = Add(c, t) h = LayerNormalization(d, g, b)" + AFTER)
    assert flattened(graph) == 4
    assert Counter(ops(graph)) == {"Reshape": 2, "Gemm": 2, "Gelu": 1, "Mul": 1, "Add": 1, "LayerNormalization": 1}


@pytest.mark.parametrize("order", ["t, x", "x, t"])
def test_a_residual_enters_as_rows_once(order: str) -> None:
    """x, LayerNormalization(x + Gemm) and the sum of it with another Gemm: one Reshape in (of x, for both), one out."""
    text = f"s = Sum({order}) h = LayerNormalization(s, g, b) r = Reshape(h, flat) n = Gemm(r, u) k = Reshape(n, tokens) y = Sum(s, k)"
    graph = graph_from(BEFORE + text)
    assert flattened(graph) == 3
    assert Counter(ops(graph)) == {"Reshape": 3, "Gemm": 2, "Sum": 2, "LayerNormalization": 1}
    assert [node.outputs[0].shape[1:] for node in graph.find("Sum")] == [[8], [8]]


def test_a_sum_of_two_gemms() -> None:
    text = "f = Reshape(x, flat) m = Gemm(f, w) a = Reshape(m, tokens) n = Gemm(f, u) c = Reshape(n, tokens) h = Sum(a, c)"
    graph = graph_from(text + " r = Reshape(h, flat) o = Gemm(r, w) y = Reshape(o, tokens)")
    assert flattened(graph) == 1
    assert Counter(ops(graph)) == {"Reshape": 2, "Gemm": 3, "Sum": 1}


def test_any_number_of_token_axes() -> None:
    text = "f = Reshape(x, flat) m = Gemm(f, w) t = Reshape(m, grid) h = Gelu(t) r = Reshape(h, flat) n = Gemm(r, u) y = Reshape(n, grid)"
    graph = graph_from(text)
    assert flattened(graph) == 1
    assert ops(graph) == ["Reshape", "Gemm", "Gelu", "Gemm", "Reshape"]


LEFT = {
    "a constant of a plane": "h = Add(t, position)",
    "one row": "h = Mul(t, row)",
    "one number per token": "h = Mul(t, column)",
    "one number of three axes": "h = Mul(t, number3)",
    "LayerNormalization over tokens": "h = LayerNormalization <axis = 1> (t, g58)",
    "several outputs": "l, mean = LayerNormalization <axis = -1> (t, g, b) h = Sub(l, mean)",
    "over the tokens": "h = Softmax <axis = 1> (t)",
    "one token of each": "s = ReduceMean <keepdims = 1> (t, axis) h = Add(t, s)",
    "a reshape of features": "p = Reshape(t, halves) q = Gelu(p) h = Reshape(q, tokens)",
}


@pytest.mark.parametrize("text", LEFT.values(), ids=LEFT)
def test_what_keeps_its_axes(text: str) -> None:
    graph = graph_from(BEFORE + text + AFTER)
    before = Counter(ops(graph))
    assert flattened(graph) == 0
    assert Counter(ops(graph)) == before


@pytest.mark.parametrize("shape", ["1, 5, 8", "5, 8", "8", "B, 1, 8", "B, 5, 1", "1"])
def test_an_activation_that_is_broadcast_keeps_its_axes(shape: str) -> None:
    graph = graph_of(f"g (float[B, 5, 8] x, float[{shape}] z) => (float y) {{ {BEFORE} h = Add(t, z) {AFTER} }}", **WEIGHTS)
    graph.infer_shapes()
    assert flattened(graph) == 0
    assert ops(graph).count("Reshape") == 4


def test_what_never_was_rows() -> None:
    graph = graph_from("a = Gelu(x) c = Sum(a, x) y = LayerNormalization(c, g, b)")
    assert flattened(graph) == 0
    assert ops(graph) == ["Gelu", "Sum", "LayerNormalization"]


def test_rows_of_another_length_do_not_cancel() -> None:
    """[B, 6, 8] as [-1, 16] is not its rows."""
    graph = graph_of(
        "g (float[B, 6, 8] x) => (float y) { f = Reshape(x, flat) m = Gemm(f, w) t = Reshape(m, six) h = Gelu(t) y = Reshape(h, pairs) }",
        **WEIGHTS,
        six=np.array([-1, 6, 8]),
    )
    graph.infer_shapes()
    assert flattened(graph) == 1
    assert ops(graph) == ["Reshape", "Gemm", "Gelu", "Reshape", "Reshape"]


def test_rows_that_are_spread_over_tokens_keep_their_axes() -> None:
    graph = graph_of("g (float[B, T, 8] x, float[M, 8] f) => (float y) { m = Gemm(f, w) h = Add(m, x) y = Gelu(h) }", **WEIGHTS)
    graph.infer_shapes()
    assert flatten_stream(graph) == 0


# Tokens whose number is open

OPEN = """lead = Shape <start = 0, end = -1> (x) shape = Concat <axis = 0> (lead, features)
    f = Reshape(x, flat) m = Gemm(f, w, b) t = Reshape(m, shape) """
OPEN_END = " r = Reshape(h, flat) n = Gemm(r, u) y = Reshape(n, shape)"


def open_graph(text: str, size: str = "B, T, 8") -> Graph:
    graph = graph_of(f"g (float[{size}] x) => (float y) {{ {text} }}", **WEIGHTS, features=np.array([8]), wide=np.array([16]))
    graph.infer_shapes()
    for tensor in graph.tensors():  # as canonicalize names sizes
        if tensor.shape and len(tensor.shape) > 2:
            tensor.shape = [*size.split(", ")[: len(tensor.shape) - 1], tensor.shape[-1] or 8]
    return graph


@pytest.mark.parametrize("text", ROWWISE.values(), ids=ROWWISE)
def test_open_tokens_go_as_rows_too(text: str) -> None:
    graph = open_graph(OPEN + text + OPEN_END)
    assert flattened(graph) == 1
    assert ops(graph).count("Reshape") == 2
    assert ops(graph).count("Shape") == 1


@pytest.mark.parametrize("size", ["B, T, 8", "B, H, W, 8"])
def test_a_residual_of_open_tokens(size: str) -> None:
    text = "s = Sum(t, x) h = LayerNormalization(s, g, b) r = Reshape(h, flat) n = Gemm(r, u) k = Reshape(n, shape) y = Sum(s, k)"
    graph = open_graph(OPEN + text, size)
    assert flattened(graph) == 3
    assert ops(graph).count("Reshape") == 3, "one of x for the product, one for the sum, and one for the output"
    assert ops(graph).count("Shape") == 1
    assert graph.nodes[-1].op == "Reshape"


def test_sizes_without_names_keep_their_axes() -> None:
    graph = open_graph(OPEN + "h = Gelu(t)" + OPEN_END)
    graph.tensor("h").shape = [None, None, 8]
    assert flatten_stream(graph) == 0


def test_rows_and_heads_in_one_reshape() -> None:
    """Reshape[0, 0, 2, 4](Reshape[B, T, 8](m))  ->  Reshape[B, T, 2, 4](m)"""
    graph = open_graph(OPEN + "y = Reshape(t, heads)")
    graph.tensor("t").shape = ["B", "T", 8]
    heads = graph.tensor("y").inputs[0]
    heads.inputs[1] = graph.constant("heads", np.array([0, 0, 2, 4]))
    feed = feed_of(graph)
    before = run_model(graph, feed)
    assert merge_reshapes(graph) == 1
    assert ops(graph).count("Reshape") == 2
    assert difference(before, run_model(graph, feed)) == 0
    heads.inputs[1] = graph.constant("other", np.array([0, -1, 8]))
    assert merge_reshapes(graph) == 0, "it copies one size and not the other"


def test_one_shape_for_all_tensors_of_the_same_sizes() -> None:
    text = """a = Relu(x) s = Shape <start = 0, end = -1> (x) t = Shape <start = 0, end = -1> (a) v = Shape <start = 0, end = 1> (a)
        c = Concat <axis = 0> (s, t, v) y = Cast <to = 1> (c)"""
    graph = open_graph(text)
    feed = feed_of(graph)
    before = run_model(graph, feed)
    assert merge_shapes(graph) == 1
    assert ops(graph).count("Shape") == 2
    assert difference(before, run_model(graph, feed)) == 0
    for tensor in (graph.tensor("x"), graph.tensor("a")):
        tensor.shape = ["unk__1", "unk__2", 8]
    assert merge_shapes(graph) == 0, "inference counts what it does not know"


@pytest.mark.parametrize("output", ["t", "h", "a", "y"])
def test_an_output_inside_the_stream(output: str) -> None:
    outputs = "float y" if output == "y" else f"float y, float {output}"
    graph = graph_from(BEFORE + "a = Gelu(t) h = LayerNormalization(a, g, b)" + AFTER, outputs)
    assert flattened(graph) == 2
    assert ops(graph).count("Reshape") == (2 if output == "y" else 3)
    assert [t.shape[1:] for t in graph.outputs] == [[5, 8]] * (1 if output == "y" else 2)


def test_rows_that_are_an_output() -> None:
    graph = graph_from("f = Reshape(x, flat) m = Gemm(f, w) t = Reshape(m, tokens) h = Gelu(t) y = Reshape(h, flat)")
    assert flattened(graph) == 1
    assert ops(graph) == ["Reshape", "Gemm", "Gelu"]


def test_a_reader_that_needs_the_tokens_gets_them() -> None:
    text = "a = Gelu(t) h = Relu(a) q = ReduceMean <keepdims = 0> (a, axis) r = Reshape(h, flat) p = Gemm(r, u)"
    graph = graph_from(BEFORE + text, "float p, float q")
    assert flattened(graph) == 2
    assert Counter(ops(graph))["Reshape"] == 2
    (mean,) = graph.find("ReduceMean")
    assert producer(mean.inputs[0]).op == "Reshape"


LINES = st.lists(
    st.tuples(
        st.sampled_from(
            ["Gelu({a})", "Relu({a})", "LayerNormalization({a}, g, b)", "Add({a}, {c})", "Sum({c}, {a})", "Mul({a}, g)", "Gemm"]
        ),
        st.integers(0, 20),
        st.integers(0, 20),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=60)
@given(LINES, st.integers(0, 10))
def test_random_streams_keep_their_outputs(lines: list[tuple[str, int, int]], more: int) -> None:
    names, text = ["x", "t"], BEFORE
    for index, (form, a, c) in enumerate(lines):
        first, second = names[a % len(names)], names[c % len(names)]
        if form == "Gemm":
            text += f"i{index} = Reshape({first}, flat) o{index} = Gemm(i{index}, u) v{index} = Reshape(o{index}, tokens) "
        else:
            text += f"v{index} = {form.format(a=first, c=second)} "
        names.append(f"v{index}")
    outputs = list(dict.fromkeys([names[-1], names[2 + more % len(lines)]]))
    flattened(graph_from(text, ", ".join(f"float {name}" for name in outputs)))


# In lowered models


def compiled(sizes: Sizes, dialect: Dialect, version: str = "") -> Compilation:
    c = compilation(vit(sizes, dialect), target=Onnxruntime(version))
    run_passes(c, str(pipeline_for(c.recipe, c.target)))
    return c


@pytest.mark.parametrize("version", ["", "newest"], ids=["portable", "newest"])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_four_reshapes_in_a_block(dialect: Dialect, class_token: bool, version: str) -> None:
    """Around attention alone: q, k and v become tokens, their result becomes rows."""
    counts = [ops(compiled(Sizes(depth=depth, class_token=class_token), dialect, version).graph).count("Reshape") for depth in (2, 3, 4)]
    assert np.diff(counts).tolist() == [4, 4]
    c = compiled(Sizes(depth=2, class_token=class_token), dialect, version)
    if version == "newest":
        first, last = ([producer(t).op for t in node.inputs] for node in c.graph.find("Attention"))
        results = [node.outputs[0] for node in c.graph.find("Attention")]
    else:
        blocks = c.annotations.attentions
        operands = [[a.scores.inputs[0], a.scores.inputs[1], a.context.inputs[1]] for a in blocks]
        assert {producer(t).op for tensors in operands for t in tensors} == {"Transpose"}
        first, last = ([producer(producer(t).inputs[0]).op for t in tensors] for tensors in operands)
        last[0] = producer(producer(producer(operands[1][0]).inputs[0]).inputs[0]).op if class_token else last[0]
        results = [readers(a.context.outputs[0])[0].outputs[0] for a in blocks]
    assert first == ["Reshape"] * 3
    assert last == ["Gather" if class_token else "Reshape", "Reshape", "Reshape"]
    for result in results:
        assert [reader.op for reader in readers(result)] == ["Reshape"]
    for node in c.graph.find("Gelu"):
        (reader,) = readers(node.outputs[0])
        assert [producer(node.inputs[0]).op, reader.op] == ["Gemm", "QuantizeLinear"]
    position, *norms = c.graph.find("LayerNormalization")
    assert [reader.op for reader in readers(position.outputs[0])] == ["Reshape"], "the stream begins as tokens"
    assert [len(node.outputs[0].shape) for node in norms] == [2] * 4


def stay_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitq_compiler.targets.onnxruntime.flatten_stream", lambda graph: 0)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "tokens"])
@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_no_add_before_a_layernormalization(dialect: Dialect, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(depth=2, width=16, hidden=32)
    if not rows:
        stay_tokens(monkeypatch)
    c = compiled(sizes, dialect)
    norms = c.graph.find("LayerNormalization")
    assert [producer(node.inputs[0]).op for node in norms] == ["Sum"] * (2 * sizes.depth + 1)
    assert ops(c.graph).count("Sum") == len(norms)
    found = Counter(node.op_type for node in runtime.optimized(c.graph.to_proto()).graph.node)
    assert found["SkipLayerNormalization"] == 0
    assert found["LayerNormalization"] == len(norms)


def test_the_runtime_would_fuse_an_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Sum is for, where a stream stays tokens: the day this fails, Add can stay Add."""
    stay_tokens(monkeypatch)
    c = compiled(Sizes(depth=2, width=16, hidden=32), Dialect())
    for node in c.graph.find("Sum"):
        node.op = "Add"
    found = Counter(node.op_type for node in runtime.optimized(c.graph.to_proto()).graph.node)
    assert found["SkipLayerNormalization"] > 0


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_the_same_numbers_as_rows_and_as_tokens(dialect: Dialect, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compiled(Sizes(depth=2), dialect)
    stay_tokens(monkeypatch)
    tokens = compiled(Sizes(depth=2), dialect)
    assert ops(tokens.graph).count("Reshape") > ops(rows.graph).count("Reshape")
    feed = feed_of(rows.graph)
    assert difference(run_model(tokens.graph, feed), run_model(rows.graph, feed)) == 0


@pytest.mark.parametrize(("second", "merged"), [([-1, 5, 2, 4], 1), ([0, 5, 2, 4], 0)], ids=["absolute", "copies a size"])
def test_two_reshapes_are_one(second: list[int], merged: int) -> None:
    graph = graph_of(
        "g (float[N, 8] x) => (float y) { t = Reshape(x, tokens) y = Reshape(t, heads) }",
        tokens=np.array([-1, 5, 8]),
        heads=np.array(second),
    )
    x = RANDOM.normal(size=(10, 8)).astype(np.float32)
    before = run_model(graph, {"x": x})
    assert merge_reshapes(graph) == merged
    assert ops(graph).count("Reshape") == 2 - merged
    np.testing.assert_array_equal(before, run_model(graph, {"x": x}))
