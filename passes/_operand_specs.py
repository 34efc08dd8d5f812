"""What the operands of the attention products of one block become: all that a choice names, or none."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vitq_compiler.blocks.attention import Attention
from vitq_compiler.graph import Node
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge, QuantSpec


def operand_specs(c: Compilation, attention: Attention, specs: Mapping[str, QuantSpec]) -> dict[Edge, QuantSpec]:
    """What the target makes of ``specs``, which are by operand.

    Raises:
        MatchFailure: it has no fast kernel for a block of this size.
        RecipeError: it has no such numbers.
    """
    fitted = {operand: c.target.fit(spec) for operand, spec in specs.items()}
    tokens, head_dim = attention.scores.outputs[0].shape[-1], len(attention.q.columns) // attention.heads
    if fitted and (fault := c.target.attention_fault(head_dim, tokens if isinstance(tokens, int) else 0, next(iter(fitted.values())))):
        raise MatchFailure(fault, attention.softmax.name)
    return {attention.edges[operand]: spec for operand, spec in fitted.items()}


def excluding_pattern(c: Compilation, node: Node) -> str | None:
    """The regular expression by which the user keeps ``node`` in float, if any."""
    names = (node.name, c.graph.scope(node))
    return next((p for p in c.recipe.exclude if any(re.search(p, n) for n in names)), None)
