"""Which release of ONNX Runtime runs a graph on the CPU.

Measured with the releases themselves, by graphs of one operator. `tests/test_releases.py` measures again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from vitq_compiler.opset import form_of, opset_of

NEVER = ""  # no release so far

# Release -> the newest opset it has kernels for, and the newest IR version it reads.
RELEASES: Mapping[str, tuple[int, int]] = {
    "1.15": (18, 9),
    "1.16": (19, 9),
    "1.17": (20, 9),
    "1.18": (21, 10),
    "1.19": (21, 10),
    "1.20": (21, 10),
    "1.21": (22, 10),
    "1.22": (22, 10),
    "1.23": (23, 11),
    "1.24": (25, 13),
    "1.25": (26, 13),
    "1.32": (27, 14),
}
# Operator and the opset of its form -> the release that has it, where that is not the first one with the opset.
KERNELS: Mapping[tuple[str, int], str] = {
    ("DeformConv", 19): "1.25",
    ("DeformConv", 22): "1.25",
    ("LpNormalization", 22): "1.25",
    ("QuantizeLinear", 23): "1.24",
    ("TensorScatter", 24): "1.25",
    **dict.fromkeys([("Bernoulli", 22), ("GlobalLpPool", 22), ("ImageDecoder", 20), ("MaxRoiPool", 22), ("Multinomial", 22)], NEVER),
    **dict.fromkeys([("RandomNormal", 22), ("RandomNormalLike", 22), ("RandomUniform", 22), ("RandomUniformLike", 22)], NEVER),
    **dict.fromkeys([("RoiAlign", 22), ("Swish", 24)], NEVER),
}
# Operator and the type of a constant that it reads -> likewise.
TYPES: Mapping[tuple[str, int], str] = {
    **dict.fromkeys([("Cast", TensorProto.INT4), ("Cast", TensorProto.UINT4)], "1.23"),
    **dict.fromkeys([("DequantizeLinear", TensorProto.INT4), ("DequantizeLinear", TensorProto.UINT4)], "1.19"),
}


@dataclass(frozen=True)
class Requirement:
    """What a graph needs of ONNX Runtime.

    Attributes:
        release: the first one that runs it, and all later ones do; `NEVER` where none does.
        reason: what in the graph needs that one.
    """

    release: str
    reason: str

    def met_by(self, release: str) -> bool:
        """Whether that release, of `RELEASES`, runs the graph."""
        return self.release != NEVER and order(self.release) <= order(release)


def order(release: str) -> tuple[int, ...]:
    """A release as numbers, which can be compared."""
    return tuple(map(int, release.split(".")))


OLDEST, NEWEST = min(RELEASES, key=order), max(RELEASES, key=order)


def known_release(version: str) -> str:
    """The newest of `RELEASES` that is no newer than ``version``, such as 1.20.1; the oldest where all are.

    Raises:
        ValueError: it is no version.
    """
    asked = order(".".join(version.split(".")[:2]))
    return max((r for r in RELEASES if order(r) <= asked), key=order, default=OLDEST)


def requirement(model: onnx.ModelProto, *, opset: int = 0, more: Sequence[str] = ()) -> Requirement:
    """What a graph needs.

    Args:
        model: the graph; its weights may lie elsewhere.
        opset: as if its standard operators were those of this opset.
        more: as if it had these operators too.
    """
    opset = opset or opset_of(model)
    nodes = [node for node in _nodes(model.graph) if node.domain in ("", "ai.onnx")]
    types = {t.name: t.data_type for t in model.graph.initializer}
    operators = {*more, *(node.op_type for node in nodes)}
    newest = next((op for op in sorted(operators) if form_of(op, opset) == opset), "")
    needs = [
        Requirement(_first(0, opset), f"{newest} is of opset {opset}" if newest else f"opset {opset}"),
        Requirement(_first(1, model.ir_version), f"IR version {model.ir_version}"),
    ]
    for op in sorted(operators):
        form = form_of(op, opset)
        if (op, form) in KERNELS:
            needs.append(Requirement(KERNELS[op, form], f"{op} of opset {form}"))
    for node in nodes:
        for kind in {types[name] for name in node.input if name in types}:
            if (node.op_type, kind) in TYPES:
                needs.append(Requirement(TYPES[node.op_type, kind], f"{node.op_type} of {TensorProto.DataType.Name(kind)}"))
    return max(needs, key=lambda need: (need.release == NEVER, order(need.release or "0")))


def _first(index: int, version: int) -> str:
    return min((r for r, newest in RELEASES.items() if newest[index] >= version), key=order, default=NEVER)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of branches too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
