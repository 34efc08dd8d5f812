"""pack-weights: the same numbers from half the bytes, in the same kernels, and what is not packed."""

from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import pytest

from tests.builders import Sizes, assert_golden, changes_of, compilation, feed_of, graph_of, ops, run_model, run_passes, vit
from vitq_compiler import runtime
from vitq_compiler.catalog import load_target, pipeline_for
from vitq_compiler.errors import RecipeError
from vitq_compiler.graph import Graph, is_constant, producer, value
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge
from vitq_compiler.recipe import load_recipe, parse_recipe
from vitq_compiler.targets import onnxruntime
from vitq_compiler.validation import kernels

SIZES = Sizes(depth=2, width=16, hidden=32)
CODES = np.arange(-7, 8).reshape(3, 5).astype(np.int8)  # an odd number of them


def small(codes: np.ndarray = CODES) -> Compilation:
    """One dequantized weight, known to the compilation."""
    c = compilation(
        graph_of(
            "g (float[B, 3] x) => (float[B, 5] y) { w = DequantizeLinear <axis = 1> (codes, s, z) y = MatMul(x, w) }",
            codes=codes,
            s=np.linspace(0.1, 0.5, 5).astype(np.float32),
            z=np.zeros(5, np.int8),
        )
    )
    c.codes[Edge("MatMul_1", 1)] = "codes"
    return c


def compiled(bits: str, storage: str) -> Compilation:
    recipe = load_recipe("minmax").with_bits(bits).stored(storage)
    c = compilation(vit(SIZES), recipe=recipe)
    run_passes(c, str(pipeline_for(recipe, c.target)))
    return c


def test_golden() -> None:
    c = small()
    assert changes_of(c, "pack-weights") == 1
    assert_golden(c.graph, "pack_weights", weights=False)


def test_packed_codes_are_the_same_in_half_the_bytes() -> None:
    c = small()
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    changes_of(c, "pack-weights")
    np.testing.assert_array_equal(before, run_model(c.graph, feed))
    (stored,) = [t for t in c.graph.to_proto().graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert len(stored.raw_data) == 8, "fifteen codes"
    again = Graph.from_proto(c.graph.to_proto()).tensor(stored.name)
    np.testing.assert_array_equal(value(again).astype(np.int8), CODES)
    np.testing.assert_array_equal(before, run_model(Graph.from_proto(c.graph.to_proto()), feed))


@pytest.mark.parametrize("bits", ["w4a4", "w3a8", "w2a4"])
def test_a_whole_model_computes_the_same_in_the_same_kernels(bits: str) -> None:
    container, native = (compiled(bits, storage) for storage in ("container", "native"))
    feed = feed_of(container.graph)
    for a, b in zip(run_model(container.graph, feed, optimize=True), run_model(native.graph, feed, optimize=True), strict=True):
        np.testing.assert_array_equal(a, b)
    models = [runtime.optimized(c.graph.to_proto()) for c in (container, native)]
    assert Counter(n.op_type for n in models[0].graph.node) == Counter(n.op_type for n in models[1].graph.node)
    found = kernels(models[1])
    assert {found[native.codes[Edge(linear.name, 1)]] for linear in native.annotations.linears} == {"QGemm"}
    assert native.target.check(native.graph) == []


def test_the_runtime_shares_weights_that_are_not_packed() -> None:
    """A session on the graph itself, which takes large weights from memory."""
    c = small((np.arange(3 * 5 * 400) % 15 - 7).reshape(3, -1).astype(np.int8))
    weight = producer(c.graph.find("MatMul")[0].inputs[1])
    weight.inputs[1].values, weight.inputs[2].values = np.full(2000, 0.1, np.float32), np.zeros(2000, np.int8)
    c.graph.outputs[0].shape = ["B", 2000]
    feed = feed_of(c.graph)
    before = runtime.session(c.graph).run(None, feed)
    changes_of(c, "pack-weights")
    np.testing.assert_array_equal(before, runtime.session(c.graph).run(None, feed))


def test_wider_codes_stay_and_are_noted() -> None:
    c = small(np.full((3, 5), 9, np.int8))
    before = c.graph.text()
    assert changes_of(c, "pack-weights") == 0
    assert c.graph.text() == before
    assert [(n.where, n.reason) for n in c.notes] == [("MatMul_1", "its codes have more than 4 bits and stay int8")]
    assert c.warnings == ["native storage changes nothing: no weight has 4 bits or fewer"]


def test_without_the_cast_there_is_no_integer_kernel() -> None:
    """Why it is there. When a runtime has such kernels, this fails, and the Cast can go."""
    c = compiled("w4a4", "native")
    for cast in c.graph.find("Cast"):
        dequantize = cast.outputs[0].outputs[0]
        zero_point = value(dequantize.inputs[2]).astype(ml_dtypes.int4)
        dequantize.inputs[2] = c.graph.constant(f"{dequantize.name}/int4", zero_point)
        dequantize.inputs[0] = cast.inputs[0]
    assert "Cast" not in ops(c.graph.clean())
    assert all(is_constant(d.inputs[0]) for d in c.graph.find("DequantizeLinear") if d.inputs[0].dtype == ml_dtypes.int4)
    kinds = Counter(node.op_type for node in runtime.optimized(c.graph.to_proto()).graph.node)
    assert kinds["QGemm"] == 0
    assert kinds["Gemm"] == len(c.annotations.linears)


def test_tensorrt_has_no_such_weights() -> None:
    with pytest.raises(RecipeError, match="target tensorrt runs no INT4 weights beside quantized activations: leave out --storage native"):
        pipeline_for(load_recipe("best").stored("native"), load_target("tensorrt"))


@pytest.mark.parametrize("version", ["", "newest"])
def test_an_older_runtime_has_none(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (runtime, onnxruntime):
        monkeypatch.setattr(module, "INSTALLED", "1.22")
    with pytest.raises(RecipeError, match=r"target onnxruntime of 1\.22 runs no INT4 weights .*: leave out --storage native"):
        pipeline_for(load_recipe("best").stored("native"), load_target("onnxruntime", {"version": version}))


def test_a_recipe_may_ask_for_it() -> None:
    table = {"description": "d", "weight": {"bits": 4}, "activation": {}, "passes": "calibrate,compute-qparams", "storage": "native"}
    assert str(pipeline_for(parse_recipe("r", table), load_target("onnxruntime"))).endswith("insert-qdq,pack-weights,legalize")
    with pytest.raises(RecipeError, match="storage 'disk' is unknown: known are container, native"):
        parse_recipe("r", table | {"storage": "disk"})
