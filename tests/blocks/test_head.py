"""Which last Linear layers give classes, and which give embeddings, boxes or feature maps."""

import numpy as np
import pytest

from tests.builders import Sizes, compilation, graph_of, run_passes, vit
from vitq_compiler.annotations import understand
from vitq_compiler.graph import Layout


def ends(text: str, kind: str = "float[B, 4] x", outputs: str = "float y", **widths: int) -> tuple[list[str], frozenset[str]]:
    """Roles of the Linear layers, and the outputs that hold classes; a weight [4, n] and a bias for each of ``widths``."""
    held = {name: np.ones((4, width), np.float32) for name, width in widths.items()}
    held |= {f"{name}_bias": np.ones(width, np.float32) for name, width in widths.items()}
    graph = graph_of(f"g ({kind}) => ({outputs}) {{ {text} }}", **held, one=np.array([1]), zero=np.array([0]), k=np.array([3]))
    if kind.startswith("float[1"):
        graph.layouts = {"x": Layout(batched=False, channels=0)}
    found = understand(graph)
    return [linear.role for linear in found.linears], found.class_outputs


PLAIN = "m = MatMul(x, w) y = Add(m, w_bias)"


@pytest.mark.parametrize("width", [2, 5, 10, 100, 1000, 21843])
def test_classes(width: int) -> None:
    assert ends(PLAIN, w=width) == (["head"], {"y"})


@pytest.mark.parametrize("width", [1, 64, 512, 768, 1280])
def test_embeddings_and_single_numbers(width: int) -> None:
    assert ends(PLAIN, w=width) == (["output"], frozenset())


@pytest.mark.parametrize(("width", "role"), [(512, "output"), (48, "output"), (16, "output"), (5, "head"), (1000, "head")])
def test_without_bias_embeddings_are_likelier(width: int, role: str) -> None:
    assert ends("y = MatMul(x, w)", w=width)[0] == [role]


@pytest.mark.parametrize("after", ["Softmax(m)", "LogSoftmax(m)", "ArgMax(m)"])
def test_a_decision_makes_any_width_one_of_classes(after: str) -> None:
    roles, classes = ends(f"m = MatMul(x, w) y = {after}", w=512)
    assert roles == ["head"]
    assert ("y" in classes) == ("Soft" in after)


@pytest.mark.parametrize(
    "after",
    [
        "s = Mul(y0, y0) t = ReduceSum(s, one) r = Sqrt(t) y = Div(y0, r)",
        "y = Mul(y0, x0)",
        "y = Relu(y0)",
        "t = ReduceMean(y0, one) y = Sub(y0, t)",
    ],
)
def test_what_is_normalized_or_mixed_with_others_is_no_class(after: str) -> None:
    roles, classes = ends(f"m = MatMul(x, w) y0 = Add(m, w_bias) {after}", "float[B, 4] x, float[B, 5] x0", w=5)
    assert (roles, classes) == (["output"], frozenset())


@pytest.mark.parametrize(
    "after", ["y = Sigmoid(y0)", "y = Mul(y0, k)", "u = Unsqueeze(y0, one) y = Squeeze(u, one)", "y = Cast <to = 1> (y0)"]
)
def test_what_leaves_the_largest_where_it_is_may_follow(after: str) -> None:
    text = f"m = MatMul(x, w) y0 = Add(m, w_bias) f = Cast <to = 1> (k) {after.replace('k)', 'f)')}"
    assert ends(text, w=5) == (["head"], {"y"})


def test_two_heads_averaged() -> None:
    text = "a = MatMul(x, w) b = MatMul(x, v) s = Add(a, b) f = Cast <to = 1> (k) y = Div(s, f)"
    assert ends(text, w=5, v=5) == (["head", "head"], {"y"})


def test_of_every_token_no_decision_is_compared() -> None:
    tokens = "float[B, 6, 4] x"
    assert ends(PLAIN, tokens, w=21) == (["head"], frozenset()), "classes of tokens, as for segmentation"
    assert ends(PLAIN, tokens, w=256) == (["output"], frozenset()), "a feature map"
    assert ends(PLAIN, tokens, w=32) == (["output"], frozenset())


def test_feature_pyramids_have_no_heads() -> None:
    text = "a = MatMul(x, w) p = Add(a, w_bias) q = Transpose <perm = [0, 2, 1]> (p) b = MatMul(x, v) r = Add(b, v_bias)"
    roles, classes = ends(text, "float[B, 6, 4] x", "float q, float r", w=256, v=256)
    assert (roles, classes) == (["output", "output"], frozenset())


def test_one_picture_without_a_batch() -> None:
    assert ends("m = MatMul(x, w) y = Squeeze(m, zero)", "float[1, 4] x", w=5) == (["head"], {"y"})
    assert ends("y = MatMul(x, w)", "float[1, 4] x", w=5) == (["head"], {"y"})


def test_an_embedding_keeps_its_last_layer_in_float() -> None:
    c = compilation(vit(Sizes(classes=512)))
    run_passes(c, "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate")
    assert c.annotations.linears[-1].role == "output"
    assert any(note.reason == "role output stays in float in recipe w8a8" for note in c.notes)
