"""LayerNormalization from its decomposed chain.

    d = x - mean(x);  d / sqrt(mean(d^2) + eps) * gamma + beta  ->  LayerNormalization(x, gamma, beta; eps)

Matched: every form of `blocks.normalization`, with and without gamma and beta, constants on either side, and TensorFlow's
x * s + (beta - mean(x) * s) with s = gamma / sqrt(var + eps). Precondition: means over the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.blocks.normalization import inverse_root, mean, over_root, parameter, square, width_of
from vitq_compiler.graph import Graph, Node, scalar
from vitq_compiler.pattern import Bindings, MatchFailure, const, either, match, nearest_miss, op, var
from vitq_compiler.pipeline import Compilation, Fact, Pass

_mean = mean(var("x"), "mean")
_centered = op.Sub(var("x"), _mean)
_variance = op.Add(mean(square(_centered), "mean_square"), const("epsilon"))
_normal = over_root(_centered, _variance)
_scaled = over_root(_centered, _variance, const("gamma"))
_slope = op.Mul(inverse_root(_variance), const("gamma"))
_regrouped = op.Add(op.Mul(var("x"), _slope), op.Sub(const("beta"), op.Mul(_mean, _slope)))
LAYERNORM = either(op.Add(_scaled, const("beta")), _regrouped, _scaled, op.Add(_normal, const("beta")), _normal)


@dataclass(frozen=True)
class RecoverLayernorm(Pass):
    """(x - mean) / sqrt(var + eps) * gamma + beta -> LayerNormalization"""

    name = "recover-layernorm"
    requires = frozenset({Fact.CANONICAL})
    exact = True

    def run(self, c: Compilation) -> int:
        recovered: set[int] = set()  # mean(d^2) of each; what is left of its chain is no LayerNormalization of its own
        failures: dict[int, MatchFailure] = {}
        for node in reversed(c.graph.clean().find("Add", "Mul", "Div")):  # the longest form of a chain ends last
            bound = match(LAYERNORM, node.outputs[0])
            if bound is None or id(bound["mean_square"]) in recovered:
                continue
            try:
                _rewrite(c.graph, node, bound, width_of(bound, ("mean", "mean_square")))
                recovered.add(id(bound["mean_square"]))
            except MatchFailure as failure:
                failures[id(bound["mean_square"])] = MatchFailure(failure.reason, node.name)
        self._note(c, [failure for key, failure in failures.items() if key not in recovered])
        c.graph.clean()
        return len(recovered)

    def _note(self, c: Compilation, failures: list[MatchFailure]) -> None:
        """Say why a chain, or a division of x - mean(x) that is almost one, is no LayerNormalization."""
        for node in c.graph.clean().find("Div", "Mul"):
            if (
                match(_centered, node.inputs[0]) is not None
                and (miss := nearest_miss(_normal, node.outputs[0], 1 if node.op == "Div" else 2)) is not None
            ):
                failures.append(MatchFailure(miss.reason, node.name))
        for failure in failures:
            self.note(c, failure.where, f"not a LayerNormalization: {failure.reason}")


def _rewrite(graph: Graph, node: Node, bound: Bindings, width: int) -> None:
    gamma, beta = (
        graph.constant(f"{node.name}/{n}", parameter(bound, n, width, default)) for n, default in (("gamma", 1.0), ("beta", 0.0))
    )
    epsilon = scalar(bound["epsilon"])
    output = graph.insert(
        "LayerNormalization", [bound["x"], gamma, beta], name=f"{node.name}/layernorm", like=node.outputs[0], axis=-1, epsilon=epsilon
    )
    graph.replace(node.outputs[0], output)
