"""Ranges and specs -> scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.graph import Node, is_constant, value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import QuantParams, QuantSpec, from_range


@dataclass(frozen=True)
class ComputeQparams(Pass):
    """CalibrationTable + QuantSpec -> QuantParams"""

    name = "compute-qparams"
    requires = frozenset({Fact.CALIBRATED})
    provides = frozenset({Fact.QPARAMS})
    edits = False

    def run(self, c: Compilation) -> int:
        for edge, spec in c.specs.items():
            node = c.graph.node(edge.node)
            tensor = node.inputs[edge.index]
            if is_constant(tensor):
                c.params[edge] = weight_params(node, spec)
            else:
                seen = c.table.statistics[tensor.name]
                low, high = seen.low.min(), seen.high.max()
                if spec.format == "e4m3" and tensor.inputs and tensor.inputs[0].op == "Softmax":
                    low, high = np.float32(0), np.float32(1)  # the scale 1/448, which fused attention kernels are made for
                c.params[edge] = from_range(low, high, spec)
        return len(c.specs)


def weight_params(node: Node, spec: QuantSpec) -> QuantParams:
    """Parameters of the weight of a MatMul ([K, N], channels last) or Conv ([O, I, ...], channels first)."""
    weight, axis = value(node.inputs[1]), 0 if node.op == "Conv" else 1
    if spec.granularity == "per_tensor":
        return from_range(weight.min(), weight.max(), spec)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    return from_range(np.asarray(weight.min(others)), np.asarray(weight.max(others)), spec, axis)
