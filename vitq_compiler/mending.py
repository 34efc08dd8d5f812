"""Graphs that the runtime refuses although what is wrong with them can be put right, as exporters and scripts leave them behind.

nodes of the same name                           each gets a name of its own
nodes before those whose outputs they read       sorted
sizes or types of tensors that contradict        forgotten, and those of outputs inferred
what the graph computes
outputs without a type                           inferred
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import onnx
from onnx import TypeProto, helper, shape_inference

from vitq_compiler.errors import ModelError
from vitq_compiler.graph import LARGE
from vitq_compiler.tensors import numpy_type

Dimension = onnx.TensorShapeProto.Dimension


def mend(model: onnx.ModelProto) -> list[str]:
    """Put a model right, in place; returns what was wrong, a sentence each.

    Raises:
        ModelError: a node reads what nothing gives, or its own results, or an output has no type and none can be inferred.
    """
    notes = []
    for graph in _graphs(model.graph):
        if _sort(graph, set() if graph is model.graph else None):
            notes.append("nodes stood before those whose outputs they read: sorted")
        if renamed := _rename(graph):
            notes.append(f"{renamed} nodes had the name of another one: renamed")
    return list(dict.fromkeys(notes)) + _mend_types(model)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those in the attributes of its nodes, the innermost first."""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(inner)
    yield graph


# Nodes


def _sort(graph: onnx.GraphProto, outside: set[str] | None) -> bool:
    """Put nodes behind those whose outputs they read, and change as little as that; returns whether anything was to do.

    ``outside`` are tensors given from without; None where these are not known.
    """
    makers = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    reads = [sorted({makers[name] for name in _reads(node) if name in makers}) for node in graph.node]
    if outside is not None:
        given = outside | {t.name for t in (*graph.input, *graph.initializer)} | {t.values.name for t in graph.sparse_initializer}
        for node in graph.node:
            if missing := next((name for name in _reads(node) if name not in makers and name not in given), None):
                raise ModelError(f"node {node.name or node.op_type} reads {missing}, which nothing gives; export it again")
    if all(place > max(before, default=-1) for place, before in enumerate(reads)):
        return False
    order: list[int] = []
    state = [0] * len(reads)  # 0 untouched, 1 waiting for others, 2 done
    for start in range(len(reads)):
        stack = [start]
        while stack:
            place = stack[-1]
            waiting = [before for before in reads[place] if state[before] < 2]
            if state[place] == 2 or not waiting:
                order += [place] if state[place] < 2 else []
                state[place] = 2
                stack.pop()
            elif any(state[before] == 1 for before in waiting):
                node = graph.node[place]
                raise ModelError(f"node {node.name or node.op_type} reads what is computed from its own results; export it again")
            else:
                state[place] = 1
                stack.append(waiting[0])
    nodes = [graph.node[place] for place in order]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return True


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """All tensors that a node reads, those of the graphs inside it too, as far as they come from outside."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            own = {t.name for t in (*inner.input, *inner.initializer)} | {name for n in inner.node for name in n.output}
            yield from (name for n in inner.node for name in _reads(n) if name not in own)
            yield from (t.name for t in inner.output if t.name not in own)


def _rename(graph: onnx.GraphProto) -> int:
    """Give each node that has the name of one before it a name of its own; returns how many there were."""
    used = {node.name for node in graph.node}
    seen: set[str] = set()
    renamed = 0
    for node in graph.node:
        if node.name and node.name in seen:
            node.name = next(name for number in count(1) if (name := f"{node.name}_{number}") not in used)
            used.add(node.name)
            renamed += 1
        seen.add(node.name)
    return renamed


# Types and sizes


def _mend_types(model: onnx.ModelProto) -> list[str]:
    graph = model.graph
    inferred = _inferred(model)
    free = {d.dim_param for t in graph.input for d in t.type.tensor_type.shape.dim if d.dim_param}
    notes = []
    for output in graph.output:
        if not output.type.tensor_type.elem_type and output.type.WhichOneof("value") in (None, "tensor_type"):
            if (found := inferred.get(output.name)) is None or not found.tensor_type.elem_type:
                raise ModelError(f"output {output.name} has no type, and none can be inferred; export it again")
            output.type.CopyFrom(found)
            notes.append(f"output {output.name} had no type: inferred {_shown(found)}")
    stale = [t for t in (*graph.value_info, *graph.output) if t.name in inferred and _contradicts(t.type, inferred[t.name], free)]
    if stale:
        first = f"{stale[0].name} is {_shown(inferred[stale[0].name])}, not {_shown(stale[0].type)}"
        notes.append(f"sizes of {len(stale)} tensors contradict what the graph computes ({first}): inferred again")
        wrong = {t.name for t in stale}
        for output in graph.output:
            if output.name in wrong:
                output.type.CopyFrom(inferred[output.name])
        del graph.value_info[:]
    return notes


def _inferred(model: onnx.ModelProto) -> dict[str, TypeProto]:
    """Types and shapes of tensors as ONNX infers them from inputs and weights alone; none where it knows an operator not at all."""
    large = [t for t in model.graph.initializer if np.prod(t.dims) >= LARGE]
    names = {t.name for t in large}
    light = onnx.ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import, functions=model.functions)
    graph = onnx.GraphProto(name=model.graph.name, node=model.graph.node)
    graph.input.extend(t for t in model.graph.input if t.name not in names)
    graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in large)
    graph.initializer.extend(t for t in model.graph.initializer if t.name not in names)
    graph.output.extend(onnx.ValueInfoProto(name=t.name) for t in model.graph.output)
    light.graph.CopyFrom(graph)
    try:
        result = shape_inference.infer_shapes(light, data_prop=True).graph
    except shape_inference.InferenceError:  # what the model is refused for is said better by what reads it next
        return {}
    return {t.name: t.type for t in (*result.value_info, *result.output) if t.type.HasField("tensor_type")}


def _contradicts(declared: TypeProto, inferred: TypeProto, free: set[str]) -> bool:
    """Whether both cannot be true; ``free`` are names of sizes that inputs leave open."""
    a, b = declared.tensor_type, inferred.tensor_type
    if declared.WhichOneof("value") != "tensor_type":
        return False
    if a.elem_type and b.elem_type and a.elem_type != b.elem_type:
        return True
    if not (a.HasField("shape") and b.HasField("shape")):
        return False
    return len(a.shape.dim) != len(b.shape.dim) or any(_differ(x, y, free) for x, y in zip(a.shape.dim, b.shape.dim, strict=True))


def _differ(declared: Dimension, inferred: Dimension, free: set[str]) -> bool:
    if not declared.HasField("dim_value"):
        return False
    return inferred.dim_param in free or bool(inferred.HasField("dim_value") and inferred.dim_value != declared.dim_value)


def _shown(kind: TypeProto) -> str:
    tensor = kind.tensor_type
    sizes = ", ".join(str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    name = numpy_type(tensor.elem_type).name if tensor.elem_type else "of no type"
    return f"{name} [{sizes}]" if tensor.HasField("shape") else name
