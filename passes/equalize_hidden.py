"""Channel ranges of the hidden layer of an MLP, made alike and centred before it is quantized.

    f(x W1) W2 + c  ->  ((f(x W1) + s) / r) (diag(r) W2) + (c - s W2)

with s the middle of each channel's range and r = k (width / mean width)^strength, k such that the widest ends at 4. Nothing
positive or negative passes through a GELU, so this costs one multiplication and one addition after it; a compiler for GPUs puts
both into the kernel that computes the GELU and quantizes. It gains three times: a symmetric quantizer has no zero point with
which to follow a range of -0.17 to 8, and half of its codes would lie idle; a few channels with massive activations (arXiv
2402.17762) no longer set the scale of all (SmoothQuant, arXiv 2211.10438, across an activation function); and the hidden layers
of all blocks have one scale, so that one kernel serves them: TensorRT-RTX keeps the scale in the source of a kernel, and every
source in the engine.

Precondition: nothing else reads the hidden layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.linear import add_to_bias
from vitq_compiler.blocks.mlp import Mlp
from vitq_compiler.graph import value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import Edge, check_strength, equalizing_scale

REACH = 4.0
TINY = 1e-12  # of a hidden layer that is constant


@dataclass(frozen=True)
class EqualizeHidden(Pass):
    """f(x W1) W2 -> ((f(x W1) + s) / r) W2'"""

    name = "equalize-hidden"
    requires = frozenset({Fact.CALIBRATED})
    drops = frozenset({Fact.QPARAMS})
    exact = True
    strength: float = 0.5

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def run(self, c: Compilation) -> int:
        changes = 0
        for mlp in c.annotations.mlps:
            if Edge(mlp.fc2.name, 0) not in c.specs:
                self.note(c, mlp.fc2.name, "the hidden layer keeps its ranges: fc2 stays in float")
            elif c.graph.is_output(mlp.fc2.input) or len(mlp.fc2.input.outputs) != 1:
                self.note(c, mlp.fc2.name, "the hidden layer keeps its ranges: more than fc2 reads it")
            else:
                self._equalize(c, mlp)
                changes += 1
        return changes

    def _equalize(self, c: Compilation, mlp: Mlp) -> None:
        fc2, hidden, graph = mlp.fc2, mlp.fc2.input, c.graph
        seen = c.table.statistics[hidden.name]
        width = seen.high - seen.low
        _, ratio = equalizing_scale(width, self.strength)
        ratio = (ratio * max(float((width / ratio).max()) / (2 * REACH), TINY)).astype(np.float32)
        shift = (-(seen.high + seen.low) / 2).astype(np.float32)
        weight = value(fc2.weight)
        factor = graph.constant(f"{fc2.name}/factor", 1 / ratio)
        offset = graph.constant(f"{fc2.name}/offset", shift / ratio)
        scaled = graph.insert("Mul", [hidden, factor], name=f"{fc2.name}/scaled", like=hidden)
        fc2.matmul.inputs[0] = graph.insert("Add", [scaled, offset], name=f"{fc2.name}/centred", like=hidden)
        add_to_bias(graph, fc2, -(shift.astype(np.float64) @ weight.astype(np.float64)))
        fc2.weight.values = weight * ratio[:, None]
        c.table.statistics[fc2.input.name] = seen
        c.table.rescale(fc2.input.name, ratio, shift)
