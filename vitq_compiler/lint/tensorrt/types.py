"""The types that TensorRT quantizes to, and what each demands."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from vitq_compiler.lint.model import Model, Node
from vitq_compiler.lint.quantization import (
    FLOATS,
    FP4,
    FP8,
    INT4,
    code_type,
    dequantizer,
    dequantizes,
    gemms,
    is_blocked,
    is_dequantize,
    is_quantize,
    quantizers,
    quantizes,
    type_name,
)
from vitq_compiler.lint.rule import ERROR, SILENT, Fault, Platform, Rule
from vitq_compiler.tensors import FLOAT8E8M0 as E8M0

LEGAL: dict[str, set[int]] = {"8.6": {TensorProto.INT8}, "10": {TensorProto.INT8, FP8, INT4, FP4}, "11": {TensorProto.INT8, FP8, INT4, FP4}}
ELSEWHERE: set[int] = {0, TensorProto.UINT8, TensorProto.INT32, E8M0}  # the business of T04, T05, T17 and T12
FIRST_OPSET: dict[int, int] = {FP8: 19, INT4: 21, FP4: 23}


def _uint8_data(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in dequantizes(model):
        data = node.input(0)
        if data is not None and data.dtype == TensorProto.UINT8 and not is_quantize(data.producer):
            yield Fault(node, f"its data {data.name} is UINT8")


def _uint8_codes(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        zero_point = node.input(2)
        if zero_point is not None and zero_point.dtype == TensorProto.UINT8:
            yield Fault(node, "its zero point is UINT8")


def _code_types(model: Model, platform: Platform) -> Iterator[Fault]:
    legal = LEGAL.get(platform.version or "", LEGAL["11"])
    for node in quantizers(model):
        kind = code_type(node)
        if kind not in legal | ELSEWHERE:
            yield Fault(node, f"{type_name(kind)} codes")


def _fp8_hardware(model: Model, platform: Platform) -> Iterator[Fault]:
    if platform.compute_capability is None or platform.compute_capability >= 8.9:
        return
    for node in quantizers(model):
        if code_type(node) == FP8:
            yield Fault(node, f"FP8 codes for compute capability {platform.compute_capability}")


def _opset_of_type(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        needed, what = FIRST_OPSET.get(code_type(node), 0), f"{type_name(code_type(node))} codes"
        if is_blocked(node) and needed < 21:
            needed, what = 21, "block_size"
        if model.opset < needed and node.domain == "":
            yield Fault(node, f"{what} in a graph of opset {model.opset}, {needed} needed")


def _int4(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        if code_type(node) != INT4:
            continue
        data, scale = node.input(0), node.input(1)
        if data is None or scale is None:
            continue
        if not model.is_static(data):
            yield Fault(node, "INT4 codes of an activation")
        elif data.shape is not None and None not in data.shape and np.prod(np.array(data.shape, np.int64)) % 2:
            yield Fault(node, "an odd number of INT4 codes")
        elif is_blocked(node) and (fault := _block_fault(data.shape, scale.shape)):
            yield Fault(node, fault)
    for gemm in gemms(model):
        activation, weight = dequantizer(gemm.input(0)), dequantizer(gemm.input(1))
        if activation is not None and weight is not None and code_type(weight) == INT4:
            yield Fault(gemm, "an INT4 weight with a quantized activation")


def _block_fault(data: tuple[int | None, ...] | None, scale: tuple[int | None, ...] | None) -> str:
    if data is None or scale is None or None in data + scale or len(data) != len(scale):
        return ""
    sizes = [(int(d or 0), int(s or 1)) for d, s in zip(data, scale, strict=True)]
    blocked = [axis - len(sizes) for axis, (d, s) in enumerate(sizes) if d != s]
    if any(d % s for d, s in sizes):
        return "blocks that do not divide the weight"
    return "" if len(blocked) == 1 and blocked[0] >= -2 else f"blocks along the axes {blocked}, one of the last two allowed"


def _fp4(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        if code_type(node) != FP4:
            continue
        scale = node.input(1)
        if is_quantize(node) and not model.is_static(node.input(0)):
            yield Fault(node, "FP4 codes of an activation by QuantizeLinear")
        elif node.attributes.get("block_size", 0) != 16:
            yield Fault(node, f"blocks of {node.attributes.get('block_size', 0)}, 16 needed")
        elif is_dequantize(node) and model.is_static(node.input(0)) and not _is_fp8_scale(scale.producer if scale is not None else None):
            yield Fault(node, "its scale is not dequantized from FP8")
    for node in model.nodes:
        if node.op == "TRT_FP4DynamicQuantize" and node.attributes.get("block_size", 16) != 16:
            yield Fault(node, f"blocks of {node.attributes['block_size']}, 16 needed")


def _is_fp8_scale(node: Node | None) -> bool:
    return is_dequantize(node) and node is not None and code_type(node) == FP8


def _mxfp8(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        scale = node.input(1)
        if E8M0 in (code_type(node), scale.dtype if scale is not None else 0):
            yield Fault(node, "E8M0 scales on a standard quantizer")
    for node in model.nodes:
        if node.op in ("TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear") and node.attributes.get("block_size", 32) != 32:
            yield Fault(node, f"blocks of {node.attributes['block_size']}, 32 needed")


def _integer_bias(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in dequantizes(model):
        if code_type(node) == TensorProto.INT32:
            yield Fault(node, "INT32 codes")


def _scale_types(model: Model, platform: Platform) -> Iterator[Fault]:
    if platform.version == "8.6":
        for node in quantizers(model):
            scale = node.input(1)
            if scale is not None and scale.dtype in FLOATS and scale.dtype != TensorProto.FLOAT:
                yield Fault(node, f"a {type_name(scale.dtype)} scale, whose bytes are read as FLOAT")
        return
    for node in quantizes(model):
        data, scale = node.input(0), node.input(1)
        if data is None or scale is None or data.dtype not in FLOATS or scale.dtype not in FLOATS:
            continue
        if data.dtype != scale.dtype:
            yield Fault(node, f"a {type_name(scale.dtype)} scale on {type_name(data.dtype)} data")
        for reader in filter(is_dequantize, node.readers()):
            other = reader.input(1)
            if other is not None and other.dtype in FLOATS and other.dtype != scale.dtype:
                yield Fault(reader, f"dequantizes to {type_name(other.dtype)} what was {type_name(data.dtype)}")


RULES = (
    Rule(
        "T04",
        ERROR,
        "nothing dequantizes UINT8",
        "the parser refuses UINT8 as the type of codes",
        "quantize to INT8 with zero point 0",
        _uint8_data,
        "onnx-tensorrt DequantizeLinear importer",
    ),
    Rule(
        "T05",
        SILENT,
        "zero points are INT8, not UINT8",
        "codes of UINT8 are clipped to [-128, 127] by TensorRT and to [0, 255] by ONNX; version 8.6 refuses them",
        "quantize to INT8 with zero point 0",
        _uint8_codes,
        "onnx-tensorrt QuantDequantLinearHelper",
        severity_in={"8.6": ERROR},
    ),
    Rule(
        "T07",
        ERROR,
        "codes are INT8, FP8 (E4M3FN), INT4 or FP4 (E2M1)",
        "the parser refuses INT16, UINT16, UINT4 and FP8 E5M2; 8.6 takes only INT8, and FP4 needs 10.8",
        "quantize to INT8",
        _code_types,
        "onnx-tensorrt checkQuantizationDatatype",
    ),
    Rule(
        "T08",
        ERROR,
        "FP8 is for compute capability 8.9 and above",
        "no engine is built for an older GPU",
        "quantize to INT8 for this GPU",
        _fp8_hardware,
        "TensorRT documentation, quantized types",
        versions=("10", "11"),
    ),
    Rule(
        "T09",
        SILENT,
        "the opset knows the type: FP8 from 19, INT4 and blocks from 21, FP4 from 23",
        "TensorRT does not look, but by ONNX the graph is invalid, and other tools refuse it",
        "raise the opset of the file",
        _opset_of_type,
        "ONNX operators, QuantizeLinear",
        versions=("10", "11"),
    ),
    Rule(
        "T10",
        ERROR,
        "INT4 is for weights of float activations, in blocks along one of the last two axes that divide them",
        "the parser refuses other blocks, and no engine is built for INT4 weights on INT8 activations",
        "use INT8 weights, or leave the activation in float",
        _int4,
        "NvInfer.h IDequantizeLayer; TensorRT documentation, explicit quantization",
        versions=("10", "11"),
    ),
    Rule(
        "T11",
        ERROR,
        "FP4 weights have blocks of 16 with FP8 scales, and activations go through trt::TRT_FP4DynamicQuantize",
        "the parser refuses other forms of FP4",
        "write the form of NVIDIA Model Optimizer's NVFP4 export",
        _fp4,
        "NVIDIA Model Optimizer nvfp4_exporter",
        versions=("10", "11"),
    ),
    Rule(
        "T12",
        ERROR,
        "MXFP8 goes through trt::TRT_MXFP8DynamicQuantize and trt::TRT_MXFP8DequantizeLinear, in blocks of 32",
        "the parser refuses E8M0 scales on standard quantizers",
        "write the form of NVIDIA Model Optimizer's MXFP8 export",
        _mxfp8,
        "NVIDIA Model Optimizer mxfp8_exporter",
        versions=("10", "11"),
    ),
    Rule(
        "T17",
        ERROR,
        "biases stay in float",
        "the parser refuses to dequantize INT32",
        "store the bias as float; for onnxruntime.quantization set QuantizeBias to False",
        _integer_bias,
        "microsoft/onnxruntime#14229; onnx/onnx-tensorrt#850",
    ),
    Rule(
        "T20",
        SILENT,
        "a scale has the float type of the tensor it belongs to",
        "a quantizer's scale must match its data, and a dequantizer writes the type of its scale, which is then that of the product",
        "store scales in the type of the tensor; for 8.6 keep both in FLOAT",
        _scale_types,
        "NvInfer.h IQuantizeLayer; onnx-tensorrt QuantDequantLinearHelper",
    ),
)
