"""Types that numpy lacks: the same bytes as onnx writes, read from every form in which a TensorProto holds them."""

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitq_compiler.tensors import (
    BEYOND_NUMPY,
    FLOAT4E2M1,
    FLOAT8E8M0,
    from_array,
    kind_name,
    numpy_type,
    onnx_type,
    stored_bytes,
    to_array,
)

KINDS = pytest.mark.parametrize("kind", [*BEYOND_NUMPY, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8], ids=kind_name)


def numbers(kind: int, *shape: int) -> np.ndarray:
    """Numbers that every type holds exactly, and where it has them a negative and a large one."""
    values = np.resize(np.array([1, 2, 4, 1, 2], np.float32), shape)
    if kind not in (TensorProto.UINT4, FLOAT8E8M0):
        values.reshape(-1)[:2] = [-1, -4]
    return values.astype(numpy_type(kind))


@KINDS
@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (1, 2, 1)])
def test_the_bytes_are_those_of_onnx(kind: int, shape: tuple[int, ...]) -> None:
    array = numbers(kind, *shape)
    tensor = from_array(array, "t")
    assert tensor == numpy_helper.from_array(array, "t")
    assert (tensor.name, tensor.data_type, len(tensor.raw_data)) == ("t", kind, stored_bytes(tensor))
    assert onnx_type(array.dtype) == kind
    assert numpy_type(kind) == array.dtype
    found = to_array(tensor)
    assert (found.dtype, found.shape) == (array.dtype, shape)
    np.testing.assert_array_equal(found.astype(np.float32), array.astype(np.float32))


@KINDS
def test_numbers_in_typed_fields(kind: int) -> None:
    array = numbers(kind, 5)
    tensor = helper.make_tensor("t", kind, [5], array)
    assert not tensor.HasField("raw_data")
    np.testing.assert_array_equal(to_array(tensor).astype(np.float32), array.astype(np.float32))


def test_every_code_of_4_bits() -> None:
    raw = bytes(code | (code ^ 15) << 4 for code in range(16))
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = {
        TensorProto.UINT4: [*range(16)],
        TensorProto.INT4: [*range(8), *range(-8, 0)],
        FLOAT4E2M1: [*magnitudes, *(-m for m in magnitudes)],
    }
    for kind, values in expected.items():
        found = to_array(TensorProto(data_type=kind, dims=[32], raw_data=raw)).astype(np.float32)
        np.testing.assert_array_equal(found[::2], values)
        np.testing.assert_array_equal(found[1::2], values[::-1])


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.FLOAT])
def test_numbers_in_a_file_stay_there(kind: int, tmp_path: Path) -> None:
    array = numbers(kind, 4, 5)
    (tmp_path / "t.data").write_bytes(b"head" + array.tobytes())
    tensor = TensorProto(name="t", data_type=kind, dims=[4, 5], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", str(tmp_path / "t.data")), ("offset", "4")):
        tensor.external_data.add(key=key, value=text)
    found = to_array(tensor)
    assert isinstance(found.base, np.memmap)
    np.testing.assert_array_equal(found.astype(np.float32), array.astype(np.float32))


def test_names_of_types() -> None:
    assert [kind_name(kind) for kind in (TensorProto.INT8, FLOAT4E2M1, FLOAT8E8M0, 999)] == ["INT8", "FLOAT4E2M1", "FLOAT8E8M0", "type 999"]
    known = TensorProto.DataType
    assert (known.Value("FLOAT4E2M1"), known.Value("FLOAT8E8M0")) == (FLOAT4E2M1, FLOAT8E8M0)
