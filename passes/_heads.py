"""What passes have in common that rewrite operands of attention: which blocks they may touch, and a glance at their ranges."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from vitq_compiler.blocks.attention import Attention, Values, check_private
from vitq_compiler.calibration import ChannelStatistics, glance
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass

T = TypeVar("T", bound=Values)


def queries_and_keys(p: Pass, c: Compilation, does: str) -> list[Attention]:
    """The attention blocks of which queries and keys are known; what is not done to the others, ``does``, is noted with the reason."""
    for computed in c.annotations.computed_attentions:
        p.note(c, f"attention {computed.index}", f"{does}: {computed.reason}")
    return c.annotations.attentions


def values(p: Pass, c: Compilation, does: str) -> list[Values]:
    """The same for values: they are known of attention too whose queries and keys are rotated by positions, or normalized."""
    for computed in c.annotations.computed_attentions:
        if isinstance(computed.values, MatchFailure):
            p.note(c, f"attention {computed.index}", f"{does}: {computed.values.reason}")
    return c.annotations.values


def private(p: Pass, c: Compilation, attentions: Iterable[T], letters: str, does: str) -> list[T]:
    """Those whose operands ``letters`` nothing else reads; what is not done to the others, ``does``, is noted with the reason."""
    fit = []
    for attention in attentions:
        try:
            check_private(c.graph, attention, letters)
            fit.append(attention)
        except MatchFailure as failure:
            p.note(c, attention.proj.block, f"{does}: {failure.reason}")
    return fit


@dataclass(frozen=True)
class ObservedHeads(Pass, Generic[T]):
    """A rewrite of the operands ``letters`` of every attention that nothing else reads; ``does`` says what is not done elsewhere."""

    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True
    letters: ClassVar[str]
    does: ClassVar[str]

    def run(self, c: Compilation) -> int:
        fit = private(self, c, self.blocks(c), self.letters, self.does)
        names = {attention.views[letter].linear.output.name for attention in fit for letter in self.letters}
        seen = glance(c.graph, sorted(names), c.data.calibration(), threads=c.threads)
        for attention in fit:
            self.rewrite(c, attention, seen)
        return len(fit)

    @abstractmethod
    def blocks(self, c: Compilation) -> Iterable[T]:
        """What may be rewritten; what is not, is noted."""

    @abstractmethod
    def rewrite(self, c: Compilation, attention: T, seen: dict[str, ChannelStatistics]) -> None:
        """Rewrite one attention, given the statistics of the outputs of its Linear layers by name."""
