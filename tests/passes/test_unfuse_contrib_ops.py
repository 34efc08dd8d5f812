"""unfuse-contrib-ops: every fused operator against ONNX Runtime's own kernel, and what is refused."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from tests.builders import DIALECTS, Sizes, changes_of, compilation, difference, run_model, vit
from vitq_compiler.compiler import compile
from vitq_compiler.contrib import DOMAIN, UNFUSE
from vitq_compiler.errors import ModelError
from vitq_compiler.graph import Graph
from vitq_compiler.pipeline import Compilation

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "gamma": RANDOM.standard_normal(8),
    "beta": RANDOM.standard_normal(8),
    "w": RANDOM.standard_normal((8, 8)),
    "wqkv": RANDOM.standard_normal((8, 24)),
    "bqkv": RANDOM.standard_normal(24),
    "wide": RANDOM.standard_normal((8, 20)),
    "wide_bias": RANDOM.standard_normal(20),
    "bias": RANDOM.standard_normal((1, 2, 5, 5)),
    "kernel": RANDOM.standard_normal((4, 5, 2)),
    "kernel_bias": RANDOM.standard_normal(4),
    "table": RANDOM.standard_normal((5, 5)),
    "w34": RANDOM.standard_normal((2, 5, 4)),
}
INTEGERS = {"mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)}
BODIES = {
    "BiasGelu": "y = com.microsoft.BiasGelu(x, gamma)",
    "Gelu": "y = com.microsoft.Gelu(x)",
    "FastGelu": "y = com.microsoft.FastGelu(x)",
    "FastGelu with bias": "y = com.microsoft.FastGelu(x, gamma)",
    "QuickGelu": "y = com.microsoft.QuickGelu <alpha = 1.5> (x)",
    "SkipLayerNormalization": "y = com.microsoft.SkipLayerNormalization <epsilon = 0.01> (x, z, gamma, beta)",
    "SkipLayerNormalization with bias": "y = com.microsoft.SkipLayerNormalization <epsilon = 0.01> (x, z, gamma, beta, beta)",
    "SkipLayerNormalization with sum": "n, m, v, s = com.microsoft.SkipLayerNormalization(x, z, gamma, beta) y = Add(n, s)",
    "SkipLayerNormalization without beta": "y = com.microsoft.SkipLayerNormalization(x, z, gamma)",
    "SkipSimplifiedLayerNormalization": "y = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.01> (x, z, gamma)",
    "LayerNormalization": "y = com.microsoft.LayerNormalization <epsilon = 0.01> (x, gamma, beta)",
    "SimplifiedLayerNormalization": "y = com.microsoft.SimplifiedLayerNormalization <epsilon = 0.01> (x, gamma)",
    "FusedMatMul": "y = com.microsoft.FusedMatMul <transB = 1, alpha = 0.5> (x, w)",
    "FusedMatMul of activations": "a = com.microsoft.FusedMatMul <transA = 1, alpha = 0.5> (x, z) y = MatMul(x, a)",
    "FusedGemm": """f = Reshape(x, flat) g1 = com.microsoft.FusedGemm <transB = 1, alpha = 0.5, activation = "Relu"> (f, w, gamma)
        y = Reshape(g1, tokens)""",
    "FusedConv": 'y = com.microsoft.FusedConv <activation = "Relu", pads = [1, 0], kernel_shape = [2]> (x, kernel, kernel_bias)',
    "Attention": "y = com.microsoft.Attention <num_heads = 2> (x, wqkv, bqkv)",
    "Attention, padded": "y = com.microsoft.Attention <num_heads = 2, scale = 0.3> (x, wqkv, bqkv, mask)",
    "Attention, biased": 'y = com.microsoft.Attention <num_heads = 2> (x, wqkv, bqkv, "", "", bias)',
    "Attention, causal": "y = com.microsoft.Attention <num_heads = 2, unidirectional = 1> (x, wqkv, bqkv, mask)",
    "Attention, sizes": "y = com.microsoft.Attention <num_heads = 2, qkv_hidden_sizes = [4, 4, 12]> (x, wide, wide_bias)",
    "MultiHeadAttention": "y = com.microsoft.MultiHeadAttention <num_heads = 2> (x, z, x)",
    "MultiHeadAttention, biases": "y = com.microsoft.MultiHeadAttention <num_heads = 4, scale = 0.3> (x, z, x, bqkv, mask, bias4)",
}
STANDARD = {
    "three axes": "y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, z, x)",
    "three axes, masked": "y = Attention <q_num_heads = 2, kv_num_heads = 2, scale = 0.3> (x, z, x, table)",
    "four axes": "q = Reshape(x, four) k = Reshape(z, four) y = Attention(q, k, q)",
    "causal": "y = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (x, z, x)",
    "causal, masked": "y = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (x, z, x, table)",
    "heads that share keys": "y = Attention <q_num_heads = 4, kv_num_heads = 2> (x, w34, w34)",
    "four axes that share keys": "q = Reshape(x, eight) k = Reshape(w34, one) y = Attention <is_causal = 1> (q, k, k)",
    "a mask of truths": "m = Greater(table, zero) y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, z, x, m)",
}
REFUSED = {
    "y = Attention <q_num_heads = 2, kv_num_heads = 2, softcap = 2.0> (x, z, x)": "it caps its scores",
    "y = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (x, w3, w3)": "it is causal, with 5 queries and 3 keys",
    "y, k, v = Attention <q_num_heads = 2, kv_num_heads = 2> (x, z, x) s = Add(k, v)": "more than its first output is read",
    "y = com.microsoft.Attention <num_heads = 2> (x, computed, bqkv)": "it has computed weights",
    "n, y = com.microsoft.SkipLayerNormalization(x, z, gamma, beta)": "its output y is read",
    'f = Reshape(x, flat) y = com.microsoft.FusedGemm <activation = "LeakyRelu"> (f, w)': "its activation LeakyRelu is not one of Relu,",
    "y = com.microsoft.FusedMatMul <transBatchA = 1> (x, z)": "its batch axes are transposed",
}


def model_with(body: str) -> onnx.ModelProto:
    text = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (float[2, 5, 8] x, float[2, 5, 8] z) => (float y) {{ computed = Identity(wqkv) {body} }}"""
    model = parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    weights = {n: a.astype(np.float32) for n, a in WEIGHTS.items()} | INTEGERS
    weights |= {
        "four": np.array([2, 1, 5, 8]),
        "eight": np.array([2, 2, 5, 4]),
        "one": np.array([2, 1, 5, 4]),
        "zero": np.array(-0.5, np.float32),
        "w3": np.ones((2, 3, 8), np.float32),
    }
    weights |= {"bias4": np.repeat(weights["bias"], 2, axis=1), "flat": np.array([-1, 8]), "tokens": np.array([-1, 5, 8])}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return model


def unfused(body: str) -> Compilation:
    model = model_with(body)
    c = compilation(Graph.from_proto(model))
    assert changes_of(c, "unfuse-contrib-ops") == sum(n.domain == DOMAIN for n in model.graph.node)
    return c


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_every_operator(body: str) -> None:
    c = unfused(body)
    assert not any(node.domain for node in c.graph.nodes)
    feed = {n: RANDOM.standard_normal((2, 5, 8)).astype(np.float32) for n in "xz"}
    original = model_with(body)
    for node in original.graph.node:
        if node.op_type in ("LayerNormalization", "SimplifiedLayerNormalization"):
            node.domain = ""  # where the runtime has them; reading a file moves them
    assert difference(run_model(original, feed), run_model(c.graph, feed)) < 2e-6
    assert changes_of(c, "unfuse-contrib-ops") == 0


@pytest.mark.parametrize("body", STANDARD.values(), ids=STANDARD)
def test_the_standard_attention(body: str) -> None:
    c = compilation(Graph.from_proto(onnx.shape_inference.infer_shapes(model_with(body))))
    assert changes_of(c, "unfuse-contrib-ops") == 1
    assert not c.graph.find("Attention")
    feed = {n: RANDOM.standard_normal((2, 5, 8)).astype(np.float32) for n in "xz"}
    assert difference(run_model(model_with(body), feed), run_model(c.graph, feed)) < 2e-6


def test_every_operator_of_the_table_is_tested() -> None:
    tested = {node.op_type for body in BODIES.values() for node in model_with(body).graph.node if node.domain}
    assert tested == UNFUSE.keys()


@pytest.mark.parametrize(("body", "reason"), REFUSED.items())
def test_what_cannot_be_taken_apart(body: str, reason: str) -> None:
    c = compilation(Graph.from_proto(model_with(body)))
    with pytest.raises(ModelError, match=rf"operator [\w.]+\.\w+ \(node .+\) is fused and cannot be taken apart: {reason}"):
        changes_of(c, "unfuse-contrib-ops")


SIZES = Sizes(image=16, width=32, heads=2, hidden=64)


def optimized_by_runtime(model: onnx.ModelProto, path: Path) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4  # it warns that the file fits this machine only
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["timm", "old-torch", "keras"])
def test_models_saved_by_the_runtime_compile(name: str, tmp_path: Path) -> None:
    optimized_by_runtime(vit(SIZES, DIALECTS[name]), tmp_path / "fused.onnx")
    assert any(n.domain == DOMAIN for n in onnx.load(tmp_path / "fused.onnx").graph.node)
    assert_compiled(tmp_path / "fused.onnx")


@pytest.mark.parametrize("name", ["timm", "old-torch"])
def test_models_of_the_transformer_optimizer_compile(name: str, tmp_path: Path) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    onnx.save(vit(SIZES, DIALECTS[name]), tmp_path / "vit.onnx")
    fused = optimizer.optimize_model(str(tmp_path / "vit.onnx"), "vit", num_heads=2, hidden_size=32, opt_level=0)
    fused.save_model_to_file(str(tmp_path / "fused.onnx"))
    assert_compiled(tmp_path / "fused.onnx")


def assert_compiled(path: Path) -> None:
    """As many layers are integer as in the model that was not fused."""
    report = compile(path, None, samples=8, threads=1)
    assert {row.role for row in report.linears if not row.integer} == {"head"}
    assert len({row.block for row in report.linears if row.block}) == 2 * SIZES.depth
    assert report.validation.outputs[0].sqnr_db > 25
