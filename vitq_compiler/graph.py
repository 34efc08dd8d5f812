"""The graph: the only file that imports onnx_graphsurgeon.

Weights are never edited in place: a pass assigns a new array, so that a `snapshot` taken before it stays valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Node = gs.Node
Tensor = gs.Tensor
Array = NDArray[Any]


@dataclass(frozen=True)
class InputSpec:
    """One graph input.

    Attributes:
        name: its name in the model.
        dtype: element type.
        shape: sizes; a string or 0 stands for a dynamic dimension.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


class Graph:
    """An ONNX graph that can be searched and edited; see `model_io` for files."""

    def __init__(self, surgeon: gs.Graph, ir_version: int, metadata: dict[str, dict[str, str]]) -> None:
        self._gs = surgeon
        self._metadata = metadata
        self._names = {n.name for n in surgeon.nodes} | set(surgeon.tensors())
        self.ir_version = ir_version

    @classmethod
    def from_proto(cls, model: onnx.ModelProto) -> Graph:
        """Wrap a ModelProto; node metadata, which graphsurgeon drops, is kept by node name."""
        metadata = {n.name: {p.key: p.value for p in n.metadata_props} for n in model.graph.node if n.name and n.metadata_props}
        graph = cls(gs.import_onnx(model), model.ir_version, metadata)
        graph.name_nodes()
        return graph

    def to_proto(self) -> onnx.ModelProto:
        """The graph as a ModelProto, nodes sorted, metadata restored, shapes not inferred."""
        self._gs.toposort()
        model = gs.export_onnx(self._gs, do_type_check=False)
        model.ir_version = self.ir_version
        model.producer_name = "vitq"
        for node in model.graph.node:
            for key, value in self._metadata.get(node.name, {}).items():
                node.metadata_props.add(key=key, value=value)
        return model

    def snapshot(self) -> Graph:
        """A copy whose structure is independent; weight arrays are shared."""
        return Graph(self._gs.copy(), self.ir_version, self._metadata)

    # Reading

    @property
    def opset(self) -> int:
        return int(self._gs.opset)

    @opset.setter
    def opset(self, version: int) -> None:
        self._gs.opset = version
        self._gs.import_domains = [helper.make_opsetid("", version)]

    @property
    def nodes(self) -> list[Node]:
        return self._gs.nodes  # type: ignore[no-any-return]

    @property
    def inputs(self) -> list[InputSpec]:
        return [InputSpec(t.name, np.dtype(t.dtype), tuple(t.shape or ())) for t in self._gs.inputs]

    @property
    def output_names(self) -> list[str]:
        return [t.name for t in self._gs.outputs]

    def find(self, *ops: str) -> list[Node]:
        """All nodes of the given op types, in graph order."""
        return [n for n in self._gs.nodes if n.op in ops]

    def node(self, name: str) -> Node:
        """The node of that name; KeyError where there is none."""
        for node in self._gs.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; KeyError where there is none."""
        return self._gs.tensors()[name]

    def is_input(self, tensor: Tensor) -> bool:
        return any(tensor is t for t in self._gs.inputs)

    def is_output(self, tensor: Tensor) -> bool:
        return any(tensor is t for t in self._gs.outputs)

    def scope(self, node: Node) -> str:
        """Where the exporter says the node came from (``blocks.0.attn``), or an empty string. For humans only."""
        return self._metadata.get(node.name, {}).get("pkg.torch.onnx.name_scopes", "")

    def text(self) -> str:
        """The graph in ONNX text syntax, weights of more than 8 elements elided: for golden tests and dumps."""
        model = self.to_proto()
        for tensor in model.graph.initializer:
            if int(np.prod(tensor.dims)) > 8:
                for kind in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "raw_data"):
                    tensor.ClearField(kind)
                tensor.data_location = onnx.TensorProto.EXTERNAL  # the printer refuses a tensor without data
                tensor.external_data.add(key="location", value="elided")
        del model.graph.value_info[:]
        return onnx.printer.to_text(model)

    # Editing

    def constant(self, name: str, value: Array) -> Tensor:
        """A new initializer; ``name`` is made unique."""
        return gs.Constant(self._unique(name), np.asarray(value, order="C"))

    def add(self, op: str, inputs: Sequence[Tensor], *, name: str, outputs: int = 1, **attributes: Any) -> Tensor | list[Tensor]:
        """Append a node; ``name`` is made unique and its outputs are called after it. Returns its output, or a list of several."""
        name = self._unique(name)
        results = [gs.Variable(self._unique(f"{name}/out" if outputs == 1 else f"{name}/out_{i}")) for i in range(outputs)]
        self._gs.nodes.append(gs.Node(op, name, {k: v for k, v in attributes.items() if v is not None}, list(inputs), results))
        return results[0] if outputs == 1 else results

    def insert(self, op: str, inputs: Sequence[Tensor], *, name: str, like: Tensor | None = None, **attributes: Any) -> Tensor:
        """`add` for one output, which takes dtype and shape of ``like``."""
        result = self.add(op, inputs, name=name, **attributes)
        if like is not None:
            result.dtype, result.shape = like.dtype, like.shape
        return result

    def replace(self, old: Tensor, new: Tensor, *, only: Callable[[Node], bool] = lambda _: True) -> int:
        """Let every reader of ``old`` (for which ``only`` holds) read ``new``; returns the number of edges moved.

        Where ``old`` is a graph output its name stays: ``new`` takes it over.
        """
        moved = 0
        for reader in [n for n in unique(old.outputs) if only(n)]:
            for index, tensor in enumerate(reader.inputs):
                if tensor is old:
                    reader.inputs[index] = new
                    moved += 1
        for index, tensor in enumerate(self._gs.outputs):
            if tensor is old:
                moved += 1
                if not new.inputs or self.is_output(new):  # an input, a constant or another output cannot give up its own name
                    new = self.insert("Identity", [new], name=f"{old.name}/identity", like=old)
                new.dtype, new.shape = old.dtype or new.dtype, old.shape or new.shape
                old.name, new.name = self._unique(f"{old.name}/replaced"), old.name
                self._gs.outputs[index] = new
        return moved

    def remove(self, node: Node) -> None:
        """Take ``node`` out; whatever only it needed goes with the next `clean`."""
        node.inputs.clear()
        node.outputs.clear()
        self._gs.nodes.remove(node)

    def clean(self) -> Graph:
        """Drop what no output needs, and sort."""
        self._gs.cleanup(remove_unused_node_outputs=False, remove_unused_graph_inputs=False).toposort()
        return self

    def set_outputs(self, tensors: Iterable[Tensor]) -> None:
        """Replace the graph outputs (for probing copies)."""
        self._gs.outputs = list(tensors)

    def name_nodes(self) -> None:
        """Give every node a unique name, keeping the exporter's."""
        seen: set[str] = set()
        for index, node in enumerate(self._gs.nodes):
            wanted = node.name or f"{node.op}_{index}"
            name, again = wanted, 1
            while name in seen:
                name, again = f"{wanted}_{again}", again + 1
            seen.add(name)
            node.name = name
        self._names |= seen

    def infer_shapes(self) -> None:
        """Fill in dtypes and shapes of all tensors by ONNX shape inference; keeps what was known."""
        model = self.to_proto()
        weights = {t.name: t for t in model.graph.initializer if int(np.prod(t.dims)) > 64}
        light = onnx.ModelProto()
        light.CopyFrom(strip_weights(model, weights))
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
        tensors = self._gs.tensors()
        for info in [*inferred.graph.value_info, *inferred.graph.output]:
            tensor = tensors.get(info.name)
            if isinstance(tensor, gs.Variable) and info.type.HasField("tensor_type"):
                tensor.dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
                if info.type.tensor_type.HasField("shape"):
                    tensor.shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in info.type.tensor_type.shape.dim]

    def _unique(self, wanted: str) -> str:
        name, again = wanted, 0
        while name in self._names:
            again += 1
            name = f"{wanted}_{again}"
        self._names.add(name)
        return name


def strip_weights(model: onnx.ModelProto, weights: dict[str, onnx.TensorProto]) -> onnx.ModelProto:
    """``model`` with the named initializers turned into typed graph inputs, so that it can be copied cheaply."""
    stripped = onnx.ModelProto(ir_version=model.ir_version)
    stripped.opset_import.extend(model.opset_import)
    graph = stripped.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.initializer.extend(t for t in model.graph.initializer if t.name not in weights)
    graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in weights.values())
    return stripped


def unique(nodes: Iterable[Node]) -> list[Node]:
    """Nodes without repetition, by identity, in order."""
    seen: set[int] = set()
    return [n for n in nodes if not (id(n) in seen or seen.add(id(n)))]  # type: ignore[func-returns-value]


def is_constant(tensor: Tensor) -> bool:
    return isinstance(tensor, gs.Constant)


def value(tensor: Tensor) -> Array:
    """The array of a constant."""
    return np.asarray(tensor.values)


def scalar(tensor: Tensor) -> float | None:
    """The number in a constant of one element, else None."""
    if not is_constant(tensor) or value(tensor).size != 1:
        return None
    return float(value(tensor).reshape(()))


def producer(tensor: Tensor) -> Node | None:
    """The node that computes ``tensor``; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def readers(tensor: Tensor) -> list[Node]:
    return unique(tensor.outputs)


def ancestors(tensor: Tensor, stop: Callable[[Node], bool] = lambda _: False) -> Iterator[Node]:
    """Every node that ``tensor`` depends on; where ``stop`` holds the node is given but not what feeds it."""
    seen: set[int] = set()
    stack = list(tensor.inputs)
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if not stop(node):
            stack.extend(p for t in node.inputs for p in t.inputs)


def to_array(tensor: onnx.TensorProto) -> Array:
    return numpy_helper.to_array(tensor)
