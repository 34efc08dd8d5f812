"""separate-heads: the form, float parity in every dialect, integer kernels from Linear to product, and refusals."""

from collections import Counter

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
from vitq_compiler import runtime
from vitq_compiler.annotations import understand
from vitq_compiler.catalog import pipeline_for
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import QuantSpec
from vitq_compiler.recipe import load_recipe

FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate"
BLOCK = """q3 = Reshape(a, s) q = Transpose <perm = [0, 2, 1, 3]> (q3)
    k3 = Reshape(b, s) k = Transpose <perm = [0, 2, 3, 1]> (k3)
    v3 = Reshape(d, s) v = Transpose <perm = [0, 2, 1, 3]> (v3)
    m = MatMul(q, k) n = Mul(m, half) p = Softmax <axis = -1> (n) o = MatMul(p, v)
    t = Transpose <perm = [0, 2, 1, 3]> (o) r = Reshape(t, back) y = MatMul(r, wo)"""


def to_be_quantized(c: Compilation) -> Compilation:
    """With a spec on every operand of the attention products."""
    c.specs.update(dict.fromkeys((edge for attention in c.annotations.attentions for edge in attention.edges.values()), QuantSpec()))
    return c


def block(text: str = "", outputs: str = "float[B, 5, 4] y", tokens: str = "5") -> Compilation:
    """One block in ONNX text with q, k and v from one Linear, ``text`` after it."""
    count = int(tokens) if tokens.isdigit() else 0
    weights = {name: np.random.default_rng(i).normal(size=(4, 4)).astype(np.float32) for i, name in enumerate(("wq", "wk", "wv", "wo"))}
    c = compilation(
        graph_of(
            f"""g (float[B, {tokens}, 4] x) => ({outputs}) {{
                a = MatMul(x, wq) b = MatMul(x, wk) d = MatMul(x, wv) {BLOCK} {text}
            }}""",
            s=np.array([0, count, 2, 2]),
            back=np.array([0, count, 4]),
            half=np.float32(0.5),
            **weights,
        )
    )
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    return to_be_quantized(c)


def test_golden() -> None:
    c = block()
    assert changes_of(c, "separate-heads") == 1
    assert_golden(c.graph, "separate_heads", weights=False)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("qkv", QKV)
def test_every_dialect_becomes_the_same_form(qkv: str, scale: str) -> None:
    c = compilation(vit(Sizes(depth=2, width=12, heads=3), Dialect(qkv=qkv, scale=scale)))
    run_passes(c, FRONT)
    to_be_quantized(c)
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    assert changes_of(c, "separate-heads") == 2
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    assert not {"Split", "Slice", "Squeeze"} & set(ops(c.graph))
    for attention in c.annotations.attentions:
        assert [linear.out_features for linear in attention.linears] == [12, 12, 12]
        assert attention.softmax.inputs[0] is attention.scores.outputs[0]
        assert attention.scale == 1
    found = understand(c.graph)
    assert [linear.name for linear in found.linears] == [linear.name for linear in c.annotations.linears]
    assert changes_of(c, "separate-heads") == 2, "again: to the same form"
    assert difference(before, run_model(c.graph, feed)) <= 1e-5


def test_an_open_number_of_tokens() -> None:
    c = block(outputs="float[B, T, 4] y", tokens="T")
    x = np.random.default_rng(9).normal(size=(2, 7, 4)).astype(np.float32)
    before = run_model(c.graph, {"x": x})
    changes_of(c, "separate-heads")
    assert difference(before, run_model(c.graph, {"x": x})) <= 1e-5


def test_one_operator_is_left_alone() -> None:
    c = block()
    c.specs.clear()
    assert changes_of(c, "fuse-attention") == 1
    before = c.graph.text()
    assert changes_of(c, "separate-heads") == 0
    assert (c.graph.text(), c.notes) == (before, [])


IMAGE = """g (float[B, 2, 3, 8] x) => (float y) {
    q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q = Transpose<perm = [0, 2, 1, 3]>(q1)
    k0 = MatMul(x, wk) k1 = Reshape(k0, heads) k = Transpose<perm = [0, 2, 3, 1]>(k1)
    v0 = MatMul(x, wv) v1 = Reshape(v0, heads) v = Transpose<perm = [0, 2, 1, 3]>(v1)
    s0 = MatMul(q, k) s1 = Mul(s0, half) s = Add(s1, mask) p = Softmax<axis = -1>(s) o = MatMul(p, v)
    o1 = Transpose<perm = [0, 2, 1, 3]>(o) o2 = Reshape(o1, image) y = MatMul(o2, wp)
}"""
IN_THE_BATCH = """g (float[B, 6, 8] x) => (float y) {
    a = MatMul(x, wqkv) q0, k0, v0 = Split<axis = -1>(a, parts)
    q1 = Reshape(q0, heads) q2 = Transpose<perm = [0, 2, 1, 3]>(q1) q = Reshape(q2, matrices)
    k1 = Reshape(k0, heads) k2 = Transpose<perm = [0, 2, 3, 1]>(k1) k = Reshape(k2, turned)
    v1 = Reshape(v0, heads) v2 = Transpose<perm = [0, 2, 1, 3]>(v1) v = Reshape(v2, matrices)
    s0 = MatMul(q, k) s = Mul(s0, half) p = Softmax<axis = -1>(s) o = MatMul(p, v) o0 = Reshape(o, apart)
    o1 = Transpose<perm = [0, 2, 1, 3]>(o0) o2 = Reshape(o1, merged) y = MatMul(o2, wp)
}"""
ONE_HEAD = """g (float[B, 6, 8] x) => (float y) {
    q = MatMul(x, wq) k0 = MatMul(x, wk) k = Transpose<perm = [0, 2, 1]>(k0) v = MatMul(x, wv)
    s0 = MatMul(q, k) s = Mul(s0, half) p = Softmax<axis = -1>(s) o = MatMul(p, v) y = MatMul(o, wp)
}"""
CROSS = """g (float[B, 6, 8] x, float[B, 4, 8] z) => (float y) {
    q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q = Transpose<perm = [0, 2, 1, 3]>(q1)
    k0 = MatMul(z, wk) k1 = Reshape(k0, fewer) k = Transpose<perm = [0, 2, 3, 1]>(k1)
    v0 = MatMul(z, wv) v1 = Reshape(v0, fewer) v = Transpose<perm = [0, 2, 1, 3]>(v1)
    s = MatMul(q, k) p = Softmax<axis = -1>(s) o = MatMul(p, v)
    o1 = Transpose<perm = [0, 2, 1, 3]>(o) o2 = Reshape(o1, merged) y = MatMul(o2, wp)
}"""


@pytest.mark.parametrize("text", [IMAGE, IN_THE_BATCH, ONE_HEAD, CROSS], ids=["image", "heads in the batch", "one head", "cross"])
def test_tokens_and_heads_in_other_axes(text: str) -> None:
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(8, 8)).astype(np.float32) for name in ("wq", "wk", "wv", "wp")}
    weights |= {"wqkv": random.normal(size=(8, 24)).astype(np.float32), "mask": random.normal(size=(1, 2, 6, 6)).astype(np.float32)}
    shapes = {"heads": [-1, 6, 2, 4], "fewer": [-1, 4, 2, 4], "image": [-1, 2, 3, 8], "matrices": [-1, 6, 4], "turned": [-1, 4, 6]}
    shapes |= {"apart": [-1, 2, 6, 4], "merged": [-1, 6, 8], "parts": [8, 8, 8]}
    c = compilation(graph_of(text, half=np.float32(0.5), **weights, **{name: np.array(shape) for name, shape in shapes.items()}))
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    assert changes_of(c, "separate-heads") == 1, c.notes
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    assert not {"Split", "Mul"} & set(ops(c.graph)), "one Linear for each, the scale in that of the queries"
    assert len(understand(c.graph).attentions) == 1, "found again"


@pytest.mark.parametrize(
    ("text", "outputs", "reason"),
    [
        ("y2 = Relu(a)", "float[B, 5, 4] y, float[B, 5, 4] y2", "is read by more than this attention"),
        ("", "float[B, 5, 4] y, float[B, 2, 5, 5] m", "the scores or their operands are graph outputs"),
    ],
)
def test_what_something_else_reads_stays(text: str, outputs: str, reason: str) -> None:
    c = block(text, outputs)
    before = sorted(ops(c.graph))
    assert changes_of(c, "separate-heads") == 0
    assert sorted(ops(c.graph)) == before
    assert [reason in note.reason for note in c.notes] == [True]


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_kernels_of_linears_write_the_codes_that_products_read(bits: str) -> None:
    """Between a Linear and the product of heads no float is left: its kernel gives codes, and codes are moved."""
    recipe = load_recipe("minmax").with_bits(bits)
    c = compilation(vit(Sizes(depth=2, width=16, hidden=32)), recipe=recipe)
    run_passes(c, str(pipeline_for(recipe, c.target)))
    model = runtime.optimized(c.graph.to_proto())
    made_by = {name: node for node in model.graph.node for name in node.output}
    products = [node for node in model.graph.node if node.op_type in ("MatMulIntegerToFloat", "QLinearMatMul")]
    assert len(products) == 4
    sources: Counter[str] = Counter()
    for node in products:
        for name in (node.input[0], node.input[3 if node.op_type == "QLinearMatMul" else 1]):
            while made_by[name].op_type in ("Reshape", "Transpose", "Clip"):
                name = made_by[name].input[0]
            sources[made_by[name].op_type] += 1
    assert sources == {"QGemm": 6, "QuantizeLinear": 2}, "q, k, v of two blocks, and the probabilities"
