"""Half precision: a model in float16 or bfloat16 as one in float32, and its types given back to the graph's inputs and outputs.

Weights and constants are widened, which is exact, and every Cast to a half type becomes one to float32. What is compiled
computes in float32 between its quantized layers: CPUs have few half-precision kernels and the runtime would cast around
every other operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from vitq_compiler.tensors import from_array, to_array

HALF = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
MOVING = frozenset({"Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Concat", "Flatten", "Expand"})
TYPE_ATTRIBUTES = frozenset({"to", "dtype", "stash_type", "output_dtype"})  # of Cast, RandomNormal, LayerNormalization and their like


@dataclass(frozen=True)
class HalfPrecision:
    """What a model uses half precision for.

    Attributes:
        kind: float16 or bfloat16; empty where it has neither.
        computes: whether it computes in that type, or gives and takes it; else only weights are stored so, and cast before they are used.
    """

    kind: str
    computes: bool


def find_half(model: onnx.ModelProto) -> HalfPrecision:
    """What half precision is used for, by weights, inputs, outputs and casts."""
    graph = model.graph
    stored = {t.name for t in graph.initializer if t.data_type in HALF}
    kinds = [t.data_type for t in graph.initializer]
    boundary = [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)]
    computes = any(kind in HALF for kind in boundary)
    for node in graph.node:
        casts = [a.i for a in node.attribute if a.name in TYPE_ATTRIBUTES]
        held = [a.t.data_type for a in node.attribute]
        kinds += [*casts, *held]
        reads = any(name in stored for name in node.input)
        if (reads and node.op_type in MOVING) or (node.op_type == "Constant" and any(kind in HALF for kind in held)):
            stored.update(node.output)
        else:
            computes |= (reads and node.op_type != "Cast") or any(kind in HALF for kind in casts)
    return HalfPrecision(next((HALF[kind] for kind in (*kinds, *boundary) if kind in HALF), ""), computes)


def widen(model: onnx.ModelProto) -> dict[str, int]:
    """Turn every half-precision number of ``model`` into float32, in place.

    Returns:
        The inputs and outputs that were half precision, with their type; see `narrow`.
    """
    graph = model.graph
    boundary = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output) if v.type.tensor_type.elem_type in HALF}
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type in HALF:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            elif attribute.name in TYPE_ATTRIBUTES and attribute.i in HALF:
                attribute.i = TensorProto.FLOAT
    return boundary


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in HALF:
        tensor.CopyFrom(from_array(to_array(tensor).astype(np.float32), tensor.name))


def narrow(model: onnx.ModelProto, boundary: dict[str, int]) -> onnx.ModelProto:
    """Give the inputs and outputs in ``boundary`` their types back, in place, with a Cast behind each input and before each output."""
    graph = model.graph
    inputs = _retype(graph.input, boundary)
    outputs = _retype(graph.output, boundary)
    for node in graph.node:
        node.input[:] = [inputs.get(name, outputs.get(name, name)) for name in node.input]
        node.output[:] = [outputs.get(name, name) for name in node.output]
    casts = [helper.make_node("Cast", [name], [inner], f"{name}/widen", to=TensorProto.FLOAT) for name, inner in inputs.items()]
    nodes = [*casts, *graph.node]
    nodes += [helper.make_node("Cast", [inner], [name], f"{name}/narrow", to=boundary[name]) for name, inner in outputs.items()]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _retype(infos: Iterable[onnx.ValueInfoProto], boundary: dict[str, int]) -> dict[str, str]:
    """Set the types; name of each -> name of the float32 tensor inside."""
    inner = {}
    for info in infos:
        if info.name in boundary:
            info.type.tensor_type.elem_type = boundary[info.name]
            inner[info.name] = f"{info.name}/float32"
    return inner
