"""select-tokens-early: only the tokens that are read are computed, and what must be left alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import (
    DIALECTS,
    QKV,
    TIMM,
    Dialect,
    Sizes,
    changes_of,
    compilation,
    difference,
    feed_of,
    graph_of,
    ops,
    random_feed,
    run_model,
    run_passes,
    vit,
)
from tests.open_vit import KEYS, open_vit
from vitq_compiler.annotations import Annotations, understand
from vitq_compiler.catalog import pipeline_for
from vitq_compiler.graph import Graph, Node, producer, value
from vitq_compiler.pipeline import Compilation

FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,fold-layer-scale,annotate,fuse-attention"
TOLERANCE = 1e-5
TOKENS = 5  # of the vision transformers here, and of the texts below
STATIC = replace(TIMM, dynamic=False)


def selected(c: Compilation) -> int:
    """The changes; outputs are kept, shapes are those that inference finds, and a second run does nothing."""
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    changes = changes_of(c, "select-tokens-early")
    onnx.checker.check_model(c.graph.to_proto())
    assert difference(before, run_model(c.graph, feed)) <= TOLERANCE
    recorded = shapes_of(c.graph)
    again = c.graph.snapshot()
    again.infer_shapes()
    assert shapes_of(again) == recorded
    text = c.graph.text()
    assert changes_of(c, "select-tokens-early") == 0
    assert c.graph.text() == text
    return changes


def shapes_of(graph: Graph) -> dict[str, list[int | None]]:
    """Sizes of every tensor by name; names of dynamic sizes do not count."""
    tensors = [t for node in graph.nodes for t in node.outputs]
    return {t.name: [d if isinstance(d, int) else None for d in t.shape or ()] for t in tensors}


def prepared(sizes: Sizes | None = None, dialect: Dialect = TIMM, edit: Callable[[onnx.GraphProto], None] | None = None) -> Compilation:
    model = vit(sizes or Sizes(), dialect)
    if edit is not None:
        edit(model.graph)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    c = compilation(model)
    run_passes(c, FRONT)
    return c


def tokens_of(c: Compilation, role: str) -> list[int]:
    """How many tokens each Linear of a role gets, in graph order."""
    return [linear.input.shape[1] for linear in c.annotations.linears if linear.role == role]


# Vision transformers

CHANGES = 9  # Attention, proj, residual Add, LayerNormalization, fc1, Gelu, fc2, residual Add, the last LayerNormalization


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_the_last_block_computes_the_class_token_alone(dialect: Dialect, depth: int) -> None:
    c = prepared(Sizes(depth=depth), dialect)
    assert selected(c) == CHANGES
    earlier = [TOKENS] * (depth - 1)
    assert tokens_of(c, "proj") == tokens_of(c, "fc1") == tokens_of(c, "fc2") == [*earlier, 1]
    assert tokens_of(c, "qkv") == [TOKENS] * 3 * depth
    (last,) = [node for node in c.graph.nodes if node.op == "LayerNormalization"][-1:]
    assert last.inputs[0].shape[1] == 1
    assert [node.outputs[0].shape[1] for node in c.graph.find("Attention")] == [*earlier, 1]
    assert [node.outputs[0].shape[1] for node in c.graph.find("Gelu")] == [*earlier, 1]


@pytest.mark.parametrize("qkv", QKV)
def test_the_queries_are_selected_behind_their_linear(qkv: str) -> None:
    """q reads the same LayerNormalization output as k and v, which thus can still be folded into all three."""
    c = prepared(Sizes(depth=2), Dialect(qkv=qkv))
    assert selected(c) == CHANGES
    attention = c.annotations.attentions[-1]
    assert attention.q.linear.input is attention.k.linear.input is attention.v.linear.input
    q, k, v = attention.fused.inputs
    pick = producer(q)
    assert pick.op == "Gather"
    assert pick.attrs["axis"] == 1
    assert pick.inputs[0] is attention.q.linear.output
    assert (k, v) == (attention.k.linear.output, attention.v.linear.output)
    assert [t.shape[1] for t in (q, k, v)] == [1, TOKENS, TOKENS]
    changes_of(c, "calibrate")
    assert changes_of(c, "reparameterize-layernorm") == 4


def test_one_selection_serves_the_residual_stream() -> None:
    c = prepared()
    selected(c)
    gathers = [node for node in c.graph.find("Gather") if node.attrs.get("axis") == 1]
    assert sorted(value(node.inputs[1]).ndim for node in gathers) == [0, 1, 1], "the model's own, of the queries, of the residual"
    assert len({id(node.inputs[0]) for node in gathers}) == 3


def test_pooled_models_are_left_alone() -> None:
    c = prepared(Sizes(class_token=False))
    before = c.graph.text()
    assert selected(c) == 0
    assert c.graph.text() == before


def last_gather(graph: onnx.GraphProto) -> onnx.NodeProto:
    """What selects the class token."""
    return next(node for node in reversed(graph.node) if node.op_type == "Gather" and node.attribute[0].i == 1)


def set_index(graph: onnx.GraphProto, index: int) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.int64(index), "chosen"))
    last_gather(graph).input[1] = "chosen"


def replace_head(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], **vectors: list[int]) -> None:
    """Nodes from ``last``, the last LayerNormalization, to ``pooled`` in the place of the Gather."""
    gather = last_gather(graph)
    place = list(graph.node).index(gather)
    names = {"last": gather.input[0], "pooled": gather.output[0]}
    for node in nodes:
        for part in (node.input, node.output):
            part[:] = [names.get(name, name) for name in part]
    graph.node.remove(gather)
    for node in reversed(nodes):
        graph.node.insert(place, node)
    graph.initializer.extend(onnx.numpy_helper.from_array(np.array(v, np.int64), name) for name, v in vectors.items())


make = onnx.helper.make_node
SLICE = [make("Slice", ["last", "start", "end", "axis"], ["cut"], "cut"), make("Squeeze", ["cut", "axis"], ["pooled"], "squeeze")]


@pytest.mark.parametrize("index", [0, 2, TOKENS - 1, -1, -TOKENS])
def test_any_token_may_be_chosen(index: int) -> None:
    c = prepared(Sizes(depth=2), STATIC, lambda graph: set_index(graph, index))
    assert selected(c) == CHANGES
    assert tokens_of(c, "fc1") == [TOKENS, 1]
    (pick,) = [node for node in c.graph.find("Gather") if node.inputs[0] is c.annotations.attentions[-1].q.linear.output]
    assert value(pick.inputs[1]).tolist() == [index % TOKENS]


@pytest.mark.parametrize(("start", "end"), [(0, 1), (TOKENS - 1, 2**62), (-1, 2**31), (-TOKENS, 1 - TOKENS), (2, -2)], ids=str)
def test_a_slice_of_one_token(start: int, end: int) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        copies = [make(n.op_type, list(n.input), list(n.output), n.name) for n in SLICE]
        replace_head(graph, copies, start=[start], end=[end], axis=[1])

    c = prepared(Sizes(depth=2), STATIC, edit)
    assert selected(c) == CHANGES
    assert tokens_of(c, "fc1") == [TOKENS, 1]
    assert "Slice" not in ops(c.graph)


def test_some_tokens_of_which_the_mean_is_read() -> None:
    def edit(graph: onnx.GraphProto) -> None:
        cut = make("Slice", ["last", "start", "end", "axis", "step"], ["cut"], "cut")
        replace_head(
            graph, [cut, make("ReduceMean", ["cut"], ["pooled"], "mean", axes=[1], keepdims=0)], start=[0], end=[99], axis=[1], step=[2]
        )

    c = prepared(Sizes(depth=2), STATIC, edit)
    assert selected(c) == CHANGES
    assert tokens_of(c, "fc1") == tokens_of(c, "proj") == [TOKENS, 3]


def test_a_head_that_reads_class_token_and_patches_is_left_alone() -> None:
    """As in DINOv2: the class token beside the mean of the patch tokens."""

    def edit(graph: onnx.GraphProto) -> None:
        nodes = [
            make("Gather", ["last", "first"], ["class"], "class_of", axis=1),
            make("Slice", ["last", "start", "end", "axis"], ["patches"], "patches_of"),
            make("ReduceMean", ["patches"], ["mean"], "mean_of", axes=[1], keepdims=0),
            make("Squeeze", ["class", "axis"], ["flat"], "flat_of"),
            make("Add", ["flat", "mean"], ["pooled"], "pooled_of"),
        ]
        replace_head(graph, nodes, first=[0], start=[1], end=[99], axis=[1])

    c = prepared(Sizes(depth=2), STATIC, edit)
    before = c.graph.text()
    assert selected(c) == 0
    assert c.graph.text() == before
    assert tokens_of(c, "fc1") == [TOKENS, TOKENS]


def test_tokens_that_are_an_output_too() -> None:
    def edit(graph: onnx.GraphProto) -> None:
        graph.output.append(onnx.helper.make_tensor_value_info(last_gather(graph).input[0], 1, [2, TOKENS, 8]))

    c = prepared(Sizes(depth=2), STATIC, edit)
    assert selected(c) == 0
    assert tokens_of(c, "fc1") == [TOKENS, TOKENS]


@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (1, 1, 5, 5)])
def test_attention_with_a_mask_keeps_all_queries(shape: tuple[int, ...]) -> None:
    """Its mask has a row for every query; what follows is moved all the same."""

    def edit(graph: onnx.GraphProto) -> None:
        mask = np.where(np.arange(np.prod(shape)).reshape(shape) % 4 == 3, np.float32(-1e4), np.float32(0.5))
        graph.initializer.append(onnx.numpy_helper.from_array(mask, "mask"))
        softmax = [node for node in graph.node if node.op_type == "Softmax"][-1]
        graph.node.insert(list(graph.node).index(softmax), make("Add", [softmax.input[0], "mask"], ["masked"], "add_mask"))
        softmax = [node for node in graph.node if node.op_type == "Softmax"][-1]
        softmax.input[0] = "masked"

    c = prepared(Sizes(depth=2), STATIC, edit)
    assert len(c.graph.find("Attention")) == 2
    assert selected(c) == CHANGES - 1
    assert [node.outputs[0].shape[1] for node in c.graph.find("Attention")] == [TOKENS, TOKENS]
    assert tokens_of(c, "proj") == tokens_of(c, "fc1") == [TOKENS, 1]


def test_attention_in_products_keeps_all_queries() -> None:
    c = compilation(vit(Sizes(depth=2)))
    run_passes(c, FRONT.removesuffix(",fuse-attention"))
    assert selected(c) == CHANGES - 1
    assert tokens_of(c, "proj") == tokens_of(c, "fc1") == [TOKENS, 1]


@settings(max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(list(DIALECTS.values())),
    st.sampled_from(QKV),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_random_vision_transformers_keep_their_outputs(
    depth: int, heads: int, dialect: Dialect, qkv: str, class_token: bool, bias: bool, seed: int
) -> None:
    sizes = Sizes(width=4 * heads, heads=heads, depth=depth, bias=bias, class_token=class_token, layer_scale=bool(seed % 2), seed=seed)
    c = prepared(sizes, replace(dialect, qkv=qkv))
    assert selected(c) == (CHANGES if class_token else 0)
    if class_token:
        assert tokens_of(c, "fc1") == [TOKENS] * (depth - 1) + [1]


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_in_the_whole_pipeline(dialect: Dialect) -> None:
    """The blocks can still be compared, and the last one's integer kernels get one row per image."""
    c = compilation(vit(Sizes(depth=2, width=16, hidden=32), dialect))
    changes = run_passes(c, str(pipeline_for(c.recipe, c.target)))
    assert changes["select-tokens-early"] == CHANGES
    assert changes["reparameterize-layernorm"] == 4
    assert changes["equalize-values"] == 2
    assert len(c.annotations.block_edges) == 4
    names = {node.name for node in c.graph.nodes}
    assert {edge.node for edge in c.annotations.block_edges.values()} <= names


# Single operations

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "w": RANDOM.normal(size=(8, 6)).astype(np.float32),
    "c": RANDOM.normal(size=6).astype(np.float32),
    "g": RANDOM.normal(size=8).astype(np.float32),
    "g58": RANDOM.normal(size=(TOKENS, 8)).astype(np.float32),
    "first": np.int64(0),
    "third": np.int64(2),
    "list": np.array([2]),
    "two": np.array([3, 1]),
    "table": np.array([[0, 1]]),
    "all": np.arange(TOKENS),
    "start": np.array([2]),
    "end": np.array([3]),
    "zero": np.array([0]),
    "one": np.array([1]),
    "starts": np.array([2, 0]),
    "ends": np.array([3, 4]),
    "axes": np.array([1, 2]),
    "minus": np.array([-1]),
}


def small(text: str, **weights: np.ndarray) -> Compilation:
    c = compilation(graph_of(f"g (float[B, 5, 8] x) => (float y) {{ {text} }}", **(WEIGHTS | weights)))
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    return c


def last_of(c: Compilation, op: str) -> Node:
    return c.graph.find(op)[-1]


LINEAR = "a = Relu(x) b = Neg(a) m = MatMul(b, w) n = Add(m, c) "
GATHER = "y = Gather <axis = 1> (n, third)"


def test_a_linear() -> None:
    c = small(LINEAR + GATHER)
    assert selected(c) == 1
    assert ops(c.graph) == ["Relu", "Neg", "Gather", "MatMul", "Add", "Gather"]
    assert [list(node.outputs[0].shape)[1:] for node in c.graph.nodes[2:]] == [[1, 8], [1, 6], [1, 6], [6]]


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        ("y = Gather <axis = 1> (n, third)", 1),
        ("y = Gather <axis = 1> (n, list)", 1),
        ("y = Gather <axis = 1> (n, two)", 2),
        ("y = Slice(n, start, end, one)", 1),
        ("y = Slice(n, start, end, one, one)", 1),
    ],
)
def test_selections(selection: str, count: int) -> None:
    c = small(LINEAR + selection)
    assert selected(c) == 1
    assert last_of(c, "MatMul").inputs[0].shape[1] == count
    assert ops(c.graph).count("Gather") == (2 if "third" in selection else 1)
    assert "Slice" not in ops(c.graph)


@pytest.mark.parametrize(
    "selection",
    [
        "y = Gather <axis = 1> (n, table)",
        "y = Gather <axis = 2> (n, third)",
        "y = Gather <axis = 0> (n, first)",
        "y = Gather <axis = 1> (n, all)",
        "y = Slice(n, starts, ends, axes)",
        "y = Slice(n, start, end)",
        "y = Slice(n, start, zero, one, minus)",
        "s = Shape(x) i = Gather(s, zero) y = Gather <axis = 1> (n, i)",
        "y = Relu(n)",
    ],
)
def test_what_selects_no_fixed_tokens(selection: str) -> None:
    c = small(LINEAR + selection)
    before = c.graph.text()
    changes = changes_of(c, "select-tokens-early")
    assert (changes, c.graph.clean().text()) == (0, before)


def test_readers_of_the_same_token_are_served_at_once() -> None:
    text = "p = Gather <axis = 1> (n, third) q = Gather <axis = 1> (n, list) r = Slice(n, start, end, one) y = Sum(p, q, r)"
    c = small(LINEAR + text)
    assert selected(c) == 1
    assert ops(c.graph).count("Gather") == 2
    total = last_of(c, "Sum")
    assert total.inputs[1] is total.inputs[2] is c.annotations.linears[0].output


def test_readers_of_different_tokens() -> None:
    assert selected(small(LINEAR + "p = Gather <axis = 1> (n, third) q = Gather <axis = 1> (n, first) y = Add(p, q)")) == 0


def test_a_reader_of_all_tokens() -> None:
    assert selected(small(LINEAR + "p = Gather <axis = 1> (n, list) y = Add(p, n)")) == 0


@pytest.mark.parametrize("form", ["third", "list"])
def test_a_selection_that_is_an_output_keeps_its_name(form: str) -> None:
    c = small(LINEAR + f"y = Gather <axis = 1> (n, {form})")
    shape = run_model(c.graph, feed_of(c.graph))[0].shape
    assert selected(c) == 1
    assert c.graph.output_names == ["y"]
    assert run_model(c.graph, feed_of(c.graph))[0].shape == shape


def test_two_outputs_of_the_same_token() -> None:
    text = f"g (float[B, 5, 8] x) => (float y, float z) {{ {LINEAR} y = Gather <axis = 1> (n, list) z = Slice(n, start, end, one) }}"
    c = compilation(graph_of(text, **WEIGHTS))
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    assert selected(c) == 1
    assert c.graph.output_names == ["y", "z"]


def test_a_result_that_is_an_output() -> None:
    c = compilation(graph_of(f"g (float[B, 5, 8] x) => (float y, float n) {{ {LINEAR} {GATHER} }}", **WEIGHTS))
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    assert selected(c) == 0


def test_a_linear_whose_input_others_read() -> None:
    c = small("a = Relu(x) m = MatMul(a, w) n = Add(m, c) p = Gather <axis = 1> (n, list) q = ReduceMean(a) y = Add(p, q)")
    assert selected(c) == 0


def test_a_product_of_activations() -> None:
    c = small("t = Transpose <perm = [0, 2, 1]> (x) n = MatMul(x, t) y = Gather <axis = 1> (n, third)")
    assert selected(c) == 0


ADDENDS = {
    "features": (np.shape(WEIGHTS["g"]), None),
    "number": ((), None),
    "row": ((1, 8), None),
    "plane of one row": ((1, 1, 8), None),
    "positions": ((1, TOKENS, 8), (1, 1, 8)),
    "positions without a batch": ((TOKENS, 8), (1, 8)),
    "one number per token": ((TOKENS, 1), (1, 1)),
}


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("shape", "kept"), ADDENDS.values(), ids=ADDENDS)
def test_constants_lose_their_other_tokens(shape: tuple[int, ...], kept: tuple[int, ...] | None, first: bool, op: str) -> None:
    k = (np.arange(int(np.prod(shape)), dtype=np.float32) + 1).reshape(shape)
    operands = "k, a" if first else "a, k"
    c = small(f"a = Neg(x) n = {op}({operands}) {GATHER}", k=k)
    assert selected(c) == 1
    constant = value(last_of(c, op).inputs[0 if first else 1])
    assert constant.shape == (kept or shape)
    if kept is not None:
        np.testing.assert_array_equal(constant, k[..., 2:3, :])


@pytest.mark.parametrize("op", ["Gelu", "Relu", "Sigmoid", "Tanh", "Erf"])
def test_elementwise_operations(op: str) -> None:
    c = small(f"a = Neg(x) n = {op}(a) {GATHER}")
    assert selected(c) == 1
    assert ops(c.graph) == ["Neg", "Gather", op, "Gather"]


def test_a_sum_with_itself_is_selected_once() -> None:
    c = small(f"a = Neg(x) n = Add(a, a) {GATHER}")
    assert selected(c) == 1
    assert ops(c.graph) == ["Neg", "Gather", "Add", "Gather"]


@pytest.mark.parametrize(
    "text",
    [
        "s = Gather <axis = 1> (x, list) a = Neg(x) n = Add(a, s) ",  # broadcast over the tokens
        "n = Relu(x) ",  # reads an input of the graph: nothing is saved by selecting earlier
        "a = Neg(x) n = Softmax <axis = 1> (a) ",
        "a = Neg(x) n = LayerNormalization <axis = 1> (a, g58) ",
        "a = Neg(x) n, mean = LayerNormalization <axis = -1> (a, g) z = Identity(mean) ",
        "a = Neg(x) n = Transpose <perm = [0, 2, 1]> (a) ",
        "a = Neg(x) n = CumSum(a, one) ",
    ],
)
def test_operations_that_are_left_alone(text: str) -> None:
    c = small(text + GATHER.replace("y", "p") + " y = Neg(p)" if "mean" not in text else text + GATHER)
    assert selected(c) == 0


@pytest.mark.parametrize(("axis", "changes"), [(-1, 1), (2, 1)])
def test_layernorm_over_features(axis: int, changes: int) -> None:
    c = small(f"a = Neg(x) n = LayerNormalization <axis = {axis}> (a, g) {GATHER}")
    assert selected(c) == changes
    assert last_of(c, "LayerNormalization").inputs[0].shape[1] == 1


@pytest.mark.parametrize(("causal", "changes"), [(0, 1), (1, 0)])
def test_causal_attention_counts_its_queries(causal: int, changes: int) -> None:
    c = small(f"a = Neg(x) b = Abs(x) n = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = {causal}> (a, b, b) {GATHER}")
    assert selected(c) == changes
    assert last_of(c, "Attention").inputs[0].shape[1] == (1 if changes else TOKENS)
    assert last_of(c, "Attention").inputs[1].shape[1] == TOKENS


# Tokens whose number is open


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("fused", [True, False])
def test_one_token_of_an_open_number(keys: str, fused: bool) -> None:
    c = compilation(open_vit(keys=keys, depth=2))
    run_passes(c, f"{FRONT if fused else FRONT.replace('fuse-attention', 'separate-heads')}")
    feed = random_feed(c.graph.inputs, size=16)
    before = run_model(c.graph, feed)
    assert changes_of(c, "select-tokens-early") > 0
    assert difference(before, run_model(c.graph, feed)) <= TOLERANCE
    assert [tokens if isinstance(tokens, int) else "open" for tokens in tokens_of(c, "proj")] == ["open", 1]
    assert tokens_of(c, "fc2")[1] == 1
    assert tokens_of(c, "qkv").count(1) == 0
    for size in (12, 21):
        other = random_feed(c.graph.inputs, size=size)
        assert run_model(c.graph, other)[0].shape == (2, 5)


@pytest.mark.parametrize(
    ("pick", "moved"),
    [
        ("Gather <axis = 1> (h, zero)", True),
        ("Gather <axis = 1> (h, last)", True),
        ("Gather <axis = 1> (h, one_row)", True),
        ("Slice(h, start, one_row, one_row)", True),
        ("Gather <axis = 1> (h, two)", False),
        ("Slice(h, start, end, one_row)", False),
        ("Slice(h, last_row, end, one_row)", False),
    ],
)
def test_what_is_picked_of_an_open_number(pick: str, moved: bool) -> None:
    """Several tokens may be more than there are, and a slice then gives fewer."""
    numbers = {"zero": np.array(0), "last": np.array(-1), "start": np.array([0]), "end": np.array([4]), "last_row": np.array([-2])}
    graph = graph_of(
        f"g (float[B, N, 4] x) => (float y) {{ a = Relu(x) h = Sigmoid(a) p = {pick} y = Neg(p) }}",
        **numbers,
        one_row=np.array([1]),
        two=np.array([0, 1]),
    )
    c = compilation(graph)
    c.annotations = Annotations()
    graph.infer_shapes()
    feed = {"x": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)}
    before = run_model(graph, feed)
    assert bool(changes_of(c, "select-tokens-early")) is moved
    assert difference(before, run_model(graph, feed)) == 0
