"""annotate: roles, specs, exclusions, and models that are no vision transformer."""

import re
from dataclasses import replace

import numpy as np
import onnx
import pytest

from tests.builders import DIALECTS, Dialect, Sizes, compilation, graph_of, model_of, roles_of, run_passes, vit
from vitq_compiler.annotations import understand
from vitq_compiler.errors import ModelError
from vitq_compiler.pipeline import Compilation, Note
from vitq_compiler.quant import Edge
from vitq_compiler.recipe import Recipe, load_recipe

FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,fold-layer-scale,annotate"


def annotated(model: onnx.ModelProto, recipe: Recipe | None = None) -> Compilation:
    c = compilation(model, recipe=recipe)
    run_passes(c, FRONT)
    return c


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_roles_and_blocks_in_every_dialect(dialect: Dialect) -> None:
    sizes = Sizes()
    c = annotated(vit(sizes, dialect))
    linears = c.annotations.linears
    assert [linear.role for linear in linears] == roles_of(sizes, dialect)
    per_block = [len([r for r in roles_of(sizes, dialect)[:-1] if r in ("qkv", "proj")]) // 2, 2]
    expected = [name for i in range(2) for name, n in zip((f"attention {i}", f"mlp {i}"), per_block, strict=True) for _ in range(n)]
    assert [linear.block for linear in linears] == [*expected, ""]
    assert [a.heads for a in c.annotations.attentions] == [2, 2]
    assert len(c.annotations.patch_embeddings) == 1
    assert set(c.annotations.block_edges) == set(expected)


def test_specs_are_those_of_the_recipe() -> None:
    recipe = load_recipe("w8a8")
    c = annotated(vit(), recipe)
    wanted = {linear.name for linear in c.annotations.linears if linear.role != "head"} | {c.annotations.patch_embeddings[0].name}
    assert set(c.specs) == {Edge(name, index) for name in wanted for index in (0, 1)}
    assert {spec for edge, spec in c.specs.items() if edge.index == 0} == {recipe.activation}
    assert {spec for edge, spec in c.specs.items() if edge.index == 1} == {c.target.fit_weight(recipe.weight, recipe.activation)}
    head = c.annotations.linears[-1]
    assert Note("annotate", head.name, "role head stays in float in recipe w8a8") in c.notes


def test_operands_of_attention_get_what_the_recipe_has() -> None:
    recipe = replace(load_recipe("w8a8"), attention={"q": {}, "probs": {"bits": 6}})
    c = annotated(vit(), recipe)
    for attention in c.annotations.attentions:
        assert {operand: c.specs[edge].bits for operand, edge in attention.edges.items() if edge in c.specs} == {"q": 8, "probs": 6}
    softmax = c.annotations.attentions[0].softmax.name
    c = annotated(vit(), recipe.excluding((f"^{softmax}$",)))
    assert [any(e in c.specs for e in a.edges.values()) for a in c.annotations.attentions] == [False, True]
    assert Note("annotate", softmax, f"excluded by '^{softmax}$'") in c.notes


def test_exclusion_by_name() -> None:
    name = next(linear.name for linear in annotated(vit()).annotations.linears if linear.role == "fc1")
    c = annotated(vit(), load_recipe("w8a8").excluding((f"^{name}$",)))
    assert Edge(name, 0) not in c.specs
    assert Edge(name, 1) not in c.specs
    assert Note("annotate", name, f"excluded by '^{name}$'") in c.notes
    assert len(c.specs) == len(annotated(vit()).specs) - 2


def test_exclusion_by_scope() -> None:
    model = vit()
    matmuls = [node for node in model.graph.node if node.op_type == "MatMul"]
    matmuls[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'blocks.0.attn.qkv', 'matmul']")
    c = annotated(model, load_recipe("w8a8").excluding((r"blocks\.0\.attn",)))
    excluded = [linear for linear in c.annotations.linears if linear.role != "head" and Edge(linear.name, 0) not in c.specs]
    assert [linear.name for linear in excluded] == [matmuls[0].name]
    assert excluded[0].role == "qkv"


def test_a_model_of_which_nothing_is_left() -> None:
    with pytest.raises(ModelError, match="every Linear is excluded or of a role that the recipe keeps in float"):
        annotated(vit(), load_recipe("w8a8").excluding((".",)))
    every = replace(load_recipe("w8a8"), float_roles=("qkv", "proj", "fc1", "fc2", "head", "patch_embed"))
    with pytest.raises(ModelError, match="every Linear is excluded"):
        annotated(vit(), every)


def test_a_model_without_a_softmax() -> None:
    model = model_of("g (float[B, 4] x) => (float[B, 4] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match="no transformer block found") as caught:
        annotated(model)
    assert "no softmax of a product" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_nearest_miss_is_named() -> None:
    model = model_of("g (float[B, 4] x) => (float[B, 4] y) { p = Softmax(x) y = MatMul(p, w) }", w=np.eye(4, dtype=np.float32))
    model.graph.node[0].name = "the_softmax"
    with pytest.raises(ModelError, match=re.escape("the_softmax: the softmax input comes from a graph input")):
        annotated(model)


def with_softmax(*, read: bool) -> onnx.ModelProto:
    """A ViT whose logits also pass through a Softmax, which a MatMul reads or nothing."""
    model = vit()
    model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["probabilities"], "classifier"))
    if read:
        model.graph.node.append(onnx.helper.make_node("MatMul", ["probabilities", "prices"], ["price"], "dot"))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((5, 1), np.float32), "prices"))
    name, width = ("price", 1) if read else ("probabilities", 5)
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, ["batch", width]))
    return model


def not_attention(c: Compilation) -> list[str]:
    return [note.where for note in c.notes if note.reason.startswith("not an attention block")]


def test_what_is_almost_an_attention_becomes_a_note() -> None:
    c = annotated(with_softmax(read=True))
    assert len(c.annotations.attentions) == 2
    assert not_attention(c) == ["classifier"]


def test_the_softmax_of_a_classifier_is_no_near_miss() -> None:
    c = annotated(with_softmax(read=False))
    assert len(c.annotations.attentions) == 2
    assert not_attention(c) == []
    assert c.annotations.failures == []
    alone = model_of("g (float[B, 4] x) => (float[B, 4] y) { y = Softmax(x) }")
    with pytest.raises(ModelError, match="no softmax of a product"):
        annotated(alone)


def test_no_roles_outside_a_transformer() -> None:
    text = """g (float[B, 4] x) => (float[B, 4] y) {
        a = MatMul(x, w) b = Relu(a) d = MatMul(b, w) e = MatMul(x, w) f = Add(d, e) h = MatMul(f, w) y = Neg(h)
    }"""
    found = understand(graph_of(text, w=np.eye(4, dtype=np.float32)))
    assert [linear.role for linear in found.linears] == ["fc1", "fc2", "linear", "output"]
