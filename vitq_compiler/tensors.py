"""Numbers as ONNX stores them and as numpy holds them, where ml_dtypes has the types that numpy lacks.

The same with every release of onnx: until 1.18 its own helpers read those types as others, and do not write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]

FLOAT4E2M1, FLOAT8E8M0 = 23, 24  # in the ONNX standard; onnx has names for them since 1.18 and 1.19
BEYOND_NUMPY: Mapping[int, np.dtype[Any]] = {
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    TensorProto.FLOAT8E4M3FNUZ: np.dtype(ml_dtypes.float8_e4m3fnuz),
    TensorProto.FLOAT8E5M2: np.dtype(ml_dtypes.float8_e5m2),
    TensorProto.FLOAT8E5M2FNUZ: np.dtype(ml_dtypes.float8_e5m2fnuz),
    TensorProto.UINT4: np.dtype(ml_dtypes.uint4),
    TensorProto.INT4: np.dtype(ml_dtypes.int4),
    FLOAT4E2M1: np.dtype(ml_dtypes.float4_e2m1fn),
    FLOAT8E8M0: np.dtype(ml_dtypes.float8_e8m0fnu),
}
KINDS = {dtype: kind for kind, dtype in BEYOND_NUMPY.items()}
PACKED = frozenset(BEYOND_NUMPY[kind] for kind in (TensorProto.UINT4, TensorProto.INT4, FLOAT4E2M1))  # two numbers to a byte in a file


def numpy_type(kind: int) -> np.dtype[Any]:
    """The type of numpy that holds the numbers of a TensorProto type; KeyError where there is none."""
    return BEYOND_NUMPY[kind] if kind in BEYOND_NUMPY else np.dtype(helper.tensor_dtype_to_np_dtype(kind))


def onnx_type(dtype: np.dtype[Any]) -> int:
    """The TensorProto type of a type of numpy."""
    return KINDS[dtype] if dtype in KINDS else int(helper.np_dtype_to_tensor_dtype(dtype))


def kind_name(kind: int) -> str:
    """What ONNX calls a TensorProto type: INT8, FLOAT16, and so on."""
    names: dict[int, str] = {FLOAT4E2M1: "FLOAT4E2M1", FLOAT8E8M0: "FLOAT8E8M0"}
    names |= {number: name for name, number in TensorProto.DataType.items()}
    return names.get(kind, f"type {kind}")


def to_array(tensor: TensorProto) -> Array:
    """The numbers of a TensorProto; those in a file are mapped, so that memory holds only what is read."""
    if is_external(tensor):
        where = {entry.key: entry.value for entry in tensor.external_data}
        dtype = numpy_type(tensor.data_type).newbyteorder("<")
        return np.asarray(np.memmap(where["location"], dtype, "r", int(where.get("offset", 0)), tuple(tensor.dims)))
    if tensor.data_type not in BEYOND_NUMPY:
        return numpy_helper.to_array(tensor)
    dtype = BEYOND_NUMPY[tensor.data_type]
    codes = np.dtype(f"<u{dtype.itemsize}")
    stored = np.frombuffer(tensor.raw_data, codes) if tensor.HasField("raw_data") else np.array(tensor.int32_data, np.int32).astype(codes)
    if dtype not in PACKED:
        return stored.view(dtype).reshape(tensor.dims)
    numbers = np.stack([stored & 15, stored >> 4], axis=-1).reshape(-1)[: np.prod(tensor.dims, dtype=int)].reshape(tensor.dims)
    if tensor.data_type == FLOAT4E2M1:
        return numbers.view(dtype)
    return ((numbers ^ 8).astype(np.int8) - 8 if tensor.data_type == TensorProto.INT4 else numbers).astype(dtype)


def from_array(array: Array, name: str = "") -> TensorProto:
    """A TensorProto of these numbers."""
    if array.dtype not in KINDS:
        return numpy_helper.from_array(array, name)
    codes = np.ascontiguousarray(array).reshape(-1).view(f"<u{array.dtype.itemsize}")
    if array.dtype in PACKED:
        codes = np.pad(codes & 15, (0, codes.size % 2))
        codes = codes[::2] | codes[1::2] << 4
    return TensorProto(name=name, dims=array.shape, data_type=KINDS[array.dtype], raw_data=codes.tobytes())


def stored_bytes(tensor: TensorProto) -> int:
    """The size of its numbers in a file."""
    dtype = numpy_type(tensor.data_type)
    count = int(np.prod(tensor.dims, dtype=np.int64))
    return (count + 1) // 2 if dtype in PACKED else count * dtype.itemsize


def is_external(tensor: TensorProto) -> bool:
    """Whether the numbers of a TensorProto lie in a file of their own."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)
