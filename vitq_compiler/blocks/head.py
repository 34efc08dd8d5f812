"""Which of the last Linear layers give classes: scores of which the largest is a decision.

A Linear after which no other weight comes gives classes where softmax, argmax or TopK follow, or where its output leaves the graph
as it is and is as wide as there are classes. Widths of embeddings and of feature maps are round: multiples of 64, in small networks of
16 or 8; numbers of classes hardly ever are. Without a bias, or for every token, embeddings are likelier.
"""

from __future__ import annotations

from collections.abc import Iterable

from vitq_compiler.blocks.linear import Linear
from vitq_compiler.graph import Graph, Tensor, is_constant, producer, readers
from vitq_compiler.views import VIEWS

DECIDING = frozenset({"Softmax", "LogSoftmax", "ArgMax", "TopK"})
CARRYING = VIEWS | {"Sigmoid", "Cast", "Add", "Sub", "Mul", "Div", "Resize"}  # may stand between a head and what reads its classes
ROUND_OF_SAMPLES, ROUND_OF_SAMPLES_WITHOUT_BIAS, ROUND_OF_TOKENS = 64, 16, 8  # widths of embeddings are multiples of these


def find_heads(graph: Graph, last: Iterable[Linear]) -> list[Linear]:
    """Those of the ``last`` Linear layers, after which no other weight comes, that give one number per class."""
    ends = {id(linear.output): linear for linear in last}
    leaving = {id(linear) for tensor in graph.outputs for linear in _sources(tensor, ends) or ()}
    return [x for x in ends.values() if x.out_features > 1 and (_is_decided(x) or (id(x) in leaving and not _is_round(x)))]


def class_outputs(graph: Graph, heads: Iterable[Linear]) -> frozenset[str]:
    """The outputs that hold one decision of each sample: what a head gives, at most through softmax and the like."""
    ends = {id(linear.output): linear for linear in heads}
    found = set()
    for tensor in graph.outputs:
        sources = _sources(tensor, ends)
        if sources and all(_one_of_each_sample(graph, tensor, linear.out_features) for linear in sources):
            found.add(tensor.name)
    return frozenset(found)


def _sources(tensor: Tensor, ends: dict[int, Linear]) -> list[Linear] | None:
    """The layers of ``ends`` that ``tensor`` is made of; None where something else has a part in it."""
    if id(tensor) in ends:
        return [ends[id(tensor)]]
    node = producer(tensor)
    if node is None or node.op not in CARRYING | DECIDING:
        return None
    operands = node.inputs if node.op in ("Add", "Sub", "Mul", "Div") else node.inputs[:1]
    found: list[Linear] = []
    for operand in operands:
        if not is_constant(operand):
            part = _sources(operand, ends)
            if part is None:
                return None
            found += part
    return found


def _is_decided(linear: Linear) -> bool:
    """Whether softmax, argmax or TopK follow."""
    stack, seen = [linear.output], {id(linear.output)}
    while stack:
        for node in readers(stack.pop()):
            if node.op in DECIDING:
                return True
            if node.op in CARRYING:
                stack += [t for t in node.outputs if id(t) not in seen]
                seen |= {id(t) for t in node.outputs}
    return False


def _is_round(linear: Linear) -> bool:
    """Whether it is as wide as embeddings are."""
    if len(linear.output.shape or ()) > 2:
        return linear.out_features % ROUND_OF_TOKENS == 0
    return linear.out_features % (ROUND_OF_SAMPLES if linear.bias is not None else ROUND_OF_SAMPLES_WITHOUT_BIAS) == 0


def _one_of_each_sample(graph: Graph, tensor: Tensor, width: int) -> bool:
    """Whether ``tensor`` is [samples, classes]; without a batch axis, whether it holds no more than the classes."""
    sizes = list(tensor.shape or ())
    if any(spec.batched for spec in graph.inputs):
        return len(sizes) == 2 and sizes[1] == width
    return sizes[-1:] == [width] and all(size == 1 for size in sizes[:-1])
