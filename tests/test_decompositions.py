"""Newer operators in older ones compute what ONNX's own reference says of them."""

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from tests.builders import difference, feed_of, model_of, ops, run_model
from vitq_compiler.decompositions import DECOMPOSED
from vitq_compiler.errors import TargetError
from vitq_compiler.graph import Graph
from vitq_compiler.opset import lower_opset, lowest_opset

RANDOM = np.random.default_rng(0)
IMAGE, ROWS = "g (float[B, 6, 4, 4] x) => (float[B, 6, 4, 4] y)", "g (float[B, 5, 8] x) => (float y)"
HEADS = "g (float[B, 2, 5, 8] x) => (float y)"
WEIGHTS = {
    "gamma": RANDOM.normal(size=8).astype(np.float32),
    "table": RANDOM.normal(size=(5, 8)).astype(np.float32),
    "scale": RANDOM.normal(size=6).astype(np.float32),
    "bias": RANDOM.normal(size=6).astype(np.float32),
    "by_group": np.array([0.5, -2, 3], np.float32),
    **{f"{name}{half}": RANDOM.normal(size=(9, half)).astype(np.float32) for name in ("cos", "sin") for half in (2, 4)},
    **{f"{name}_of_each": RANDOM.normal(size=(2, 5, 4)).astype(np.float32) for name in ("cos", "sin")},
    "places": np.array([[0, 3, 1, 8, 2], [4, 4, 5, 6, 7]]),
    "gate": RANDOM.normal(size=(1, 5, 8)).astype(np.float32),
}
# Text, opset of the model, and that of the result.
CASES = {
    "Gelu": (f"{ROWS} {{ y = Gelu(x) }}", 20, 13),
    "Gelu, tanh": (f'{ROWS} {{ y = Gelu <approximate = "tanh"> (x) }}', 23, 13),
    "Mish": (f"{ROWS} {{ y = Mish(x) }}", 18, 13),
    "Swish": (f"{ROWS} {{ y = Swish(x) }}", 24, 13),
    "Swish, alpha": (f"{ROWS} {{ y = Swish <alpha = 1.702> (x) }}", 24, 13),
    "SwiGLU": (f"{ROWS} {{ b = Expand(gate, shape) y = SwiGLU <alpha = 0.5> (x, b) }}", 28, 13),
    "RMSNormalization": (f"{ROWS} {{ y = RMSNormalization(x, gamma) }}", 23, 17),
    "RMSNormalization, two axes": (f"{ROWS} {{ y = RMSNormalization <axis = 1, epsilon = 0.01> (x, table) }}", 23, 17),
    "RMSNormalization, negative axis": (f"{ROWS} {{ y = RMSNormalization <axis = -2> (x, gamma) }}", 23, 17),
    "GroupNormalization of groups": (f"{IMAGE} {{ y = GroupNormalization <num_groups = 3> (x, by_group, by_group) }}", 20, 17),
    "GroupNormalization of channels": (f"{IMAGE} {{ y = GroupNormalization <num_groups = 3, epsilon = 0.1> (x, scale, bias) }}", 22, 20),
    "RotaryEmbedding": (f"{HEADS} {{ y = RotaryEmbedding(x, cos4, sin4, places) }}", 23, 20),
    "RotaryEmbedding, interleaved": (f"{HEADS} {{ y = RotaryEmbedding <interleaved = 1> (x, cos4, sin4, places) }}", 23, 17),
    "RotaryEmbedding, in part": (f"{HEADS} {{ y = RotaryEmbedding <rotary_embedding_dim = 4> (x, cos2, sin2, places) }}", 23, 20),
    "RotaryEmbedding, no places": (f"{HEADS} {{ y = RotaryEmbedding(x, cos_of_each, sin_of_each) }}", 23, 20),
    "RotaryEmbedding, side by side": (
        f"{ROWS} {{ y = RotaryEmbedding <num_heads = 2, interleaved = 1, rotary_embedding_dim = 4> (x, cos2, sin2, places) }}",
        23,
        20,
    ),
    "Attention": (f"{ROWS} {{ y = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (x, x, x) }}", 23, 17),
}


def model(text: str, opset: int) -> onnx.ModelProto:
    return model_of(text, opset=opset, shape=np.array([2, 5, 8]), **WEIGHTS)


@pytest.mark.parametrize(("text", "before", "after"), CASES.values(), ids=CASES)
def test_the_numbers(text: str, before: int, after: int) -> None:
    original = model(text, before)
    graph = Graph.from_proto(original)
    feed = feed_of(graph)
    expected = ReferenceEvaluator(original).run(None, feed)
    op = next(name for name in DECOMPOSED if f" {name} " in text or f" {name}(" in text)
    assert lower_opset(graph, after) == 1
    assert graph.opset == after
    assert op not in ops(graph)
    assert lowest_opset(graph) <= 17
    graph.ir_version = 8
    onnx.checker.check_model(graph.to_proto(), full_check=True)
    assert difference(expected, run_model(graph, feed)) <= 2e-6
    assert graph.output_names == ["y"], "the output keeps its name"


def test_every_operator_is_tested() -> None:
    assert {name for name in DECOMPOSED for text, *_ in CASES.values() if f" {name} " in text or f" {name}(" in text} == DECOMPOSED.keys()


def test_the_runtime_finds_the_normalization_again() -> None:
    """Its kernel is then the same as for the operator."""
    from vitq_compiler import runtime

    graph = Graph.from_proto(model(CASES["RMSNormalization"][0], 23))
    lower_opset(graph, 20)
    assert [node.op_type for node in runtime.optimized(graph.to_proto()).graph.node] == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y = RMSNormalization <axis = 1> (z, gamma)", "RMSNormalization node .*: the number of its axes is not known"),
        ("y = RotaryEmbedding(z, cos4, sin4, places)", "RotaryEmbedding node .*: its heads and their size are not known"),
        ("y = Attention <q_num_heads = 2, kv_num_heads = 2, softcap = 2.0> (x, x, x)", "Attention node .*: it caps its scores"),
    ],
)
def test_what_cannot_be_written(text: str, message: str) -> None:
    graph = Graph.from_proto(model_of(f"g (float[B, 5, 8] x, int64[N] s) => (float y) {{ z = Reshape(x, s) {text} }}", **WEIGHTS))
    with pytest.raises(TargetError, match=message.replace(": ", " has no form in opset 20: ")):
        lower_opset(graph, 20)
