"""What quantizers of a TensorRT graph hold: zero points, scales, axes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from onnx import TensorProto

from vitq_compiler.lint.model import Model, Node, Shape, Value
from vitq_compiler.lint.quantization import code_type, dequantizes, is_blocked, is_quantize, quantizers, scale_count
from vitq_compiler.lint.rule import ERROR, INFORMATION, SILENT, WARNING, Fault, Platform, Rule


def _zero_points(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        zero_point = model.array(node.input(2))
        if zero_point is not None and (wrong := zero_point[zero_point != 0]).size:
            yield Fault(node, f"zero point {float(wrong.flat[0]):g}")


def _scales(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        scale = model.array(node.input(1))
        if scale is None:
            continue
        if scale.size == 0:
            yield Fault(node, "no scale")
            continue
        numbers = scale.astype(np.float64)
        if (wrong := numbers[~(np.isfinite(numbers) & (numbers > 0))]).size:
            yield Fault(node, f"scale {wrong.flat[0]:g}")


def _runtime_scales(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        for index, what in ((1, "scale"), (2, "zero point")):
            if not model.is_static(node.input(index)):
                yield Fault(node, f"its {what} is computed at run time")


def _missing_zero_points(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        if node.input(2) is None and (platform.version == "8.6" or (is_quantize(node) and code_type(node) == TensorProto.UINT8)):
            yield Fault(node, "no zero point")


def _scale_shapes(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        data, scale, zero_point = (node.input(index) for index in range(3))
        if data is not None and scale is not None and scale.shape is not None:
            fault = _shape_fault(node, data, scale.shape, zero_point.shape if zero_point is not None else None)
            if fault:
                yield Fault(node, fault)


def _shape_fault(node: Node, data: Value, scale: Shape, zero_point: Shape | None) -> str:
    axis, rank = _axis(node), data.rank
    if zero_point is not None and _volume(scale) != _volume(zero_point):
        return f"scale {_shown(scale)} but zero point {_shown(zero_point)}"
    if rank is None or len(scale) == 0 or scale == (1,):
        return ""
    if len(scale) not in (1, rank):
        return f"scale {_shown(scale)} for a tensor of {rank} dimensions"
    if len(scale) == 1 and not -rank <= axis < rank:
        return f"axis {axis} of a tensor of {rank} dimensions"
    if len(scale) == 1 and scale[0] is not None and (size := data.size(axis)) is not None and size != scale[0]:
        return f"{scale[0]} scales for {size} channels"
    return ""


def _axes(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        if "axis" not in node.attributes and not is_blocked(node) and (count := scale_count(model, node)) is not None and count > 1:
            yield Fault(node, f"{count} scales and no axis")


def _scalars(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        data = node.input(0)
        if data is not None and data.rank == 0:
            yield Fault(node, "its data is a scalar")


def _narrow_weights(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in dequantizes(model):
        if code_type(node) == TensorProto.INT8 and (codes := model.array(node.input(0))) is not None and (codes == -128).any():
            yield Fault(node, f"{int((codes == -128).sum())} of {codes.size} codes are -128")


def _axis(node: Node) -> int:
    """What the ONNX operator takes where nothing is written."""
    return int(node.attributes.get("axis", 1))


def _volume(shape: Shape) -> int:
    """Number of elements; a size that is not static counts as one."""
    return prod(1 if size is None else size for size in shape)


def _shown(shape: Shape) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


RULES = (
    Rule(
        "T01",
        ERROR,
        "every zero point is zero",
        "the parser refuses a quantizer whose zero point is not zero",
        "quantize symmetrically",
        _zero_points,
        "onnx-tensorrt QuantDequantLinearHelper; NvInfer.h IQuantizeLayer; NVIDIA/TensorRT#2774, #4698",
    ),
    Rule(
        "T02",
        ERROR,
        "every scale is finite and above zero",
        "the parser refuses any other scale",
        "give a constant channel a small positive scale",
        _scales,
        "onnx-tensorrt QuantDequantLinearHelper",
    ),
    Rule(
        "T03",
        SILENT,
        "scales and zero points are constants",
        "documented as build-time constants, but the parser does not check it: what a computed one does depends on the version",
        "calibrate, and store scale and zero point as initializers",
        _runtime_scales,
        "TensorRT operator reference, Quantize",
    ),
    Rule(
        "T06",
        SILENT,
        "the zero point is written, and is INT8",
        "ONNX takes a zero point left out for UINT8, and TensorRT takes it for INT8; version 8.6 wants three inputs",
        "add a zero point of INT8 zeros",
        _missing_zero_points,
        "onnx-tensorrt QuantDequantLinearHelper",
        severity_in={"8.6": ERROR},
    ),
    Rule(
        "T13",
        ERROR,
        "there is one scale, or one for each channel, and as many zero points",
        "the parser refuses a scale that does not fit its axis or its zero point",
        "give the scale the size of the axis, and the zero point that of the scale",
        _scale_shapes,
        "onnx-tensorrt QuantDequantLinearHelper",
    ),
    Rule(
        "T14",
        SILENT,
        "a quantizer with several scales says along which axis",
        "left out, the axis is 0 to the parsers of 8.6 to 10.1, and 1 to ONNX and to newer ones: a square weight gets the wrong scales",
        "write the axis attribute",
        _axes,
        "onnx-tensorrt QuantDequantLinearHelper, 10.1 beside newer ones",
    ),
    Rule(
        "T26",
        WARNING,
        "no scalar is quantized",
        "quantizers are defined for one dimension and more; newer parsers put a Reshape around a scalar",
        "leave it in float",
        _scalars,
        "NvInfer.h IQuantizeLayer",
        severity_in={"8.6": ERROR},
    ),
    Rule(
        "T28",
        INFORMATION,
        "weights lie within [-127, 127]",
        "symmetric weights leave -128 unused; it is taken all the same",
        "nothing to do, or quantize weights to [-127, 127]",
        _narrow_weights,
        "TensorRT documentation, quantization",
    ),
)
