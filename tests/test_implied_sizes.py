"""What weights and tables of positions say of the sizes that inputs leave open."""

import numpy as np
import pytest

from tests.builders import graph_of
from vitq_compiler.graph import Graph
from vitq_compiler.implied_sizes import channel_sizes, find_patchings, implied_lengths, implied_sides, side_steps

WIDTH = 6
TOKENS = "c = Conv <strides = [4, 4]> (image, w) r = Reshape(c, flat) t = Transpose <perm = [0, 2, 1]> (r) "


def picture(text: str, size: str = "B, C, H, W", channels: int = 3, **tables: tuple[int, ...]) -> Graph:
    weights = {name: np.ones(shape, np.float32) for name, shape in {"w": (WIDTH, channels, 4, 4), **tables}.items()}
    numbers = {"flat": np.array([0, WIDTH, -1]), "one": np.array([1]), "sizes": np.array([1, WIDTH, 5, 5])}
    return graph_of(f"g (float[{size}] image) => (float y) {{ {text} }}", **weights, **numbers)


def sides(graph: Graph) -> list[tuple[int, ...]]:
    (patching,) = find_patchings(graph)
    return implied_sides(graph, patching)


@pytest.mark.parametrize(
    ("text", "size", "axes"),
    [
        (TOKENS + "y = Relu(t)", "B, C, H, W", (1, (2, 3))),
        ("p = Transpose <perm = [0, 3, 1, 2]> (image) y = Conv <strides = [4, 4]> (p, w)", "B, H, W, C", (3, (1, 2))),
        ("f = Cast <to = 1> (image) n = Sub(f, one_f) m = Div(n, one_f) y = Conv <strides = [4, 4]> (m, w)", "B, C, H, W", (1, (2, 3))),
        ("i = Identity(w) y = Conv <strides = [4, 4]> (image, i)", "B, C, H, W", (1, (2, 3))),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_channels_and_sides(text: str, size: str, axes: tuple[int, tuple[int, int]], channels: int) -> None:
    (patching,) = find_patchings(picture(text, size, channels, one_f=(1,)))
    assert (patching.channels, patching.sides) == axes
    assert channel_sizes([patching]) == {("image", axes[0]): channels}
    assert side_steps([patching]) == {("image", axis): 4 for axis in axes[1]}


def test_the_patch_of_a_stem() -> None:
    """Three convolutions and a pooling: 2 * 2 * 1 * 2 pixels a patch, and 2 from one to the next output of the first."""
    text = """a = Conv <strides = [2, 2]> (image, w) b = Relu(a) c = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)
        d = Conv(c, v) e = Conv <strides = [2, 2]> (d, v) r = Reshape(e, flat) t = Transpose <perm = [0, 2, 1]> (r) y = Add(t, table)"""
    graph = picture(text, v=(WIDTH, WIDTH, 1, 1), table=(1, 10, WIDTH))
    (patching,) = find_patchings(graph)
    assert (patching.steps, patching.patch, patching.width) == ((2, 2), (8, 8), WIDTH)
    assert sides(graph)[0] == (24, 24)


def test_what_no_convolution_reads_is_no_picture() -> None:
    assert find_patchings(graph_of("g (float[B, 3, H, W] image, float[3, 3] w) => (float y) { y = MatMul(image, w) }")) == []
    computed = "g (float[B, 3, H, W] image, float[6, 3, 4, 4] w) => (float y) { y = Conv <strides = [4, 4]> (image, w) }"
    assert find_patchings(graph_of(computed)) == []


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ((1, 9, WIDTH), [(12, 12)]),
        ((16, WIDTH), [(16, 16), (12, 12)]),
        ((1, 10, WIDTH), [(12, 12)]),  # with a class token
        ((1, 18, WIDTH), [(16, 16)]),  # and one of distillation
        ((1, 13, WIDTH), [(12, 12)]),  # and registers
        ((1, 12, WIDTH), [(12, 12)]),  # 9 + 3 as soon as a square is possible
        ((1, 193, WIDTH), [(48, 64), (64, 48)]),  # 12 by 16 patches and a class token
        ((1, 1, WIDTH), []),
    ],
)
def test_positions_in_a_row(table: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    for text in (TOKENS + "y = Add(t, table)", TOKENS + "y = Add(table, t)"):
        found = sides(picture(text, table=table))
        assert found[: len(expected)] == expected
        assert bool(found) == bool(expected)


@pytest.mark.parametrize(
    "text",
    [
        "c = Conv <strides = [4, 4]> (image, w) y = Add(c, table)",
        "c = Conv <strides = [4, 4]> (image, w) s = Shape(c) p = Resize <mode = 'cubic'> (table, , , s) y = Add(c, p)",
        "c = Conv <strides = [4, 4]> (image, w) p = Resize <mode = 'linear'> (table, , , sizes) y = Add(c, p)",
    ],
    ids=["fixed", "resized", "resized to a fixed size"],
)
def test_positions_in_a_plane(text: str) -> None:
    assert sides(picture(text.replace("'", '"'), table=(1, WIDTH, 5, 3))) == [(20, 12)]


def test_positions_in_a_plane_with_channels_last() -> None:
    text = "c = Conv <strides = [4, 4]> (image, w) t = Transpose <perm = [0, 2, 3, 1]> (c) y = Add(t, table)"
    assert sides(picture(text, table=(1, 5, 3, WIDTH))) == [(20, 12)]


def test_positions_by_distance() -> None:
    """BEiT's: 5 * 5 distances between 3 by 3 patches, and three rows of the class token; a window's have no such rows."""
    text = TOKENS + "b = Gather(table, where) k = Transpose <perm = [0, 2, 1]> (t) s = MatMul(t, k) y = Add(s, b)"
    for rows, expected in ((28, [(12, 12)]), (25, [])):
        graph = graph_of(
            f"g (float[B, 3, H, W] image) => (float y) {{ {text} }}",
            w=np.ones((WIDTH, 3, 4, 4), np.float32),
            flat=np.array([0, WIDTH, -1]),
            table=np.ones((rows, 1), np.float32),
            where=np.zeros((9, 9), np.int64),
        )
        assert sides(graph) == expected


def test_what_is_no_table_of_positions() -> None:
    text = TOKENS + "a = Add(t, bias) m = MatMul(a, v) n = Add(m, computed_bias) y = Mul(n, table)"
    assert sides(picture(text, bias=(WIDTH,), v=(WIDTH, WIDTH), computed_bias=(1, 1, WIDTH), table=(1, 9, WIDTH))) == []


TEXTS = {
    "fixed": "y = Add(x, table)",
    "sliced": "p = Slice(table, zero, length, zero) y = Add(x, p)",
    "picked": "n = Squeeze(length, zero) r = Range(start, n, step) p = Gather(table, r) y = Add(x, p)",
    "sliced ids": "i = Slice(ids_of_positions, zero, length, one) p = Gather(table, i) y = Add(x, p)",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_lengths_of_texts(text: str) -> None:
    graph = graph_of(
        f"g (int64[B, L] ids) => (float y) {{ x = Gather(words, ids) length = Shape <start = 1, end = 2> (ids) {text} }}",
        words=np.ones((50, 4), np.float32),
        table=np.ones((20, 4), np.float32),
        zero=np.array([0]),
        one=np.array([1]),
        start=np.array(0),
        step=np.array(1),
        ids_of_positions=np.arange(20)[None],
    )
    assert implied_lengths(graph) == [20]
    assert find_patchings(graph) == []


def test_a_text_without_positions() -> None:
    assert implied_lengths(graph_of("g (int64[B, L] ids) => (float y) { y = Gather(w, ids) }", w=np.ones((9, 4), np.float32))) == []
