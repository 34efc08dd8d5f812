"""Gelu from its decomposed chain, whatever the order of the factors.

0.5 * x * (1 + erf(x / sqrt 2))                              ->  Gelu(x)
0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3)))      ->  Gelu(x; approximate = tanh)
x * sigmoid(2 * sqrt(2/pi) * (x + 0.044715 * x^3))           ->  the same, as 0.5 * (1 + tanh(z)) = sigmoid(2 z)

The gate may also be written 0.5 + 0.5 * erf(.), and the cubic polynomial as x * (1 + 0.044715 * x^2). x * sigmoid(a * x)
stays: there is no operator for it (quick-GELU, SiLU), and `blocks.mlp` knows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt

import numpy as np

from vitq_compiler.graph import Tensor, producer
from vitq_compiler.pattern import const, either, factors, match, op, var
from vitq_compiler.pipeline import Compilation, Fact, Pass

CUBIC = 0.044715

_square = either(op.Pow(var("x"), const(equals=2.0)), op.Mul(var("x"), var("x")))
_cube = either(op.Pow(var("x"), const(equals=3.0)), op.Mul(var("x"), _square))
_inner = op.Add(var("x"), op.Mul(_cube, const(equals=CUBIC)))
_factored = op.Add(op.Mul(_square, const(equals=CUBIC)), const(equals=1.0))  # times x
_also_factored = op.Add(op.Mul(var("x"), op.Mul(var("x"), const(equals=CUBIC))), const(equals=1.0))


@dataclass(frozen=True)
class RecoverGelu(Pass):
    """x * 0.5 * (1 + erf(x / sqrt 2)) -> Gelu"""

    name = "recover-gelu"
    requires = frozenset({Fact.CANONICAL})
    exact = True

    def run(self, c: Compilation) -> int:
        changes = 0
        for node in c.graph.find("Mul", "Div"):
            found = _gelu_of(node.outputs[0]) if node.outputs else None
            if found is not None:
                x, approximate = found
                output = c.graph.insert("Gelu", [x], name=f"{node.name}/gelu", like=node.outputs[0], approximate=approximate)
                c.graph.replace(node.outputs[0], output)
                changes += 1
        c.graph.clean()
        return changes


def _gelu_of(tensor: Tensor) -> tuple[Tensor, str] | None:
    number, tensors = factors(tensor)
    if len(tensors) != 2:
        return None
    for x, gate in (tensors, tensors[::-1]):
        bent = _gate(gate, number)
        if bent is None:
            continue
        kind, z, by = bent
        if kind == "Erf" and _is_multiple(z, x, by / sqrt(2)):
            return x, "none"
        if kind != "Erf" and _is_polynomial(z, x, by * sqrt(2 / pi)):
            return x, "tanh"
    return None


def _gate(gate: Tensor, number: float) -> tuple[str, Tensor, float] | None:
    """``number`` * ``gate`` = (1 + f(z)) / 2: the operator, its argument, and what that must be a multiple by; else None."""
    for kind in ("Erf", "Tanh"):
        bent = getattr(op, kind)(var("z"))
        found = match(op.Add(bent, const(equals=1.0)), gate) if np.isclose(number, 0.5) else None
        if found is None and np.isclose(number, 1.0):
            found = match(op.Add(op.Mul(bent, const(equals=0.5)), const(equals=0.5)), gate)
        if found is not None:
            return kind, found["z"], 1.0
    sigmoid = match(op.Sigmoid(var("z")), gate) if np.isclose(number, 1.0) else None
    return ("Sigmoid", sigmoid["z"], 2.0) if sigmoid is not None else None


def _is_multiple(tensor: Tensor, x: Tensor, by: float) -> bool:
    number, tensors = factors(tensor)
    return len(tensors) == 1 and tensors[0] is x and producer(tensor) is not None and bool(np.isclose(number, by, rtol=1e-4))


def _is_polynomial(tensor: Tensor, x: Tensor, by: float) -> bool:
    """Whether ``tensor`` is ``by`` * (x + 0.044715 x^3)."""
    number, tensors = factors(tensor)
    if not np.isclose(number, by, rtol=1e-4):
        return False
    if len(tensors) == 1:
        sums = [match(_inner, tensors[0])]
    else:
        rest = [t for t in tensors if t is not x]
        sums = [match(p, rest[0]) for p in (_factored, _also_factored)] if len(tensors) == 2 and len(rest) == 1 else []
    return any(found is not None and found["x"] is x for found in sums)
