"""Patch embedding: the convolution that turns the image into tokens, its stride equal to its kernel."""

from __future__ import annotations

from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer

ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Cast", "Identity", "Transpose"})


def find_patch_embeddings(graph: Graph) -> list[Node]:
    """Conv nodes without overlap that read a graph input, directly or through elementwise preprocessing."""
    return [n for n in graph.find("Conv") if _is_patchify(n) and _reads_input(graph, n.inputs[0])]


def _is_patchify(node: Node) -> bool:
    if not is_constant(node.inputs[1]) or node.attrs.get("group", 1) != 1:
        return False
    kernel = list(node.inputs[1].shape[2:])
    return (
        list(node.attrs.get("strides", [])) == kernel
        and not any(node.attrs.get("pads", []))
        and set(node.attrs.get("dilations", [])) <= {1}
    )


def _reads_input(graph: Graph, tensor: Tensor) -> bool:
    while not graph.is_input(tensor):
        node = producer(tensor)
        if node is None or node.op not in ELEMENTWISE or not all(is_constant(t) for t in node.inputs[1:]):
            return False
        tensor = node.inputs[0]
    return True
