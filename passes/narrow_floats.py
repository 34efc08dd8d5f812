"""What is not quantized, in half precision.

    float32 tensors, constants and scales  ->  float16 (or bfloat16); inputs and outputs of the graph stay float32, behind a Cast

A compiler that takes types from the graph (TensorRT, strongly typed) computes in float32 whatever the graph has in float32:
attention is then not fused, and every integer product writes four bytes for each number.

Where it is safe: LayerNormalization keeps its statistics in float32 (ONNX attribute ``stash_type``), as is done for a decomposed
normalization by the root of a mean square; a softmax subtracts the maximum first, and products accumulate in float32. What else
could overflow is measured: every operation that reads or writes values within ``headroom`` of the largest half (65504), on a
calibration batch, stays in float32 and is noted. bfloat16 has the range of float32. A scale is rounded up to a half, and the codes
of a weight are taken again with the rounded one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from ml_dtypes import bfloat16
from onnx import TensorProto

from vitq_compiler.errors import TargetError
from vitq_compiler.graph import Array, Graph, Node, Tensor, is_constant, readers, scalar, value
from vitq_compiler.pattern import const, either, match, op, var
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.runtime import Feed, limited, rounds_half, run, session
from vitq_compiler.views import VIEWS

TYPES: dict[str, tuple[np.dtype[Any], int]] = {
    "fp16": (np.dtype(np.float16), TensorProto.FLOAT16),
    "bf16": (np.dtype(bfloat16), TensorProto.BFLOAT16),
}
SAMPLES = 8  # on which the largest values are looked up
LARGEST = float(np.finfo(np.float16).max)
SINGLE = np.dtype(np.float32)
SMALLEST = 2.0**-14  # normal half
QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
TYPED_BY_ATTRIBUTE = frozenset({"Cast", "ConstantOfShape"})  # which `_narrow` writes
SCATTERS = frozenset({"ScatterElements", "ScatterND"})
FLOAT32_INPUTS = {"Resize": (2,), "Upsample": (1,)}  # scales of sizes, float32 whatever the data


_square = either(op.Pow(var("x"), const(equals=2.0)).named("square"), op.Mul(var("x"), var("x")).named("square"))
MEAN_SQUARE_ROOT = op.Sqrt(op.Add(op.ReduceMean(_square).named("mean"), const("epsilon")).named("sum"))


@dataclass(frozen=True)
class NarrowFloats(Pass):
    """float32 remainder -> float16"""

    name = "narrow-floats"
    requires = frozenset({Fact.QUANTIZED})
    to: str = "fp16"
    headroom: float = 4.0

    def __post_init__(self) -> None:
        if self.to not in TYPES:
            raise ValueError(f"to must be {' or '.join(TYPES)}, got {self.to!r}")
        if self.headroom < 1:
            raise ValueError(f"headroom must be at least 1, got {self.headroom}")

    def run(self, c: Compilation) -> int:
        graph = c.graph.clean()
        if branching := next((n for n in graph.nodes if any(True for _ in n.subgraphs())), None):
            raise TargetError(
                f"{branching.op} node {branching.name} branches, which has no half precision form here; use --float-type fp32"
            )
        graph.infer_shapes()
        if reason := self._not_computed(graph):
            c.runnable = graph.snapshot()
            c.warnings.append(f"{reason}: the accuracy figures are those of the graph with a float32 remainder")
        wide = self._wide(c)
        narrowed = {id(n) for n in graph.nodes if n.name not in wide}
        graph_outputs = [(t, t.name) for t in graph.outputs if t.dtype == SINGLE]
        halves: dict[int, Tensor] = {}
        for node in list(graph.nodes):
            if id(node) in narrowed:
                _narrow(graph, node, self.to, halves)
        _join(graph, narrowed, self.to)
        for tensor, name in graph_outputs:
            _widen_output(graph, tensor, name)
        graph.clean()
        return len(narrowed)

    def _not_computed(self, graph: Graph) -> str:
        """Why the runtime cannot compute in that type what an engine computes in it, or an empty string."""
        if self.to == "bf16":
            return "onnxruntime has no bfloat16 on the CPU"
        if graph.find("QuantizeLinear") and not rounds_half():
            return f"onnxruntime {ort.__version__} drops fractions of float16 where it should round them, 1.30 and newer do not"
        return ""

    def _wide(self, c: Compilation) -> dict[str, str]:
        """The nodes that must stay in float32, with the reason, which is noted too."""
        found: dict[str, str] = {}
        reach = {} if self.to == "bf16" else largest_values(c.graph, limited(c.graph.inputs, c.data.calibration(), SAMPLES), c.threads)
        met = {n.name: max((reach[t.name] for t in (*n.inputs, *n.outputs) if t.name in reach), default=0.0) for n in c.graph.nodes}
        large = [name for name, largest in met.items() if largest > LARGEST / self.headroom]
        statistics = {node.name for node in _statistics(c.graph)}
        for node in c.graph.nodes:
            if node.name in statistics:
                found[node.name] = "statistics of a normalization are float32"
            elif node.name in large:
                found[node.name] = f"it meets values of {met[node.name]:.3g}, and the largest half is {LARGEST:.0f}"
            elif not _has_half(node, c.graph.opset, self.to):
                found[node.name] = f"{node.op} has no {self.to} form"
            elif self.to == "fp16" and node.op in SCATTERS and node.attrs.get("reduction", "none") != "none":
                found[node.name] = f"onnxruntime, which checks the result, adds up no halves in {node.op}"
            elif self.to == "fp16" and node.op not in QDQ and (small := _smallest_number(node)) < SMALLEST:
                found[node.name] = f"its constant {small:.3g} is no half"
            elif 0 < met[node.name] < SMALLEST:
                self.note(c, node.name, f"below the normal halves, with fewer digits: its largest value is {met[node.name]:.3g}")
        for name, reason in found.items():
            self.note(c, name, f"stays in float32: {reason}")
        if large:
            c.warnings.append(
                f"{len(large)} operations stay in float32, the first is {large[0]}: values of up to {max(met.values()):.3g} are met, "
                f"too near the largest half ({LARGEST:.0f})"
            )
        return found


def largest_values(graph: Graph, feeds: Iterable[Feed], threads: int) -> dict[str, float]:
    """The largest magnitude of every float32 tensor that is computed, by tensor name."""
    copy = graph.snapshot()
    names, largest = [], []
    for node in list(copy.nodes):
        for tensor in node.outputs:
            if tensor.dtype == SINGLE and node.op not in VIEWS | QDQ:
                magnitude = copy.insert("Abs", [tensor], name=f"{tensor.name}/abs", like=tensor)
                result = copy.insert("ReduceMax", [magnitude], name=f"{tensor.name}/largest", keepdims=0)
                result.dtype, result.shape = SINGLE, []
                names.append(tensor.name)
                largest.append(result)
    copy.set_outputs(largest)
    runtime = session(copy, threads=threads, brief=True)
    return dict(zip(names, np.max([run(runtime, feed) for feed in feeds], axis=0).tolist(), strict=True))


def _statistics(graph: Graph) -> Iterator[Node]:
    """The nodes of x / sqrt(mean(x^2) + eps), however often."""
    for root in graph.find("Sqrt"):
        bound = match(MEAN_SQUARE_ROOT, root.outputs[0])
        if bound is not None:
            yield from (bound["square"], bound["mean"], bound["sum"], root)
            yield from (node for node in readers(root.outputs[0]) if node.op == "Div")


def _has_half(node: Node, opset: int, to: str) -> bool:
    """Whether all float32 inputs can be halves, and all float32 outputs then are."""
    wanted = "tensor(float16)" if to == "fp16" else "tensor(bfloat16)"
    schema = onnx.defs.get_schema(node.op, opset, node.domain or "")
    constraints = {t.type_param_str: t.allowed_type_strs for t in schema.type_constraints}
    halves = set()
    for index, (tensor, parameter) in enumerate(zip(node.inputs, schema.inputs, strict=False)):
        if tensor.dtype == SINGLE and index not in FLOAT32_INPUTS.get(node.op, ()):
            if wanted not in constraints.get(parameter.type_str, (parameter.type_str,)):
                return False
            halves.add(parameter.type_str)
    outputs = {p.type_str for tensor, p in zip(node.outputs, schema.outputs, strict=False) if tensor.dtype == SINGLE}
    return node.op in TYPED_BY_ATTRIBUTE or (outputs <= halves and node.attrs.get("dtype") != TensorProto.FLOAT)


def _smallest_number(node: Node) -> float:
    """The smallest magnitude among the scalar constants that are not zero."""
    numbers = [abs(n) for t in node.inputs if is_constant(t) and t.dtype == SINGLE and (n := scalar(t))]
    return min(numbers, default=1.0)


def _narrow(graph: Graph, node: Node, to: str, halves: dict[int, Tensor]) -> None:
    """Give a node half constants and half outputs; ``halves`` holds what constants have become."""
    half, code = TYPES[to]
    if node.op == "DequantizeLinear" and is_constant(node.inputs[0]):
        node.inputs[1] = _recode(graph, node, half)
    for index, tensor in enumerate(node.inputs):
        if is_constant(tensor) and tensor.dtype == SINGLE and index not in FLOAT32_INPUTS.get(node.op, ()):
            if id(tensor) not in halves:
                array = round_up(value(tensor), half) if node.op in QDQ and index == 1 else _to_half(value(tensor), half)
                halves[id(tensor)] = graph.constant(f"{tensor.name}/half", array)
            node.inputs[index] = halves[id(tensor)]
    if node.attrs.get("to") == TensorProto.FLOAT:
        node.attrs["to"] = code
    if "value" in node.attrs and (held := getattr(node.attrs["value"], "values", None)) is not None and held.dtype == SINGLE:
        node.attrs["value"].values = held.astype(half)  # of ConstantOfShape
    for tensor in node.outputs:
        if tensor.dtype == SINGLE:
            tensor.dtype = half


def _to_half(array: Array, half: np.dtype[Any]) -> Array:
    """Rounded to nearest; what is finite stays finite, so that a mask of -1e9 gives no NaN in a row that it masks wholly."""
    if half == np.float16:
        array = np.where(np.isfinite(array), np.clip(array, -LARGEST, LARGEST), array)
    return np.asarray(array.astype(half))


def round_up(scale: Array, half: np.dtype[Any]) -> Array:
    """The smallest halves that are not below positive ``scale``: no range gets smaller, and none becomes zero."""
    nearest = scale.astype(half)
    return np.where(nearest.astype(np.float32) < scale, np.nextafter(nearest, half.type(np.inf)), nearest).astype(half)


def _recode(graph: Graph, node: Node, half: np.dtype[Any]) -> Tensor:
    """The scale of a constant as halves; its codes become those of the same values on that scale."""
    codes, scale = value(node.inputs[0]), value(node.inputs[1])
    rounded = round_up(scale, half)
    shape = [-1 if i == node.attrs.get("axis") else 1 for i in range(codes.ndim)] if scale.ndim else []
    ratio = (scale / rounded.astype(np.float32)).reshape(shape)
    again = codes.astype(np.float32) * ratio
    node.inputs[0].values = (np.rint(again) if codes.dtype.kind == "i" else again).astype(codes.dtype)
    return graph.constant(f"{node.inputs[1].name}/half", rounded)


def _join(graph: Graph, narrowed: set[int], to: str) -> None:
    """A Cast wherever a reader wants another type than is written."""
    half, code = TYPES[to]
    casts: dict[tuple[int, bool], Tensor] = {}
    for node in list(graph.nodes):
        for index, tensor in enumerate(node.inputs):
            if is_constant(tensor) or tensor.dtype not in (SINGLE, half):
                continue
            wants_half = id(node) in narrowed and index not in FLOAT32_INPUTS.get(node.op, ())
            if (tensor.dtype == half) == wants_half:
                continue
            key = (id(tensor), wants_half)
            if key not in casts:
                name = f"{tensor.name}/{to if wants_half else 'fp32'}"
                casts[key] = graph.insert("Cast", [tensor], name=name, like=tensor, to=code if wants_half else TensorProto.FLOAT)
                casts[key].dtype = half if wants_half else SINGLE
            node.inputs[index] = casts[key]


def _widen_output(graph: Graph, tensor: Tensor, name: str) -> None:
    """A graph output in float32 again, under its own name."""
    if tensor.dtype == SINGLE:
        return
    wide = graph.insert("Cast", [tensor], name=f"{name}/fp32", like=tensor, to=TensorProto.FLOAT)
    graph.replace(tensor, wide, only=lambda node: False)
    wide.dtype = SINGLE
