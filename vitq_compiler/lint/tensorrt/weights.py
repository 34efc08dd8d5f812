"""Quantized weights of a TensorRT graph: which axis, which form, and what may stand between them and their product."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from vitq_compiler.lint.model import Model, Node
from vitq_compiler.lint.quantization import (
    FP4,
    FP8,
    INT4,
    behind,
    code_type,
    dequantizes,
    gemms,
    is_blocked,
    is_dequantize,
    is_quantize,
    quantizers,
    scale_count,
    type_name,
)
from vitq_compiler.lint.rule import ERROR, INFORMATION, WARNING, Fault, Platform, Rule
from vitq_compiler.lint.tensorrt.operators import INTEGER_OPS

CODES = frozenset({TensorProto.INT8, FP8, INT4, FP4})
UNFOLDED = frozenset({"Gather", "GatherElements", "GatherND", "Pow", "Exp"})


def _is_transpose(node: Node) -> bool:
    return node.op == "Transpose"


def _weight(model: Model, gemm: Node) -> tuple[int, Node | None]:
    """(operand, DequantizeLinear) of a weight, seen through a Transpose; operand -1 where there is no weight."""
    for index in (1, 0):
        if model.is_static(gemm.input(index)):
            found = behind(gemm.input(index), _is_transpose)
            return index, found if is_dequantize(found) else None
    return -1, None


def _axis_fault(gemm: Node, operand: int, dequantize: Node) -> str:
    """What is wrong with the axis of a weight; empty where nothing is."""
    weight = gemm.input(operand)
    rank = weight.rank if weight is not None else None
    node = weight.producer if weight is not None else None
    axis = dequantize.attributes.get("axis", 1)
    if rank is None:
        return ""
    axis %= rank
    permutations = []
    while node is not None and node is not dequantize:
        permutations.append(node.attributes.get("perm", list(range(rank))[::-1]))
        source = node.input(0)
        node = source.producer if source is not None else None
    for permutation in reversed(permutations):
        axis = list(permutation).index(axis)
    if gemm.op == "Conv":
        wanted = 0
    elif gemm.op == "ConvTranspose":
        wanted = 1
    elif gemm.op == "Gemm":
        transposed = bool(gemm.attributes.get("transB" if operand else "transA", 0))
        wanted = (0 if transposed else 1) if operand else (1 if transposed else 0)
    else:
        wanted = rank - 1 if operand else rank - 2
    return "" if axis == wanted else f"its weight has scales along axis {axis}, its output channels are axis {wanted}"


def _weight_axes(model: Model, platform: Platform) -> Iterator[Fault]:
    for gemm in gemms(model):
        operand, dequantize = _weight(model, gemm)
        if dequantize is None or is_blocked(dequantize) or (scale_count(model, dequantize) or 0) < 2:
            continue
        if fault := _axis_fault(gemm, operand, dequantize):
            yield Fault(gemm, fault)


def _activation_scales(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        if not model.is_static(node.input(0)) and not is_blocked(node) and (count := scale_count(model, node)) is not None and count > 1:
            yield Fault(node, f"{count} scales on an activation")


def _stray_codes(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in model.nodes:
        if is_dequantize(node) or is_quantize(node) or node.domain != "" or node.op in INTEGER_OPS:
            continue  # plugins may read codes, and what the parser does not know is the business of T21 and T22
        for value in node.inputs:
            if value is not None and value.tensor is not None and value.dtype in CODES:
                yield Fault(node, f"reads the {type_name(value.dtype)} constant {value.name}")


def _codes_in_old_versions(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in dequantizes(model):
        data = node.input(0)
        if data is not None and data.tensor is not None and data.dtype == TensorProto.INT8:
            yield Fault(node, f"its weight {data.name} is stored as INT8")


def _fp8_transposes(model: Model, platform: Platform) -> Iterator[Fault]:
    for gemm in gemms(model):
        operand, dequantize = _weight(model, gemm)
        weight = gemm.input(operand)
        if dequantize is not None and code_type(dequantize) == FP8 and weight is not None and weight.producer is not dequantize:
            yield Fault(gemm, "a Transpose between its FP8 weight and it")


def _tables(model: Model, platform: Platform) -> Iterator[Fault]:
    for gemm in gemms(model):
        for value in gemm.inputs[:2]:
            waiting = [value.producer] if value is not None and model.is_static(value) else []
            while waiting:
                node = waiting.pop()
                if node is None:
                    continue
                if node.op in UNFOLDED and node.domain == "":
                    yield Fault(gemm, f"its weight is computed by {node.op} node {node.label}")
                    break
                waiting += [v.producer for v in node.inputs if v is not None]


RULES = (
    Rule(
        "T15",
        WARNING,
        "scales of a weight lie along its output channels",
        "the product becomes a dequantization and a half-precision product",
        "quantize along axis 0 of Conv and of Gemm with transB, 1 of ConvTranspose, the last one of MatMul",
        _weight_axes,
        "NvInfer.h IDequantizeLayer; NVIDIA Model Optimizer configure_ort",
    ),
    Rule(
        "T16",
        ERROR,
        "activations have one scale",
        "within a block no engine is built for an activation with a scale for each channel",
        "move scales of channels into the LayerNormalization or the weight before",
        _activation_scales,
        "NvInfer.h IQuantizeLayer",
    ),
    Rule(
        "T18",
        ERROR,
        "codes that are constants are read only by DequantizeLinear",
        "no engine is built where anything else reads them",
        "dequantize first",
        _stray_codes,
        "TensorRT builder: quantized constants are only allowed before DQ or PLUGIN",
    ),
    Rule(
        "T19",
        ERROR,
        "version 8.6 gets float weights with both quantizers",
        "its parser takes no INT8 weights",
        "store the weight as FLOAT and quantize it in the graph (AddQDQPairToWeight of onnxruntime.quantization)",
        _codes_in_old_versions,
        "microsoft/onnxruntime#11535; TensorRT documentation, explicit quantization",
        versions=("8.6",),
    ),
    Rule(
        "S20",
        WARNING,
        "an FP8 weight is stored as its product reads it",
        "a Transpose behind its DequantizeLinear costs a kernel; INT8 weights do not mind",
        "transpose the stored weight",
        _fp8_transposes,
        "NVIDIA Model Optimizer compress_weights; NVIDIA/TensorRT#1604",
        versions=("10", "11"),
    ),
    Rule(
        "S21",
        WARNING,
        "weights are not looked up or computed",
        "a table or a power is not folded: it runs at every inference, and the product is done in half precision",
        "store the nearest INT8 codes with a scale for each channel",
        _tables,
        "TensorRT-RTX 1.7, layer listing",
    ),
    Rule(
        "S22",
        INFORMATION,
        "levels that are not uniform are snapped to an INT8 grid",
        "stored as INT8 with a scale for each channel such weights run as any other; the graph does not tell them apart",
        "nothing to do",
        None,
        "TensorRT-RTX 1.7, layer listing",
    ),
)
