"""The few hidden channels of an MLP that stretch its range, computed in float beside the rest.

    f(x W1 + b1) W2 + b2  ->  f(x A1 + a1) A2 + b2  +  f(x B1 + c1) B2

where B holds the outlier channels of the hidden layer and A the others; f is elementwise. One scale then serves A well.
ViTs with massive activations (arXiv 2402.17762) put values of 14 into one channel of a tensor whose others stay below 1;
eight bits cannot hold both. The idea is that of LLM.int8() (arXiv 2208.07339), decided once and offline.

Precondition: nothing else reads the hidden layer. Done only where it pays: where leaving out ``portion`` of the channels
shrinks the range of the others by at least ``gain``, for the two small products cost time too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.blocks.linear import Linear
from vitq_compiler.blocks.mlp import ACTIVATIONS, Mlp
from vitq_compiler.calibration import ChannelStatistics
from vitq_compiler.graph import Tensor, value
from vitq_compiler.pipeline import Compilation, Fact, Note, Pass
from vitq_compiler.quant import Edge


@dataclass(frozen=True)
class SplitOutlierChannels(Pass):
    """f(x W1) W2 -> f(x A1) A2 + f(x B1) B2"""

    name = "split-outlier-channels"
    requires = frozenset({Fact.CALIBRATED})
    drops = frozenset({Fact.QPARAMS})
    exact = True
    portion: float = 1 / 64
    gain: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.portion < 1 or self.gain < 1:
            raise ValueError("portion must lie between 0 and 1, and gain be at least 1")

    def run(self, c: Compilation) -> int:
        if c.data.synthetic:
            self.note(c, "mlps", "outlier channels are not split off: built-in images do not show which they are")
            return 0
        changes = 0
        for mlp in c.annotations.mlps:
            hidden = mlp.fc2.input
            if Edge(mlp.fc1.name, 0) not in c.specs or Edge(mlp.fc2.name, 0) not in c.specs:
                continue
            outliers = self.outliers(c.table.statistics[hidden.name])
            if not len(outliers):
                continue
            if not mlp.plain or mlp.activation.op not in ACTIVATIONS or len(mlp.fc1.output.outputs) != 1 or len(hidden.outputs) != 1:
                self.note(c, mlp.fc2.name, "outlier channels are not split off: the hidden layer has other readers, or no plain activation")
                continue
            _split(c, mlp, outliers)
            changes += 1
        return changes

    def outliers(self, seen: ChannelStatistics) -> NDArray[np.int64]:
        """The channels to split off, ascending; none where that does not pay."""
        reach = np.maximum(np.abs(seen.low), np.abs(seen.high))
        order = np.argsort(-reach, kind="stable")
        count = int(self.portion * len(reach))
        if not count or reach[order[0]] < self.gain * reach[order[count]]:
            return np.empty(0, np.int64)
        return np.sort(order[:count])


def _split(c: Compilation, mlp: Mlp, outliers: NDArray[np.int64]) -> None:
    fc1, fc2, graph = mlp.fc1, mlp.fc2, c.graph
    hidden = fc2.input
    kept = np.setdiff1d(np.arange(fc1.out_features), outliers)
    before, after = list(fc1.output.shape[:-1]), list(fc2.output.shape)

    inner = _linear(c, fc1, fc1.input, value(fc1.weight)[:, outliers], None if fc1.bias is None else value(fc1.bias)[outliers], before)
    active = graph.insert(
        mlp.activation.op, [inner.output], name=f"{mlp.activation.name}/outliers", like=inner.output, **mlp.activation.attrs
    )
    outer = _linear(c, fc2, active, value(fc2.weight)[outliers], None, after[:-1])

    fc1.weight.values = value(fc1.weight)[:, kept]
    if fc1.bias is not None:
        fc1.bias.values = value(fc1.bias)[kept]
    fc2.weight.values = value(fc2.weight)[kept]
    fc1.out_features = fc2.in_features = len(kept)
    for tensor in (fc1.matmul.outputs[0], fc1.output, hidden):
        tensor.shape = [*before, len(kept)]
    seen = c.table.statistics[hidden.name]
    c.table.statistics[hidden.name] = replace(seen, low=seen.low[kept], high=seen.high[kept], mean=seen.mean[kept])

    total = graph.insert("Add", [fc2.output, outer.output], name=f"{fc2.name}/with_outliers", like=fc2.output)
    graph.replace(fc2.output, total)


def _linear(
    c: Compilation, like: Linear, x: Tensor, weight: NDArray[np.float32], bias: NDArray[np.float32] | None, shape: list[object]
) -> Linear:
    """A float Linear on ``x`` that does a part of what ``like`` does."""
    graph = c.graph
    name = f"{like.name}/outliers"
    output = graph.insert("MatMul", [x, graph.constant(f"{name}/weight", weight)], name=name, like=like.output)
    linear = Linear(output.inputs[0], None, like.role, like.block, like.layers, aside=True)
    if bias is not None:
        output.shape = [*shape, weight.shape[1]]
        output = graph.insert("Add", [output, graph.constant(f"{name}/bias", bias)], name=f"{name}/add", like=like.output)
        linear.add = output.inputs[0]
    output.shape = [*shape, weight.shape[1]]
    c.annotations.linears.insert(c.annotations.linears.index(like) + 1, linear)
    c.notes.append(
        Note(SplitOutlierChannels.name, name, f"{min(weight.shape)} outlier channels stay in float, so that 8 bits serve the others")
    )
    return linear
