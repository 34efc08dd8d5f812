"""Outputs that are sorted by score, and those that are not though something is picked on the way."""

import numpy as np
import pytest

from tests.builders import graph_of
from vitq_compiler.blocks.ordering import sorted_outputs

HELD = {"k": np.array([3]), "one": np.array([1]), "w": np.ones((4, 4), np.float32), "last": np.array([-1])}
SCORES = "s = MatMul(x, w) best = ReduceMax <keepdims = 0> (s, last) v, i = TopK(best, k)"
SPREAD = "u = Unsqueeze(i, last) e = Expand(u, full)"


def found(text: str, outputs: str) -> set[str]:
    graph = graph_of(f"g (float[B, 6, 4] x) => ({outputs}) {{ {text} }}", **HELD, full=np.array([1, 1, 4]))
    return set(sorted_outputs(graph))


def test_scores_and_what_is_gathered_by_them() -> None:
    text = f"{SCORES} {SPREAD} boxes = GatherElements <axis = 1> (s, e) labels = Cast <to = 1> (i) all = Identity(s)"
    assert found(f"{text} scores = Identity(v)", "float boxes, float scores, float labels, float all") == {"boxes", "scores", "labels"}


def test_queries_picked_for_a_decoder_keep_their_order() -> None:
    text = f"{SCORES} {SPREAD} q = GatherElements <axis = 1> (x, e) d = MatMul(q, w) p = ReduceMean <keepdims = 0> (d, one)"
    assert found(f"{text} y = Relu(d) z = Relu(p)", "float[B, 3, 4] y, float[B, 4] z") == {"y"}


def test_what_only_chooses_weights_sorts_nothing() -> None:
    """As a router of experts does."""
    text = "v, i = TopK(x, k) m = ReduceMin <keepdims = 1> (v, last) l = GreaterOrEqual(x, m) f = Cast <to = 1> (l) a = Mul(x, f)"
    assert found(f"{text} y = MatMul(a, w)", "float[B, 6, 4] y") == set()
    assert found(f"{text} y = Relu(a)", "float[B, 6, 4] y") == set()


@pytest.mark.parametrize("text", ["y = Relu(x)", "s = Softmax(x) y = MatMul(s, w)"])
def test_graphs_that_sort_nothing(text: str) -> None:
    assert found(text, "float y") == set()


def test_boxes_after_suppression() -> None:
    text = """g (float[1, 6, 4] b, float[1, 2, 6] s) => (int64 n, float y) {
        n = NonMaxSuppression(b, s) i = Gather <axis = 1> (n, two) y = Gather <axis = 1> (b, i) }"""
    assert set(sorted_outputs(graph_of(text, two=np.array(2)))) == {"n", "y"}
