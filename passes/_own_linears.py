"""q, k and v of an attention block as outputs of Linear layers of their own, for passes that move heads."""

from __future__ import annotations

import numpy as np

from vitq_compiler.blocks.attention import Attention, HeadView, feeds_only
from vitq_compiler.blocks.linear import Linear
from vitq_compiler.graph import Graph, Tensor, producer, scalar, value
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation


def own_linears(c: Compilation, attention: Attention) -> list[Tensor]:
    """Take a Linear that gives more than one of q, k and v, or interleaved heads, apart by weight columns.

    Returns:
        q, k and v, each the whole output of a Linear.

    Raises:
        MatchFailure: something else reads a Linear that has to be taken apart.
    """
    views = attention.views
    for linear in attention.linears:
        mine = {letter: view for letter, view in views.items() if view.linear is linear}
        if len(mine) == 1 and all(np.array_equal(view.columns, np.arange(linear.out_features)) for view in mine.values()):
            continue
        if not feeds_only(c.graph, linear.output, attention):
            raise MatchFailure(f"{linear.name} is read by more than this attention, so its features cannot be taken apart")
        parts = [_part(c.graph, linear, view, f"{linear.name}/{letter}") for letter, view in mine.items()]
        c.move_specs(linear.name, [part.name for part in parts])
        place = c.annotations.linears.index(linear)
        c.annotations.linears[place : place + 1] = parts
    return [view.linear.output for view in views.values()]


def _part(graph: Graph, linear: Linear, view: HeadView, name: str) -> Linear:
    """The output features of ``view`` as a Linear of their own, called ``name``."""
    weight = graph.constant(f"{linear.weight.name}/part", value(linear.weight)[:, view.columns])
    output = graph.insert("MatMul", [linear.input, weight], name=name)
    part = Linear(output.inputs[0], None, linear.role, linear.block, linear.layers)
    if linear.bias is not None:
        bias = graph.constant(f"{linear.bias.name}/part", value(linear.bias)[view.columns])
        output = graph.insert("Add", [output, bias], name=f"{name}/add")
        part.add = output.inputs[0]
    for tensor in (part.matmul.outputs[0], output):
        tensor.dtype, tensor.shape = linear.output.dtype, [*linear.output.shape[:-1], len(view.columns)]
    view.linear, view.columns = part, np.arange(len(view.columns))
    return part


def unscale(graph: Graph, attention: Attention) -> None:
    """Take the scaling of the scores out, where it is in the weight of q."""
    tensor = attention.softmax.inputs[0]
    while (node := producer(tensor)) is not None and node is not attention.scores:
        tensor = next((t for t in node.inputs if _leads_to(t, attention)), node.inputs[0])
        if node.op in ("Mul", "Div") and any(scalar(t) is not None for t in node.inputs):
            graph.replace(node.outputs[0], tensor)


def _leads_to(tensor: Tensor, attention: Attention) -> bool:
    """Whether ``tensor`` is made of the scores by scalings and masks alone."""
    node = producer(tensor)
    if node is attention.scores:
        return True
    return node is not None and node.op in ("Mul", "Div", "Add") and any(_leads_to(t, attention) for t in node.inputs)
