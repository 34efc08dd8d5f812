"""Patterns: ordinary Python that looks like the graph it finds.

    x = var("x")
    centered = op.Sub(x, op.ReduceMean(x))
    match(op.Mul(op.Div(centered, ...), const("gamma")), tensor)

A pattern is matched backwards from a tensor. ``Add`` and ``Mul`` match in either order; ``either`` gives variants; a name
bound twice must be the same tensor both times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitq_compiler.graph import Node, Tensor, is_constant, producer, scalar

COMMUTATIVE = frozenset({"Add", "Mul"})
Bindings = dict[str, Any]


class MatchFailure(Exception):
    """A structure was almost what a pass looks for. Control flow: it becomes a note in the report.

    Attributes:
        reason: one sentence.
        where: name of the node at fault.
    """

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where


@dataclass
class Trace:
    """Where a match failed farthest up from the tensor it began at: the nearest miss.

    Attributes:
        level: how many nodes lie between that tensor and where the match is now.
        reached: the level of ``failure``.
        failure: what differs there.
    """

    level: int = 0
    reached: int = -1
    failure: MatchFailure | None = None

    def miss(self, tensor: Tensor, wanted: str) -> None:
        """Remember a failure at ``tensor``, if none was farther up."""
        if self.level > self.reached:
            node = producer(tensor)
            there = f"{node.op} {node.name}" if node else "a constant" if is_constant(tensor) else f"the input {tensor.name}"
            self.reached, self.failure = self.level, MatchFailure(f"{there} stands where {wanted} is looked for", node.name if node else "")


class Pattern:
    """Base of all patterns."""

    def bind(self, tensor: Tensor, bound: Bindings, trace: Trace) -> Iterator[Bindings]:
        raise NotImplementedError


@dataclass(frozen=True)
class Variable(Pattern):
    """Any tensor; the same one wherever the name recurs."""

    name: str

    def bind(self, tensor: Tensor, bound: Bindings, trace: Trace) -> Iterator[Bindings]:
        if self.name not in bound:
            yield {**bound, self.name: tensor}
        elif bound[self.name] is tensor:
            yield bound
        else:
            trace.miss(tensor, f"{bound[self.name].name} again")


@dataclass(frozen=True)
class Constant(Pattern):
    """A constant, bound to ``name``; where ``equals`` is given, one of that single value (relative tolerance 1e-4)."""

    name: str = ""
    equals: float | None = None

    def bind(self, tensor: Tensor, bound: Bindings, trace: Trace) -> Iterator[Bindings]:
        number = scalar(tensor) if self.equals is not None else None
        if not is_constant(tensor):
            trace.miss(tensor, "a constant" if self.equals is None else f"the number {self.equals:g}")
            return
        if self.equals is not None and (number is None or not np.isclose(number, self.equals, rtol=1e-4)):
            trace.miss(tensor, f"the number {self.equals:g}")
            return
        yield {**bound, self.name: tensor} if self.name else bound


@dataclass(frozen=True)
class Either(Pattern):
    """The first of several variants that matches."""

    variants: tuple[Pattern, ...]

    def bind(self, tensor: Tensor, bound: Bindings, trace: Trace) -> Iterator[Bindings]:
        for variant in self.variants:
            for found in variant.bind(tensor, bound, trace):
                trace = Trace()  # what fails after a match is no miss
                yield found


@dataclass(frozen=True)
class Operation(Pattern):
    """A node of type ``kind`` on ``inputs`` (trailing inputs that are not listed are free), bound to ``name`` if given."""

    kind: str
    inputs: tuple[Pattern, ...]
    name: str = ""

    def named(self, name: str) -> Operation:
        """The same, with the node bound to ``name``."""
        return Operation(self.kind, self.inputs, name)

    def bind(self, tensor: Tensor, bound: Bindings, trace: Trace) -> Iterator[Bindings]:
        node = producer(tensor)
        if node is None or node.op != self.kind or len(node.inputs) < len(self.inputs):
            trace.miss(tensor, self.kind)
            return
        orders = [list(node.inputs)]
        if self.kind in COMMUTATIVE:
            orders.append([node.inputs[1], node.inputs[0]])
        for order in orders:
            for found in self._inputs(order, 0, bound, trace):
                yield {**found, self.name: node} if self.name else found

    def _inputs(self, order: list[Tensor], index: int, bound: Bindings, trace: Trace) -> Iterator[Bindings]:
        if index == len(self.inputs):
            yield bound
            return
        trace.level += 1
        for found in self.inputs[index].bind(order[index], bound, trace):
            trace.level -= 1
            yield from self._inputs(order, index + 1, found, trace)
            trace.level += 1
        trace.level -= 1


class _Operations:
    """``op.Add(a, b)`` is an `Operation` of type Add."""

    def __getattr__(self, kind: str) -> Any:
        return lambda *inputs: Operation(kind, inputs)


op = _Operations()


def var(name: str) -> Variable:
    """Any tensor."""
    return Variable(name)


def const(name: str = "", equals: float | None = None) -> Constant:
    """A constant tensor, or one of a given single value."""
    return Constant(name, equals)


def either(*variants: Pattern) -> Either:
    """Any of the variants."""
    return Either(variants)


def match(pattern: Pattern, tensor: Tensor) -> Bindings | None:
    """What the names of ``pattern`` stand for where it computes ``tensor``; None where it does not."""
    return next(pattern.bind(tensor, {}, Trace()), None)


def nearest_miss(pattern: Pattern, tensor: Tensor, depth: int = 0) -> MatchFailure | None:
    """What differs where ``pattern`` is almost what computes ``tensor``.

    None where it matches, and where it already fails less than ``depth`` nodes up: that is no near miss.
    """
    trace = Trace()
    found = next(pattern.bind(tensor, {}, trace), None)
    return trace.failure if found is None and trace.reached >= depth else None


def factors(tensor: Tensor) -> tuple[float, list[Tensor]]:
    """Flatten a product: ``tensor`` = number * product of tensors, through Mul by anything and Div by a number."""
    node = producer(tensor)
    if node is not None and node.op == "Mul":
        parts = [factors(t) if scalar(t) is None else (scalar(t) or 0.0, []) for t in node.inputs]
        return parts[0][0] * parts[1][0], [*parts[0][1], *parts[1][1]]
    if node is not None and node.op == "Div":
        divisor = scalar(node.inputs[1])
        if divisor:
            number, tensors = factors(node.inputs[0])
            return number / divisor, tensors
    return 1.0, [tensor]


def interior(nodes: list[Node], result: Tensor) -> bool:
    """Whether nothing outside ``nodes`` reads what they compute, but for ``result``."""
    inside = {id(n) for n in nodes}
    return all(t is result or all(id(r) in inside for r in t.outputs) for n in nodes for t in n.outputs)
