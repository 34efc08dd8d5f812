"""Every exact rewrite of the float graph as a golden file: what it does to the numbers of a small block, and to its nodes.

Numbers are small integers before, and those that a rewrite looks at stay exact in float32, so the files hold on any machine.
"""

from typing import Any

import numpy as np
import pytest

from tests.builders import assert_golden, compilation, difference, feed_of, find_pass, graph_of, run_model
from vitq_compiler.annotations import understand
from vitq_compiler.calibration import CalibrationTable, ChannelStatistics
from vitq_compiler.graph import Array, Graph
from vitq_compiler.pipeline import Compilation, _build
from vitq_compiler.quant import Edge, QuantSpec
from vitq_compiler.runtime import Feed

ATTENTION = """
    q0 = MatMul(n, wq) q = Add(q0, bq) qs = Reshape(q, heads) qh = Transpose <perm = [0, 2, 1, 3]> (qs) qt = Mul(qh, half)
    k0 = MatMul(n, wk) k = Add(k0, bk) ks = Reshape(k, heads) kh = Transpose <perm = [0, 2, 3, 1]> (ks)
    v0 = MatMul(n, wv) v = Add(v0, bv) vs = Reshape(v, heads) vh = Transpose <perm = [0, 2, 1, 3]> (vs)
    s = MatMul(qt, kh) p = Softmax <axis = -1> (s) o = MatMul(p, vh) ot = Transpose <perm = [0, 2, 1, 3]> (o)
    om = Reshape(ot, merged) m = MatMul(om, wp)
"""
STREAM = "e = MatMul(x, we) u = Add(e, be) n = LayerNormalization(u, {}) h = MatMul(n, wr) y = Add(h, bq)"
BLOCKS = {  # no weight has more than 8 elements, so that the files show them
    "attention": f"n = Identity(x) {ATTENTION} y = Add(m, bp)",
    "turned attention": f"n = Identity(x) {ATTENTION} y = Add(m, bp)".replace("Mul(qh, half)", "Mul(qh, turns)"),
    "stream": STREAM.format("g, b"),
    "plain stream": STREAM.format("ones, zeros"),
    "mlp": "h0 = MatMul(x, we) h1 = Add(h0, be) h = Relu(h1) m = MatMul(h, wr) y = Add(m, bq)",
}


def integers(*shape: int) -> Array:
    """Small whole numbers, the same for every shape."""
    return (np.arange(np.prod(shape)) * 7 % 5 - 2).reshape(shape).astype(np.float32)


CONSTANTS = {f"w{letter}": integers(2, 2) + np.float32(i) for i, letter in enumerate("qkvp")}
CONSTANTS |= {f"b{letter}": integers(2) * np.float32(i + 1) for i, letter in enumerate("qkvp")}
CONSTANTS |= {"we": integers(2, 4), "be": integers(4), "wr": integers(4, 2), "half": np.array(0.5, np.float32)}
CONSTANTS |= {"g": np.array([1, 2, 4, -1], np.float32), "b": np.array([0, 1, -2, 3], np.float32)}
CONSTANTS |= {"ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32)}
CONSTANTS |= {"turns": integers(3, 2)}  # what the positions do to the queries, so that only the values are known
CONSTANTS |= {"heads": np.array([1, 3, 1, 2]), "merged": np.array([1, 3, 2])}
LOW, HIGH = np.array([-1, -4, 0, -16], np.float32), np.array([1, 4, 2, 48], np.float32)


class WholeNumbers:
    """Calibration data on which products are exact."""

    calibration_count = 2

    def calibration(self) -> list[Feed]:
        return [{"x": integers(1, 3, 2)}]


def block(name: str) -> Compilation:
    text = BLOCKS[name]
    used = {key: array for key, array in CONSTANTS.items() if any(sign in text for sign in (f" {key})", f" {key},"))}
    c = compilation(graph_of(f"g (float[1, 3, 2] x) => (float y) {{ {text} }}", **used))
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    data: Any = WholeNumbers()
    c.data = data
    for linear in c.annotations.linears:
        c.specs[Edge(linear.name, 0)] = QuantSpec()
    seen = {linear.input.name: (LOW[-linear.in_features :], HIGH[-linear.in_features :]) for linear in c.annotations.linears}
    c.table = CalibrationTable({name: ChannelStatistics(low, high, (low + high) / 2) for name, (low, high) in seen.items()}, 1)
    return c


def outputs(graph: Graph) -> list[Array]:
    return run_model(graph, feed_of(graph, seed=3))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fold-attention-scale", "attention"),
        ("rotate-heads", "attention"),
        ("center-keys", "attention"),
        ("center-values", "attention"),
        ("equalize-heads", "attention"),
        ("equalize-values{strength=1}", "attention"),
        ("rotate-heads", "turned attention"),
        ("center-values", "turned attention"),
        ("equalize-values{strength=1}", "turned attention"),
        ("fold-layernorm-affine", "stream"),
        ("reparameterize-layernorm{strength=1}", "plain stream"),
        ("rotate-residual", "plain stream"),
        ("equalize-hidden{strength=1}", "mlp"),
    ],
)
def test_golden(text: str, name: str) -> None:
    c = block(name)
    before = outputs(c.graph)
    rewrite, _, options = text.partition("{")
    assert _build(find_pass(rewrite), options.rstrip("}")).run(c)
    c.graph.clean()
    assert difference(before, outputs(c.graph)) <= 1e-5
    assert_golden(c.graph, rewrite.replace("-", "_") + ("_turned" if name.startswith("turned") else ""))
