"""fuse-attention: every way to write it becomes one operator, and what must be left alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from tests.builders import (
    QKV,
    SCALES,
    Dialect,
    Sizes,
    assert_golden,
    changes_of,
    compilation,
    difference,
    feed_of,
    model_of,
    ops,
    run_model,
    run_passes,
    vit,
)
from vitq_compiler.graph import is_constant, value
from vitq_compiler.passes import fuse_attention
from vitq_compiler.pipeline import Compilation, Note
from vitq_compiler.quant import Edge
from vitq_compiler.recipe import load_recipe

FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,fold-layer-scale,annotate"


def prepared(model: onnx.ModelProto) -> Compilation:
    c = compilation(model)
    run_passes(c, FRONT)
    return c


def fused(c: Compilation) -> int:
    """Number of blocks fused; outputs are kept to 1e-5."""
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    changes = changes_of(c, "fuse-attention")
    onnx.checker.check_model(c.graph.to_proto())
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    assert len(c.graph.find("Attention")) == changes
    return changes


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("qkv", QKV)
def test_every_dialect(qkv: str, scale: str) -> None:
    c = prepared(vit(Sizes(depth=2, width=12, heads=3, hidden=8), Dialect(qkv=qkv, scale=scale)))
    assert fused(c) == 2
    assert not {"Softmax", "Slice", "Squeeze", "Split"} & set(ops(c.graph))
    assert ops(c.graph).count("Transpose") == ops(c.graph).count("Gather") == 1, "of the patch embedding, and of the class token"
    assert [linear.role for linear in c.annotations.linears] == [*["qkv", "qkv", "qkv", "proj", "fc1", "fc2"] * 2, "head"]
    assert len(c.graph.find("MatMul")) == len(c.annotations.linears), "the products of activations are gone"
    for node in c.graph.find("Attention"):
        assert node.attrs["q_num_heads"] == node.attrs["kv_num_heads"] == 3
        assert node.attrs["scale"] == pytest.approx(0.5)
    assert all(attention.fused is not None for attention in c.annotations.attentions)


def test_golden() -> None:
    c = prepared(vit(Sizes(depth=1, width=4, heads=2, hidden=2, classes=2, image=4, patch=2), Dialect(qkv="interleaved", scale="q")))
    assert fused(c) == 1
    nodes = c.graph.text().partition("{\n")[2]
    start = nodes.index("LayerNormalization")
    lines = nodes[start:].splitlines()
    end = next(i for i, line in enumerate(lines) if "Attention" in line)
    assert [line.split("=")[1].split()[0] for line in lines[1 : end + 1]] == [*["MatMul"] * 3, *["Add"] * 3, "Attention"]
    assert_golden(c.graph, "fuse_attention", weights=False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_and_bias(heads: int, bias: bool) -> None:
    assert fused(prepared(vit(Sizes(depth=1, width=8, heads=heads, bias=bias), Dialect(qkv="interleaved")))) == 1


def edited(edit: Any, dialect: Dialect | None = None) -> Compilation:
    """A ViT of one block whose graph has been edited."""
    model = vit(Sizes(depth=1), dialect or Dialect(dynamic=False))
    edit(model.graph)
    return prepared(onnx.shape_inference.infer_shapes(model))


def node_of(graph: onnx.GraphProto, kind: str, index: int = 0) -> onnx.NodeProto:
    return [node for node in graph.node if node.op_type == kind][index]


def mask_of(graph: onnx.GraphProto, mask: Any) -> None:
    """Add a mask to the scores: a constant, or an input of the shape given."""
    if isinstance(mask, list):
        graph.input.append(onnx.helper.make_tensor_value_info("mask", 1, mask))
    else:
        graph.initializer.append(onnx.numpy_helper.from_array(mask, "mask"))
    softmax = node_of(graph, "Softmax")
    add = onnx.helper.make_node("Add", [softmax.input[0], "mask"], ["masked"], "add_mask")
    graph.node.insert(list(graph.node).index(softmax), add)
    node_of(graph, "Softmax").input[0] = "masked"


@pytest.mark.parametrize("shape", [(1, 1, 5, 5), (5, 5), (2, 5, 5), (2, 2, 5, 5), (1, 1, 1, 5), (2, 1, 1, 5), (5,), (1, 1, 5, 1)], ids=str)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_mask_is_passed_on(order: tuple[int, int], shape: tuple[int, ...]) -> None:
    def add_mask(graph: onnx.GraphProto) -> None:
        mask = np.where(np.arange(np.prod(shape)).reshape(shape) % 4 == 3, np.float32(-1e4), np.float32(0.5))
        graph.initializer.append(onnx.numpy_helper.from_array(mask, "mask"))
        softmax = node_of(graph, "Softmax")
        operands = [softmax.input[0], "mask"]
        index = list(graph.node).index(softmax)
        graph.node.insert(index, onnx.helper.make_node("Add", [operands[i] for i in order], ["masked"], "add_mask"))
        node_of(graph, "Softmax").input[0] = "masked"

    c = edited(add_mask)
    assert fused(c) == 1
    assert len(c.graph.find("Attention")[0].inputs) == 4
    assert list(c.graph.find("Attention")[0].inputs[3].shape)[-2:] == [5, 5], "as long as queries and keys"


def test_a_key_mask_is_spread_over_the_queries() -> None:
    keys = np.array([0, -1e4, 0.5, 0, -2], np.float32)
    c = edited(lambda graph: mask_of(graph, keys.reshape(1, 1, 1, 5)))
    assert fused(c) == 1
    spread = c.graph.find("Attention")[0].inputs[3]
    assert is_constant(spread)
    np.testing.assert_array_equal(value(spread), np.broadcast_to(keys, (1, 1, 5, 5)))


def test_a_computed_mask_of_every_head() -> None:
    """[1, heads, queries, keys], such as a relative position bias that is computed."""
    c = edited(lambda graph: mask_of(graph, [1, 2, 5, 5]))
    feed = feed_of(c.graph)
    assert np.ptp(feed["mask"]) > 1, "a mask that matters"
    assert fused(c) == 1
    assert [t.name for t in c.graph.find("Attention")[0].inputs][3] == "mask"


def test_a_computed_key_mask_is_refused() -> None:
    c = edited(lambda graph: mask_of(graph, [2, 1, 1, 5]))
    before = c.graph.text()
    assert fused(c) == 0
    (note,) = [note for note in c.notes if note.stage == "fuse-attention"]
    assert note.where == c.annotations.attentions[0].softmax.name
    assert note.reason == (
        "attention kept decomposed: its mask of shape [2, 1, 1, 5] is not one number for each of [5, 5] queries and keys"
    )
    assert c.graph.text() == before


@pytest.mark.parametrize(("shape", "fuses"), [([2, 1, 5, 5], 1), ([2, 1, 1, 5], 0), ([5], 0)], ids=str)
def test_a_computed_mask_must_have_its_full_size(shape: list[int], fuses: int) -> None:
    c = edited(lambda graph: mask_of(graph, shape))
    assert fused(c) == fuses
    assert fuses or "is not one number for each of [5, 5] queries and keys" in c.notes[-1].reason


def probabilities_as_output(graph: onnx.GraphProto) -> None:
    graph.output.append(onnx.helper.make_tensor_value_info(node_of(graph, "Softmax").output[0], 1, [2, 2, 5, 5]))


def test_probabilities_that_are_an_output_too() -> None:
    c = edited(probabilities_as_output)
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    changes_of(c, "fuse-attention")
    assert difference(before, run_model(c.graph, feed)) <= 1e-5


def qkv_as_output(graph: onnx.GraphProto) -> None:
    graph.output.append(onnx.helper.make_tensor_value_info(node_of(graph, "Add", 1).output[0], 1, [2, 5, 24]))


@pytest.mark.parametrize("qkv", ["interleaved", "gather", "split"])
def test_features_that_others_read_are_not_taken_apart(qkv: str) -> None:
    c = edited(qkv_as_output, Dialect(qkv=qkv, dynamic=False))
    before, specs = c.graph.text(), dict(c.specs)
    assert fused(c) == 0
    (note,) = [note for note in c.notes if note.stage == "fuse-attention"]
    name = c.annotations.attentions[0].q.linear.name
    assert note.reason == f"attention kept decomposed: {name} is read by more than this attention, so its features cannot be taken apart"
    assert note.where == c.annotations.attentions[0].softmax.name
    assert (c.graph.text(), c.specs) == (before, specs)


@pytest.mark.parametrize("which", [1, 2, 3], ids=["q", "k", "v"])
def test_a_linear_of_one_operand_may_be_read_by_others(which: int) -> None:
    def as_output(graph: onnx.GraphProto) -> None:
        graph.output.append(onnx.helper.make_tensor_value_info(node_of(graph, "Add", which).output[0], 1, [2, 5, 8]))

    c = edited(as_output, Dialect(qkv="separate", dynamic=False))
    linears, specs = list(c.annotations.linears), dict(c.specs)
    assert fused(c) == 1
    assert (c.annotations.linears, c.specs) == (linears, specs), "each is used as it is"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qkv", ["gather", "split", "interleaved"])
def test_a_linear_is_taken_apart_by_columns(qkv: str, bias: bool) -> None:
    c = prepared(vit(Sizes(depth=1, width=12, heads=3, bias=bias), Dialect(qkv=qkv)))
    attention = c.annotations.attentions[0]
    views = (attention.q, attention.k, attention.v)
    whole, columns = attention.q.linear, [view.columns for view in views]
    specs = [c.specs[Edge(whole.name, index)] for index in (0, 1)]
    c.notes.append(Note("annotate", whole.name, "a reason"))
    source, weight, offset = whole.input, value(whole.weight), value(whole.bias) if whole.bias is not None else None
    assert fused(c) == 1
    parts = [view.linear for view in views]
    assert [part.name for part in parts] == [f"{whole.name}/{letter}" for letter in "qkv"]
    assert c.annotations.linears[:3] == parts
    assert whole not in c.annotations.linears
    assert c.graph.find("Attention")[0].inputs == [part.output for part in parts]
    for part, kept, view in zip(parts, columns, views, strict=True):
        assert part.input is source, "one quantizer serves the three"
        assert (part.role, part.block, part.out_features) == ("qkv", "attention 0", 12)
        assert list(part.output.shape)[1:] == [5, 12]
        np.testing.assert_array_equal(value(part.weight), weight[:, kept])
        assert (part.bias is None) is (offset is None)
        if offset is not None:
            np.testing.assert_array_equal(value(part.bias), offset[kept])
        np.testing.assert_array_equal(view.columns, np.arange(12))
        assert [c.specs[Edge(part.name, index)] for index in (0, 1)] == specs
    assert {edge.node for edge in c.specs}.isdisjoint({whole.name})
    assert [note.where for note in c.notes if note.reason == "a reason"] == [part.name for part in parts]


def test_the_three_share_one_quantizer() -> None:
    c = prepared(vit(Sizes(depth=2, width=12, heads=3)))
    assert fused(c) == 2
    for name in ("calibrate", "compute-qparams", "insert-qdq"):
        changes_of(c, name)
    for attention in c.annotations.attentions:
        assert len({id(view.linear.input) for view in (attention.q, attention.k, attention.v)}) == 1
    quantizers = [node.inputs[0].name for node in c.graph.find("QuantizeLinear")]
    assert len(quantizers) == len(set(quantizers)) == 1 + 2 * 4


@pytest.mark.parametrize("installed", ["1.22", "1.23"])
def test_a_runtime_without_the_operator(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_attention, "INSTALLED", installed)
    c = prepared(vit(Sizes(depth=1)))
    before = c.graph.text()
    assert changes_of(c, "fuse-attention") == 0
    assert c.graph.text() == before
    assert (c.notes[-1].stage, c.notes[-1].where) == ("fuse-attention", "attention")
    assert c.notes[-1].reason == (
        "kept decomposed: the graph would need a newer onnxruntime than the installed one: QuantizeLinear of opset 23"
    )


def test_an_onnx_without_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    c = prepared(vit(Sizes(depth=1)))
    monkeypatch.setattr(fuse_attention.onnx.defs, "onnx_opset_version", lambda: 21)
    assert changes_of(c, "fuse-attention") == 0
    assert c.graph.opset == 20
    assert c.notes[-1].reason == f"kept decomposed: the installed onnx {fuse_attention.onnx.__version__} ends at opset 21, 23 is needed"


def test_another_operator_that_has_no_kernel_at_that_opset() -> None:
    """RoiAlign runs as it was in opset 16, and not as it is in 22."""
    c = prepared(vit(Sizes(depth=1)))
    graph = c.graph
    rois = graph.constant("rois", np.array([[0, 0, 2, 2]], np.float32))
    picture = graph.constant("picture", np.array([0], np.int64))
    crops = graph.insert("RoiAlign", [graph.input_tensors[0], rois, picture], name="crops", output_height=2, output_width=2)
    crops.dtype, crops.shape = np.dtype(np.float32), [1, 3, 2, 2]
    graph.set_outputs([*graph.outputs, crops])
    assert fused(c) == 0
    assert c.notes[-1].reason.endswith("RoiAlign of opset 22")
    assert graph.opset == 20


def test_batches_may_differ_afterwards() -> None:
    c = prepared(vit(replace(Sizes(), depth=1)))
    model = vit(Sizes(depth=1))
    assert fused(c) == 1
    for batch in (1, 3):
        feed = feed_of(c.graph, batch)
        assert difference(run_model(model, feed), run_model(c.graph, feed)) <= 1e-5


def test_products_that_are_to_be_quantized_stay() -> None:
    recipe = replace(load_recipe("w8a8"), attention={"v": {}})
    c = compilation(vit(), recipe=recipe.excluding((prepared(vit()).annotations.attentions[1].softmax.name,)))
    run_passes(c, FRONT)
    assert fused(c) == 1, "the block that the user keeps in float"
    assert [note.reason for note in c.notes if note.stage == "fuse-attention"] == [
        "attention kept decomposed: its products are to be quantized"
    ]


def test_tokens_that_lie_as_an_image_are_one_sequence() -> None:
    text = """g (float[B, 2, 3, 8] x) => (float y) {
        q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q = Transpose<perm = [0, 2, 1, 3]>(q1)
        k0 = MatMul(x, wk) k1 = Reshape(k0, heads) k = Transpose<perm = [0, 2, 3, 1]>(k1)
        v0 = MatMul(x, wv) v1 = Reshape(v0, heads) v = Transpose<perm = [0, 2, 1, 3]>(v1)
        s0 = MatMul(q, k) s = Add(s0, mask) p = Softmax<axis = -1>(s) o = MatMul(p, v)
        o1 = Transpose<perm = [0, 2, 1, 3]>(o) o2 = Reshape(o1, image) y = MatMul(o2, wp)
    }"""
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(8, 8)).astype(np.float32) for name in ("wq", "wk", "wv", "wp")}
    shapes = {"heads": np.array([-1, 6, 2, 4]), "image": np.array([-1, 2, 3, 8])}
    c = prepared(model_of(text, **weights, **shapes, mask=random.normal(size=(1, 2, 6, 6)).astype(np.float32)))
    assert fused(c) == 1
