"""The sizes of samples where a model leaves its axes open: who decides, and what is said of it."""

from dataclasses import replace

import numpy as np
import pytest

from tests.builders import graph_of
from vitq_compiler.graph import Graph
from vitq_compiler.preprocess import Preprocess, resolve
from vitq_compiler.sample_sizes import TOKENS, SampleSizes

ASSUMED = resolve(None, None)
TOLD = replace(ASSUMED, assumed=False)
FIXED = "y = Add(t, table)"
RESIZED = 's = Shape(c) p = Resize <mode = "cubic"> (plane, , , s) q = Reshape(p, flat) u = Transpose <perm = [0, 2, 1]> (q) y = Add(t, u)'
FREE = "y = Relu(t)"


def picture(rest: str, size: str = "B, C, H, W") -> Graph:
    return graph_of(
        f"""g (float[{size}] image) => (float y) {{
            c = Conv <strides = [4, 4]> (image, w) r = Reshape(c, flat) t = Transpose <perm = [0, 2, 1]> (r) {rest} }}""",
        w=np.ones((6, 3, 4, 4), np.float32),
        flat=np.array([0, 6, -1]),
        table=np.ones((1, 25, 6), np.float32),
        plane=np.ones((1, 6, 5, 5), np.float32),
    )


def sized(graph: Graph, preprocess: Preprocess) -> tuple[tuple[int | str, ...], list[str]]:
    """The shape of the samples of the one input, and the notes."""
    sizes = SampleSizes(graph, preprocess)
    assert sizes.notes == [], "nothing is tried before it is asked for"
    (spec,) = graph.inputs
    return sizes(spec).shape, sizes.notes


@pytest.mark.parametrize(
    ("rest", "preprocess", "side", "note"),
    [
        (FIXED, ASSUMED, 20, "samples are 20x20, which its positions are made for; for others pass --preprocess crop=HEIGHTxWIDTH"),
        (RESIZED, ASSUMED, 20, "samples are 20x20, which its positions are made for; for others pass --preprocess crop=HEIGHTxWIDTH"),
        (FREE, ASSUMED, 224, "samples are 224x224, as nothing tells it; for others pass --preprocess crop=HEIGHTxWIDTH"),
        (FIXED, TOLD, 20, "samples are 20x20, which its positions are made for; that of the preprocessing does not run"),
        (RESIZED, TOLD, 224, ""),
        (FREE, TOLD, 224, ""),
    ],
)
def test_pictures(rest: str, preprocess: Preprocess, side: int, note: str) -> None:
    shape, notes = sized(picture(rest), preprocess)
    assert shape == ("B", 3, side, side)
    assert notes == ([f"image leaves its size open: {note}"] if note else [])


def test_one_side_alone() -> None:
    shape, (note,) = sized(picture(RESIZED, "B, 3, 40, W"), ASSUMED)
    assert shape == ("B", 3, 40, 20)
    assert "samples are 20, which its positions are made for" in note
    assert sized(picture(FREE, "B, C, 8, 8"), ASSUMED) == (("B", 3, 8, 8), []), "there is nothing to say of channels"
    assert sized(picture(FREE, "B, 3, 8, 8"), ASSUMED) == (("B", 3, 8, 8), [])


def text(rest: str, rows: int) -> Graph:
    return graph_of(
        f"g (int64[B, L] ids) => (float y) {{ x = Gather(words, ids) length = Shape <start = 1, end = 2> (ids) {rest} }}",
        words=np.ones((50, 4), np.float32),
        table=np.ones((rows, 4), np.float32),
        zero=np.array([0]),
    )


SLICED = "p = Slice(table, zero, length, zero) y = Add(x, p)"


@pytest.mark.parametrize(
    ("rest", "rows", "length", "reason"),
    [
        (SLICED, 32, 23, "as it has positions for 32 tokens"),
        (SLICED, 512, TOKENS, "as it has positions for 512 tokens"),
        ("y = Add(x, table)", 32, 32, "as it has positions for 32 tokens"),
        ("y = Relu(x)", 32, TOKENS, "as nothing tells it"),
    ],
)
def test_texts(rest: str, rows: int, length: int, reason: str) -> None:
    shape, notes = sized(text(rest, rows), ASSUMED)
    assert shape == ("B", length)
    assert notes == [f"ids leaves its size open: samples are {length}, {reason}; for others pass a .npz"]


def test_pictures_beside_texts() -> None:
    graph = graph_of(
        """g (float[B, 3, H, W] image, int64[B, L] ids, int64[B, L] mask, float[B, F] features) => (float y, float z, float m, float n) {
            c = Conv <strides = [4, 4]> (image, w) y = Add(c, plane)
            x = Gather(words, ids) z = Add(x, table) m = Cast <to = 1> (mask) n = Relu(features) }""",
        w=np.ones((6, 3, 4, 4), np.float32),
        plane=np.ones((1, 6, 5, 3), np.float32),
        words=np.ones((50, 4), np.float32),
        table=np.ones((9, 4), np.float32),
    )
    sizes = SampleSizes(graph, ASSUMED)
    assert sizes.shapes == {"image": (0, 3, 20, 12), "ids": (0, 9), "mask": (0, 9), "features": (0, TOKENS)}
    assert [note.split(":")[0] for note in sizes.notes] == ["image leaves its size open", "ids leaves its size open"]
