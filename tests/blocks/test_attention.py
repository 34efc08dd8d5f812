"""Attention: operands, columns, scale, mask; and near misses with their reason."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from tests.builders import QKV, SCALES, Dialect, Sizes, compilation, run_passes, vit
from vitq_compiler.annotations import understand
from vitq_compiler.blocks.attention import Attention, feeds_only, find_attention
from vitq_compiler.blocks.linear import find_linears
from vitq_compiler.graph import Graph
from vitq_compiler.pattern import MatchFailure

FRONT = "canonicalize,recover-gelu,separate-linears"
SIZES = Sizes(depth=1, width=12, heads=3)
Edit = Callable[[onnx.GraphProto], None]


def prepared(dialect: Dialect, edit: Edit | None = None) -> Graph:
    model = vit(SIZES, dialect)
    if edit is not None:
        edit(model.graph)
        model = onnx.shape_inference.infer_shapes(model)
    c = compilation(model)
    run_passes(c, FRONT)
    return c.graph


def found(graph: Graph) -> tuple[list[Attention], list[MatchFailure]]:
    return find_attention(graph, find_linears(graph))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("qkv", QKV)
def test_operands_in_every_dialect(qkv: str, scale: str) -> None:
    graph = prepared(Dialect(qkv=qkv, scale=scale))
    (attention,), failures = found(graph)
    assert failures == []
    assert (attention.heads, attention.mask, attention.index) == (3, None, 0)
    assert attention.scale == pytest.approx(0.5)
    width = np.arange(12)
    if qkv == "separate":
        starts = {"q": width, "k": width, "v": width}
        assert len(attention.linears) == 3
    elif qkv == "interleaved":
        heads = np.arange(36).reshape(3, 3, 4)
        starts = {name: heads[:, i].reshape(-1) for i, name in enumerate("qkv")}
    else:
        starts = {"q": width, "k": width + 12, "v": width + 24}
    for name, columns in starts.items():
        np.testing.assert_array_equal(getattr(attention, name).columns, columns)
    assert attention.proj.in_features == 12
    assert attention.proj.matmul is graph.find("MatMul")[len(attention.linears) + 2]


def node_of(graph: onnx.GraphProto, kind: str, index: int = 0) -> onnx.NodeProto:
    return [node for node in graph.node if node.op_type == kind][index]


def insert_before(graph: onnx.GraphProto, node: onnx.NodeProto, operand: int, kind: str, *others: str, **attributes: object) -> None:
    """Put a node on one edge."""
    name = f"inserted_{kind}"
    graph.node.insert(list(graph.node).index(node), onnx.helper.make_node(kind, [node.input[operand], *others], [name], name, **attributes))
    node = next(n for n in graph.node if n.output[0] == node.output[0])
    node.input[operand] = name


def constant(graph: onnx.GraphProto, name: str, array: np.ndarray) -> str:
    graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return name


def test_a_mask_between_scale_and_softmax() -> None:
    def edit(graph: onnx.GraphProto) -> None:
        insert_before(graph, node_of(graph, "Softmax"), 0, "Add", constant(graph, "mask", np.ones((5, 5))))

    graph = prepared(Dialect(dynamic=False), edit)
    (attention,), _ = found(graph)
    assert attention.mask is graph.tensor("mask")
    assert attention.scale == pytest.approx(0.5)


def second_mask(graph: onnx.GraphProto) -> None:
    for name in ("mask", "mask2"):
        softmax = node_of(graph, "Softmax")
        graph.node.insert(
            list(graph.node).index(softmax),
            onnx.helper.make_node("Add", [softmax.input[0], constant(graph, name, np.ones((5, 5)))], [f"with_{name}"], name),
        )
        node_of(graph, "Softmax").input[0] = f"with_{name}"


def scale_after_mask(graph: onnx.GraphProto) -> None:
    insert_before(graph, node_of(graph, "Softmax"), 0, "Add", constant(graph, "mask", np.ones((5, 5))))
    softmax = node_of(graph, "Softmax")
    graph.node.insert(
        list(graph.node).index(softmax),
        onnx.helper.make_node("Mul", [softmax.input[0], constant(graph, "two", np.array(2))], ["twice"], "m"),
    )
    node_of(graph, "Softmax").input[0] = "twice"


def scale_per_head(graph: onnx.GraphProto) -> None:
    insert_before(graph, node_of(graph, "Softmax"), 0, "Mul", constant(graph, "temperature", np.arange(1, 4).reshape(3, 1, 1)))


def context(graph: onnx.GraphProto) -> onnx.NodeProto:
    softmax = node_of(graph, "Softmax")
    return next(node for node in graph.node if softmax.output[0] in node.input)


def scaled_values(graph: onnx.GraphProto) -> None:
    insert_before(graph, context(graph), 1, "Mul", constant(graph, "two", np.array(2)))


def bent_queries(graph: onnx.GraphProto) -> None:
    scores = next(n for n in graph.node if n.op_type == "MatMul" and n.output[0] == node_of(graph, "Mul").input[0])
    insert_before(graph, scores, 0, "Relu")


def probabilities_read_twice(graph: onnx.GraphProto) -> None:
    extra = onnx.helper.make_node("Relu", [node_of(graph, "Softmax").output[0]], ["again"], "again")
    graph.node.append(extra)
    graph.output.append(onnx.helper.make_tensor_value_info("again", 1, [2, 3, 5, 5]))


def heads_in_disorder(graph: onnx.GraphProto) -> None:
    merge = [node for node in graph.node if node.op_type == "Transpose"][-1]
    assert list(merge.attribute[0].ints) == [0, 2, 1, 3]
    merge.attribute[0].ints[:] = [0, 2, 3, 1]


def bent_heads(graph: onnx.GraphProto) -> None:
    merge = [node for node in graph.node if node.op_type == "Transpose"][-1]
    insert_before(graph, merge, 0, "Relu")


NEAR_MISSES: dict[str, tuple[Edit, str]] = {
    "two masks": (second_mask, "cannot tell the scores from the mask"),
    "mask below the scaling": (scale_after_mask, "two masks, or one below the scaling"),
    "scale per head": (scale_per_head, "the scores are scaled by a tensor"),
    "scaled values": (scaled_values, "the values are scaled"),
    "bent queries": (bent_queries, "an operand comes from Relu, not from a Linear"),
    "probabilities read twice": (probabilities_read_twice, "is read by MatMul, Relu, not by one MatMul"),
    "heads in disorder": (heads_in_disorder, "the heads are not merged in order"),
    "bent heads": (bent_heads, "is read by Relu, not by one Transpose or Reshape or MatMul or Identity"),
}


@pytest.mark.parametrize(("edit", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(edit: Edit, reason: str) -> None:
    attentions, failures = found(prepared(Dialect(dynamic=False), edit))
    assert attentions == []
    (failure,) = failures
    assert reason in failure.reason
    assert failure.where.startswith("Softmax")


def test_indices_count_blocks_in_graph_order() -> None:
    c = compilation(vit(Sizes(depth=3)))
    run_passes(c, FRONT)
    attentions = understand(c.graph).attentions
    assert [attention.index for attention in attentions] == [0, 1, 2]
    positions = [c.graph.nodes.index(attention.softmax) for attention in attentions]
    assert positions == sorted(positions)


def test_feeds_only() -> None:
    graph = prepared(Dialect(qkv="split"))
    (attention,), _ = found(graph)
    assert feeds_only(graph, attention.v.linear.output, attention)
    graph.insert("Relu", [attention.v.linear.output], name="other")
    assert not feeds_only(graph, attention.v.linear.output, attention)
