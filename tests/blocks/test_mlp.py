"""MLPs: two Linears joined by one activation."""

import numpy as np
import pytest

from tests.builders import Sizes, compilation, graph_of, run_passes, vit
from vitq_compiler.blocks.linear import find_linears
from vitq_compiler.blocks.mlp import ACTIVATIONS, Mlp, find_mlps

W = np.eye(4, dtype=np.float32)
NUMBER = np.array(1.702, np.float32)


def mlps(middle: str) -> list[Mlp]:
    text = f"m = MatMul(x, w) a = Add(m, c) {middle} n = MatMul(h, w2) y = Add(n, c2)"
    held = {"w": W, "w2": W, "c": W[0], "c2": W[1], "k": NUMBER}
    graph = graph_of(f"g (float[B, 4] x, float[B, 4] z) => (float[B, 4] y) {{ {middle and text} }}", **held)
    return find_mlps(graph, find_linears(graph))


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS - {"Silu"}))
def test_every_activation(kind: str) -> None:
    (mlp,) = mlps(f"h = {kind}(a)")
    assert mlp.activation.op == kind
    assert (mlp.fc1.matmul.inputs[1].name, mlp.fc2.matmul.inputs[1].name) == ("w", "w2")


@pytest.mark.parametrize(
    "middle",
    [
        "s = Sigmoid(a) h = Mul(a, s)",
        "s = Sigmoid(a) h = Mul(s, a)",
        "b = Mul(a, k) s = Sigmoid(b) h = Mul(a, s)",
        "b = Mul(k, a) s = Sigmoid(b) h = Mul(s, a)",
    ],
)
def test_products_with_a_sigmoid(middle: str) -> None:
    (mlp,) = mlps(middle)
    assert mlp.activation.op == "Mul"


@pytest.mark.parametrize(
    "middle",
    ["h = Neg(a)", "b = Relu(a) h = Relu(b)", "s = Sigmoid(z) h = Mul(a, s)", "h = Mul(a, a)", "b = Add(a, z) h = Relu(b)", "h = Relu(z)"],
)
def test_other_things_between_two_linears(middle: str) -> None:
    assert mlps(middle) == []


DEPTHWISE = "Conv <group = 4, pads = [1, 1]>"


@pytest.mark.parametrize(
    "convolution",
    [
        f"d = {DEPTHWISE} (t, kernel) b = Transpose <perm = [0, 2, 1]> (d) h = Relu(b)",
        f"d = {DEPTHWISE} (t, kernel) b = Relu(d) h = Transpose <perm = [0, 2, 1]> (b)",
    ],
)
def test_a_depthwise_convolution_between(convolution: str) -> None:
    def found(kernel: np.ndarray, text: str) -> list[Mlp]:
        text = f"a = MatMul(x, w) t = Transpose <perm = [0, 2, 1]> (a) {text} y = MatMul(h, w2)"
        graph = graph_of(f"g (float[B, 5, 4] x) => (float[B, 5, 4] y) {{ {text} }}", w=W, w2=W, kernel=kernel)
        return find_mlps(graph, find_linears(graph))

    (mlp,) = found(np.ones((4, 1, 3), np.float32), convolution)
    assert mlp.activation.op == "Relu"
    assert not mlp.plain
    assert found(np.ones((4, 4, 3), np.float32), convolution.replace("group = 4", "group = 1")) == []


def test_in_a_vision_transformer() -> None:
    c = compilation(vit(Sizes(depth=3)))
    run_passes(c, "canonicalize,recover-gelu,separate-linears")
    found = find_mlps(c.graph, find_linears(c.graph))
    assert [mlp.index for mlp in found] == [0, 1, 2]
    assert all(mlp.plain for mlp in found)
    assert all((mlp.fc1.in_features, mlp.fc1.out_features, mlp.fc2.out_features) == (8, 12, 8) for mlp in found)
