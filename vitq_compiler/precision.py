"""Half precision: a model in float16 or bfloat16 as one in float32, and its types given back to the graph's inputs and outputs.

Weights and constants are widened, which is exact, and every Cast to a half type becomes one to float32. What is compiled
computes in float32 between its quantized layers: CPUs have few half-precision kernels and the runtime would cast around
every other operator.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper

from vitq_compiler.tensors import from_array, to_array

HALF = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
TYPE_ATTRIBUTES = frozenset({"to", "dtype", "stash_type", "output_dtype"})  # of Cast, RandomNormal, LayerNormalization and their like


def half_type(model: onnx.ModelProto) -> str:
    """float16 or bfloat16 where the model has weights, inputs or casts of that type, else an empty string."""
    kinds = [t.data_type for t in model.graph.initializer]
    kinds += [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)]
    for node in model.graph.node:
        for attribute in node.attribute:
            kinds += [attribute.t.data_type, attribute.i if attribute.name in TYPE_ATTRIBUTES else 0]
    return next((HALF[kind] for kind in kinds if kind in HALF), "")


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
