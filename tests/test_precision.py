"""Half precision: what is widened, and what the graph's inputs and outputs become again."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.builders import DIALECTS, Dialect, Sizes, difference, feed_of, model_of, run_model, vit
from vitq_compiler.compiler import compile
from vitq_compiler.precision import HalfPrecision, find_half, narrow, widen
from vitq_compiler.tensors import from_array, numpy_type, to_array

TEXT = """g (float16[B, 4] x, int64[B, 4] i) => (float16[B, 4] y, float[B, 4] z, int64[B, 4] j) {
    a = MatMul(x, w) z = Cast <to = 1> (a) s = Add(z, z) b = Cast <to = 10> (s) k = Constant <value = float16[1] {16384}> ()
    y = Mul(b, k) j = Identity(i)
}"""  # 16384 are the bits of 2


def halved(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The model with weights, constants, inputs, outputs and casts of a half type."""
    dtype = numpy_type(kind)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = [*copy.graph.initializer, *(a.t for n in copy.graph.node for a in n.attribute if a.HasField("t"))]
    for tensor in tensors:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(from_array(to_array(tensor).astype(dtype), tensor.name))
    for info in (*copy.graph.input, *copy.graph.output):
        info.type.tensor_type.elem_type = kind
    for node in copy.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = kind
    del copy.graph.value_info[:]
    return copy


def test_everything_is_widened_and_the_boundary_remembered() -> None:
    model = model_of(TEXT, w=np.eye(4, dtype=np.float16))
    assert find_half(model) == HalfPrecision("float16", computes=True)
    assert widen(model) == {"x": TensorProto.FLOAT16, "y": TensorProto.FLOAT16}
    assert find_half(model) == HalfPrecision("", computes=False)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    y, z, j = run_model(model, {"x": x, "i": np.ones((2, 4), np.int64)})
    np.testing.assert_array_equal(y, 4 * x)
    np.testing.assert_array_equal(z, x)
    assert {y.dtype, z.dtype} == {np.dtype(np.float32)}
    assert j.dtype == np.int64


def test_the_boundary_gets_its_types_back() -> None:
    model = model_of(TEXT, w=np.eye(4, dtype=np.float16))
    narrow(model, widen(model))
    onnx.checker.check_model(model)
    x = np.arange(8, dtype=np.float16).reshape(2, 4)
    y, z, _ = run_model(model, {"x": x, "i": np.ones((2, 4), np.int64)})
    assert (y.dtype, z.dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(y, 4 * x)


def test_an_output_that_is_read_inside() -> None:
    model = model_of("g (float16[2] x) => (float16[2] a, float16[2] y) { a = Relu(x) y = Neg(a) }")
    narrow(model, widen(model))
    onnx.checker.check_model(model)
    a, y = run_model(model, {"x": np.array([-1, 2], np.float16)})
    np.testing.assert_array_equal(a, [0, 2])
    np.testing.assert_array_equal(y, [0, -2])


def test_float32_models_have_nothing_to_widen() -> None:
    model = vit()
    before = model.SerializeToString()
    assert find_half(model) == HalfPrecision("", computes=False)
    assert widen(model) == {}
    assert model.SerializeToString() == before


STORED = "g (float[B, 4] x) => (float[B, 3] y) {{ {how} y = MatMul(x, w32) }}"


@pytest.mark.parametrize(
    ("text", "computes"),
    [
        (STORED.format(how="w32 = Cast <to = 1> (w)"), False),
        (STORED.format(how="t = Transpose(w) u = Transpose(t) w32 = Cast <to = 1> (u)"), False),
        (STORED.format(how="k = Identity(w) w32 = Cast <to = 1> (k)"), False),
        (STORED.format(how="k = Mul(w, w) w32 = Cast <to = 1> (k)"), True),
        ("g (float[B, 4] x) => (float[B, 3] y) { h = Cast <to = 10> (x) m = MatMul(h, w) y = Cast <to = 1> (m) }", True),
        ("g (float16[B, 4] x) => (float[B, 3] y) { h = Cast <to = 1> (x) w32 = Cast <to = 1> (w) y = MatMul(h, w32) }", True),
    ],
)
def test_weights_in_half_precision_are_not_a_model_in_half_precision(text: str, computes: bool) -> None:
    assert find_half(model_of(text, w=np.ones((4, 3), np.float16))) == HalfPrecision("float16", computes)


def with_stored_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model in float32, its matrices stored as float16 behind Cast."""
    copy, casts = onnx.ModelProto(), []
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            casts.append(onnx.helper.make_node("Cast", [f"{tensor.name}_half"], [tensor.name], to=TensorProto.FLOAT))
            tensor.CopyFrom(from_array(to_array(tensor).astype(np.float16), f"{tensor.name}_half"))
    nodes = [*casts, *copy.graph.node]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def test_a_model_with_weights_in_half_precision_is_called_what_it_is(tmp_path: Path) -> None:
    onnx.save(with_stored_weights(vit(Sizes(image=16, width=32, heads=2, hidden=64))), tmp_path / "vit.onnx")
    report = compile(tmp_path / "vit.onnx", tmp_path / "out.onnx", samples=8, threads=1)
    (told,) = (warning for warning in report.warnings if "float16" in warning)
    assert told == "the model computes in float32 and only stores weights in float16: compiled from these, as float32"
    result = onnx.load(tmp_path / "out.onnx")
    assert {v.type.tensor_type.elem_type for v in (*result.graph.input, *result.graph.output)} == {TensorProto.FLOAT}
    assert report.validation.outputs[0].sqnr_db > 20


def test_half_precision_between_float32_inputs_and_outputs_is_told(tmp_path: Path) -> None:
    model = halved(vit(Sizes(image=16, width=32, heads=2, hidden=64)), TensorProto.FLOAT16)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        node.input[:] = ["narrow" if name == "image" else name for name in node.input]
    nodes = [onnx.helper.make_node("Cast", ["image"], ["narrow"], to=TensorProto.FLOAT16), *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "vit.onnx")
    report = compile(tmp_path / "vit.onnx", samples=8, threads=1)
    assert "the model computes in float16: compiled from its weights in float32, logits in float16" in report.warnings


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_every_dialect_in_float16_is_itself_in_float32(dialect: Dialect) -> None:
    original = vit(Sizes(depth=1), dialect)
    half = halved(original, TensorProto.FLOAT16)
    widen(half)
    feed = feed_of(original)
    assert difference(run_model(original, feed), run_model(half, feed)) < 1e-2


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_models_compile_and_keep_their_types(tmp_path: Path, kind: int) -> None:
    onnx.save(halved(vit(Sizes(image=16, width=32, heads=2, hidden=64)), kind), tmp_path / "vit.onnx")
    report = compile(tmp_path / "vit.onnx", tmp_path / "out.onnx", samples=8, threads=1)
    assert report.integer == len(report.linears) - 1, "all but the head"
    assert report.validation.outputs[0].sqnr_db > 20
    result = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(result)
    assert [v.type.tensor_type.elem_type for v in (*result.graph.input, *result.graph.output)] == [kind, kind]
    assert any("bfloat16" in w for w in report.warnings) == (kind == TensorProto.BFLOAT16)
    assert any("float32" in w for w in report.warnings)
