"""Patch embeddings: convolutions without overlap that read the image."""

import numpy as np
import pytest

from tests.builders import graph_of
from vitq_compiler.blocks.patch_embed import find_patch_embeddings

KERNEL = np.ones((5, 3, 2, 2), np.float32)


def count(text: str, kernel: np.ndarray = KERNEL) -> int:
    held = {"w": kernel, "mean": np.ones((3, 1, 1), np.float32), "flipped": np.array([2, 1, 0]), "twice": np.float32([1, 1, 2, 2])}
    graph = graph_of(f"g (float[B, 3, 4, 4] x, float[5, 3, 2, 2] z) => (float y) {{ {text} }}", **held)
    return len(find_patch_embeddings(graph))


@pytest.mark.parametrize(
    "text",
    [
        "y = Conv <strides = [2, 2]> (x, w)",
        "y = Conv <strides = [2, 2], pads = [0, 0, 0, 0], dilations = [1, 1], group = 1> (x, w)",
        "a = Sub(x, mean) b = Div(a, mean) y = Conv <strides = [2, 2]> (b, w)",
        "a = Identity(x) b = Cast <to = 1> (a) y = Conv <strides = [2, 2]> (b, w)",
        "a = Sub(mean, x) b = Clip(a) y = Conv <strides = [2, 2]> (b, w)",
        'r = Resize <mode = "linear"> (x, , twice) y = Conv <strides = [2, 2]> (r, w)',
        "t = Transpose <perm = [0, 2, 3, 1]> (x) u = Transpose <perm = [0, 3, 1, 2]> (t) y = Conv <strides = [2, 2]> (u, w)",
        "s = Gather <axis = 1> (x, flipped) y = Conv <strides = [2, 2]> (s, w)",
    ],
)
def test_patch_embeddings(text: str) -> None:
    assert count(text) == 1


@pytest.mark.parametrize(
    "text",
    [
        "y = Conv(x, w)",
        "y = Conv <strides = [1, 2]> (x, w)",
        "y = Conv <strides = [2, 2], pads = [0, 0, 1, 1]> (x, w)",
        "y = Conv <strides = [2, 2], dilations = [2, 2]> (x, w)",
        "y = Conv <strides = [2, 2]> (x, z)",
        "a = Relu(x) y = Conv <strides = [2, 2]> (a, w)",
        "a = Mul(x, x) y = Conv <strides = [2, 2]> (a, w)",
    ],
)
def test_other_convolutions(text: str) -> None:
    assert count(text) == 0


def test_one_picture_without_a_batch() -> None:
    graph = graph_of(
        """g (float[4, 4, 3] x) => (float y) {
            t = Transpose <perm = [2, 0, 1]> (x) u = Unsqueeze(t, zero) y = Conv <strides = [2, 2]> (u, w) }""",
        w=KERNEL,
        zero=np.array([0]),
    )
    assert len(find_patch_embeddings(graph)) == 1


def test_grouped_convolutions() -> None:
    assert count("y = Conv <strides = [2, 2], group = 3> (x, w)", np.ones((3, 1, 2, 2), np.float32)) == 0
