"""fold-batch-norm: into convolutions and Linear layers, through views; and what is refused."""

import numpy as np
import pytest

from tests.builders import changes_of, compilation, difference, feed_of, graph_of, ops, run_model, run_passes
from vitq_compiler.pipeline import Compilation

RANDOM = np.random.default_rng(0)
NORM = {
    "g": RANDOM.normal(size=4).astype(np.float32),
    "b": RANDOM.normal(size=4).astype(np.float32),
    "m": RANDOM.normal(size=4).astype(np.float32),
    "v": RANDOM.uniform(0.5, 2, 4).astype(np.float32),
}
WEIGHTS = {
    "kernel": RANDOM.normal(size=(4, 4, 3, 3)).astype(np.float32),
    "depthwise": RANDOM.normal(size=(4, 1, 3, 3)).astype(np.float32),
    "w": RANDOM.normal(size=(4, 4)).astype(np.float32),
    "c": RANDOM.normal(size=4).astype(np.float32),
    "rows": np.array([-1, 4]),
    "tokens": np.array([-1, 6, 4]),
}
BN = "BatchNormalization <epsilon = 0.001> ({}, g, b, m, v)"
IMAGE, TOKENS = "float[B, 4, 5, 5] x", "float[B, 6, 4] x"

FOLDED = {
    "Conv": (IMAGE, f"z = Conv(x, kernel, c) y = {BN.format('z')}"),
    "Conv without bias": (IMAGE, f"z = Conv(x, kernel) y = {BN.format('z')}"),
    "depthwise Conv": (IMAGE, f"z = Conv <group = 4> (x, depthwise) y = {BN.format('z')}"),
    "Linear on flat tokens": (TOKENS, f"p = MatMul(x, w) q = Add(p, c) r = Reshape(q, rows) n = {BN.format('r')} y = Reshape(n, tokens)"),
    "Linear without bias": (TOKENS, f"p = MatMul(x, w) r = Reshape(p, rows) n = {BN.format('r')} y = Reshape(n, tokens)"),
    "Linear with channels in front": (TOKENS, f"p = MatMul(x, w) t = Transpose <perm = [0, 2, 1]> (p) y = {BN.format('t')}"),
}
REFUSED = {
    "another reader": (IMAGE, f"z = Conv(x, kernel) n = {BN.format('z')} y = Add(n, z)", "z has other readers"),
    "another reader of the Linear": (
        TOKENS,
        f"p = MatMul(x, w) t = Transpose <perm = [0, 2, 1]> (p) n = {BN.format('t')} u = Transpose <perm = [0, 2, 1]> (n) y = Add(u, p)",
        "p has other readers",
    ),
    "no weights": (IMAGE, f"z = Relu(x) y = {BN.format('z')}", "no convolution and no Linear lies before it"),
    "other channels": ("float[B, 4, 4] x", f"p = MatMul(x, w) y = {BN.format('p')}", "its channels are not the features"),
    "computed statistics": (IMAGE, f"z = Conv(x, kernel) r = Relu(g) y = {BN.format('z').replace('g,', 'gx,')}", "not constants"),
}


def folded(inputs: str, text: str) -> tuple[Compilation, int]:
    held = {name: array for name, array in (NORM | WEIGHTS).items() if name in text.replace("BatchNormalization", "")}
    extra = ", float[4] gx" if "gx" in text else ""
    c = compilation(graph_of(f"g ({inputs}{extra}) => (float y) {{ {text} }}", **held))
    run_passes(c, "canonicalize")
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    changes = changes_of(c, "fold-batch-norm")
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    return c, changes


@pytest.mark.parametrize(("inputs", "text"), FOLDED.values(), ids=FOLDED)
def test_folded(inputs: str, text: str) -> None:
    c, changes = folded(inputs, text)
    assert changes == 1
    assert "BatchNormalization" not in ops(c.graph)
    assert c.notes == []
    assert changes_of(c, "fold-batch-norm") == 0


@pytest.mark.parametrize(("inputs", "text", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(inputs: str, text: str, reason: str) -> None:
    c, changes = folded(inputs, text)
    assert changes == 0
    (note,) = c.notes
    assert reason in note.reason
