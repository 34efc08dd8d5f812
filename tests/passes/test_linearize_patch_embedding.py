"""linearize-patch-embedding: the convolution as a Linear, and images it cannot cut."""

import numpy as np
import pytest

from tests.builders import (
    Dialect,
    Sizes,
    assert_golden,
    changes_of,
    compilation,
    difference,
    feed_of,
    graph_of,
    ops,
    run_model,
    run_passes,
    vit,
)
from vitq_compiler.annotations import understand
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge, QuantSpec
from vitq_compiler.sizes import Probe

CONV = "c = Conv <strides = {strides}, kernel_shape = {strides}> (image, w{bias}) "
TOKENS = "r = Reshape(c, shape) t = Transpose <perm = [0, 2, 1]> (r) y = Relu(t)"
TEXT = CONV + TOKENS


def embedding(high: int = 2, wide: int = 2, size: str = "4, 8", *, bias: bool = True, text: str = TEXT) -> Compilation:
    """A patch embedding of 5 channels, annotated, with specs on its edges."""
    random = np.random.default_rng(0)
    weights = {"w": random.normal(size=(5, 3, high, wide)).astype(np.float32), "shape": np.array([0, 5, -1])}
    if bias:
        weights["c0"] = random.normal(size=5).astype(np.float32)
    full = text.format(strides=[high, wide], bias=", c0" if bias else "")
    c = compilation(graph_of(f"g (float[B, 3, {size}] image) => (float y) {{ {full} }}", **weights))
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    for node in c.annotations.patch_embeddings:
        for index in (0, 1):
            c.specs[Edge(node.name, index)] = QuantSpec()
    return c


def linearized(c: Compilation, shape: tuple[int, ...] = (4, 8)) -> int:
    """The changes; outputs are kept to 1e-5."""
    feed = {"image": np.random.default_rng(1).normal(size=(3, 3, *shape)).astype(np.float32)}
    before = run_model(c.graph, feed)
    changes = changes_of(c, "linearize-patch-embedding")
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    return changes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("high", "wide"), [(2, 2), (4, 4), (1, 1), (4, 2), (2, 8)])
def test_cuts_patches(high: int, wide: int, bias: bool) -> None:
    c = embedding(high, wide, bias=bias)
    assert linearized(c) == 1
    assert ops(c.graph) == ["Reshape", "Transpose", "Reshape", "MatMul", *(["Add"] if bias else []), "Relu"]
    (linear,) = c.annotations.linears
    assert (linear.role, linear.in_features, linear.out_features) == ("patch_embed", 3 * high * wide, 5)
    assert (linear.bias is not None) is bias
    assert set(c.specs) == {Edge(linear.name, 0), Edge(linear.name, 1)}, "the specs follow"
    assert c.annotations.patch_embeddings == []


def test_golden() -> None:
    c = embedding()
    linearized(c)
    assert_golden(c.graph, "linearize_patch_embedding")


def test_flatten_instead_of_reshape() -> None:
    text = "c = Conv <strides = {strides}> (image, w{bias}) n = Transpose <perm = [0, 2, 3, 1]> (c) r = Reshape(n, rows) y = Relu(r)"
    random = np.random.default_rng(0)
    graph = graph_of(
        f"g (float[B, 3, 4, 8] image) => (float y) {{ {text.format(strides=[2, 2], bias='')} }}",
        w=random.normal(size=(5, 3, 2, 2)).astype(np.float32),
        rows=np.array([-1, 8, 5]),
    )
    c = compilation(graph)
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    assert linearized(c) == 1
    assert "Conv" not in ops(c.graph)


@pytest.mark.parametrize(("size", "patch"), [((8,), (2,)), ((4, 4, 6), (2, 2, 3))])
def test_patches_of_signals_and_videos(size: tuple[int, ...], patch: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    graph = graph_of(
        f"g (float[B, 3, {str(size).strip('(),')}] image) => (float y) {{ {TEXT.format(strides=list(patch), bias='')} }}",
        w=random.normal(size=(5, 3, *patch)).astype(np.float32),
        shape=np.array([0, 5, -1]),
    )
    c = compilation(graph)
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    assert linearized(c, size) == 1
    assert "Conv" not in ops(c.graph)


def kept(c: Compilation, shape: tuple[int, int], reason: str) -> None:
    """The pass leaves ``c`` alone for ``reason`` and takes the specs back."""
    assert c.specs
    before = ops(c.graph)
    assert linearized(c, shape) == 0
    assert ops(c.graph) == before
    assert c.specs == {}
    (note,) = c.notes
    assert note.reason.startswith("patch embedding stays in float: ")
    assert reason in note.reason


@pytest.mark.parametrize("size", ["H, W", "8, W", "H, 8", "S, S"])
@pytest.mark.parametrize(("high", "wide"), [(2, 2), (4, 2)])
def test_an_open_image_size(size: str, high: int, wide: int) -> None:
    """Any size, also one that leaves pixels over, which the convolution does not read either."""
    c = embedding(high, wide, size)
    before = c.graph.snapshot()
    assert linearized(c, (8, 8)) == 1
    assert "Conv" not in ops(c.graph)
    (linear,) = c.annotations.linears
    assert (linear.in_features, set(c.specs)) == (3 * high * wide, {Edge(linear.name, 0), Edge(linear.name, 1)})
    for height, width in ((8, 8), (4, 10), (9, 8), (8, 11), (13, 7)):
        sides = (
            (height, height)
            if size == "S, S"
            else tuple(8 if "8" in s else n for s, n in zip(size.split(","), (height, width), strict=True))
        )
        feed = {"image": np.random.default_rng(1).normal(size=(2, 3, *sides)).astype(np.float32)}
        assert difference(run_model(before, feed), run_model(c.graph, feed)) <= 1e-5


def test_sizes_that_are_always_whole_patches_are_not_cut_off() -> None:
    c = embedding(size="H, W")
    c.probes = [Probe(2, {"image": (0, 3, 8, 8)}), Probe(3, {"image": (0, 3, 6, 4)})]
    assert linearized(c) == 1
    assert "Slice" not in ops(c.graph)


@pytest.mark.parametrize("size", ["5, 8", "4, 9", "7, 11"])
def test_an_image_that_is_no_multiple_of_the_patch(size: str) -> None:
    c = embedding(size=size)
    assert linearized(c, tuple(map(int, size.split(", ")))) == 1
    assert ops(c.graph) == ["Slice", "Reshape", "Transpose", "Reshape", "MatMul", "Add", "Relu"]


@pytest.mark.parametrize("part", ["", "<start = 2>", "<start = 1, end = 3>", "<start = -2, end = -1>"])
def test_shapes_of_the_convolution(part: str) -> None:
    """Positions are resized to the shape of what they are added to."""
    text = CONV + f"s = Shape {part} (c) f = Cast <to = 1> (s) m = ReduceMax(f) " + TOKENS.replace("Relu(t)", "Mul(t, m)")
    c = embedding(size="H, W", text=text)
    before = c.graph.snapshot()
    assert linearized(c, (8, 12)) == 1
    assert "Conv" not in ops(c.graph), "nothing reads it any more"
    feed = {"image": np.ones((2, 3, 6, 4), np.float32)}
    assert difference(run_model(before, feed), run_model(c.graph, feed)) <= 1e-5


@pytest.mark.parametrize(
    "rest",
    [
        "y = Relu(c)",
        "r = Reshape(c, shape) y = Relu(r)",
        "r = Reshape(c, shape) t = Transpose <perm = [2, 1, 0]> (r) y = Relu(t)",
        "r = Reshape(c, shape) t = Transpose <perm = [0, 2, 1]> (r) q = ReduceSum(c) y = Add(t, q)",
        "p = Transpose <perm = [0, 1, 3, 2]> (c) r = Reshape(p, shape) t = Transpose <perm = [0, 2, 1]> (r) y = Relu(t)",
    ],
)
def test_outputs_that_are_no_tokens(rest: str) -> None:
    kept(embedding(text=CONV + rest), (4, 8), "its output is not flattened to [batch, tokens, channels]")


@pytest.mark.parametrize(
    "attributes",
    ["strides = [1, 1]", "strides = [2, 1]", "strides = [2, 2], pads = [1, 1, 1, 1]", "strides = [4, 4]"],
)
def test_overlapping_padded_and_gapped_convolutions_are_none(attributes: str) -> None:
    c = embedding(text=f"c = Conv <{attributes}> (image, w{{bias}}) y = Relu(c)")
    assert c.annotations.patch_embeddings == []


def test_dilated_convolutions_are_none() -> None:
    c = embedding(text="c = Conv <strides = [2, 2], dilations = [2, 2]> (image, w{bias}) " + TOKENS)
    assert c.annotations.patch_embeddings == []


def test_an_inner_convolution_is_none() -> None:
    c = embedding(text="a = Relu(image) b = MaxPool <kernel_shape = [1, 1]> (a) y = Conv <strides = [2, 2]> (b, w{bias})")
    assert c.annotations.patch_embeddings == []


def test_elementwise_preprocessing_before_it() -> None:
    text = "n = Sub(image, mean) " + TEXT.replace("(image, w", "(n, w")
    graph = graph_of(
        f"g (float[B, 3, 4, 8] image) => (float y) {{ {text.format(strides=[2, 2], bias='')} }}",
        mean=np.arange(3, dtype=np.float32).reshape(3, 1, 1),
        w=np.ones((5, 3, 2, 2), np.float32),
        shape=np.array([0, 5, -1]),
    )
    c = compilation(graph)
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    assert linearized(c) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_in_a_vision_transformer(dynamic: bool) -> None:
    c = compilation(vit(Sizes(depth=1), Dialect(dynamic=dynamic)))
    run_passes(c, "canonicalize,recover-gelu,separate-linears,annotate")
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    assert changes_of(c, "linearize-patch-embedding") == 1
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    assert c.annotations.linears[0].role == "patch_embed"
