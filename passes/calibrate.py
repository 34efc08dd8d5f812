"""Calibration data -> the statistics of every activation that is to be quantized, per channel.

Where the target has several choices for the attention products, their operands are looked at even if they stay in float: the
report tells the price of each.

Built-in images excite a trained model less than real ones do: ranges from them are widened by ``synthetic_margin``, since
clipping costs more than a coarser step.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.blocks.attention import CHANNEL_AXES
from vitq_compiler.calibration import collect
from vitq_compiler.graph import is_constant
from vitq_compiler.pipeline import Compilation, Fact, Pass


@dataclass(frozen=True)
class Calibrate(Pass):
    """float graph + data -> CalibrationTable"""

    name = "calibrate"
    requires = frozenset({Fact.ANNOTATED})
    provides = frozenset({Fact.CALIBRATED})
    edits = False

    synthetic_margin: float = 1.5

    def run(self, c: Compilation) -> int:
        axes: dict[str, tuple[int, ...]] = {}
        operand_axes = {edge: CHANNEL_AXES[operand] for a in c.annotations.attentions for operand, edge in a.edges.items()}
        for edge in dict.fromkeys([*c.specs, *(operand_axes if c.target.attention_choices else ())]):
            node = c.graph.node(edge.node)
            tensor = node.inputs[edge.index]
            if not is_constant(tensor):
                channels = operand_axes.get(edge, (1,) if node.op == "Conv" else (-1,))
                axes[tensor.name] = channels if len(tensor.shape) > len(channels) + 1 else channels[-1:]
        c.table = collect(c.graph, axes, c.data.calibration(), c.data.calibration_count, threads=c.threads, progress=c.progress)
        if c.data.synthetic:
            c.table.widen(self.synthetic_margin)
        return len(axes)
