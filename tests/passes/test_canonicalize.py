"""canonicalize: constants, shape arithmetic, no-ops, sharing."""

import numpy as np
import onnx
import pytest

from tests.builders import (
    DIALECTS,
    Dialect,
    Sizes,
    assert_golden,
    changes_of,
    compilation,
    difference,
    feed_of,
    graph_of,
    model_of,
    ops,
    run_model,
    vit,
)
from vitq_compiler.graph import Graph, is_constant, value
from vitq_compiler.pipeline import Compilation
from vitq_compiler.sizes import Probe

CLASS_TOKEN = """g (float[B, 3, 4] x) => (float[B, 12] y) {
    s = Shape(x)
    b = Gather <axis = 0> (s, zero)
    b1 = Unsqueeze(b, axes)
    shape = Concat <axis = 0> (b1, ones)
    token = Expand(class_token, shape)
    both = Concat <axis = 1> (token, x)
    kept = Slice(both, axes, three, one)
    flat = Concat <axis = 0> (b1, minus)
    y = Reshape(kept, flat)
}"""
CLASS_TOKEN_WEIGHTS = {
    "zero": np.array(0),
    "axes": np.array([0]),
    "ones": np.array([1, 4]),
    "three": np.array([3]),
    "one": np.array([1]),
    "minus": np.array([-1]),
    "class_token": np.array([[[1, 2, 3, 4]]], np.float32),
}


def canonical(text: str, **weights: np.ndarray) -> tuple[Graph, int, Compilation]:
    """The graph after the pass, the number of changes; outputs are unchanged and a second run does nothing."""
    c = compilation(graph_of(text, **weights))
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    changes = changes_of(c, "canonicalize")
    assert difference(before, run_model(c.graph, feed)) <= 1e-6
    onnx.checker.check_model(c.graph.to_proto())
    assert changes_of(c, "canonicalize") == 0
    return c.graph, changes, c


def test_golden_shape_arithmetic() -> None:
    graph, changes, _ = canonical(CLASS_TOKEN, **CLASS_TOKEN_WEIGHTS)
    assert changes == 2
    assert ops(graph).count("Shape") == 1
    assert_golden(graph, "canonicalize_class_token")


def test_the_result_takes_any_batch() -> None:
    graph, _, _ = canonical(CLASS_TOKEN, **CLASS_TOKEN_WEIGHTS)
    for batch in (1, 5):
        feed = feed_of(graph, batch)
        assert difference(run_model(model_of(CLASS_TOKEN, **CLASS_TOKEN_WEIGHTS), feed), run_model(graph, feed)) == 0


@pytest.mark.parametrize(
    ("attribute", "array"),
    [
        ("value = float[2] {1.5, 2}", np.array([1.5, 2], np.float32)),
        ("value_float = 1.5", np.array(1.5, np.float32)),
        ("value_floats = [1.5, 2.0]", np.array([1.5, 2], np.float32)),
        ("value_int = 3", np.array(3, np.int64)),
        ("value_ints = [3, 4]", np.array([3, 4], np.int64)),
    ],
)
def test_constant_nodes_of_every_kind(attribute: str, array: np.ndarray) -> None:
    kind = "y = Mul(x, k)" if array.dtype == np.float32 else "f = Cast <to = 1> (k) y = Mul(x, f)"
    c = compilation(graph_of(f"g (float[B, 2] x) => (float[B, 2] y) {{ k = Constant <{attribute}> () {kind} }}"))
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    assert changes_of(c, "canonicalize") >= 1
    assert ops(c.graph) == ["Mul"]
    held = next(t for t in c.graph.nodes[0].inputs if is_constant(t))
    np.testing.assert_array_equal(value(held), array)
    assert difference(before, run_model(c.graph, feed)) == 0


def test_constant_expressions_are_folded() -> None:
    graph, changes, _ = canonical(
        "g (float[B, 3] x) => (float[B, 2] y) { t = Transpose(w) s = Mul(t, two) y = MatMul(x, s) }",
        w=np.arange(6, dtype=np.float32).reshape(2, 3),
        two=np.array(2, np.float32),
    )
    assert (ops(graph), changes) == (["MatMul"], 1)
    np.testing.assert_array_equal(value(graph.nodes[0].inputs[1]), 2 * np.arange(6).reshape(2, 3).T)


def test_a_constant_output_is_kept_as_an_output() -> None:
    graph, _, _ = canonical("g (float[B, 2] x) => (float[B, 2] y, float[2] z) { y = Relu(x) z = Neg(w) }", w=np.ones(2, np.float32))
    assert graph.output_names == ["y", "z"]


def test_random_numbers_are_not_folded() -> None:
    c = compilation(graph_of("g (float[2, 2] x) => (float[2, 2] y) { r = RandomNormal <shape = [2, 2]> () y = Add(x, r) }"))
    changes_of(c, "canonicalize")
    assert ops(c.graph) == ["RandomNormal", "Add"]


def test_rows_repeated_along_the_batch_become_one_row() -> None:
    text = """g (float[B, 4] x) => (float[B, 4] y) {
        s = Shape <start = 0, end = 1> (x) full = Concat <axis = 0> (s, four) mask = Expand(w, full) y = Add(x, mask)
    }"""
    uniform, _, _ = canonical(text, four=np.array([4]), w=np.full((1, 4), 3, np.float32))
    assert ops(uniform) == ["Add"], "equal numbers need no batch at all"
    rows, _, _ = canonical(text, four=np.array([4]), w=np.arange(4, dtype=np.float32)[None])
    assert ops(rows) == ["Shape", "Concat", "Expand", "Add"]


OPEN = "g (float[B, 3, H, W] x) => (float y) {{ {text} }}"


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("s = Shape <start = 0, end = 2> (x) t = Concat <axis = 0> (s, minus) y = Reshape(x, t)", [0, 3, -1]),
        ("s = Shape <start = 0, end = 3> (x) t = Concat <axis = 0> (s, two, minus) y = Reshape(x, t)", [0, 3, 0, 2, -1]),
        ("s = Shape <start = 0, end = 1> (x) t = Concat <axis = 0> (s, three, two, minus) y = Reshape(x, t)", [0, 3, 2, -1]),
    ],
)
def test_reshapes_of_open_image_sizes(text: str, target: list[int]) -> None:
    numbers = {name: np.array([n]) for name, n in (("minus", -1), ("two", 2), ("three", 3))}
    graph, _, c = canonical(OPEN.format(text=text), **numbers)
    assert ops(graph) == ["Reshape"]
    np.testing.assert_array_equal(value(graph.nodes[0].inputs[1]), target)
    assert c.notes[0].reason == "sizes x[2], x[3] are open: what depends on them is computed when the graph runs"
    original = model_of(OPEN.format(text=text), **numbers)
    for sides in ((4, 6), (10, 2)):
        feed = {"x": np.arange(6 * sides[0] * sides[1], dtype=np.float32).reshape(2, 3, *sides)}
        assert difference(run_model(original, feed), run_model(graph, feed)) == 0


def test_two_open_sizes_of_a_reshape_are_kept() -> None:
    text = """s = Shape <start = 2, end = 3> (x) h = Div(s, two) w = Shape <start = 3, end = 4> (x) v = Mul(w, two)
        t = Concat <axis = 0> (minus, three, h, v) y = Reshape(x, t)"""
    graph, _, _ = canonical(OPEN.format(text=text), minus=np.array([-1]), two=np.array([2]), three=np.array([3]))
    assert "Shape" in ops(graph)


def test_arithmetic_that_two_sizes_do_not_show_is_kept() -> None:
    """The padding to whole windows is none at both sizes that are observed."""
    text = """s = Shape <start = 3, end = 4> (x) r = Mod(s, four) n = Sub(four, r) p = Mod(n, four) w = Concat <axis = 0> (zeros, p)
        y = Pad(x, w)"""
    graph, _, _ = canonical(OPEN.format(text=text), four=np.array([4]), zeros=np.zeros(7, np.int64))
    assert run_model(graph, {"x": np.ones((1, 3, 4, 5), np.float32)})[0].shape == (1, 3, 4, 8)


def test_scale_factors_of_open_sizes_are_folded() -> None:
    text = "s = Shape <start = 1, end = 2> (x) f = Cast <to = 1> (s) q = Sqrt(f) y = Div(x, q)"
    graph, _, _ = canonical(OPEN.format(text=text))
    assert ops(graph) == ["Div"]
    text = "s = Shape <start = 2, end = 3> (x) f = Cast <to = 1> (s) q = Sqrt(f) y = Div(x, q)"
    graph, _, _ = canonical(OPEN.format(text=text))
    assert "Shape" in ops(graph), "it depends on the size"


def test_dynamic_image_sizes_are_not_taken_from_the_probe() -> None:
    text = """g (float[B, 3, H, W] x) => (float[M, K] y) {
        s = Shape <start = 2, end = 3> (x) t = Concat <axis = 0> (minus, s) y = Reshape(x, t)
    }"""
    graph, _, _ = canonical(text, minus=np.array([-1]))
    for size in (4, 6):
        assert run_model(graph, {"x": np.zeros((1, 3, size, 5), np.float32)})[0].shape == (15, size)


def test_sizes_get_names() -> None:
    """The same name wherever a size is the same in every run, those of the inputs first."""
    text = """s = Shape <start = 0, end = 2> (x) t = Concat <axis = 0> (s, minus) r = Reshape(x, t) u = Transpose <perm = [0, 2, 1]> (r)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x) q = Reshape(p, t) e = ReduceMax <keepdims = 1> (q, two) k = Relu(u)
        y = Mul(k, number) z = Relu(e) w = Relu(q)"""
    c = compilation(
        graph_of(
            f"g (float[B, 3, H, W] x) => (float y, float z, float w) {{ {text} }}",
            minus=np.array([-1]),
            two=np.array([2]),
            number=np.float32(2),
        )
    )
    changes_of(c, "canonicalize")
    (pixels,) = {t.shape[1] for t in (c.graph.tensor("u"), c.graph.tensor("k"))}
    assert c.graph.tensor("k").shape == ["B", pixels, 3]
    assert c.graph.tensor("r").shape == ["B", 3, pixels]
    assert c.graph.tensor("z").shape == ["B", 3, 1]
    pooled = c.graph.tensor("q").shape[2]
    assert len({"B", "H", "W", pixels, pooled}) == 5
    assert list(c.graph.inputs[0].shape) == ["B", 3, "H", "W"]


def test_outputs_lend_their_names() -> None:
    text = "s = Shape <start = 0, end = 2> (x) t = Concat <axis = 0> (s, minus) r = Reshape(x, t) a = Relu(r) y = Neg(a)"
    c = compilation(graph_of(f"g (float[B, 3, H, W] x) => (float[B, 3, pixels] y) {{ {text} }}", minus=np.array([-1])))
    changes_of(c, "canonicalize")
    assert c.graph.tensor("a").shape == ["B", 3, "pixels"]
    c = compilation(graph_of(f"g (float[B, 3, H, W] x) => (float[B, 3, H] y) {{ {text} }}", minus=np.array([-1])))
    changes_of(c, "canonicalize")
    assert c.graph.tensor("a").shape[2] not in ("H", "W"), "which is another size, whatever the output says"


def test_vectors_of_open_sizes() -> None:
    text = """s = Shape(x) a = Gather <axis = 0> (s, three) b = Unsqueeze(a, axes) c = Gather <axis = 0> (s, zero) d = Unsqueeze(c, axes)
        t = Concat <axis = 0> (d, ones, b) m = ReduceMax <keepdims = 1> (x, sides) y = Expand(m, t)"""
    numbers = {"zero": np.array(0), "three": np.array(3), "axes": np.array([0]), "ones": np.array([1, 2]), "sides": np.array([1, 2, 3])}
    graph, _, _ = canonical(OPEN.format(text=text), **numbers)
    assert sorted(ops(graph)) == ["Concat", "Expand", "ReduceMax", "Shape", "Shape"]
    assert run_model(graph, {"x": np.zeros((5, 3, 4, 7), np.float32)})[0].shape == (5, 1, 2, 7)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("r = Expand(one_row, hw) y = Add(r, x)", ["Add"]),
        ("r = Expand(one_row, hw) n = Relu(x) y = Add(n, r)", ["Relu", "Add"]),
        ("r = Expand(one_row, hw) m = ReduceMax <keepdims = 1> (x, axes) y = Add(m, r)", ["Shape", "ReduceMax", "Expand", "Add"]),
        ("r = Expand(one_row, hw) y = MatMul(x, r)", ["Shape", "Expand", "MatMul"]),
    ],
    ids=["added", "added behind", "widens its partner", "multiplied"],
)
def test_what_is_repeated_along_open_axes(text: str, kept: list[str]) -> None:
    graph = graph_of(
        f"g (float[B, 3, S, S] x) => (float y) {{ hw = Shape <start = 2> (x) {text} }}",
        one_row=np.full((1, 1), 2, np.float32),
        axes=np.array([2, 3]),
    )
    c = compilation(graph)
    feed = {"x": np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)}
    before = run_model(c.graph, feed)
    changes_of(c, "canonicalize")
    assert ops(c.graph) == kept
    assert difference(before, run_model(c.graph, feed)) == 0


@pytest.mark.parametrize("size", ["B", "B, S"])
def test_an_output_that_is_repeated_stays_so(size: str) -> None:
    graph, _, _ = canonical(
        f"g (float[{size}] x) => (float y, float z) {{ z = Relu(x) s = Shape(x) y = Expand(number, s) }}", number=np.ones(1, np.float32)
    )
    shape = (5, 7)[: size.count(",") + 1]
    assert [a.shape for a in run_model(graph, {"x": np.ones(shape, np.float32)})] == [shape, shape]


def test_a_transposition_by_way_of_matrices() -> None:
    """Heads are counted into the batch and back, the sizes computed: how torch's exporter writes k.transpose(-2, -1)."""
    text = """s = Shape(x) n = Slice(s, two, three) t = Concat <axis = 0> (minus, n, four) m = Reshape(x, t)
        k = Transpose <perm = [0, 2, 1]> (m) b = Slice(s, zero, two) u = Concat <axis = 0> (b, four, n) r = Reshape(k, u) y = Relu(r)"""
    numbers = {name: np.array([n]) for name, n in (("minus", -1), ("zero", 0), ("two", 2), ("three", 3), ("four", 4))}
    graph, _, _ = canonical(f"g (float[B, 2, N, 4] x) => (float y) {{ {text} }}", **numbers)
    assert ops(graph) == ["Transpose", "Relu"]
    assert graph.nodes[0].attrs["perm"] == [0, 1, 3, 2]
    other = text.replace("(b, four, n)", "(b, n, four)")
    graph, _, _ = canonical(f"g (float[B, 2, N, 4] x) => (float y) {{ {other} }}", **numbers)
    assert ops(graph).count("Reshape") == 2, "that is no transposition"


@pytest.mark.parametrize("sizes", ["B, 3, 4", "B, N, 4"])
def test_reshapes_that_change_nothing_go(sizes: str) -> None:
    text = "a = Relu(x) s = Shape(x) r = Reshape(a, s) n = Neg(r) t = Shape <end = 2> (x) u = Concat <axis = 0> (t, four) y = Reshape(n, u)"
    graph, _, _ = canonical(f"g (float[{sizes}] x) => (float y) {{ {text} }}", four=np.array([4]))
    assert ops(graph) == ["Relu", "Neg", "Reshape"], "but for an output, which keeps its name"


def test_a_graph_that_takes_one_size_only() -> None:
    text = "s = Shape(x) f = Cast <to = 1> (s) m = ReduceMax <keepdims = 0> (f) p = Add(x, table) y = Div(p, m)"
    weights = {"table": np.arange(24, dtype=np.float32).reshape(1, 3, 2, 4)}
    c = compilation(graph_of(OPEN.format(text=text), **weights))
    c.probes = [Probe(2, {"x": (0, 3, 2, 4)}), Probe(3, {"x": (0, 3, 2, 4)})]
    feed = {"x": np.ones((2, 3, 2, 4), np.float32)}
    before = run_model(c.graph, feed)
    changes_of(c, "canonicalize")
    assert ops(c.graph) == ["Add", "Div"], "the largest size is 4 in every run"
    assert difference(before, run_model(c.graph, feed)) == 0
    assert c.notes[0].reason == "sizes x[2], x[3] are open, but no others than x[N, 3, 2, 4] run, nor do they in the result"


NO_OPS = {
    "Identity": "a = Relu(x) b = Identity(a) y = Neg(b)",
    "Dropout": "a = Relu(x) b = Dropout(a) y = Neg(b)",
    "Cast": "a = Relu(x) b = Cast <to = 1> (a) y = Neg(b)",
    "plus zero": "a = Relu(x) b = Add(a, zero) y = Neg(b)",
    "zero plus": "a = Relu(x) b = Add(zero, a) y = Neg(b)",
    "times one": "a = Relu(x) b = Mul(a, one) y = Neg(b)",
    "one times": "a = Relu(x) b = Mul(one, a) y = Neg(b)",
    "times [1]": "a = Relu(x) b = Mul(a, row) y = Neg(b)",
    "Pad by nothing": "a = Relu(x) b = Pad(a, zeros) y = Neg(b)",
    "where true": "a = Relu(x) n = Neg(x) b = Where(yes, a, n) y = Neg(b)",
    "several": "a = Relu(x) b = Identity(a) d = Mul(one, b) e = Dropout(d) y = Neg(e)",
}
NUMBERS = {
    "zero": np.array(0, np.float32),
    "one": np.array(1, np.float32),
    "row": np.array([1], np.float32),
    "cube": np.ones((1, 1, 1), np.float32),
    "zeros": np.zeros(4, np.int64),
    "yes": np.array([True]),
    "no": np.array([False]),
    "two": np.array(2, np.float32),
    "vector": np.array([1, 1, 1, 1], np.float32),
}


@pytest.mark.parametrize("text", NO_OPS.values(), ids=NO_OPS)
def test_no_ops_go(text: str) -> None:
    graph, changes, _ = canonical(f"g (float[B, 4] x) => (float[B, 4] y) {{ {text} }}", **NUMBERS)
    assert ops(graph) == ["Relu", "Neg"]
    assert changes >= 1


@pytest.mark.parametrize(
    "text",
    [
        "b = Cast <to = 6> (x) y = Cast <to = 1> (b)",
        "a = Relu(x) y = Add(a, one)",
        "a = Relu(x) y = Mul(a, two)",
        "a = Relu(x) y = Sub(zero, a)",
        "a = Relu(x) n = Neg(x) c = Greater(x, zero) y = Where(c, a, n)",
    ],
)
def test_what_only_looks_like_a_no_op_stays(text: str) -> None:
    graph, _, _ = canonical(f"g (float[B, 4] x) => (float[B, 4] y) {{ {text} }}", **NUMBERS)
    assert ops(graph) == ops(graph_of(f"g (float[B, 4] x) => (float[B, 4] y) {{ {text} }}", **NUMBERS))


def test_a_product_with_one_that_adds_axes_stays() -> None:
    graph, _, _ = canonical("g (float[B, 4] x) => (float[1, B, 4] y) { a = Relu(x) y = Mul(a, cube) }", cube=NUMBERS["cube"])
    assert ops(graph) == ["Relu", "Mul"]


def test_a_choice_that_broadcasts_stays() -> None:
    text = "g (float[B, 4] x) => (float[B, 4] y) { a = ReduceMax <keepdims = 1> (x, axes) y = Where(yes, a, x) }"
    graph, _, _ = canonical(text, axes=np.array([1]), yes=NUMBERS["yes"])
    assert "Where" in ops(graph)


def test_identities_between_inputs_and_outputs() -> None:
    graph, _, _ = canonical("g (float[B, 4] x) => (float[B, 4] y, float[B, 4] z) { y = Identity(x) a = Relu(x) z = Identity(a) }")
    assert sorted(ops(graph)) == ["Identity", "Relu"]
    assert graph.output_names == ["y", "z"]


def test_one_tensor_as_two_outputs() -> None:
    graph, _, _ = canonical("g (float[B, 4] x) => (float[B, 4] y, float[B, 4] z) { y = Relu(x) z = Identity(y) }")
    assert ops(graph) == ["Relu", "Identity"]


def test_nan_guards_behind_a_softmax_go() -> None:
    text = "s = Softmax(x) n = IsNaN(s) g = Where(n, zero, s) y = Neg(g)"
    graph, _, _ = canonical(f"g (float[B, 4] x) => (float[B, 4] y) {{ {text} }}", **NUMBERS)
    assert ops(graph) == ["Softmax", "Neg"]
    text = "s = Relu(x) n = IsNaN(s) g = Where(n, zero, s) y = Neg(g)"
    graph, _, _ = canonical(f"g (float[B, 4] x) => (float[B, 4] y) {{ {text} }}", **NUMBERS)
    assert "IsNaN" in ops(graph), "only a softmax cannot be NaN"


def test_shared_weights_are_copied_and_shared_integers_are_not() -> None:
    graph, changes, _ = canonical(
        "g (float[B, 2] x) => (float[B, 2] y) { a = MatMul(x, w) b = MatMul(a, w) d = Unsqueeze(b, axis) y = Squeeze(d, axis) }",
        w=np.array([[1, 2], [3, 4]], np.float32),
        axis=np.array([0]),
    )
    first, second = graph.find("MatMul")
    assert changes == 1
    assert first.inputs[1] is not second.inputs[1]
    np.testing.assert_array_equal(value(first.inputs[1]), value(second.inputs[1]))
    assert graph.find("Unsqueeze")[0].inputs[1] is graph.find("Squeeze")[0].inputs[1]


def test_a_constant_read_twice_by_one_node() -> None:
    graph, _, _ = canonical("g (float[B, 2] x) => (float[B, 2] y) { a = Clip(x, w, w) y = Relu(a) }", w=np.array(1, np.float32))
    assert ops(graph) == ["Clip", "Relu"]


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_no_dialect_keeps_shape_arithmetic(dialect: Dialect) -> None:
    c = compilation(vit(Sizes(depth=1), dialect))
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    changes_of(c, "canonicalize")
    assert not {"Constant", "Identity", "Dropout", "Cast", "Unsqueeze"} & set(ops(c.graph))
    assert ops(c.graph).count("Shape") <= 1
    assert all(is_constant(node.inputs[1]) for node in c.graph.find("Reshape"))
    assert difference(before, run_model(c.graph, feed)) <= 1e-6
    assert changes_of(c, "canonicalize") == 0


def test_arrays_of_equal_numbers_are_no_ops_where_they_do_not_broadcast() -> None:
    zeros = np.zeros((1, 4), np.float32)
    graph, _, _ = canonical("g (float[B, 4] x) => (float[B, 4] y) { a = Relu(x) b = Add(a, zeros) y = Neg(b) }", zeros=zeros)
    assert ops(graph) == ["Relu", "Neg"]
    graph, _, _ = canonical("g (float[B, 1] x) => (float[B, 4] y) { a = Relu(x) b = Add(a, zeros) y = Neg(b) }", zeros=zeros)
    assert ops(graph) == ["Relu", "Add", "Neg"]
    mixed = np.array([[0, 0, 1, 0]], np.float32)
    graph, _, _ = canonical("g (float[B, 4] x) => (float[B, 4] y) { a = Relu(x) b = Add(a, zeros) y = Neg(b) }", zeros=mixed)
    assert ops(graph) == ["Relu", "Add", "Neg"]
