"""The graph: the only file that imports onnx_graphsurgeon.

Weights are never edited in place: a pass assigns a new array, so that a `snapshot` taken before it stays valid.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from vitq_compiler.tensors import PACKED, from_array, numpy_type, onnx_type, to_array

G_LOGGER.severity = G_LOGGER.ERROR  # it warns of types that numpy knows by ml_dtypes

Node: TypeAlias = Any  # gs.Node; graphsurgeon has no type information
Tensor: TypeAlias = Any  # gs.Variable or gs.Constant
Array = NDArray[Any]

SCOPES = "pkg.torch.onnx.name_scopes"
LARGE_MODEL = 2**30  # bytes of weights from which memory counts for more than time
PRODUCER = "vitq"  # what a compiled file says it was made by
LARGE = 1024  # elements from which a constant counts as a weight rather than as a shape or an axis


@dataclass(frozen=True)
class Layout:
    """How an input holds pictures: whether axis 0 counts them, and the axis of their colour channels."""

    batched: bool
    channels: int


@dataclass(frozen=True)
class InputSpec:
    """One graph input.

    Attributes:
        name: its name in the model.
        dtype: element type.
        shape: sizes; a string or 0 stands for a dynamic dimension.
        layout: how it holds a picture, where the graph shows that.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]
    layout: Layout | None = None

    @property
    def batched(self) -> bool:
        """Whether axis 0 counts samples."""
        return bool(self.shape) and (self.layout is None or self.layout.batched)

    @property
    def fixed_batch(self) -> int | None:
        """The number of samples that the model takes at once; None where that is open, or where it takes one without a batch axis."""
        size = self.shape[0] if self.batched else None
        return size if isinstance(size, int) and size > 0 else None


class Graph:
    """An ONNX graph that can be searched and edited; see `model_io` for files."""

    def __init__(self, surgeon: gs.Graph, ir_version: int, metadata: dict[str, str]) -> None:
        self._gs = surgeon
        self._metadata = metadata
        self._names = {n.name for n in surgeon.nodes} | set(surgeon.tensors())
        self.ir_version = ir_version
        self.layouts: dict[str, Layout] = {}  # of inputs that are pictures, by name

    @classmethod
    def from_proto(cls, model: onnx.ModelProto) -> Graph:
        """Wrap a ModelProto. Module scopes, which graphsurgeon drops, are kept by node name; other node metadata is not."""
        metadata = {n.name: p.value for n in model.graph.node for p in n.metadata_props if n.name and p.key == SCOPES}
        surgeon = gs.import_onnx(model)
        stored = {t.name: t for t in model.graph.initializer}
        for tensor in surgeon.tensors().values():
            if isinstance(tensor, gs.Constant):  # loaded or mapped now, so that the ModelProto can be freed
                tensor.values = to_array(stored[tensor.name]) if tensor.name in stored else np.asarray(tensor.values)
                tensor.data_location = None  # where the output keeps it is decided when it is written
        # A part of a ModelProto keeps all of it in memory, weights included.
        surgeon.import_domains = onnx.ModelProto(opset_import=model.opset_import).opset_import
        graph = cls(surgeon, model.ir_version, metadata)
        graph.name_nodes()
        return graph

    def to_proto(self) -> onnx.ModelProto:
        """The graph as a ModelProto, nodes sorted, scopes restored, shapes not inferred."""
        self._gs.toposort()
        packed = {t.name: (t, value(t)) for t in self.constants() if _is_packed(t)}
        try:  # graphsurgeon writes one number to a byte
            for name, (tensor, array) in packed.items():
                tensor.values = LazyValues(from_array(array, name))
            model: onnx.ModelProto = gs.export_onnx(self._gs, do_type_check=False)
        finally:
            for tensor, array in packed.values():
                tensor.values = array
        model.ir_version = self.ir_version
        model.producer_name = PRODUCER
        for node in model.graph.node:
            if node.name in self._metadata:
                node.metadata_props.add(key=SCOPES, value=self._metadata[node.name])
        return model

    def without_weights(self) -> tuple[onnx.ModelProto, dict[str, Array]]:
        """The graph with every large constant declared as external data in memory, and those constants by name.

        Nothing is copied: for sessions and shape inference on graphs whose weights are better not serialized. Packed types, of which
        numpy holds one number to a byte, stay in the graph.
        """
        large = [t for t in self.constants() if np.prod(t.shape) >= LARGE and not _is_packed(t)]
        weights = {t.name: np.ascontiguousarray(t.values) for t in large}  # a runtime can share nothing else
        try:
            for tensor in large:
                tensor.values = LazyValues(_external(tensor.name, tensor.values))
            return self.to_proto(), weights
        finally:
            for tensor in large:
                tensor.values = weights[tensor.name]

    def snapshot(self) -> Graph:
        """A copy whose structure is independent; weight arrays are shared."""
        copy = Graph(self._gs.copy(), self.ir_version, self._metadata)
        copy.layouts = self.layouts
        return copy

    # Reading

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return int(self._gs.opset)

    @opset.setter
    def opset(self, version: int) -> None:
        self._gs.opset = version
        others = [d for d in self._gs.import_domains or () if d.domain not in ("", "ai.onnx")]
        self._gs.import_domains = [helper.make_opsetid("", version), *others]  # a list of its own: snapshots share the old one

    @property
    def nodes(self) -> list[Node]:
        """All nodes; after `clean`, in topological order."""
        return self._gs.nodes  # type: ignore[no-any-return]

    @property
    def inputs(self) -> list[InputSpec]:
        """The graph inputs."""
        return [InputSpec(t.name, np.dtype(t.dtype), tuple(t.shape or ()), self.layouts.get(t.name)) for t in self._gs.inputs]

    @property
    def input_tensors(self) -> list[Tensor]:
        """The graph inputs as tensors."""
        return list(self._gs.inputs)

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors that the graph gives out."""
        return list(self._gs.outputs)

    @property
    def output_names(self) -> list[str]:
        """Names of the graph outputs."""
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

    def tensors(self) -> list[Tensor]:
        """All tensors, constants too, each once."""
        return list(self._gs.tensors().values())

    def constants(self) -> list[Tensor]:
        """All initializers, each once."""
        return [t for t in self._gs.tensors().values() if isinstance(t, gs.Constant)]

    def is_input(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a graph input."""
        return any(tensor is t for t in self._gs.inputs)

    def is_output(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a graph output."""
        return any(tensor is t for t in self._gs.outputs)

    def scope(self, node: Node) -> str:
        """The module the node came from (``blocks.0.attn``), where torch's exporter recorded it; else an empty string."""
        scopes = ast.literal_eval(self._metadata[node.name]) if node.name in self._metadata else []
        return str(scopes[-2]) if len(scopes) > 1 else ""  # the last one is the node itself

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

    def add(self, op: str, inputs: Sequence[Tensor], *, name: str, outputs: int = 1, **attributes: Any) -> Any:
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

        The node that makes ``new`` still reads ``old`` where it did: so an operator is put behind a tensor.
        Where ``old`` is a graph output its name stays: ``new`` takes it over.
        """
        moved = 0
        maker = producer(new)
        for reader in [n for n in unique(old.outputs) if n is not maker and only(n)]:
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

    def part(self, sources: Sequence[str], results: Sequence[str]) -> Graph:
        """A copy of what computes the tensors ``results`` from the tensors ``sources``, both in the order given; weights are shared.

        A tensor that is both is passed on by an Identity, under another name.
        """
        copy = self.snapshot()
        tensors = copy._gs.tensors()
        inputs = [tensors[name] for name in sources]
        for tensor in inputs:
            tensor.inputs.clear()
            tensor.dtype = tensor.dtype or np.dtype(np.float32)
            tensor.shape = (
                [f"{tensor.name}/{i}" if not isinstance(d, int) else d for i, d in enumerate(tensor.shape)] if tensor.shape else None
            )
        copy._gs.inputs = inputs
        passed = set(sources)
        copy._gs.outputs = [
            copy.insert("Identity", [tensors[n]], name=f"{n}/kept", like=tensors[n]) if n in passed else tensors[n] for n in results
        ]
        for tensor in copy._gs.outputs:
            tensor.dtype = tensor.dtype or np.dtype(np.float32)
        return copy.clean()

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
        inferred = onnx.shape_inference.infer_shapes(self.without_weights()[0], data_prop=True)
        tensors = self._gs.tensors()
        for info in [*inferred.graph.value_info, *inferred.graph.output]:
            tensor = tensors.get(info.name)
            if isinstance(tensor, gs.Variable) and info.type.HasField("tensor_type"):
                tensor.dtype = numpy_type(info.type.tensor_type.elem_type)
                if info.type.tensor_type.HasField("shape"):
                    tensor.shape = [
                        d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in info.type.tensor_type.shape.dim
                    ]

    def _unique(self, wanted: str) -> str:
        name, again = wanted, 0
        while name in self._names:
            again += 1
            name = f"{wanted}_{again}"
        self._names.add(name)
        return name


def _is_packed(constant: Tensor) -> bool:
    """Whether its numbers are of a packed type, and in memory: a constant kept elsewhere has the number of an ONNX type as its dtype."""
    return not isinstance(constant.dtype, int) and np.dtype(constant.dtype) in PACKED


def _external(name: str, array: Array) -> onnx.TensorProto:
    """An initializer whose data lies elsewhere."""
    tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=onnx_type(array.dtype), data_location=onnx.TensorProto.EXTERNAL)
    for key, text in (("location", "memory"), ("offset", "0"), ("length", str(array.nbytes))):
        tensor.external_data.add(key=key, value=text)
    return tensor


def unique(nodes: Iterable[Node]) -> list[Node]:
    """Nodes without repetition, by identity, in order."""
    seen: set[int] = set()
    return [n for n in nodes if not (id(n) in seen or seen.add(id(n)))]  # type: ignore[func-returns-value]


def is_constant(tensor: Tensor) -> bool:
    """Whether ``tensor`` is an initializer."""
    return isinstance(tensor, gs.Constant)


def value(tensor: Tensor) -> Array:
    """The array of a constant."""
    return np.asarray(tensor.values)


def constant_of(tensor: Tensor) -> Array | None:
    """The numbers of an initializer or of a Constant node, seen through Identity; None where they are computed."""
    while not is_constant(tensor):
        node = producer(tensor)
        if node is None or node.op not in ("Identity", "Constant"):
            return None
        if node.op == "Constant":
            held = next(iter(node.attrs.values()))
            return np.asarray(getattr(held, "values", held))
        tensor = node.inputs[0]
    return value(tensor)


def scalar(tensor: Tensor) -> float | None:
    """The number in a constant of one element, else None."""
    if not is_constant(tensor) or value(tensor).size != 1:
        return None
    return float(value(tensor).reshape(()))


def producer(tensor: Tensor) -> Node | None:
    """The node that computes ``tensor``; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def readers(tensor: Tensor) -> list[Node]:
    """The nodes that read ``tensor``, each once."""
    return unique(tensor.outputs)


def proto_bytes(model: onnx.ModelProto) -> int:
    """Size of a ModelProto; protobuf itself can tell only that of one under 2 GB, of a larger one the nodes and weights are summed."""
    parts = sum(part.ByteSize() for part in (*model.graph.initializer, *model.graph.node))
    return parts if parts > LARGE_MODEL else int(model.ByteSize())
