"""Layer by layer repair of quantized Linear layers, each fitted to what the float graph computes.

The first repair pass keeps the float graph as ``Compilation.reference``: from then on weights and biases of the graph are what
shall be quantized, and the reference is what the result is held against. A repair is a function of one layer and the `Moments`
of its inputs; `sweep` brings it to every quantized layer in the order of the network (see `prefix`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.blocks.linear import Linear, add_to_bias, find_linears
from vitq_compiler.graph import Graph, value
from vitq_compiler.moments import Matrix, Moments
from vitq_compiler.pipeline import Compilation
from vitq_compiler.prefix import Inputs, Stage, stages, walk
from vitq_compiler.qdq import insert_qdq, quantized_weight
from vitq_compiler.quant import Edge, fake_quantize
from vitq_compiler.runtime import limited


@dataclass(frozen=True)
class Target:
    """What a layer is in the float graph: weight [inputs, outputs] and bias [outputs]."""

    weight: Matrix
    bias: Matrix


PART = 8  # samples whose moments are summed together, in whatever batches they were run
Repair = Callable[[Linear, Target, Moments], None]


def repairable(c: Compilation) -> list[Linear]:
    """The Linear layers with a quantized weight."""
    return [linear for linear in c.annotations.linears if Edge(linear.name, 1) in c.params]


def reference(c: Compilation) -> Graph:
    """The float graph before any repair; from the first call on it is kept.

    Every layer that can be repaired gets a bias, so that graph and reference have the same tensors ever after.
    """
    if c.reference is None:
        for linear in repairable(c):
            if linear.bias is None:
                add_to_bias(c.graph, linear, np.zeros(linear.out_features))
        c.reference = c.graph.clean().snapshot()
    return c.reference


def targets(c: Compilation) -> dict[str, Target]:
    """What each Linear layer is in the float graph, by name."""
    found = {}
    for linear in find_linears(reference(c)):
        bias = np.zeros(linear.out_features) if linear.bias is None else value(linear.bias)
        found[linear.name] = Target(value(linear.weight).astype(np.float64), bias.astype(np.float64))
    return found


def deployed(c: Compilation, linear: Linear) -> Matrix:
    """The weight that the integer graph will compute with, [inputs, outputs]."""
    return quantized_weight(c, Edge(linear.name, 1), value(linear.weight)).astype(np.float64)


def set_bias(linear: Linear, bias: Matrix) -> None:
    """Give a layer, which has a bias, another one."""
    assert linear.bias is not None  # `reference` gave it one
    linear.bias.values = bias.astype(np.float32)


def quantized_part(c: Compilation, stage: Stage) -> Graph:
    """One stage of the graph as it will be deployed."""
    part = c.graph.part(stage.sources, stage.results)
    names = {node.name for node in part.nodes}
    insert_qdq(part, {edge: params for edge, params in c.params.items() if edge.node in names}, c.rounding)
    return part


def sweep(c: Compilation, repair: Repair, label: str, *, samples: int = 0, halves: bool = False) -> int:
    """Call ``repair`` for every quantized layer, first to last; returns their number.

    The moments are of the inputs in the float graph and of the quantized inputs behind all repaired layers before. q, k and v,
    which read the same tensor, share them. They are of the first ``samples`` samples, or of all where it is 0; with ``halves`` they
    have those of every other `PART` too.
    """
    floating, wanted, linears = reference(c), targets(c), repairable(c)
    cut = stages(c.graph, linears)
    changes = 0
    steps = walk(
        floating,
        cut,
        limited(c.graph.inputs, c.data.calibration(), samples) if samples else c.data.calibration(),
        lambda stage: quantized_part(c, stage),
        threads=c.threads,
        work_dir=c.work_dir,
        advance=lambda done, total: c.progress(label, done, total),
    )
    for stage, inputs in steps:
        shared: dict[tuple[str, str], Moments] = {}
        for linear in stage.linears:
            key = linear.input.name, str(c.params.get(Edge(linear.name, 0)))
            if key not in shared:
                shared[key] = Moments.gather(_rounded(c, linear, inputs), halves=halves)
            repair(linear, wanted[linear.name], shared[key])
            changes += 1
    return changes


def _rounded(c: Compilation, linear: Linear, inputs: Inputs) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    params = c.params.get(Edge(linear.name, 0))
    for x, other in inputs.parts(linear.input.name, PART):
        yield x, other if params is None else fake_quantize(other, params)
