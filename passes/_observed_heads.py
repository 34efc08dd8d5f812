"""What passes have in common that rewrite operands of attention after a glance at their ranges."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from vitq_compiler.blocks.attention import Attention, check_private
from vitq_compiler.calibration import ChannelStatistics, glance
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass


@dataclass(frozen=True)
class ObservedHeads(Pass):
    """A rewrite of the operands ``letters`` of every attention that nothing else reads; ``does`` says what is not done elsewhere."""

    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True
    letters: ClassVar[str]
    does: ClassVar[str]

    def run(self, c: Compilation) -> int:
        fit: list[Attention] = []
        for attention in c.annotations.attentions:
            try:
                check_private(c.graph, attention, self.letters)
                fit.append(attention)
            except MatchFailure as failure:
                self.note(c, attention.proj.block, f"{self.does}: {failure.reason}")
        names = {getattr(attention, letter).linear.output.name for attention in fit for letter in self.letters}
        seen = glance(c.graph, sorted(names), c.data.calibration(), threads=c.threads)
        for attention in fit:
            self.rewrite(c, attention, seen)
        return len(fit)

    @abstractmethod
    def rewrite(self, c: Compilation, attention: Attention, seen: dict[str, ChannelStatistics]) -> None:
        """Rewrite one attention, given the statistics of the outputs of its Linear layers by name."""
