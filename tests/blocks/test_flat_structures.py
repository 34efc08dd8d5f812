"""What flat families do differently: heads in the batch, class tokens, talking heads, learned queries, gated and shared MLPs."""

import numpy as np
import pytest

from tests.blocks.test_computed_attention import MERGE, PROJ, SCORES, WEIGHTS, K, Q, V, built, roles
from tests.builders import changes_of, compilation, difference, feed_of, ops, run_model
from vitq_compiler.annotations import understand
from vitq_compiler.graph import Graph

RANDOM = np.random.default_rng(0)
WEIGHTS |= {
    **{name: RANDOM.standard_normal((4, 4)).astype(np.float32) for name in ("wq", "wk", "wv", "wp")},
    "mix1": RANDOM.standard_normal((2, 2)).astype(np.float32),
    "mix2": RANDOM.standard_normal((2, 2)).astype(np.float32),
    "mixbias": np.ones(2, np.float32),
    "query": RANDOM.standard_normal((1, 2, 1, 2)).astype(np.float32),
    "batch_heads": np.array([-1, 4, 2]),
    "batch_merge": np.array([-1, 2, 4, 2]),
    "tokens4": np.array([-1, 4, 4]),
    "class_heads": np.array([-1, 1, 2, 2]),
    "class_merged": np.array([-1, 1, 4]),
    "flat_heads": np.array([0, 0, 2, 2]),
    "first": np.array(0),
    "wide": RANDOM.standard_normal((4, 8)).astype(np.float32),
    "whole": RANDOM.standard_normal((4, 16)).astype(np.float32),
    "quarter": np.array([0, 1, 2, 2]),
    "up": RANDOM.standard_normal((4, 4)).astype(np.float32),
}
QKV = {("qkv", "attention 0")}

# heads counted into the batch: [batch * heads, tokens, head_dim], as torch.nn.MultiheadAttention writes it
BATCHED = " ".join(
    f"{n} = MatMul(x, w{n}) {n}s = Reshape({n}, flat_heads) {n}t = Transpose <perm = [0, 2, 1, 3]> ({n}s) {n}h = Reshape({n}t, batch_heads)"
    for n in "qkv"
)
HEADS_IN_BATCH = f"""{BATCHED} kr = Transpose <perm = [0, 2, 1]> (kh) s = MatMul(qh, kr) p = Softmax <axis = -1> (s) o = MatMul(p, vh)
    of = Reshape(o, batch_merge) ot = Transpose <perm = [0, 2, 1, 3]> (of) om = Reshape(ot, tokens4) {PROJ}"""
ONE_HEAD = """q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) kr = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, kr)
    p = Softmax <axis = -1> (s) om = MatMul(p, v) y = MatMul(om, wp)"""
CLASS_TOKEN = f"""c = Gather <axis = 1> (x, first) q = MatMul(c, wq) qs = Reshape(q, class_heads) qh = Transpose <perm = [0, 2, 1, 3]> (qs)
    {K} {V} {SCORES} o = MatMul(p, vh) ot = Transpose <perm = [0, 2, 1, 3]> (o) om = Reshape(ot, class_merged) {PROJ}"""
REGULAR = {"heads in the batch": (HEADS_IN_BATCH, 2), "one head": (ONE_HEAD, 1), "a class token without its axis": (CLASS_TOKEN, 2)}


@pytest.mark.parametrize(("text", "heads"), REGULAR.values(), ids=REGULAR)
def test_regular_attention(text: str, heads: int) -> None:
    found = understand(built(text))
    (attention,) = found.attentions
    assert found.failures == []
    assert attention.heads == heads
    for letter in "qkv":
        assert getattr(attention, letter).linear.weight.name == f"w{letter}"
        np.testing.assert_array_equal(getattr(attention, letter).columns, np.arange(4))
    assert attention.proj.weight.name == "wp"


@pytest.mark.parametrize(("text", "heads"), REGULAR.values(), ids=REGULAR)
def test_it_is_fused(text: str, heads: int) -> None:
    c = compilation(built(text))
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    c.annotations = understand(c.graph)
    assert changes_of(c, "fuse-attention") == 1
    assert c.notes == []
    assert ops(c.graph).count("Attention") == 1
    assert ops(c.graph).count("Softmax") == 0
    assert c.graph.find("Attention")[0].attrs["q_num_heads"] == heads
    assert difference(before, run_model(c.graph, feed)) < 1e-5


def test_a_mask_for_each_head_in_the_batch_is_not_fused() -> None:
    WEIGHTS["per_row"] = np.zeros((1, 4, 4), np.float32)
    c = compilation(built(HEADS_IN_BATCH.replace("p = Softmax <axis = -1> (s)", "m = Add(s, per_row) p = Softmax <axis = -1> (m)")))
    c.annotations = understand(c.graph)
    assert changes_of(c, "fuse-attention") == 0
    assert c.notes[0].reason.endswith("its mask may differ from head to head, and heads are counted into the batch")


def test_talking_heads() -> None:
    def mixed(tensor: str, name: str) -> str:
        return f"""{name}a = Transpose <perm = [0, 2, 3, 1]> ({tensor}) {name}b = MatMul({name}a, {name}) {name}c = Add({name}b, mixbias)
            {name}d = Transpose <perm = [0, 3, 1, 2]> ({name}c)"""

    text = f"""{Q} {K} {V} s = MatMul(qh, kh) {mixed("s", "mix1")} sm = Softmax <axis = -1> (mix1d) {mixed("sm", "mix2")}
        {MERGE.replace("MatMul(p,", "MatMul(mix2d,")} {PROJ}"""
    found = understand(built(text))
    (attention,) = found.computed_attentions
    assert {linear.weight.name for linear in attention.mixers} == {"mix1", "mix2"}
    expected = {**dict.fromkeys(("wq", "wk", "wv"), "qkv"), "wp": "proj", "mix1": "mix", "mix2": "mix"}
    assert roles(found) == {name: (role, "attention 0") for name, role in expected.items()}


def test_a_learned_query() -> None:
    text = f"{K} {V} s = MatMul(query, kh) p = Softmax <axis = -1> (s) {MERGE} {PROJ}"
    found = understand(built(text))
    assert roles(found) == {**dict.fromkeys(("wk", "wv"), ("qkv", "attention 0")), "wp": ("proj", "attention 0")}


def test_a_classifier_is_no_near_miss() -> None:
    found = understand(built("l = MatMul(x, wq) y = Softmax <axis = -1> (l)"))
    assert found.failures == []


# MLPs


def mlp_roles(text: str) -> dict[str, tuple[str, str]]:
    return roles(understand(built(text)))


GATED = {
    "two Linear layers": (
        "g = MatMul(x, wq) e = Sigmoid(g) a = Mul(g, e) u = MatMul(x, up) h = Mul(a, u) y = MatMul(h, wp)",
        {"wq": "gate", "up": "fc1", "wp": "fc2"},
    ),
    "the gate second": (
        "g = MatMul(x, wq) a = Gelu(g) u = MatMul(x, up) h = Mul(u, a) y = MatMul(h, wp)",
        {"wq": "gate", "up": "fc1", "wp": "fc2"},
    ),
    "halves of one": (
        "w = MatMul(x, wide) g, u = Split <axis = -1, num_outputs = 2> (w) e = Sigmoid(g) a = Mul(g, e) h = Mul(a, u) y = MatMul(h, wp)",
        {"wide": "fc1", "wp": "fc2"},
    ),
    "normalized": (
        "g = MatMul(x, wq) a = Gelu(g) u = MatMul(x, up) h = Mul(a, u) n = LayerNormalization(h, gamma, beta) y = MatMul(n, wp)",
        {"wq": "gate", "up": "fc1", "wp": "fc2"},
    ),
    "not gated, normalized": (
        "g = MatMul(x, wq) a = Gelu(g) n = LayerNormalization(a, gamma, beta) y = MatMul(n, wp)",
        {"wq": "fc1", "wp": "fc2"},
    ),
}


@pytest.mark.parametrize(("text", "expected"), GATED.values(), ids=GATED)
def test_gated_mlps(text: str, expected: dict[str, str]) -> None:
    found = understand(built(text))
    assert roles(found) == {name: (role, "mlp 0") for name, role in expected.items()}
    (mlp,) = found.mlps
    assert not mlp.plain


def test_a_product_without_an_activation_is_no_mlp() -> None:
    assert understand(built("g = MatMul(x, wq) u = MatMul(x, up) h = Mul(g, u) y = MatMul(h, wp)")).mlps == []


def test_a_linear_of_attention_and_mlp_belongs_to_attention() -> None:
    split = "w = MatMul(x, whole) m, qf, kf, vf = Split <axis = -1, num_outputs = 4> (w) mb = Add(m, beta) a = Gelu(mb) z = MatMul(a, up)"
    heads = " ".join(
        f"{n}s = Reshape({n}f, heads) {n}h = Transpose <perm = [0, 2, {'3, 1' if n == 'k' else '1, 3'}]> ({n}s)" for n in "qkv"
    )
    graph: Graph = built(f"{split} {heads} {SCORES} {MERGE} r = MatMul(om, wp) y = Add(r, z)")
    assert roles(understand(graph)) == {"whole": ("qkv", "attention 0"), "wp": ("proj", "attention 0"), "up": ("fc2", "mlp 0")}
