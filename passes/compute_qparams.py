"""Ranges and specs -> scales, zero points and curves, such that the whole calibrated range is covered.

Weights are covered too, or with ``weights=mse`` clipped where that makes their squared error smaller. Where neighbouring codes have
a limit to keep to, a scale is as much larger as makes that error least (see `pairs`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vitq_compiler.graph import Node, Tensor, is_constant, value
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import QuantParams, QuantSpec, from_range
from vitq_compiler.quantizer import quantizer_for
from vitq_compiler.weight_scales import fit_scales, widened


@dataclass(frozen=True)
class ComputeQparams(Pass):
    """CalibrationTable + QuantSpec -> QuantParams"""

    name = "compute-qparams"
    requires = frozenset({Fact.CALIBRATED})
    provides = frozenset({Fact.QPARAMS})
    edits = False
    weights: str = "minmax"

    def __post_init__(self) -> None:
        if self.weights not in ("minmax", "mse"):
            raise ValueError(f"weights must be minmax or mse, got {self.weights}")

    def run(self, c: Compilation) -> int:
        for edge, spec in c.specs.items():
            node = c.graph.node(edge.node)
            tensor = node.inputs[edge.index]
            if is_constant(tensor):
                matrix = node.op == "MatMul"  # a kernel of a convolution is covered
                fit = self.weights == "mse" and matrix
                c.params[edge] = fit_scales(value(tensor), spec, np.ones(tensor.shape[0])) if fit else weight_params(node, spec)
            else:
                c.params[edge] = activation_params(c, tensor, spec)
        return len(c.specs)


def activation_params(c: Compilation, tensor: Tensor, spec: QuantSpec) -> QuantParams:
    """Parameters that cover all that calibration saw of a tensor."""
    seen = c.table.statistics[tensor.name]
    low, high = float(seen.low.min()), float(seen.high.max())
    if spec.format == "e4m3" and tensor.inputs and tensor.inputs[0].op == "Softmax":
        low, high = 0.0, 1.0  # the scale 1/448, which fused attention kernels are made for
    return quantizer_for(spec).from_range(low, high, spec)


def weight_params(node: Node, spec: QuantSpec) -> QuantParams:
    """Parameters of the weight of a MatMul ([K, N], channels last) or Conv ([O, I, ...], channels first)."""
    weight, axis = value(node.inputs[1]), 0 if node.op == "Conv" else 1
    others = None if spec.granularity == "per_tensor" else tuple(i for i in range(weight.ndim) if i != axis)
    params = from_range(np.asarray(weight.min(others)), np.asarray(weight.max(others)), spec, None if others is None else axis)
    if params.pairs is None:
        return params
    if node.op == "Conv":  # its kernels walk through positions first, then through channels
        walk = (*range(2, weight.ndim), 1)
        params, weight = replace(params, pairs=replace(params.pairs, walk=walk)), weight.transpose(*walk, 0).reshape(-1, len(weight))
    return widened(weight, params, np.ones(len(weight)))
