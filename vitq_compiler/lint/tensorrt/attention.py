"""What lets TensorRT compute attention in one kernel, in half precision or quantized."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from vitq_compiler.lint.model import Model, Node
from vitq_compiler.lint.quantization import (
    FP8,
    SCALING,
    Attention,
    attentions,
    code_type,
    dequantizer,
    is_dequantize,
    is_layout,
    is_quantize,
)
from vitq_compiler.lint.rule import INFORMATION, WARNING, Fault, Platform, Rule

BEFORE = SCALING | {"Add", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "QuantizeLinear", "DequantizeLinear"}
AFTER = frozenset({"Cast", "Reshape", "Transpose", "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear"})
INT8_HEADS = (16, 32, 64)
INT8_LENGTH = 512
FP8_HEADS = range(9, 257)
ADA, ADA_HEAD, ADA_LENGTH = 8.9, 64, 3072
FP8_SOFTMAX = 1 / 448  # the largest FP8 number stands for the probability 1


def _pattern(model: Model, platform: Platform) -> Iterator[Fault]:
    for core in attentions(model):
        if odd := [node for node in core.before if node.op not in BEFORE]:
            yield Fault(core.softmax, f"{odd[0].op} node {odd[0].label} between q k and the softmax")


def _after_softmax(model: Model, platform: Platform) -> Iterator[Fault]:
    for core in attentions(model):
        if odd := [node for node in core.after if node.op not in AFTER]:
            yield Fault(core.softmax, f"{odd[0].op} node {odd[0].label} between the softmax and v")


def _types(core: Attention) -> set[int]:
    return {code_type(node) for node in core.quantizers().values() if node is not None}


def _partly_quantized(model: Model, platform: Platform) -> Iterator[Fault]:
    for core in attentions(model):
        found = core.quantizers()
        missing = [name for name, node in found.items() if node is None]
        if missing and len(missing) < len(found):
            given = [name for name, node in found.items() if node is not None]
            yield Fault(core.softmax, f"{', '.join(given)} quantized, but not {', '.join(missing)}")


def _int8(model: Model, platform: Platform) -> Iterator[Fault]:
    for core in attentions(model):
        if TensorProto.INT8 not in _types(core):
            continue
        if core.head_size is not None and core.head_size not in INT8_HEADS:
            yield Fault(core.softmax, f"INT8 heads of {core.head_size} channels")
        elif length := max((n for n in core.lengths if n is not None and n > INT8_LENGTH), default=0):
            yield Fault(core.softmax, f"INT8 attention over {length} tokens")


def _fp8(model: Model, platform: Platform) -> Iterator[Fault]:
    for core in attentions(model):
        if FP8 not in _types(core):
            continue
        length = max((n for n in core.lengths if n is not None), default=0)
        scale = model.array(node.input(1)) if (node := core.quantizers()["softmax"]) is not None else None
        if core.head_size is not None and core.head_size not in FP8_HEADS:
            yield Fault(core.softmax, f"FP8 heads of {core.head_size} channels")
        elif platform.compute_capability == ADA and (length > ADA_LENGTH or (core.head_size or 0) > ADA_HEAD):
            yield Fault(core.softmax, f"FP8 heads of {core.head_size} channels over {length} tokens on compute capability {ADA}")
        elif scale is not None and not np.allclose(scale.astype(np.float64), FP8_SOFTMAX, rtol=1e-2):
            yield Fault(core.softmax, f"an FP8 softmax of scale {float(scale.flat[0]):g}, 1/448 expected")
        elif not any(is_quantize(reader) for reader in _next(core.context)):
            yield Fault(core.softmax, "FP8 attention whose output is not quantized")


def _next(node: Node) -> list[Node]:
    """The nodes that read a result, seen through what only moves elements."""
    found: list[Node] = []
    waiting = node.readers()
    while waiting:
        reader = waiting.pop()
        if is_layout(reader):
            waiting += reader.readers()
        else:
            found.append(reader)
    return found


def _quantized(model: Model, platform: Platform) -> Iterator[Fault]:
    for core in attentions(model):
        if all(core.quantizers().values()):
            yield Fault(core.softmax, "attention is quantized")


def _operator(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in model.find("Attention"):
        if any(dequantizer(value) is not None for value in node.inputs[:3]):
            yield Fault(node, "its inputs are quantized, its softmax cannot be")


def _float_side(model: Model, platform: Platform) -> Iterator[Fault]:
    for core in attentions(model):
        for value, name in zip(core.operands(), "qkv", strict=True):
            between = []
            node = value.producer if value is not None else None
            while node is not None and (is_layout(node) or node.op in SCALING):
                between.append(node)
                first = node.input(0)
                node = first.producer if first is not None else None
            odd = [n for n in between if n.op in SCALING or n.op == "Transpose"]
            if is_dequantize(node) and odd:
                yield Fault(odd[0], f"it stands between the quantizer of {name} and attention")


RULES = (
    Rule(
        "S04",
        WARNING,
        "attention is a product, a scaling, a mask added, a softmax and a product",
        "anything else between q k and the softmax leaves it unfused",
        "add masks instead of selecting by them, and scale q before the product",
        _pattern,
        "TensorRT documentation, fused attention; NVIDIA/TensorRT#3620, #3575",
    ),
    Rule(
        "S05",
        WARNING,
        "of q, k, v and the softmax all are quantized, or none",
        "half quantized is the slowest: both products run apart from the softmax",
        "quantize the softmax too, or leave attention in float",
        _partly_quantized,
        "NVIDIA/TensorRT#2981, #4167, #3243",
    ),
    Rule(
        "S06",
        WARNING,
        "INT8 attention has heads of 16, 32 or 64 channels and at most 512 tokens",
        "there is no fused kernel for others",
        "leave attention in float",
        _int8,
        "NVIDIA/TensorRT#2981, #3724; NVIDIA Model Optimizer find_nodes_from_mha_to_exclude",
    ),
    Rule(
        "S07",
        WARNING,
        "FP8 attention has heads of 9 to 256 channels (64 on 8.9, up to 3072 tokens), the softmax scale 1/448 and a quantized output",
        "there is no fused kernel for others",
        "leave attention in float",
        _fp8,
        "NVIDIA Model Optimizer fp8_exporter; TensorRT 10.6 release notes",
        versions=("10", "11"),
    ),
    Rule(
        "S08",
        INFORMATION,
        "attention stays in half precision",
        "the safe default: one fused kernel, which writes INT8 for the projection behind it; quantized attention costs accuracy",
        "measure what quantized attention is worth",
        _quantized,
        "TensorRT-RTX 1.7, layer listing",
    ),
    Rule(
        "S09",
        WARNING,
        "nothing but quantizers between the softmax and v",
        "a quantizer made of Log, Round or Pow leaves attention unfused",
        "use a uniform quantizer, or none",
        _after_softmax,
        "TensorRT-RTX 1.7, layer listing",
    ),
    Rule(
        "S10",
        WARNING,
        "quantized attention is decomposed, not the Attention operator",
        "the operator has no place for the quantizer of the softmax, and runs in half precision",
        "write MatMul, Softmax, MatMul, or take the quantizers off",
        _operator,
        "TensorRT documentation, fused attention",
    ),
    Rule(
        "S11",
        WARNING,
        "q is scaled and k transposed before they are quantized",
        "some versions fuse only what is directly behind the quantizers",
        "move the scaling and the Transpose before the QuantizeLinear",
        _float_side,
        "NVIDIA Model Optimizer fp8_exporter",
    ),
)
