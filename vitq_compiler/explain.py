"""Why a layer is what it is: the rows of a report that a pattern finds, in sentences."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vitq_compiler.errors import RecipeError

if TYPE_CHECKING:
    from vitq_compiler.report import CompileReport, LinearRow, NodeRow, NoteRow


def explain(report: CompileReport, pattern: str) -> list[str]:
    """What was found, what was quantized, and for what was not the exact reason.

    Args:
        report: a finished compile.
        pattern: regular expression; searched for in the node name, scope, block and role of every Linear, in the name,
            operator, scope and block of every other node of the input model, and in the place of every note.

    Returns:
        One line each. Where nothing is found, the blocks and roles there are.

    Raises:
        RecipeError: ``pattern`` is not a regular expression.
    """
    regex = read_pattern(pattern)
    linears = [(row, fields) for row in report.linears if (fields := _matching_fields(regex, row))]
    known = {name for row in report.linears for name in (row.name, *row.parts)}
    nodes = [row for row in report.nodes if row.name not in known and any(map(regex.search, (row.name, row.op, row.scope, row.block)))]
    known |= {row.name for row in nodes}
    notes = [note for note in report.notes if note.where not in known and regex.search(note.where)]
    if not (linears or nodes or notes):
        return _nothing(report, pattern)
    counts = [(len(linears), "Linear layer"), (len(nodes), "other node"), (len(notes), "other place")]
    found = [_count(number, thing) for number, thing in counts if number or thing == "Linear layer"]
    lines = [f"{pattern!r} finds {' and '.join(found)}"]
    for row, fields in linears:
        lines += _about(row, fields, [note for note in report.notes if note.where in (row.name, *row.parts)])
    for node in nodes:
        lines += _about_node(node, [note for note in report.notes if note.where == node.name])
    lines += [f"{note.where}: {note.stage} says: {note.reason}" for note in notes]
    return lines


def read_pattern(pattern: str) -> re.Pattern[str]:
    """The compiled pattern, so that a typo is found before a compile and not after it.

    Raises:
        RecipeError: it is not a regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"{pattern!r} is not a regular expression: {error}; put a backslash before a sign that is meant literally"
        ) from None


def _matching_fields(regex: re.Pattern[str], row: LinearRow) -> list[str]:
    fields = {"name": (row.name,), "scope": (row.scope,), "block": (row.block,), "role": (row.role,), "parts": row.parts}
    return [name for name, texts in fields.items() if any(text and regex.search(text) for text in texts)]


def _about(row: LinearRow, fields: list[str], notes: list[NoteRow]) -> list[str]:
    place = f"{row.role} of {row.block}" if row.block else f"{row.role}, outside the blocks"
    lines = [f"{row.name}: {place}, {row.in_features} x {row.out_features}" + (f", from {row.scope}" if row.scope else "")]
    lines.append(f"  found by its {' and '.join(fields)}")
    lines += [f"  taken apart into {', '.join(row.parts)}"] if len(row.parts) > 1 else []
    if not row.quantized:
        lines.append(f"  stays in float: {row.reason or 'no pass says why'}")
    elif row.integer:
        lines.append(f"  weight and activation are quantized, and {row.kernel or 'the runtime'} computes on integers")
    else:
        lines.append(f"  weight and activation are quantized, but the runtime computes in float: {row.reason or 'it does not say why'}")
    lines += [f"  {note.stage} says: {note.reason}" for note in notes if note.reason != row.reason]
    return lines


def _about_node(row: NodeRow, notes: list[NoteRow]) -> list[str]:
    origin = f", from {row.scope}" if row.scope else ""
    lines = [f"{row.name}: {row.op}{f' of {row.block}' if row.block else ''}{origin}"]
    lines += [f"  {step}" for step in row.history]
    lines += [f"  {row.state}"] if row.state else []
    lines += [f"  {note.stage} says: {note.reason}" for note in notes if note.reason not in row.state]
    return lines


def _nothing(report: CompileReport, pattern: str) -> list[str]:
    blocks = dict.fromkeys([row.block for row in report.linears if row.block] + [row.name for row in report.validation.blocks])
    roles = dict.fromkeys(row.role for row in report.linears)
    return [
        f"{pattern!r} finds nothing: no name, scope, block, role or operator of a node, and no note",
        f"  the blocks are: {', '.join(blocks) or 'none'}",
        f"  the roles are: {', '.join(roles) or 'none'}",
    ]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
