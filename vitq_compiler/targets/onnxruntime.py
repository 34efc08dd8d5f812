"""ONNX Runtime on the CPU: 2-D Gemm between QuantizeLinear and DequantizeLinear, which becomes one QGemm kernel.

    x[.., K] -> Reshape[-1, K] -> Q -> DQ -> Gemm(., DQ(W int8), DQ(c int32)) -> Reshape[.., N]

No Q follows a Gemm, so the kernel writes float and nothing is rounded twice; but for the operands of attention products, which
are quantized anyway: there the kernel writes codes. Activations are uint8: the x86 kernels are u8 x s8, and the runtime leaves
int8 activations with several readers in float.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from onnx import TensorProto

from vitq_compiler.blocks.linear import Linear
from vitq_compiler.errors import RecipeError
from vitq_compiler.graph import Array, Graph, Node, Tensor, producer, value
from vitq_compiler.lint.onnxruntime import RULES
from vitq_compiler.lint.rule import Platform, Rule
from vitq_compiler.opset import PORTABLE, lower_opset, lowest_opset, oldest_opset, stuck_nodes
from vitq_compiler.pairs import pair_limit
from vitq_compiler.quant import Edge, QuantParams, QuantSpec
from vitq_compiler.releases import NEWEST, OLDEST, RELEASES, TYPES, known_release, order, requirement
from vitq_compiler.runtime import INSTALLED
from vitq_compiler.target import Target
from vitq_compiler.targets._codes import clip_codes
from vitq_compiler.targets._flat_stream import flatten_stream, merge_reshapes
from vitq_compiler.targets._leading import leading_sizes, merge_shapes, with_features

if TYPE_CHECKING:
    from vitq_compiler.pipeline import Compilation

FUSED = "1.24"  # the first release with Attention and the quantizers of its opset

CPUS = ("any", "vnni")


@dataclass(frozen=True)
class Onnxruntime(Target):
    """ONNX Runtime's CPU kernels.

    Attributes:
        version: the release that will run the graph, such as 1.20, or ``newest``; empty for what nearly all of them run.
        cpu: which CPUs the graph must be right on, of `CPUS`: ``any``, or only those whose int8 products do not saturate (x86 with
            VNNI, ARM), where pairs of weights need no limit.
    """

    version: str = ""
    cpu: str = "any"

    name: ClassVar[str] = "onnxruntime"
    integer_kernels: ClassVar[frozenset[str]] = frozenset(
        {"QGemm", "MatMulIntegerToFloat", "QLinearMatMul", "QLinearConv", "DynamicQuantizeMatMul"}
    )
    rules: ClassVar[tuple[Rule, ...]] = RULES
    lowering: ClassVar[str] = "lower-opset,insert-qdq"

    def __post_init__(self) -> None:
        if self.cpu not in CPUS:
            raise RecipeError(f"cpu {self.cpu!r}: known are {', '.join(CPUS)}")
        if self.version in ("", "newest"):
            return
        if not re.fullmatch(r"\d+\.\d+(\.\d+)?", self.version) or order(self.version) < order(OLDEST):
            raise RecipeError(f"onnxruntime {self.version!r}: give a version from {OLDEST} on, such as {NEWEST}, or newest")

    @property
    def release(self) -> str:  # type: ignore[override]  # depends on the version
        """The release that the graph is written for, of `RELEASES`; empty where none is named."""
        return NEWEST if self.version == "newest" else known_release(self.version) if self.version else ""

    @property
    def opset(self) -> int:  # type: ignore[override]  # likewise
        """The newest opset that the release has kernels for."""
        return RELEASES[self.release][0] if self.release else PORTABLE

    @property
    def rewrites(self) -> str:  # type: ignore[override]  # likewise
        """Passes that shape the float graph; those of attention take what the one before has left."""
        fused = "fuse-attention," if self.release and order(self.release) >= order(FUSED) else ""
        return f"{fused}separate-heads,linearize-patch-embedding"

    @property
    def packing(self) -> str:  # type: ignore[override]  # likewise
        """The pass that stores weights of few bits in a type of their own, which the runtime has to widen."""
        release = min(self.release or INSTALLED, INSTALLED, key=order)  # the installed one has to run the result too
        return "pack-weights" if order(release) >= order(TYPES["Cast", TensorProto.INT4]) else ""

    def lower_opset(self, c: Compilation) -> int:
        """Write the graph in the words of the release, as far as it can be; the installed one has to run it too."""
        graph, release = c.graph, min(self.release or INSTALLED, INSTALLED, key=order)
        if self.release and release != self.release:
            c.warnings.append(f"the installed onnxruntime has to run the result too, so it is written for {release}, not {self.release}")
        limit = min(self.opset, RELEASES[release][0])
        stuck = stuck_nodes(graph, limit)
        changes = lower_opset(graph, max([limit, *(oldest_opset(node, graph.opset) for node in stuck)]))
        if stuck:
            more = f" (and {len(stuck) - 1} more)" if len(stuck) > 1 else ""
            c.warnings.append(f"{stuck[0].op} node {stuck[0].name}{more} has no form in opset {limit}, which the graph would have else")
        needs = requirement(graph.without_weights()[0], opset=lowest_opset(graph), more=("QuantizeLinear",))
        if not needs.met_by(release) and not stuck_nodes(graph, PORTABLE):
            changes += lower_opset(graph, PORTABLE)
        return changes

    @property
    def platform(self) -> Platform:  # type: ignore[override]  # one for each kind of CPU
        """What the rules are held for."""
        return Platform(cpu=self.cpu)

    @property
    def may_saturate(self) -> bool:  # type: ignore[override]  # depends on the kind of CPU
        """Whether pairs of weights are free to leave 16 bits."""
        return self.cpu == "vnni"

    def fit(self, spec: QuantSpec) -> QuantSpec:
        """Unsigned codes: the x86 kernels are uint8 by int8, and products of two activations are exact on every CPU as uint8 by uint8."""
        return replace(super().fit(spec), signed=False)

    def fit_weight(self, weight: QuantSpec, activation: QuantSpec) -> QuantSpec:
        """Where two products could leave int16, a limit on neighbouring codes; these are symmetric then, as zero must be near code 0."""
        if self.cpu != "any" or weight.format != "int" or not weight.signed or activation.quantizer != "affine":
            return weight
        limit = pair_limit(activation.quant_max)
        if 2 * max(-weight.quant_min, weight.quant_max) <= limit:
            return weight
        return replace(weight, symmetric=True, pair_limit=limit)

    def lower(self, c: Compilation) -> int:
        flat: dict[str, Tensor] = {}
        changes = 0
        for linear in c.annotations.linears:
            activation = c.params.get(Edge(linear.name, 0))
            if activation is None or activation.curve is not None:  # codes on a curve are no operand of an integer kernel
                continue
            reason = _to_gemm(c.graph, linear, activation, c.params[Edge(linear.name, 1)], flat)
            if reason:
                c.warnings.append(f"{linear.name}: {reason}; it stays a MatMul, which is a little slower")
            else:
                changes += 1
        changes += clip_codes(c.graph) + _keep_apart(c.graph) + flatten_stream(c.graph) + merge_reshapes(c.graph)
        changes += merge_shapes(c.graph)
        return changes + _shield_quantizers(c.graph)


def _keep_apart(graph: Graph) -> int:
    """Add before LayerNormalization -> Sum, which is the same but is not fused into the much slower SkipLayerNormalization."""
    changes = 0
    for node in graph.find("LayerNormalization"):
        add = producer(node.inputs[0])
        if add is not None and add.op == "Add":
            add.op = "Sum"
            changes += 1
    return changes


def _shield_quantizers(graph: Graph) -> int:
    """A Reshape between Gemm and QuantizeLinear where others read the Gemm too: else the runtime finds no integer kernel for it."""
    changes = 0
    for node in graph.find("Gemm"):
        product = node.outputs[0]
        if len(product.outputs) < 2 or not any(reader.op == "QuantizeLinear" for reader in product.outputs):
            continue
        shape = graph.constant(f"{product.name}/same", np.array([-1, product.shape[-1]], np.int64))
        same = graph.insert("Reshape", [product, shape], name=f"{product.name}/shield", like=product)
        graph.replace(product, same, only=lambda reader: reader.op == "QuantizeLinear")
        changes += 1
    return changes


def _to_gemm(graph: Graph, linear: Linear, activation: QuantParams, weight: QuantParams, flat: dict[str, Tensor]) -> str:
    """Rewrite one quantized Linear; returns why not, or an empty string."""
    dequantize = producer(linear.input)
    assert dequantize is not None  # insert-qdq put it there
    rank = len(linear.output.shape or ())  # the input's shape changes with the first of its readers
    middle = list(linear.output.shape or ())[1:-1]
    if rank < 2:
        return "its rank is unknown"
    x = linear.input if rank == 2 else _flatten(graph, dequantize, linear.weight.shape[0], flat)
    inputs = [x, linear.weight]
    bias = linear.bias
    if bias is not None and (codes := _bias_codes(linear, activation, weight)) is not None:
        inputs.append(_integer_bias(graph, linear, activation, weight, codes))
        bias = None
    output = graph.insert("Gemm", inputs, name=f"{linear.name}/gemm", like=linear.output)
    if bias is not None:
        output = graph.insert("Add", [output, bias], name=f"{linear.name}/float_bias", like=linear.output)
    if rank > 2:
        output.shape = [None, linear.output.shape[-1]]
        if all(isinstance(d, int) and d > 0 for d in middle):
            shape = graph.constant(f"{linear.name}/unflatten", np.array([-1, *middle, linear.output.shape[-1]], np.int64))
        else:
            shape = _open_shape(graph, linear, dequantize)
        output = graph.insert("Reshape", [output, shape], name=f"{linear.name}/unflatten", like=linear.output)
    graph.replace(linear.output, output)
    return ""


def _open_shape(graph: Graph, linear: Linear, dequantize: Node) -> Tensor:
    """The shape of the output, its tokens known only when it runs: that of the input but for the features."""
    matrix = producer(dequantize.inputs[0]).inputs[0].inputs[0]  # type: ignore[union-attr]  # the Reshape of _flatten
    return with_features(graph, leading_sizes(graph, matrix.inputs[0]), linear.output.shape[-1])


def _flatten(graph: Graph, dequantize: Node, features: int, flat: dict[str, Tensor]) -> Tensor:
    """The quantizer of ``dequantize`` again, on [-1, features]; one for all readers."""
    key = dequantize.name
    if key not in flat:
        quantize = producer(dequantize.inputs[0])
        assert quantize is not None  # likewise
        source, codes = quantize.inputs[0], quantize.outputs[0]
        shape = graph.constant(f"{source.name}/flat", np.array([-1, features], np.int64))
        matrix = graph.insert("Reshape", [source, shape], name=f"{source.name}/flatten", like=source)
        matrix.shape = codes.shape = dequantize.outputs[0].shape = [None, features]
        quantize.inputs[0] = matrix
        flat[key] = dequantize.outputs[0]
    return flat[key]


def _bias_codes(linear: Linear, activation: QuantParams, weight: QuantParams) -> Array | None:
    """The bias at scale activation * weight, the unit of the kernel's accumulator; None where that is too small for int32.

    A nearly dead weight has such a scale; cutting its bias off at the end of the range would lose what the layer gives out.
    """
    codes = np.rint(value(linear.bias).astype(np.float64) / (activation.scale * weight.scale).astype(np.float32))
    half = np.iinfo(np.int32).max // 2  # room for the sum of products
    return codes.astype(np.int32) if np.abs(codes).max() <= half else None


def _integer_bias(graph: Graph, linear: Linear, activation: QuantParams, weight: QuantParams, codes: Array) -> Tensor:
    """The bias as int32 codes behind a DequantizeLinear."""
    assert linear.bias is not None  # checked by the caller
    scale = (activation.scale * weight.scale).astype(np.float32)
    name = linear.bias.name
    inputs = [
        graph.constant(f"{name}/codes", codes),
        graph.constant(f"{name}/scale", scale),
        graph.constant(f"{name}/zero_point", np.zeros(scale.shape, np.int32)),
    ]
    output = graph.insert("DequantizeLinear", inputs, name=f"{name}/dq", axis=0 if scale.ndim else None)
    output.dtype, output.shape = np.dtype(np.float32), list(codes.shape)
    return output
