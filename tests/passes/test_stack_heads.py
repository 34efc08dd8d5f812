"""stack-heads: the form, float parity in every dialect, statistics and names that others rely on, and refusals."""

import numpy as np
import pytest

from tests.builders import (
    QKV,
    SCALES,
    Dialect,
    Sizes,
    assert_golden,
    changes_of,
    compilation,
    difference,
    feed_of,
    graph_of,
    ops,
    run_model,
    run_passes,
    vit,
)
from vitq_compiler.annotations import understand
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge

SIZES = Sizes(depth=1, width=12, heads=3)
FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate"


def read(dialect: Dialect, sizes: Sizes = SIZES) -> Compilation:
    c = compilation(vit(sizes, dialect))
    run_passes(c, FRONT)
    return c


def test_golden() -> None:
    c = compilation(
        graph_of(
            """g (float[B, 5, 4] x) => (float[B, 5, 4] y) {
                a = MatMul(x, wq) b = MatMul(x, wk) d = MatMul(x, wv)
                q3 = Reshape(a, s) q = Transpose <perm = [0, 2, 1, 3]> (q3)
                k3 = Reshape(b, s) k = Transpose <perm = [0, 2, 3, 1]> (k3)
                v3 = Reshape(d, s) v = Transpose <perm = [0, 2, 1, 3]> (v3)
                m = MatMul(q, k) n = Mul(m, half) p = Softmax <axis = -1> (n) o = MatMul(p, v)
                t = Transpose <perm = [0, 2, 1, 3]> (o) r = Reshape(t, back) y = MatMul(r, wo)
            }""",
            s=np.array([0, 5, 2, 2]),
            back=np.array([0, 5, 4]),
            half=np.float32(0.5),
            **{name: np.full((4, 4), number, np.float32) for name, number in {"wq": 2, "wk": 3, "wv": 4, "wo": 5}.items()},
        )
    )
    c.annotations = understand(c.graph)
    assert changes_of(c, "stack-heads") == 1
    assert_golden(c.graph, "stack_heads", weights=False)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("qkv", QKV)
@pytest.mark.parametrize("bias", [False, True])
def test_every_dialect_becomes_the_same_form(qkv: str, scale: str, bias: bool) -> None:
    c = read(Dialect(qkv=qkv, scale=scale), Sizes(depth=2, width=12, heads=3, bias=bias))
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    assert changes_of(c, "stack-heads") == 2
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    for attention in c.annotations.attentions:
        assert [linear.out_features for linear in attention.linears] == [36]
        assert attention.scores.inputs[0].inputs[0].op == "Split"
        assert attention.softmax.inputs[0] is attention.scores.outputs[0]
    found = understand(c.graph)
    assert [linear.role for linear in found.linears] == ["qkv", "proj", "fc1", "fc2"] * 2 + ["head"]
    assert [linear.name for linear in found.linears] == [linear.name for linear in c.annotations.linears]
    assert {a.scale for a in found.attentions} == {1.0}


def test_what_three_layers_were_to_become_is_what_the_stack_becomes() -> None:
    c = read(Dialect(qkv="separate"))
    old = [linear.name for linear in c.annotations.attentions[0].linears]
    changes_of(c, "stack-heads")
    (stacked,) = c.annotations.attentions[0].linears
    assert stacked.name == old[0]
    assert {edge.node for edge in c.specs} & set(old) == {stacked.name}
    assert Edge(stacked.name, 1) in c.specs


@pytest.mark.parametrize("name", ["a", "x1"])
def test_a_shared_linear_and_two_sources_are_left_alone(name: str) -> None:
    """``y2`` reads the queries too, or the keys come from other tokens."""
    source = "x" if name == "a" else "x1"
    c = compilation(
        graph_of(
            f"""g (float[2, 5, 4] x, float[2, 5, 4] x1) => (float[2, 5, 4] y, float[2, 5, 4] y2) {{
                a = MatMul(x, wq) b = MatMul({source}, wk) d = MatMul(x, wv)
                q3 = Reshape(a, s) q = Transpose <perm = [0, 2, 1, 3]> (q3)
                k3 = Reshape(b, s) k = Transpose <perm = [0, 2, 3, 1]> (k3)
                v3 = Reshape(d, s) v = Transpose <perm = [0, 2, 1, 3]> (v3)
                m = MatMul(q, k) p = Softmax <axis = -1> (m) o = MatMul(p, v)
                t = Transpose <perm = [0, 2, 1, 3]> (o) r = Reshape(t, back) y = MatMul(r, wo)
                y2 = Relu({name})
            }}""",
            s=np.array([0, 5, 2, 2]),
            back=np.array([0, 5, 4]),
            **{name: np.ones((4, 4), np.float32) for name in ("wq", "wk", "wv", "wo")},
        )
    )
    c.annotations = understand(c.graph)
    before = sorted(ops(c.graph))
    assert changes_of(c, "stack-heads") == 0
    assert sorted(ops(c.graph)) == before
    reason = "read by more than this attention" if name == "a" else "made of different tokens"
    assert [reason in note.reason for note in c.notes] == [True]


def attention_of(values: int, mask: bool) -> Compilation:
    """One block in ONNX text: values of ``values`` features per head, and scores that are regrouped to add a mask."""
    regrouped = "n = Reshape(m, windows) u = Add(n, masks) w = Reshape(u, plain) p = Softmax <axis = -1> (w)"
    c = compilation(
        graph_of(
            f"""g (float[2, 5, 4] x) => (float[2, 5, 4] y) {{
                a = MatMul(x, wq) b = MatMul(x, wk) d = MatMul(x, wv)
                q3 = Reshape(a, s) q2 = Transpose <perm = [0, 2, 1, 3]> (q3) q = Mul(q2, half)
                k3 = Reshape(b, s) k = Transpose <perm = [0, 2, 3, 1]> (k3)
                v3 = Reshape(d, sv) v = Transpose <perm = [0, 2, 1, 3]> (v3)
                m = MatMul(q, k) {regrouped if mask else "p = Softmax <axis = -1> (m)"} o = MatMul(p, v)
                t = Transpose <perm = [0, 2, 1, 3]> (o) r = Reshape(t, back) y = MatMul(r, wo)
            }}""",
            s=np.array([0, 5, 2, 2]),
            sv=np.array([0, 5, 2, values]),
            back=np.array([0, 5, 2 * values]),
            windows=np.array([1, 2, 2, 5, 5]),
            plain=np.array([2, 2, 5, 5]),
            half=np.float32(0.5),
            masks=np.random.default_rng(0).normal(size=(1, 2, 1, 5, 5)).astype(np.float32),
            wq=np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32),
            wk=np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32),
            wv=np.random.default_rng(3).normal(size=(4, 2 * values)).astype(np.float32),
            wo=np.random.default_rng(4).normal(size=(2 * values, 4)).astype(np.float32),
        )
    )
    c.annotations = understand(c.graph)
    return c


def test_scores_regrouped_into_windows() -> None:
    c = attention_of(2, mask=True)
    assert (len(c.annotations.attentions), len(c.annotations.computed_attentions)) == (0, 1)
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    assert changes_of(c, "stack-heads") == 1
    assert difference(before, run_model(c.graph, feed)) <= 1e-6
    assert ops(c.graph).count("Split") == 1
    assert ops(c.graph).count("MatMul") == 4
    assert "Mul" not in ops(c.graph)
    assert [linear.out_features for linear in c.annotations.computed_attentions[0].linears] == [12]


def test_wider_values_are_left_alone() -> None:
    c = attention_of(3, mask=False)
    assert changes_of(c, "stack-heads") == 0
    assert [note.reason for note in c.notes] == ["heads are not stacked: queries, keys and values are not equally wide"]
