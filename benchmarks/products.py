"""Dense products of a graph: every MatMul, Gemm, Einsum and Conv with a constant operand, and the multiplications each makes.

Counted on the graph itself and from the shapes of a real run, apart from what the compiler believes: a product that the
compiler has not recognized is in the sum like every other.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx

from vitq_compiler import runtime, validation
from vitq_compiler.graph import Graph, Node, is_constant, producer

KINDS = ("linear", "1x1", "conv")
OPS = ("MatMul", "Gemm", "Einsum", "Conv")


@dataclass(frozen=True)
class Product:
    """One product with a constant operand.

    Attributes:
        name: its node.
        kind: "linear", "1x1" for a convolution that is a Linear on channels, or "conv" for another one.
        macs: multiplications for one sample.
        integer: whether the runtime computes it in an integer kernel.
    """

    name: str
    kind: str
    macs: int
    integer: bool


def dense_products(model: Path, feed: dict[str, Any], kernel_of: dict[str, str], integer_kernels: frozenset[str]) -> list[Product]:
    """All of them, for one sample.

    Args:
        model: a float or an integer graph.
        feed: one sample.
        kernel_of: weight tensor -> the runtime's operator that reads it, see `validation.kernels`.
        integer_kernels: those of them that compute on integers.
    """
    graph = Graph.from_proto(onnx.load(model))
    constants = _constants(graph)
    found = [(node, index) for node in graph.find(*OPS) if (index := _weight(node, constants)) is not None]
    tensors = {id(t): t for node, index in found for t in (node.inputs[0], node.inputs[1], node.outputs[0])}
    observed = {key: graph.insert("Shape", [t], name=f"{t.name}/shape") for key, t in tensors.items()}
    names = [t.name for t in observed.values()]
    sizes = runtime.probe(graph, names, [feed])[0] if names else {}
    shapes = {key: tuple(int(d) for d in sizes[t.name]) for key, t in observed.items()}
    products = []
    for node, index in found:
        left, right, result = (shapes[id(t)] for t in (node.inputs[0], node.inputs[1], node.outputs[0]))
        kernel = kernel_of.get(_stored(node.inputs[index]), "")
        kind = "linear" if node.op != "Conv" else "1x1" if prod(right[2:]) == 1 and node.attrs.get("group", 1) == 1 else "conv"
        products.append(Product(node.name, kind, _macs(node, left, right, result), kernel in integer_kernels))
    return products


def kernels_of(model: Path, threads: int = 1) -> dict[str, str]:
    """Weight tensor -> the runtime's operator that reads it, from its optimized graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        runtime.session(model, threads=threads, optimized_path=path)
        return validation.kernels(onnx.load(path, load_external_data=False))


def _constants(graph: Graph) -> set[int]:
    """Tensors that no input reaches."""
    known: set[int] = set()
    for node in graph.clean().nodes:
        if all(is_constant(t) or not t.name or id(t) in known for t in node.inputs):
            known |= {id(t) for t in node.outputs}
        known |= {id(t) for t in node.inputs if is_constant(t)}
    return known


def _weight(node: Node, constants: set[int]) -> int | None:
    """Which of the first two operands is constant; None where both or neither are."""
    if len(node.inputs) < 2:
        return None
    constant = [id(t) in constants for t in node.inputs[:2]]
    return constant.index(True) if sum(constant) == 1 else None


def _stored(tensor: Any) -> str:
    """The initializer that ``tensor`` is computed from, through its first inputs."""
    while (node := producer(tensor)) is not None and node.inputs:
        tensor = node.inputs[0]
    return str(tensor.name)


def _macs(node: Node, left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...]) -> int:
    if node.op == "Conv":
        return prod(result) * prod(right[1:])
    if node.op == "Einsum":
        terms = node.attrs["equation"].replace(" ", "").split("->")[0].split(",")
        sizes = {letter: size for term, shape in zip(terms, (left, right), strict=False) for letter, size in zip(term, shape, strict=True)}
        return prod(sizes.values())
    return prod(result) * left[0 if node.op == "Gemm" and node.attrs.get("transA", 0) else -1]
