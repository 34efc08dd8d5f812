"""NVIDIA TensorRT: symmetric int8 around every matrix product, half precision elsewhere, attention in the form that fuses.

    x -> Q -> DQ -> MatMul(., DQ(W int8)) -> Mul(scale per column) -> Add(float bias)
    softmax(q k^T) v on heads split from one stack, the scale of the scores in the weight of q

Zero points are zero and int8, scales have the type of what they quantize, and the axis of a scale per channel is written:
what is left out there means something else in some versions. MatMul stays on [batch, tokens, features], for a compiler that
merges bias, GELU, LayerNormalization and the next QuantizeLinear into single kernels gains nothing by flattening.

Fewer than 8 bits need no symmetry for a zero point of zero: int8 has room for their codes on either side of it, and a Clip before
the quantizer ends them where they shall (`QuantSpec.anchored`). Linear products stay int8 then; attention is not fused, in which
nothing but quantizers may lie.

What the versions differ in: 8.6 ends at opset 17 without Gelu, wants weights in float32 before their own QuantizeLinear, and
chooses half precision itself (scales that are not float32 it reads wrongly); 10 and 11 take types from the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vitq_compiler.errors import RecipeError
from vitq_compiler.graph import Graph, InputSpec, Tensor, is_constant, producer, value
from vitq_compiler.lint.rule import Platform, Rule
from vitq_compiler.lint.tensorrt import RULES
from vitq_compiler.opset import PORTABLE
from vitq_compiler.quant import E4M3, QuantSpec
from vitq_compiler.target import Target

if TYPE_CHECKING:
    from vitq_compiler.pipeline import Compilation

VERSIONS = ("8.6", "10", "11")
FLOAT_TYPES = ("fp32", "fp16", "bf16")
INT8_HEADS, INT8_TOKENS = (16, 32, 64), 512  # sizes for which a fused int8 attention kernel exists
SMALL, USUAL, LARGE = 1, 8, 32  # batches of the optimization profile
FP8_GPU, FP8_HEADS = 8.9, (8, 256)
ADA, ADA_HEADS, ADA_TOKENS = 8.9, 64, 3072  # what its 8-bit float attention is limited to
OLD_OPSET, OLD_IR_VERSION = 17, 8  # of TensorRT 8.6


def _is_dequantized(tensor: Tensor) -> bool:
    node = producer(tensor)
    return node is not None and node.op == "DequantizeLinear"


@dataclass(frozen=True)
class Tensorrt(Target):
    """TensorRT 8.6, 10 and 11.

    Attributes:
        version: of TensorRT, of `VERSIONS`.
        float_type: of what is not quantized, of `FLOAT_TYPES`; empty for what the version does best.
        compute_capability: of the GPU, such as 8.9; None leaves it open.
    """

    version: str = "10"
    float_type: str = ""
    compute_capability: float | None = None

    name: ClassVar[str] = "tensorrt"
    runs_here: ClassVar[bool] = False
    attention_choices: ClassVar[tuple[str, ...]] = ("float", "int8", "fp8")
    replaces: ClassVar[Mapping[str, str]] = {
        "select-tokens-early": "",  # leaves products of one row, for which there is no integer kernel
        "split-outlier-channels": "equalize-hidden",  # which costs this compiler no kernel
    }
    integer_kernels: ClassVar[frozenset[str]] = frozenset({"Int8 MatMul", "Int8 Conv", "FP8 MatMul", "FP8 Conv"})
    rules: ClassVar[tuple[Rule, ...]] = RULES

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise RecipeError(f"TensorRT version {self.version!r}: known are {', '.join(VERSIONS)}")
        if self.float_type not in ("", *FLOAT_TYPES):
            raise RecipeError(f"float type {self.float_type!r}: known are {', '.join(FLOAT_TYPES)}")
        if self.version == "8.6" and self.float_type not in ("", "fp32"):
            raise RecipeError(
                f"float type {self.float_type}: TensorRT 8.6 reads scales as float32 and chooses half precision itself; use fp32"
            )

    @property
    def opset(self) -> int:  # type: ignore[override]  # depends on the version
        """The newest opset that the version knows in all its releases."""
        return OLD_OPSET if self.version == "8.6" else PORTABLE

    @property
    def ir_version(self) -> int:  # type: ignore[override]  # likewise
        """IR version of the file."""
        return OLD_IR_VERSION if self.version == "8.6" else 9

    @property
    def platform(self) -> Platform:  # type: ignore[override]  # one for each version
        """What the rules are held for."""
        return Platform(self.version, self.compute_capability)

    @property
    def narrow(self) -> str:
        """The float type that the graph gets."""
        return self.float_type or ("fp32" if self.version == "8.6" else "fp16")

    @property
    def rewrites(self) -> str:  # type: ignore[override]  # depends on the float type
        """Passes that shape the float graph: keys and values are centred, as there are no zero points to follow them.

        A convolution in bfloat16 comes with opset 22, a MatMul was there before.
        """
        passes = "stack-heads,center-keys,center-values"
        return f"linearize-patch-embedding,{passes}" if self.narrow == "bf16" else passes

    @property
    def lowering(self) -> str:  # type: ignore[override]  # depends on the version
        """Passes from quantization parameters to the quantized graph."""
        to = "" if self.narrow == "fp16" else f"{{to={self.narrow}}}"
        narrow = [] if self.narrow == "fp32" else ["split-weight-scales", f"narrow-floats{to}"]
        return ",".join(["lower-opset", "price-attention", "insert-qdq", *narrow])

    def fit(self, spec: QuantSpec) -> QuantSpec:
        """Signed codes whose zero point is zero: symmetric, or anchored where there are codes to spare; 8-bit floats as they are.

        Raises:
            RecipeError: the version or the GPU has no 8-bit floats.
        """
        if spec.format == "e4m3" and self.version == "8.6":
            raise RecipeError("TensorRT 8.6 has no 8-bit floats in ONNX: take int8, or --trt-version 10")
        if spec.format == "e4m3" and self.compute_capability is not None and self.compute_capability < FP8_GPU:
            raise RecipeError(f"compute capability {self.compute_capability} has no 8-bit floats, {FP8_GPU} and above have: take int8")
        if spec.format == "int" and spec.bits < 8 and spec.granularity == "per_tensor":
            return replace(spec, signed=False, symmetric=False, anchored=True)
        return replace(spec, signed=True, symmetric=True)

    def attention_fault(self, head_dim: int, tokens: int, spec: QuantSpec) -> str:
        """Why the attention products cannot be quantized in one fused kernel; empty where they can."""
        if spec.format == "e4m3":
            if not FP8_HEADS[0] < head_dim <= FP8_HEADS[1]:
                return f"there is no fused kernel of 8-bit floats for heads of {head_dim}, only above 8 and up to 256"
            small = head_dim <= ADA_HEADS and tokens <= ADA_TOKENS
            if self.compute_capability == ADA and not small:
                sizes = f"heads of {head_dim} and {tokens} tokens, only up to {ADA_HEADS} and {ADA_TOKENS}"
                return f"compute capability {ADA} has no fused kernel of 8-bit floats for {sizes}"
            return ""
        if head_dim not in INT8_HEADS:
            return f"there is no fused int8 kernel for heads of {head_dim}, only of {', '.join(map(str, INT8_HEADS))}"
        return f"there is no fused int8 kernel for {tokens} tokens, only up to {INT8_TOKENS}" if tokens > INT8_TOKENS else ""

    def lower(self, c: Compilation) -> int:
        """What the version needs."""
        if self.compute_capability is None and any(params.format == "e4m3" for params in c.params.values()):
            c.warnings.append(f"8-bit floats need a GPU of compute capability {FP8_GPU} or above; --compute-capability checks yours")
        return _quantize_weights(c.graph) if self.version == "8.6" else 0

    def kernels(self, graph: Graph) -> dict[str, str]:
        """Weight codes -> the matrix product that reads them, ``Int8`` or ``FP8`` where both operands are."""
        found = {}
        for node in graph.find("MatMul", "Conv", "Gemm"):
            codes = _codes(node.inputs[1])
            if codes is not None:
                found[codes.name] = f"{'FP8' if codes.dtype == E4M3 else 'Int8'} {node.op}" if _is_dequantized(node.inputs[0]) else node.op
        return found

    def command(self, path: Path, inputs: list[InputSpec]) -> str:
        """How to build an engine."""
        types = {"8.6": " --int8 --fp16", "10": " --stronglyTyped", "11": ""}[self.version]
        shapes = ""
        if any(not (isinstance(d, int) and d > 0) for spec in inputs for d in spec.shape):
            for name, batch in (("min", SMALL), ("opt", USUAL), ("max", LARGE)):
                shapes += f" --{name}Shapes={','.join(f'{spec.name}:{_sizes(spec, batch)}' for spec in inputs)}"
        return f"trtexec --onnx={path}{types}{shapes} --saveEngine={path.with_suffix('.engine')}"


def _sizes(spec: InputSpec, batch: int) -> str:
    """The shape of an input as trtexec reads it, with so many samples, and 224 for every other size that is open."""
    free = [batch if axis == 0 and spec.batched else 224 for axis in range(len(spec.shape))]
    return "x".join(str(size if isinstance(size, int) and size > 0 else other) for size, other in zip(spec.shape, free, strict=True))


def _codes(tensor: Tensor) -> Tensor | None:
    """The constant behind a DequantizeLinear (and a QuantizeLinear) of a weight."""
    node = producer(tensor)
    while node is not None and node.op in ("DequantizeLinear", "QuantizeLinear"):
        tensor = node.inputs[0]
        node = producer(tensor)
    return tensor if is_constant(tensor) else None


def _quantize_weights(graph: Graph) -> int:
    """Store weights as the float32 values of their codes, and let the graph quantize them."""
    nodes = [n for n in graph.find("DequantizeLinear") if is_constant(n.inputs[0])]
    for node in nodes:
        codes, scale, zero_point = node.inputs
        axis = node.attrs.get("axis")
        spread = value(scale).reshape([-1 if i == axis else 1 for i in range(value(codes).ndim)] if value(scale).ndim else [])
        kind = codes.dtype
        codes.values = (value(codes).astype(np.float32) * spread).astype(np.float32)
        quantized = graph.insert("QuantizeLinear", [codes, scale, zero_point], name=f"{codes.name}/q", axis=axis)
        quantized.dtype, quantized.shape = kind, list(codes.shape)
        node.inputs[0] = quantized
    return len(nodes)
