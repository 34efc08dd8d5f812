"""Which part of a network is trained at a time, and what of it.

network   everything at once
block     an attention or MLP block and what stands between it and the next, which begins with the projections to q, k and v
layer     the Linear layers that read one tensor, and what follows up to the next layer: AdaQuant (arXiv 2006.10518)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vitq_compiler.blocks.linear import Linear
from vitq_compiler.errors import RecipeError
from vitq_compiler.graph import Graph, Tensor, is_constant, value
from vitq_compiler.pipeline import Compilation
from vitq_compiler.prefix import Stage, merge, stages
from vitq_compiler.qdq import quantize_activation
from vitq_compiler.quant import Edge, QuantParams
from vitq_compiler.torch_graph import TorchGraph
from vitq_compiler.training.learned import Activation, Bias, Function, Learned, Weight

UNITS = ("network", "block", "layer")


@dataclass(frozen=True)
class Window:
    """One part of a network.

    Attributes:
        stage: its graph.
        ends: the tensors in it whose error counts: what its units hand on.
        rest: what the network behind it reads, from it and from before it.
    """

    stage: Stage
    ends: tuple[str, ...]
    rest: tuple[str, ...]


def cut(graph: Graph, linears: Iterable[Linear], unit: str) -> list[Window]:
    """The windows of ``graph``, in order; each has Linear layers."""
    found = stages(graph, linears)
    firsts = [i for i, stage in enumerate(found) if unit == "layer" or any(linear.role == "qkv" for linear in stage.linears)]
    edges = [0, *(i for i in firsts if i > 1), len(found)]
    parts = [merge(found, a, b) for a, b in pairwise(edges)]
    if unit == "network":
        return [Window(merge(found, 0, len(found)), tuple(dict.fromkeys(name for part in parts for name in part.results)), ())]
    rests = [merge(parts, i, len(parts)).sources for i in range(1, len(parts))]
    return [Window(part, part.results, rest) for part, rest in zip(parts, [*rests, ()], strict=True)]


def learn(c: Compilation, window: Window, margin: float, style: str, device: str) -> Learned:
    """All that can be trained of a window, as it is now.

    Args:
        c: the compilation.
        window: the part of its graph.
        margin: how far from their codes weights may start, in steps.
        style: how codes of weights are trained, of `rounding_styles.STYLES`.
        device: of torch.

    Raises:
        RecipeError: something in it has 8-bit floats for codes.
    """
    nodes = {node.name: node for node in c.graph.part(window.stage.sources, window.stage.results).nodes}
    activations: dict[Edge, Activation] = {}
    curves: dict[Edge, Function] = {}
    weights: dict[Edge, Weight] = {}
    shared: dict[tuple[str, str], Activation] = {}
    for edge in [edge for edge in c.params if edge.node in nodes]:
        params, tensor = c.params[edge], nodes[edge.node].inputs[edge.index]
        if params.format != "int":
            raise RecipeError(f"training needs integer codes, and those of {edge.node} are 8-bit floats: leave reconstruct-blocks out")
        if is_constant(tensor):
            weights[edge] = Weight(value(tensor), params, c.rounding.get(edge), margin, style, device)
        elif params.curve is not None:
            curves[edge] = through(c.graph, tensor, params, device)
        else:
            key = tensor.name, str(params)
            if key not in shared:
                shared[key] = Activation(params, c.specs[edge].has_zero_point, device)
            activations[edge] = shared[key]
    biases = {}
    for linear in window.stage.linears:
        assert linear.add is not None  # `reference` gave every layer a bias
        bias = value(linear.add.inputs[1])
        biases[Edge(linear.add.name, 1)] = Bias(bias, np.broadcast_to(_unit(c, linear), bias.shape), device)
    return Learned(activations, curves, weights, biases, device)


def keep(c: Compilation, learned: Learned) -> None:
    """Let the compilation have what was trained."""
    for edge, activation in learned.activations.items():
        c.params[edge] = activation.params()
    for edge, weight in learned.weights.items():
        c.rounding[edge], c.params[edge] = weight.codes(), weight.params()
    for edge, bias in learned.biases.items():
        c.graph.node(edge.node).inputs[1].values = bias.value()


def through(graph: Graph, tensor: Tensor, params: QuantParams, device: str) -> Function:
    """The quantizer of ``tensor`` as a function in torch, made of the operators that it becomes."""
    part = graph.part([tensor.name], [tensor.name])
    part.set_outputs([quantize_activation(part, part.input_tensors[0], params)])
    function, result = TorchGraph(part, device), part.output_names[0]
    return lambda x: function({tensor.name: x})[result]


def _unit(c: Compilation, linear: Linear) -> np.ndarray:
    """What one code of each column of a weight is worth at half of the input's range."""
    unit: np.ndarray = c.params[Edge(linear.name, 1)].scale
    params = c.params.get(Edge(linear.name, 0))
    if params is None or params.curve is not None:
        return unit
    return unit * params.scale * np.float32((params.quant_max - params.quant_min) / 2)
