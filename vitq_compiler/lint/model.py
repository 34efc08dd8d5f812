"""An ONNX model as a linter reads it: values and nodes that know each other. Read-only, of any ModelProto.

Initializers, Constant nodes, external data, subgraphs and functions (inlined) all look the same. Weights are not copied, and
read only where a rule asks for their numbers: types and shapes come from shape inference on a copy that holds none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, external_data_helper, helper, inliner

from vitq_compiler.errors import ModelError
from vitq_compiler.runtime import first_line
from vitq_compiler.tensors import from_array, is_external, to_array

Array = NDArray[Any]
Shape: TypeAlias = tuple[int | None, ...]

SMALL = 1024  # elements up to which a constant takes part in shape inference
CONTRIB = frozenset({"QuantizeLinear", "DequantizeLinear"})  # what onnxruntime also writes under a domain of its own
RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"})


@dataclass(eq=False)
class Value:
    """A tensor.

    Attributes:
        name: its name, unique only within its graph.
        dtype: a TensorProto type; 0 where unknown.
        shape: sizes, None for what is not static; None as a whole where not even the rank is known.
        producer: the node that computes it.
        readers: (node, input index) of everything that reads it, also in subgraphs.
        tensor: its numbers, where they are in the file.
        is_input, is_output: whether the graph takes it or gives it out.
    """

    name: str
    dtype: int = 0
    shape: Shape | None = None
    producer: Node | None = None
    readers: list[tuple[Node, int]] = field(default_factory=list)
    tensor: TensorProto | None = None
    is_input: bool = False
    is_output: bool = False

    @property
    def rank(self) -> int | None:
        """Number of dimensions, where known."""
        return None if self.shape is None else len(self.shape)

    def size(self, axis: int) -> int | None:
        """One dimension, where it is there and static."""
        rank = self.rank or 0
        return self.shape[axis] if self.shape is not None and -rank <= axis < rank else None


@dataclass(eq=False)
class Node:
    """An operation.

    Attributes:
        op, domain, name: as in the file; the standard domain is empty.
        inputs, outputs: its values; None for an input left out.
        attributes: their values; TensorProtos stay such, subgraphs are left out.
        position: its place in the order of the file.
        has_subgraph: whether it is control flow.
    """

    op: str
    domain: str
    name: str
    position: int
    inputs: list[Value | None] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    has_subgraph: bool = False

    @property
    def label(self) -> str:
        """Its name, or else that of its first output."""
        return self.name or (self.outputs[0].name if self.outputs else f"{self.op}_{self.position}")

    def input(self, index: int) -> Value | None:
        """An input; None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    @property
    def output(self) -> Value:
        """Its first output."""
        return self.outputs[0]

    def readers(self) -> list[Node]:
        """Every node that reads one of its outputs, each once."""
        return list(dict.fromkeys(node for value in self.outputs for node, _ in value.readers))


class Model:
    """The model.

    Attributes:
        nodes: of the graph and its subgraphs, in the order of the file.
        inputs: what the graph takes; initializers are none.
        opset: version of the standard operators; 0 where the file has none.
        functions: (domain, name) of the functions that the file defines; in ``nodes`` they are inlined.
    """

    def __init__(self, proto: onnx.ModelProto, *, folder: Path | None = None, weights: Mapping[str, Array] | None = None) -> None:
        """Index ``proto``.

        Args:
            proto: never changed.
            folder: where its external data lies.
            weights: numbers of initializers that are declared as external but held in memory.
        """
        self.functions = tuple((f.domain, f.name) for f in proto.functions)
        self.opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
        self.nodes: list[Node] = []
        self.inputs: list[Value] = []
        self._folder = folder
        self._weights = weights or {}
        self._originals: list[TensorProto] = []
        self._arrays: dict[Value, Array | None] = {}
        self._static: dict[Value, bool] = {}
        light = _inferred(_inlined(self._light_model(proto)))
        self.inputs = self._index(light.graph, {}, top=True)
        _complete_types(self.nodes)

    def find(self, *ops: str) -> Iterator[Node]:
        """All nodes of these standard operators, in order."""
        return (node for node in self.nodes if node.op in ops and node.domain == "")

    def is_static(self, value: Value | None) -> bool:
        """Whether it depends on nothing that is known only at run time."""
        if value is None:
            return True
        if value not in self._static:
            node = value.producer
            self._static[value] = False  # stands while a cycle, which is not valid, is walked
            self._static[value] = value.tensor is not None or (
                node is not None and not node.has_subgraph and node.op not in RANDOM and all(map(self.is_static, node.inputs))
            )
        return self._static[value]

    def array(self, value: Value | None) -> Array | None:
        """Its numbers, where they are in the file; None where they are computed."""
        if value is None:
            return None
        if value not in self._arrays:
            node = value.producer
            if value.tensor is not None:
                self._arrays[value] = self._load(value.tensor)
            else:
                self._arrays[value] = self.array(node.input(0)) if node is not None and node.op == "Identity" else None
        return self._arrays[value]

    def _load(self, tensor: TensorProto) -> Array:
        if is_external(tensor) and tensor.external_data[0].key == _KEY:
            tensor = self._originals[int(tensor.external_data[0].value)]
        if tensor.name in self._weights:
            return self._weights[tensor.name]
        try:
            if is_external(tensor):
                copy = TensorProto()
                copy.CopyFrom(tensor)
                external_data_helper.load_external_data_for_tensor(copy, str(self._folder or "."))
                copy.ClearField("data_location")
                tensor = copy
            return to_array(tensor)
        except Exception as error:
            raise ModelError(f"tensor {tensor.name}: cannot be read ({first_line(error)}); export the model again") from error

    # A copy without weights

    def _light_model(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        light = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
        light.functions.extend(proto.functions)
        light.graph.CopyFrom(self._light_graph(proto.graph))
        return light

    def _light_graph(self, graph: onnx.GraphProto) -> onnx.GraphProto:
        light = onnx.GraphProto(name=graph.name or "graph", input=graph.input, output=graph.output, value_info=graph.value_info)
        light.initializer.extend(map(self._light_tensor, graph.initializer))
        light.node.extend(map(self._light_node, graph.node))
        for sparse in graph.sparse_initializer:  # its numbers are never asked for
            kind, outside = sparse.values.data_type, TensorProto.EXTERNAL
            light.initializer.append(TensorProto(name=sparse.values.name, dims=sparse.dims, data_type=kind, data_location=outside))
        return light

    def _light_tensor(self, tensor: TensorProto) -> TensorProto:
        if not is_external(tensor) and prod(tensor.dims) <= SMALL:
            return tensor
        light = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, data_location=TensorProto.EXTERNAL)
        light.external_data.add(key=_KEY, value=str(len(self._originals)))
        self._originals.append(tensor)
        return light

    def _light_node(self, node: onnx.NodeProto) -> onnx.NodeProto:
        domain = "" if node.domain == "ai.onnx" or node.op_type in CONTRIB else node.domain
        light = onnx.NodeProto(op_type=node.op_type, domain=domain, name=node.name, input=node.input, output=node.output)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                light.attribute.append(AttributeProto(name=attribute.name, type=attribute.type, t=self._light_tensor(attribute.t)))
            elif attribute.type == AttributeProto.GRAPH:
                light.attribute.append(AttributeProto(name=attribute.name, type=attribute.type, g=self._light_graph(attribute.g)))
            else:
                light.attribute.append(attribute)
        return light

    # The index

    def _index(self, graph: onnx.GraphProto, outer: Mapping[str, Value], *, top: bool) -> list[Value]:
        """Add the nodes of a graph; returns its inputs."""
        values: dict[str, Value] = {}

        def own(name: str) -> Value:
            return values.setdefault(name, Value(name))

        inputs = [own(info.name) for info in graph.input]
        for tensor in graph.initializer:
            value = own(tensor.name)
            value.tensor, value.dtype, value.shape = tensor, tensor.data_type, tuple(tensor.dims)
        for info in (*graph.input, *graph.value_info, *graph.output):
            _describe(own(info.name), info.type)
        for node in graph.node:  # before anything is read: in a file that is not sorted, a name may be read before it is made
            for name in node.output:
                own(name)
        for proto in graph.node:
            node = Node(proto.op_type, "" if proto.domain == "ai.onnx" else proto.domain, proto.name, len(self.nodes))
            self.nodes.append(node)
            for index, name in enumerate(proto.input):
                found = values.get(name) or outer.get(name) or own(name) if name else None
                node.inputs.append(found)
                if found is not None:
                    found.readers.append((node, index))
            for name in proto.output:
                node.outputs.append(own(name))
                node.outputs[-1].producer = node
            for attribute in proto.attribute:
                bodies = attribute.graphs if attribute.type == AttributeProto.GRAPHS else [attribute.g] if attribute.HasField("g") else []
                for body in bodies:
                    node.has_subgraph = True
                    self._index(body, {**outer, **values}, top=False)
                if not bodies:
                    node.attributes[attribute.name] = helper.get_attribute_value(attribute)
            if node.op == "Constant" and node.domain == "" and node.outputs:
                _hold(node.output, node.attributes)
        for info in graph.output:
            own(info.name).is_output = True
        inputs = [value for value in inputs if value.tensor is None]
        for value in inputs:
            value.is_input = top
        return inputs


_KEY = "original"  # of a tensor whose numbers were left behind


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    if not model.functions:
        return model
    try:
        return inliner.inline_local_functions(model)
    except Exception:  # a broken function; its calls stay as they are, and are found to be unknown
        return model


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # types and shapes stay those that the file tells
        return model


def _describe(value: Value, kind: onnx.TypeProto) -> None:
    """What a type says of a value, where nothing is known yet."""
    if not kind.HasField("tensor_type"):
        return
    value.dtype = value.dtype or kind.tensor_type.elem_type
    if value.shape is None and kind.tensor_type.HasField("shape"):
        value.shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.tensor_type.shape.dim)


def _hold(value: Value, attributes: Mapping[str, Any]) -> None:
    """The numbers of a Constant node."""
    for name, given in attributes.items():
        if name == "value":
            value.tensor = given
        elif name in ("value_float", "value_floats"):
            value.tensor = from_array(np.asarray(given, np.float32))
        elif name in ("value_int", "value_ints"):
            value.tensor = from_array(np.asarray(given, np.int64))
    if value.tensor is not None:
        value.dtype, value.shape = value.tensor.data_type, tuple(value.tensor.dims)


def _complete_types(nodes: Iterable[Node]) -> None:
    """The types of quantizers that shape inference does not know at this opset."""
    for node in nodes:
        if node.op == "QuantizeLinear" and not node.output.dtype:
            zero_point = node.input(2)
            node.output.dtype = zero_point.dtype if zero_point is not None else node.attributes.get("output_dtype") or TensorProto.UINT8
        if node.op == "DequantizeLinear" and not node.output.dtype:
            scale = node.input(1)
            node.output.dtype = scale.dtype if scale is not None else 0
