"""What passes have in common that rewrite operands of attention: which blocks they may touch, and a glance at their ranges."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from vitq_compiler.blocks.attention import Attention, check_private
from vitq_compiler.calibration import ChannelStatistics, glance
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass


def private_attentions(
    p: Pass, c: Compilation, letters: str, does: str, wanted: Callable[[Attention], bool] = lambda attention: True
) -> list[Attention]:
    """The attention blocks whose operands ``letters`` nothing else reads, of those that are ``wanted``.

    What is not done to the others, ``does``, is noted with the reason.
    """
    for computed in c.annotations.computed_attentions:
        p.note(c, f"attention {computed.index}", f"{does}: {computed.reason}")
    fit = []
    for attention in filter(wanted, c.annotations.attentions):
        try:
            check_private(c.graph, attention, letters)
            fit.append(attention)
        except MatchFailure as failure:
            p.note(c, attention.proj.block, f"{does}: {failure.reason}")
    return fit


@dataclass(frozen=True)
class ObservedHeads(Pass):
    """A rewrite of the operands ``letters`` of every attention that nothing else reads; ``does`` says what is not done elsewhere."""

    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True
    letters: ClassVar[str]
    does: ClassVar[str]

    def run(self, c: Compilation) -> int:
        fit = private_attentions(self, c, self.letters, self.does)
        names = {getattr(attention, letter).linear.output.name for attention in fit for letter in self.letters}
        seen = glance(c.graph, sorted(names), c.data.calibration(), threads=c.threads)
        for attention in fit:
            self.rewrite(c, attention, seen)
        return len(fit)

    @abstractmethod
    def rewrite(self, c: Compilation, attention: Attention, seen: dict[str, ChannelStatistics]) -> None:
        """Rewrite one attention, given the statistics of the outputs of its Linear layers by name."""
