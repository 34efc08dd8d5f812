"""What opset a graph needs, and a graph in the words of an older one.

An operator without an older form becomes others (`decompositions`). One that has an older form is only written as it was:

    Reduce*(x, axes)            ->  Reduce*<axes>(x)                                              before opset 18
    Split<num_outputs>(x)       ->  Split(x)                                                             18
    GridSample<mode = linear>   ->  GridSample<mode = bilinear>                                          20
    QuantizeLinear<output_dtype>, DequantizeLinear<output_dtype>  ->  without, where inputs say it       21, 23

Everything else must be there with the same inputs, types and attributes, but for attributes that say what was meant without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper
from onnx.defs import OpSchema

from vitq_compiler.decompositions import CHANNELS_FROM, DECOMPOSED
from vitq_compiler.errors import TargetError
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, value
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.tensors import kind_name, onnx_type

PORTABLE = 20  # known to compilers and runtimes of several years; a graph is in its words, or newer ones, while it is compiled
STANDARD_DOMAINS = ("", "ai.onnx")
OLDEST = 13  # scales per channel came with it
REDUCTIONS = frozenset(
    {"ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"}
)
# Operator, and the opset from which the same inputs and attributes mean something else.
CHANGED = frozenset({("DFT", 20), ("GroupNormalization", CHANNELS_FROM), ("RoiAlign", 16)})
ADVICE = "name a later version of the target, or export without it"
# Words that came after the attribute they stand in.
NEW_WORDS: Mapping[tuple[str, str], Mapping[Any, int]] = {
    ("AveragePool", "ceil_mode"): {1: 19},  # how the last window counts was corrected
    ("Pad", "mode"): {"wrap": 19},
    ("Resize", "coordinate_transformation_mode"): {"half_pixel_symmetric": 19},
    ("ScatterElements", "reduction"): {"max": 18, "min": 18},
    ("ScatterND", "reduction"): {"max": 18, "min": 18},
}


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard operators; 0 where the model does not say."""
    return next((o.version for o in model.opset_import if o.domain in STANDARD_DOMAINS), 0)


@cache
def history(op: str) -> tuple[OpSchema, ...]:
    """All forms of a standard operator, oldest first."""
    schemas = [s for s in onnx.defs.get_all_schemas_with_history() if s.name == op and s.domain == ""]
    return tuple(sorted(schemas, key=lambda schema: schema.since_version))


def form_of(op: str, opset: int) -> int:
    """The opset that brought the form that a standard operator has in ``opset``; 0 where it has none."""
    return max((s.since_version for s in history(op) if s.since_version <= opset), default=0)


def oldest_opset(node: Node, opset: int, *, rewritten: bool = True) -> int:
    """The lowest opset, down to `OLDEST`, in which the operator of a node of ``opset`` can be written with the same meaning.

    Args:
        node: the node; the operators of its branches count too.
        opset: that of its graph.
        rewritten: whether it may be written otherwise there, see `RESPELLED`; in branches it cannot.
    """
    found = [OLDEST, *(oldest_opset(n, opset, rewritten=False) for graph in node.subgraphs() for n in graph.nodes)]
    forms = [] if node.domain else [schema for schema in history(node.op) if schema.since_version <= opset]
    steps = ((newer, _steps_down(node, older, newer, rewritten)) for older, newer in reversed(list(pairwise(forms))))
    found += [next((newer.since_version for newer, down in steps if not down), forms[0].since_version)] if forms else []
    found += [NEW_WORDS.get((node.op, name), {}).get(word, 0) for name, word in node.attrs.items() if isinstance(word, int | str)]
    return max(found)


def lowest_opset(graph: Graph) -> int:
    """The lowest opset in which every operator of the graph can be written."""
    return max((oldest_opset(node, graph.opset) for node in graph.nodes), default=OLDEST)


def stuck_nodes(graph: Graph, opset: int) -> list[Node]:
    """The nodes that have no form in ``opset``, not even in other operators."""
    return [node for node in graph.nodes if node.op not in DECOMPOSED and oldest_opset(node, graph.opset) > opset]


def lower_opset(graph: Graph, opset: int) -> int:
    """Write the graph in the words of ``opset``; returns the number of operators that have become others.

    Raises:
        TargetError: one has no form there.
    """
    if graph.opset <= opset:
        return 0
    for node in stuck_nodes(graph, opset):
        raise TargetError(f"{node.op} node {node.name}: {_fault(node, opset)}; {ADVICE}")
    changes = 0
    while newer := [node for node in graph.nodes if oldest_opset(node, graph.opset) > opset]:
        for node in newer:
            try:
                decompose(graph, node)
            except MatchFailure as failure:
                raise TargetError(f"{node.op} node {node.name} has no form in opset {opset}: {failure.reason}; {ADVICE}") from None
        changes += len(newer)
    for node in graph.clean().nodes:
        if not node.domain:
            _respell(graph, node, opset)
    graph.opset = opset
    return changes


def raise_opset(graph: Graph, opset: int) -> None:
    """Let a graph in the words of `PORTABLE`, or later ones, have operators of ``opset`` too.

    Raises:
        TargetError: it is in older words already.
    """
    if graph.opset < PORTABLE:
        raise TargetError(f"the graph is at opset {graph.opset} already, and cannot get operators of {opset}: do this before legalize")
    for node in graph.find("GroupNormalization") if graph.opset < CHANNELS_FROM <= opset else ():
        decompose(graph, node)
    graph.opset = max(graph.opset, opset)


def decompose(graph: Graph, node: Node) -> None:
    """Replace a node, of an operator of `decompositions.DECOMPOSED`, by older operators.

    Raises:
        MatchFailure: it does what those cannot.
    """
    graph.replace(node.outputs[0], DECOMPOSED[node.op](graph, node))
    graph.remove(node)


def _fault(node: Node, opset: int) -> str:
    if not form_of(node.op, opset):
        return f"opset {opset} has no such operator"
    return f"opset {opset} cannot say what it does" + (", as its axes are computed" if node.op in REDUCTIONS else "")


def _steps_down(node: Node, older: OpSchema, newer: OpSchema, rewritten: bool) -> bool:
    """Whether what a node says in a form of its operator can be said in the form before."""
    step = (node.op, newer.since_version)
    if step in RESPELLED:
        return rewritten and RESPELLED[step].possible(node) and _has_types(node, older)
    gone = [name for name in node.attrs if name in newer.attributes and name not in older.attributes]
    fits = older.min_input <= len(node.inputs) <= older.max_input and len(node.outputs) <= older.max_output
    return step not in CHANGED and fits and _has_types(node, older) and all(_is_default(node, name, newer) for name in gone)


def _is_default(node: Node, name: str, schema: OpSchema) -> bool:
    default = schema.attributes[name].default_value
    if not default.name:
        return False
    held = helper.get_attribute_value(default)
    return bool(node.attrs[name] == (held.decode() if isinstance(held, bytes) else held))


def _has_types(node: Node, schema: OpSchema) -> bool:
    """Whether a form of an operator takes and gives the types of all tensors whose type is known."""
    allowed = {t.type_param_str: t.allowed_type_strs for t in schema.type_constraints}
    for tensors, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        last = formal[-1:] if formal and formal[-1].option == OpSchema.FormalParameterOption.Variadic else []
        for index, tensor in enumerate(tensors):
            kind = _type_name(tensor)
            for parameter in (formal[index : index + 1] or last) if kind else ():
                if kind not in allowed.get(parameter.type_str, (parameter.type_str,)):
                    return False
    return True


def _type_name(tensor: Tensor) -> str:
    """As in schemas, such as ``tensor(float16)``; empty where it is not known."""
    if tensor.dtype is None:
        return ""
    code = tensor.dtype if isinstance(tensor.dtype, int) else onnx_type(np.dtype(tensor.dtype))
    return f"tensor({kind_name(code).lower()})"


def _respell(graph: Graph, node: Node, opset: int) -> None:
    """Write a node, which has a form there, as it is in ``opset``."""
    for schema in reversed(history(node.op)):
        step = (node.op, schema.since_version)
        if opset < schema.since_version <= graph.opset and step in RESPELLED:
            RESPELLED[step].edit(graph, node)
    known = onnx.defs.get_schema(node.op, opset).attributes
    for name in [name for name in node.attrs if name not in known]:
        del node.attrs[name]


# The same operator, written as it was


class Respelling(NamedTuple):
    """How to write an operator in its form before.

    Attributes:
        possible: whether a node can be written so.
        edit: does it; attributes that the older form does not have go anyway.
    """

    possible: Callable[[Node], bool]
    edit: Callable[[Graph, Node], None] = lambda graph, node: None


def _has_constant_axes(node: Node) -> bool:
    return is_constant(node.inputs[1]) if len(node.inputs) > 1 else not node.attrs.get("noop_with_empty_axes", 0)


def _axes_to_attribute(graph: Graph, node: Node) -> None:
    if len(node.inputs) > 1:
        node.attrs["axes"] = value(node.inputs[1]).tolist()
        del node.inputs[1]


def _has_equal_parts(node: Node) -> bool:
    """Whether parts without sizes are equal: the newer form makes the last one smaller where the axis does not fill it."""
    parts = node.attrs.get("num_outputs")
    shape, axis = list(node.inputs[0].shape or ()), int(node.attrs.get("axis", 0))
    size = shape[axis] if -len(shape) <= axis < len(shape) else None
    return parts is None or (isinstance(size, int) and size % int(parts) == 0)


def _is_plane(node: Node) -> bool:
    return len(node.inputs[0].shape or ()) == 4


def _plane_modes(graph: Graph, node: Node) -> None:
    mode = node.attrs.get("mode", "linear")
    node.attrs["mode"] = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)


def _zero_point_tells(node: Node) -> bool:
    return not node.attrs.get("block_size", 0) and ("output_dtype" not in node.attrs or len(node.inputs) > 2)


def _scale_tells(node: Node) -> bool:
    return node.attrs.get("output_dtype", 0) in (0, onnx_type(np.dtype(node.inputs[1].dtype)))


# Operator, and the opset that brought the form to write as the one before.
RESPELLED: Mapping[tuple[str, int], Respelling] = {
    **{(op, 18): Respelling(_has_constant_axes, _axes_to_attribute) for op in sorted(REDUCTIONS)},
    ("Split", 18): Respelling(_has_equal_parts),
    ("GridSample", 20): Respelling(_is_plane, _plane_modes),
    ("QuantizeLinear", 21): Respelling(_zero_point_tells),
    ("DequantizeLinear", 23): Respelling(_scale_tells),
}
