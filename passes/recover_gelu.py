"""Gelu from its decomposed chain, whatever the order of the factors.

0.5 * x * (1 + erf(x / sqrt 2))                              ->  Gelu(x)
0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3)))      ->  Gelu(x; approximate = tanh)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt

import numpy as np

from vitq_compiler.graph import Tensor, producer
from vitq_compiler.pattern import const, either, factors, match, op, var
from vitq_compiler.pipeline import Compilation, Fact, Pass

_cube = either(op.Pow(var("x"), const(equals=3.0)), op.Mul(var("x"), op.Mul(var("x"), var("x"))))
_inner = op.Add(var("x"), op.Mul(_cube, const(equals=0.044715)))


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
    if len(tensors) != 2 or not np.isclose(number, 0.5):
        return None
    for x, gate in (tensors, tensors[::-1]):
        erf = match(op.Add(op.Erf(var("z")), const(equals=1.0)), gate)
        if erf is not None and _is_multiple(erf["z"], x, 1 / sqrt(2)):
            return x, "none"
        tanh = match(op.Add(op.Tanh(var("z")), const(equals=1.0)), gate)
        if tanh is not None:
            scale, inner = factors(tanh["z"])
            polynomial = match(_inner, inner[0]) if len(inner) == 1 and np.isclose(scale, sqrt(2 / pi), rtol=1e-4) else None
            if polynomial is not None and polynomial["x"] is x:
                return x, "tanh"
    return None


def _is_multiple(tensor: Tensor, x: Tensor, by: float) -> bool:
    number, tensors = factors(tensor)
    return len(tensors) == 1 and tensors[0] is x and producer(tensor) is not None and bool(np.isclose(number, by, rtol=1e-4))
