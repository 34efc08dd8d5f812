"""recover-rmsnorm: every way to write it, and what must be left alone."""

import numpy as np
import pytest

from tests.builders import changes_of, compilation, difference, feed_of, graph_of, ops, run_model
from vitq_compiler.graph import value
from vitq_compiler.pipeline import Compilation

GAMMA = np.array([1, -2, 0.5, 3], np.float32)
NUMBERS = {"epsilon": 1e-3, "minus_half": -0.5, "half": 0.5, "one": 1, "two": 2, "three": 3, "four": 4}


def form(text: str, gamma: np.ndarray = GAMMA) -> Compilation:
    weights = {n: np.array(v, np.float32) for n, v in NUMBERS.items()}
    full = f"g (float[B, 4, 4] x) => (float[B, 4, 4] y) {{ {text} }}"
    return compilation(graph_of(full, last=np.array([-1]), middle=np.array([1]), gamma=gamma, **weights))


def recovered(c: Compilation) -> int:
    """Number of RMSNormalization nodes made; outputs are kept to 1e-5 and a second run finds nothing."""
    feed = feed_of(c.graph, batch=4)
    before = run_model(c.graph, feed)
    changes = changes_of(c, "recover-rmsnorm")
    assert len(c.graph.find("RMSNormalization")) == changes
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    assert changes_of(c, "recover-rmsnorm") == 0
    return changes


PLAIN = "s = Pow(x, two) v = ReduceMean(s, last) e = Add(v, epsilon) q = Sqrt(e) r = Reciprocal(q) n = Mul(x, r) y = Mul(gamma, n)"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "s = Mul(x, x) v = ReduceMean(s, last) e = Add(epsilon, v) q = Sqrt(e) n = Div(x, q) y = Mul(n, gamma)",
        "s = Pow(x, two) v = ReduceMean(s, last) e = Add(v, epsilon) r = Pow(e, minus_half) n = Mul(x, r) y = Mul(gamma, n)",
        "s = Pow(x, two) v = ReduceMean(s, last) e = Add(v, epsilon) q = Pow(e, half) r = Div(one, q) n = Mul(r, x) y = Mul(n, gamma)",
        "s = Pow(x, two) t = ReduceSum(s, last) v = Div(t, four) e = Add(v, epsilon) q = Sqrt(e) n = Div(x, q) y = Mul(n, gamma)",
        "s = Pow(x, two) v = ReduceMean(s, last) e = Add(v, epsilon) r = Pow(e, minus_half) k = Mul(r, gamma) y = Mul(x, k)",
    ],
)
def test_every_form(text: str) -> None:
    c = form(text)
    assert recovered(c) == 1
    assert ops(c.graph) == ["RMSNormalization"]
    assert c.graph.nodes[0].attrs["epsilon"] == pytest.approx(1e-3)
    np.testing.assert_array_equal(value(c.graph.nodes[0].inputs[1]), GAMMA)


def test_without_gamma() -> None:
    c = form("s = Pow(x, two) v = ReduceMean(s, last) e = Add(v, epsilon) q = Sqrt(e) y = Div(x, q)")
    assert recovered(c) == 1
    np.testing.assert_array_equal(value(c.graph.nodes[0].inputs[1]), np.ones(4))


def test_a_gamma_that_is_not_per_channel_stays_behind_it() -> None:
    c = form(PLAIN, gamma=np.array(2, np.float32))
    assert recovered(c) == 1
    assert ops(c.graph) == ["RMSNormalization", "Mul"]


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace("last", "middle"),
        PLAIN.replace("two", "three"),
        PLAIN.replace("Mul(x, r)", "Mul(s, r)"),
        PLAIN.replace("ReduceMean", "ReduceMax"),
    ],
)
def test_what_is_something_else_stays(text: str) -> None:
    c = form(text)
    before = sorted(ops(c.graph))
    assert recovered(c) == 0
    assert sorted(ops(c.graph)) == before


def test_the_reason_is_told() -> None:
    c = form(PLAIN.replace("last", "middle"))
    assert recovered(c) == 0
    assert c.notes[0].reason == "not an RMSNormalization: a mean is over axes [1], not over the last one and kept"
