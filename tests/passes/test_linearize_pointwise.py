"""linearize-pointwise: 1x1 convolutions become Linear layers, transposes between neighbours go, the rest stays with its reason."""

import numpy as np
import pytest

from tests.builders import changes_of, compilation, difference, feed_of, graph_of, ops, run_model, run_passes
from vitq_compiler.blocks.linear import find_linears
from vitq_compiler.blocks.mlp import find_mlps
from vitq_compiler.passes.linearize_pointwise import LinearizePointwise
from vitq_compiler.pipeline import Compilation

RANDOM = np.random.default_rng(0)


def drawn(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


WEIGHTS = {
    "up": drawn(8, 4, 1, 1),
    "down": drawn(4, 8, 1, 1),
    "line": drawn(8, 4, 1),
    "spatial": drawn(4, 4, 3, 3),
    "grouped": drawn(8, 2, 1, 1),
    "c8": drawn(8),
    "c4": drawn(4),
}


def rewritten(text: str, shape: str = "B, 4, 5, 3", least: float = 0.0) -> tuple[Compilation, int]:
    held = {name: array for name, array in WEIGHTS.items() if name in text}
    c = compilation(graph_of(f"g (float[{shape}] x) => (float y) {{ {text} }}", **held))
    run_passes(c, "canonicalize")
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    changes = LinearizePointwise(least=least).run(c)
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    return c, changes


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("y = Conv(x, up)", "B, 4, 5, 3"),
        ("y = Conv(x, up, c8)", "B, 4, 5, 3"),
        ("y = Conv <kernel_shape = [1, 1], pads = [0, 0, 0, 0], strides = [1, 1]> (x, up, c8)", "2, 4, 5, 3"),
        ("z = Conv(x, line, c8) y = Relu(z)", "B, 4, 7"),
    ],
    ids=["no bias", "bias", "attributes", "one axis"],
)
def test_one(text: str, shape: str) -> None:
    c, changes = rewritten(text, shape)
    assert changes == 1
    assert "Conv" not in ops(c.graph)
    (linear,) = find_linears(c.graph)
    assert (linear.in_features, linear.out_features) == (4, 8)
    assert (linear.bias is not None) == ("c8" in text)
    assert linear.output.shape[1:] == [*c.graph.tensor("x").shape[2:], 8]


def test_an_mlp_of_convolutions() -> None:
    c, changes = rewritten("h = Conv(x, up, c8) a = Gelu(h) z = Conv(a, down, c4) y = Add(x, z)")
    assert changes == 2
    assert ops(c.graph).count("Transpose") == 2, "one before the MLP and one behind it"
    (mlp,) = find_mlps(c.graph, find_linears(c.graph))
    assert mlp.plain


def test_a_product_with_the_gate_of_itself() -> None:
    c, changes = rewritten("h = Conv(x, up) s = Sigmoid(h) a = Mul(h, s) y = Conv(a, down)")
    assert changes == 2
    assert len(find_linears(c.graph)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "y = Conv <strides = [2, 2]> (x, up)",
        "y = Conv <pads = [1, 1, 1, 1]> (x, up)",
        "y = Conv <group = 2> (x, grouped)",
        "y = Conv(x, spatial)",
    ],
)
def test_other_convolutions(text: str) -> None:
    c, changes = rewritten(text)
    assert changes == 0
    assert ops(c.graph) == ["Conv"]
    assert c.notes == []


def test_a_single_pixel_stays() -> None:
    """Squeeze-and-excitation gates: one row each, nothing to gain."""
    _, changes = rewritten("p = GlobalAveragePool(x) y = Conv(p, up)")
    assert changes == 0


@pytest.mark.parametrize(
    ("text", "least", "reason"),
    [
        ("y = Conv(x, up)", 3.0, "a 1x1 convolution of 4 to 8 channels is no faster as an integer Linear"),
        ("s = Conv(x, spatial) r = Relu(s) y = Conv(r, up)", 0.0, "a 1x1 convolution beside Conv_0"),
        ("h = Conv(x, up) r = Relu(h) d = Conv(r, down) y = Conv(d, spatial)", 0.0, "a 1x1 convolution beside Conv_3"),
    ],
)
def test_what_is_left_alone(text: str, least: float, reason: str) -> None:
    c, _ = rewritten(text, least=least)
    (note,) = c.notes
    assert reason in note.reason


def test_again() -> None:
    c, _ = rewritten("h = Conv(x, up, c8) a = Gelu(h) z = Conv(a, down, c4) y = Add(x, z)")
    text = c.graph.text()
    assert changes_of(c, "linearize-pointwise") == 0
    assert c.graph.text() == text
