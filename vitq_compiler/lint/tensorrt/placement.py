"""Where quantizers belong in a TensorRT graph: on both operands of a large product, and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from onnx import TensorProto

from vitq_compiler.lint.model import Model, Node, Value
from vitq_compiler.lint.quantization import (
    FLOATS,
    FP4,
    FP8,
    GEMMS,
    INT4,
    ahead,
    attentions,
    code_type,
    dequantizer,
    dequantizes,
    gemms,
    is_dequantize,
    is_layout,
    is_quantize,
    quantizes,
    same_scale,
)
from vitq_compiler.lint.rule import INFORMATION, WARNING, Fault, Platform, Rule

# What computes; everything else moves elements or is folded away.
COMPUTES = GEMMS | {"Attention", "Softmax", "LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization"}
COMPUTES |= {"Add", "Sub", "Mul", "Div", "Sum", "Pow", "Sqrt", "Exp", "Log", "Erf", "Gelu", "Tanh", "Sigmoid", "Relu", "Clip"}
COMPUTES |= {"ReduceMean", "ReduceSum", "ReduceMax", "GlobalAveragePool", "AveragePool", "MaxPool", "Resize", "BatchNormalization"}
NORMALIZES = frozenset({"LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization", "Pow", "Sqrt"})
LEAST = 16  # channels from which a product is worth quantizing
FP8_KERNEL_AREA = 32


def _through(node: Node) -> bool:
    return is_layout(node) or node.op == "Cast"


def _inner_products(model: Model) -> set[Node]:
    return {product for core in attentions(model) for product in (core.scores, core.context)}


def _one_sided(model: Model, platform: Platform) -> Iterator[Fault]:
    inner = _inner_products(model)  # the business of S05
    for gemm in gemms(model):
        left, right = (dequantizer(gemm.input(index)) for index in (0, 1))
        if gemm in inner or (left is None) == (right is None):
            continue
        one = left or right
        if one is not None and code_type(one) not in (INT4, FP4):  # these are for weights alone
            side = "first" if left is not None else "second"
            yield Fault(gemm, f"only its {side} operand is quantized")


def _statistics(model: Model) -> Iterator[Node]:
    """The nodes of x / sqrt(mean(x^2) + eps): like those inside LayerNormalization they compute in float32."""
    for root in model.find("Sqrt"):
        found = [root]
        for ops in (("Add",), ("ReduceMean",), ("Pow", "Mul")):
            before = [v.producer for v in found[-1].inputs if v is not None and v.producer is not None and v.producer.op in ops]
            found += before[:1]
        if len(found) == 4:
            yield from (*found, *(node for node in root.readers() if node.op == "Div"))


def _float32(model: Model, platform: Platform) -> Iterator[Fault]:
    statistics = set(_statistics(model))
    left = [
        node
        for node in model.nodes
        if node.op in COMPUTES and node.domain == "" and node.output.dtype == TensorProto.FLOAT and not model.is_static(node.output)
        if node not in statistics
    ]
    if left:
        counts = ", ".join(f"{count} {op}" for op, count in sorted(Counter(node.op for node in left).items()))
        yield Fault(None, f"{len(left)} operations compute in FLOAT ({counts}); the first is {left[0].op} node {left[0].label}")


def _casts(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in model.find("Cast"):
        source = node.input(0)
        if source is None or source.dtype not in FLOATS or model.is_static(source):
            continue
        if is_dequantize(source.producer) and any(reader.op in GEMMS for reader, _ in ahead(node, is_layout)):
            yield Fault(node, "it stands between a DequantizeLinear and a product")
        elif source.producer is not None and source.producer.op in COMPUTES and any(map(is_quantize, node.readers())):
            yield Fault(node, f"it stands between {source.producer.op} node {source.producer.label} and a QuantizeLinear")


def _fate(model: Model, reader: Node) -> str:
    """The rule that a DequantizeLinear of an activation breaks by this reader; empty where it breaks none."""
    if reader.op in GEMMS or is_quantize(reader) or is_dequantize(reader):
        return ""
    if reader.op in ("Attention", "MultiHeadAttention"):
        return ""  # S10
    if reader.op == "Concat":
        return "" if any(r.op in GEMMS or is_quantize(r) for r, _ in ahead(reader, _through)) else "S19"
    if reader.op in NORMALIZES or _is_mean_part(reader):
        return "S12"
    if reader.op == "Gelu" or _touches_erf(reader):
        return "S14"
    if reader.op in ("Mul", "Div") and any(r.op in GEMMS for r, _ in ahead(reader, _through)):
        return ""  # S11
    if reader.op in ("Add", "Sum") and not any(map(model.is_static, reader.inputs)):
        return "S13"
    return "S19"


def _is_mean_part(node: Node) -> bool:
    """Whether it takes a mean and subtracts it, or subtracts one."""
    if node.op == "ReduceMean":
        return any(reader.op == "Sub" for reader, _ in ahead(node, _requantizes))
    return node.op == "Sub" and any(_source(value, "ReduceMean") for value in node.inputs)


def _touches_erf(node: Node) -> bool:
    """Whether it is a piece of a decomposed GELU."""
    if node.op == "Erf" or node.op not in ("Mul", "Div", "Add"):
        return node.op == "Erf"
    if any(reader.op == "Erf" for reader, _ in ahead(node, _requantizes)) or any(_source(value, "Erf") for value in node.inputs):
        return True
    sums = [value.producer for value in node.inputs if value is not None and value.producer is not None and value.producer.op == "Add"]
    return node.op == "Mul" and any(_source(value, "Erf") for found in sums for value in found.inputs)


def _requantizes(node: Node) -> bool:
    return is_quantize(node) or is_dequantize(node)


def _source(value: Value | None, op: str) -> bool:
    """Whether ``op`` computes a value, quantized in between or not."""
    node = value.producer if value is not None else None
    for _ in range(2):
        if _requantizes(node) if node is not None else False:
            first = node.input(0) if node is not None else None
            node = first.producer if first is not None else None
    return node is not None and node.op == op


def _misplaced(rule: str, model: Model) -> Iterator[Fault]:
    """Every DequantizeLinear of an activation with a reader of that fate, and none that it is good for."""
    for node in dequantizes(model):
        if model.is_static(node.input(0)):
            continue
        fates = [(_fate(model, reader), reader) for reader, _ in ahead(node, _through)]
        if node.output.is_output and not fates:
            fates = [("S19", node)]
        good = any(not fate for fate, _ in fates)
        for fate, reader in fates:
            if fate == rule and not (good and rule == "S19"):
                outcome = "is an output of the graph" if reader is node else f"is read by {reader.op} node {reader.label}"
                yield Fault(node, f"what it makes {outcome}")
                break


def _normalizations(model: Model, platform: Platform) -> Iterator[Fault]:
    for fault in _misplaced("S12", model):
        quantize = _source_of(fault.node)
        if quantize is None or quantize.op != "Conv":
            yield fault


def _source_of(node: Node | None) -> Node | None:
    """The operation whose result a DequantizeLinear gives back."""
    codes = node.input(0) if node is not None else None
    quantize = codes.producer if codes is not None else None
    data = quantize.input(0) if quantize is not None and is_quantize(quantize) else None
    source = data.producer if data is not None else None
    while source is not None and is_layout(source):
        data = source.input(0)
        source = data.producer if data is not None else None
    return source


def _residuals(model: Model, platform: Platform) -> Iterator[Fault]:
    return _misplaced("S13", model)


def _gelus(model: Model, platform: Platform) -> Iterator[Fault]:
    return _misplaced("S14", model)


def _strays(model: Model, platform: Platform) -> Iterator[Fault]:
    return _misplaced("S19", model)


def _small_products(model: Model, platform: Platform) -> Iterator[Fault]:
    inner = _inner_products(model)
    for gemm in model.find("MatMul", "Gemm"):
        if gemm in inner or dequantizer(gemm.input(0)) is None:
            continue
        left, right, result = gemm.input(0), gemm.input(1), gemm.output
        sizes = {"rows": result.size(-2), "columns": result.size(-1)}
        if left is not None and right is not None:
            outer = right.size(-1 if gemm.attributes.get("transB") else -2)
            sizes["terms"] = left.size(-2 if gemm.attributes.get("transA") else -1) or outer
        least = {"rows": 2, "columns": LEAST, "terms": LEAST}
        if small := [f"{size} {name}" for name, size in sizes.items() if size is not None and size < least[name]]:
            yield Fault(gemm, f"a quantized product of {' and '.join(small)}")


def _patch_embeddings(model: Model, platform: Platform) -> Iterator[Fault]:
    for conv in model.find("Conv"):
        weight, quantized = conv.input(1), dequantizer(conv.input(0))
        if quantized is None or weight is None or weight.shape is None or None in weight.shape or len(weight.shape) < 3:
            continue
        out, channels, *kernel = (int(size or 0) for size in weight.shape)
        area = 1
        for size in kernel:
            area *= size
        if code_type(quantized) == FP8 and (channels <= LEAST or area > FP8_KERNEL_AREA):
            yield Fault(conv, f"FP8 with {channels} input channels and {area} kernel elements")
        elif code_type(quantized) != FP8 and channels <= 4 and (out % 8 or len(set(kernel)) > 1):
            yield Fault(conv, f"INT8 with {out} output channels and a kernel of {'x'.join(map(str, kernel))}")


def _unshared(model: Model, platform: Platform) -> Iterator[Fault]:
    for first in quantizes(model):
        data = first.input(0)
        for node in [reader for reader, index in data.readers if index == 0 and is_quantize(reader)] if data is not None else ():
            if node.position > first.position and same_scale(model, first, node) is False:
                yield Fault(node, f"it quantizes what {first.op} node {first.label} quantizes with another scale")
                break


def _concats(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in model.find("Concat"):
        found = [dequantizer(value) for value in node.inputs]
        into = [reader for reader, _ in ahead(node, is_layout) if is_quantize(reader)]
        all_of_them = [n for n in (*found, *into) if n is not None]
        if None not in found and any(same_scale(model, all_of_them[0], other) is False for other in all_of_them[1:]):
            yield Fault(node, "its inputs and what follows have different scales")


RULES = (
    Rule(
        "S01",
        WARNING,
        "both operands of a product are quantized, or none",
        "with one of them it is dequantized within the kernel, and the product is done in half precision",
        "quantize the other operand too, or neither",
        _one_sided,
        "TensorRT-RTX 1.7, layer listing",
    ),
    Rule(
        "S02",
        WARNING,
        "what is not quantized is FP16 or BF16 in the file, but for the statistics of normalizations",
        "a strongly typed network computes in the types it is given: FP32 leaves attention unfused and needs half as many layers again",
        "convert the rest of the graph to FP16",
        _float32,
        "NVIDIA/Model-Optimizer#167",
        versions=("10", "11"),
    ),
    Rule(
        "S03",
        WARNING,
        "no Cast between quantizers and what they belong to",
        "it costs a kernel, and the product writes FP32",
        "give the scale the type that the Cast makes, and drop the Cast",
        _casts,
        "NVIDIA/Model-Optimizer pull request 1289",
    ),
    Rule(
        "S12",
        WARNING,
        "LayerNormalization reads float, except behind a convolution",
        "quantized inside, it is neither fused nor accurate; a QuantizeLinear behind it is part of its kernel",
        "take the quantizers off its input",
        _normalizations,
        "NVIDIA/TensorRT#4084; NVIDIA/Model-Optimizer pull request 1117",
    ),
    Rule(
        "S13",
        INFORMATION,
        "the residual stream stays in float",
        "quantizing an Add costs a transformer accuracy; NVIDIA advises it for the speed of convolutional networks",
        "take the quantizers off the Add",
        _residuals,
        "NVIDIA/TensorRT#1992, #3861, #3243",
    ),
    Rule(
        "S14",
        WARNING,
        "GELU is not quantized inside",
        "it is fused into the product before it only as Gelu or Div, Erf, Add, Mul, Mul on float",
        "take the quantizers off",
        _gelus,
        "NVIDIA Model Optimizer find_hardcoded_patterns",
    ),
    Rule(
        "S15",
        WARNING,
        "only large products are quantized",
        "with one row, or fewer than 16 columns or terms, quantizing costs more than it saves",
        "leave it in float",
        _small_products,
        "NVIDIA Model Optimizer find_nodes_from_matmul_to_exclude",
    ),
    Rule(
        "S16",
        WARNING,
        "a quantized patch embedding has output channels in eights and a square kernel; FP8 needs more than 16 input channels",
        "there is no fast kernel for others",
        "leave it in float",
        _patch_embeddings,
        "NVIDIA Model Optimizer find_nodes_from_convs_to_exclude",
    ),
    Rule(
        "S17",
        WARNING,
        "a tensor is quantized with one scale for all its readers",
        "q, k and v of one scale are one product; of three they are three products and three quantizers",
        "share one QuantizeLinear and DequantizeLinear (DedicatedQDQPair off)",
        _unshared,
        "NVIDIA Model Optimizer; TensorRT-RTX 1.7, layer listing",
    ),
    Rule(
        "S18",
        WARNING,
        "inputs and output of a quantized Concat share one scale",
        "other scales need a kernel to requantize",
        "calibrate them together",
        _concats,
        "NVIDIA Model Optimizer get_concat_eliminated_tensors; NVIDIA/TensorRT#3861",
    ),
    Rule(
        "S19",
        WARNING,
        "quantizers stand only before products",
        "elsewhere they are a kernel of their own that goes to integers and back",
        "take them off",
        _strays,
        "NVIDIA Model Optimizer configure_ort; NVIDIA/TensorRT#4039",
    ),
)
