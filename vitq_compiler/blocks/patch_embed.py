"""Patch embedding: the convolution that turns the image into tokens, its stride equal to its kernel."""

from __future__ import annotations

from vitq_compiler.blocks.picture import KEEPING, RESIZING
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer

ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "BatchNormalization"}) | KEEPING
MOVING = frozenset({"Transpose", "Unsqueeze", "Squeeze", "Slice", "Gather", "GatherND"})
PREPROCESSING = ELEMENTWISE | MOVING | RESIZING


def find_patch_embeddings(graph: Graph) -> list[Node]:
    """Conv nodes without overlap that read a graph input, directly or through preprocessing."""
    return [n for n in graph.find("Conv") if not patchify_fault(graph, n)]


def patchify_fault(graph: Graph, node: Node) -> str:
    """Why a Conv is no patch embedding; empty where it is one."""
    if not is_constant(node.inputs[1]):
        return "its weight is computed"
    kernel, strides = list(node.inputs[1].shape[2:]), list(node.attrs.get("strides", []))
    if node.attrs.get("group", 1) != 1:
        return f"a convolution in {node.attrs['group']} groups is no patch embedding"
    if strides != kernel:
        return f"its stride {strides or 1} differs from its kernel {kernel}: its patches overlap or leave gaps"
    if any(node.attrs.get("pads", [])) or not set(node.attrs.get("dilations", [])) <= {1}:
        return "its patches are padded or dilated"
    return "" if _reads_input(graph, node.inputs[0]) else "it does not read the image, so it is no patch embedding"


def _reads_input(graph: Graph, tensor: Tensor) -> bool:
    while not graph.is_input(tensor):
        node = producer(tensor)
        if node is None or node.op not in PREPROCESSING:
            return False
        sources = [t for t in node.inputs if t.name and not is_constant(t)]
        if node.op not in RESIZING and len(sources) > 1:
            return False
        tensor = node.inputs[0] if node.op in RESIZING else sources[0]
    return True
