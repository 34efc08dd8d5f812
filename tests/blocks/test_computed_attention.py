"""Attention whose operands are more than views: the structures of hierarchical families, and what is no attention block."""

import re

import numpy as np
import pytest

from tests.builders import graph_of
from vitq_compiler.annotations import Annotations, understand
from vitq_compiler.blocks.attention import Values
from vitq_compiler.graph import Graph
from vitq_compiler.pattern import MatchFailure

# Four tokens of four channels; two heads of two channels.
WEIGHTS = {
    **{name: np.ones((4, 4), np.float32) for name in ("wq", "wk", "wv", "wp", "w1", "w2")},
    **{name: np.ones(4, np.float32) for name in ("gamma", "beta")},
    "two": np.float32(2),
    "tiny": np.float32(1e-6),
    "minus1": np.array([-1]),
    "one": np.array([1]),
    "heads": np.array([0, 4, 2, 2]),
    "merged": np.array([0, -1, 4]),
    "pairs": np.array([0, 2, 2, 4]),
    "fives": np.array([-1, 1, 2, 4, 4]),
    "fours": np.array([-1, 2, 4, 4]),
    "mask5": np.zeros((1, 1, 1, 4, 4), np.float32),
    "bias": np.zeros((1, 2, 4, 4), np.float32),
    "temperature": np.ones((2, 1, 1), np.float32),
    "depthwise": np.ones((4, 1, 3), np.float32),
    "dense": np.ones((4, 4, 1), np.float32),
}
Q = "q = MatMul(x, wq) qs = Reshape(q, heads) qh = Transpose <perm = [0, 2, 1, 3]> (qs)"
K = "k = MatMul(x, wk) ks = Reshape(k, heads) kh = Transpose <perm = [0, 2, 3, 1]> (ks)"
V = "v = MatMul(x, wv) vs = Reshape(v, heads) vh = Transpose <perm = [0, 2, 1, 3]> (vs)"
SCORES = "s = MatMul(qh, kh) p = Softmax <axis = -1> (s)"
MERGE = "o = MatMul(p, vh) ot = Transpose <perm = [0, 2, 1, 3]> (o) om = Reshape(ot, merged)"
PROJ = "y = MatMul(om, wp)"

STRUCTURES = {
    "a window mask in five axes": f"""{Q} {K} {V} s = MatMul(qh, kh) sb = Add(s, bias) s5 = Reshape(sb, fives) sm = Add(s5, mask5)
        s4 = Reshape(sm, fours) p = Softmax <axis = -1> (s4) {MERGE} {PROJ}""",
    "cosine attention": f"""{Q} {K} {V} ql = ReduceL2 <keepdims = 1> (qh, minus1) qm = Max(ql, tiny) qn = Div(qh, qm)
        s = MatMul(qn, kh) st = Mul(s, temperature) p = Softmax <axis = -1> (st) {MERGE} {PROJ}""",
    "pooled queries": f"""q = MatMul(x, wq) q2 = Reshape(q, pairs) qp = ReduceMax <keepdims = 0> (q2, one)
        qs = Unsqueeze(qp, one) kw = MatMul(x, wk) ks = Unsqueeze(kw, one) kh = Transpose <perm = [0, 1, 3, 2]> (ks)
        v = MatMul(x, wv) vh = Unsqueeze(v, one) s = MatMul(qs, kh) p = Softmax <axis = -1> (s) {MERGE} {PROJ}""",
    "attention over channels": f"""{Q} {K} {V} qt = Transpose <perm = [0, 1, 3, 2]> (qh) kt = Transpose <perm = [0, 1, 3, 2]> (kh)
        vt = Transpose <perm = [0, 1, 3, 2]> (vh) ql = ReduceL2 <keepdims = 1> (qt, minus1) qn = Div(qt, ql) s = MatMul(qn, kt)
        p = Softmax <axis = -1> (s) o = MatMul(p, vt) ot = Transpose <perm = [0, 3, 1, 2]> (o) om = Reshape(ot, merged) {PROJ}""",
    "an activation before the projection": f"{Q} {K} {V} {SCORES} {MERGE} a = HardSwish(om) y = MatMul(a, wp)",
    "a normalization before the projection": f"{Q} {K} {V} {SCORES} {MERGE} n = LayerNormalization(om, gamma, beta) y = MatMul(n, wp)",
    "a depthwise convolution and a normalization of the queries": f"""q = MatMul(x, wq) qt = Transpose <perm = [0, 2, 1]> (q)
        qc = Conv <group = 4, pads = [1, 1]> (qt, depthwise) qn = LayerNormalization(qc, gamma, beta)
        qb = Transpose <perm = [0, 2, 1]> (qn) qs = Reshape(qb, heads) qh = Transpose <perm = [0, 2, 1, 3]> (qs)
        {K} {V} {SCORES} {MERGE} {PROJ}""",
    "a sum with the queries before the projection": f"{Q} {K} {V} {SCORES} {MERGE} a = Add(om, q) y = MatMul(a, wp)",
}


KINDS = {
    "cosine attention": "queries and keys are divided by their lengths; ",
    "attention over channels": "queries and keys are divided by their lengths; ",
    "a depthwise convolution and a normalization of the queries": "queries and keys are normalized; ",
}


def built(text: str, output: str = "y") -> Graph:
    used = {name: array for name, array in WEIGHTS.items() if re.search(rf"\b{name}\b", text)}
    graph = graph_of(f"g (float[B, 4, 4] x) => (float {output}) {{ {text} }}", **used)
    graph.infer_shapes()
    return graph


def roles(found: Annotations) -> dict[str, tuple[str, str]]:
    return {linear.weight.name: (linear.role, linear.block) for linear in found.linears}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str) -> None:
    found = understand(built(STRUCTURES[name]))
    assert found.attentions == []
    assert found.failures == []
    (attention,) = found.computed_attentions
    assert attention.reason.removeprefix(KINDS.get(name, ""))
    assert attention.reason.startswith(KINDS[name]) if name in KINDS else ";" not in attention.reason
    assert {linear.weight.name for linear in attention.linears} == {"wq", "wk", "wv"}
    assert roles(found) == {**dict.fromkeys(("wq", "wk", "wv"), ("qkv", "attention 0")), "wp": ("proj", "attention 0")}


VALUES = {  # the others have their values as plain heads, and know where they go
    "attention over channels": "an operand is no split of a Linear into heads over the same tokens",
    "an activation before the projection": "is read by HardSwish",
    "a normalization before the projection": "is read by LayerNormalization",
    "a sum with the queries before the projection": "is read by Add",
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_is_behind_the_softmax(name: str) -> None:
    (attention,) = understand(built(STRUCTURES[name])).computed_attentions
    if name in VALUES:
        assert isinstance(attention.values, MatchFailure)
        assert VALUES[name] in attention.values.reason
    else:
        assert isinstance(attention.values, Values)
        assert attention.values.proj is attention.proj
        assert attention.values.v.linear in attention.linears
        assert attention.values.v.columns.tolist() == [0, 1, 2, 3]


NO_BLOCKS = {
    "queries from a convolution": (
        f"""xt = Transpose <perm = [0, 2, 1]> (x) c = Conv(xt, dense) q = Transpose <perm = [0, 2, 1]> (c) qs = Reshape(q, heads)
        qh = Transpose <perm = [0, 2, 1, 3]> (qs) kr = Transpose <perm = [0, 2, 3, 1]> (qs) s = MatMul(qh, kr)
        p = Softmax <axis = -1> (s) {V} {MERGE} {PROJ}""",
        "an operand comes from Conv, not from a Linear",
    ),
    "no projection before the residual stream": (
        f"{Q} {K} {V} {SCORES} {MERGE} r = Add(x, om) n = LayerNormalization(r, gamma, beta) y = MatMul(n, w1)",
        "is read by Add, not by one Transpose or Reshape or MatMul or Identity",
    ),
    "two projections": (
        f"{Q} {K} {V} {SCORES} {MERGE} y1 = MatMul(om, wp) y2 = MatMul(om, w1) y = Add(y1, y2)",
        "is read by MatMul, MatMul",
    ),
    "queries from the residual stream": (
        f"""f = MatMul(x, w1) r = Add(f, x) n = LayerNormalization(r, gamma, beta) qs = Reshape(n, heads)
        qh = Transpose <perm = [0, 2, 1, 3]> (qs) kr = Transpose <perm = [0, 2, 3, 1]> (qs) s = MatMul(qh, kr)
        p = Softmax <axis = -1> (s) {V} {MERGE} {PROJ}""",
        "an operand comes from LayerNormalization, not from a Linear",
    ),
}


@pytest.mark.parametrize(("text", "reason"), NO_BLOCKS.values(), ids=NO_BLOCKS)
def test_what_is_no_block(text: str, reason: str) -> None:
    found = understand(built(text))
    assert (found.attentions, found.computed_attentions) == ([], [])
    (failure,) = found.failures
    assert reason in failure.reason


def test_blocks_of_both_kinds_are_numbered_together() -> None:
    first = STRUCTURES["cosine attention"]
    second = re.sub(r"\b(q|k|v|[qkvo]s|[qkv]h|s|p|o|ot|om|y)\b", r"\1_2", f"{Q} {K} {V} {SCORES} {MERGE} {PROJ}").replace("(x,", "(y,")
    found = understand(built(f"{first} {second}", "y_2"))
    assert [a.index for a in found.computed_attentions] == [0]
    assert [a.index for a in found.attentions] == [1]
    assert [linear.block for linear in found.linears] == ["attention 0"] * 4 + ["attention 1"] * 4
