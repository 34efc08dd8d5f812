"""RMSNormalization from its decomposed chain (Zhang and Sennrich 2019).

    x / sqrt(mean(x^2) + eps) * gamma  ->  RMSNormalization(x, gamma; eps)

Matched: every form of `blocks.normalization`, with and without gamma. Precondition: the mean over the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.blocks.normalization import mean, over_root, parameter, square, width_of
from vitq_compiler.graph import Graph, Node, scalar
from vitq_compiler.opset import raise_opset
from vitq_compiler.pattern import Bindings, MatchFailure, const, either, match, op, var
from vitq_compiler.pipeline import Compilation, Fact, Pass

OPSET = 23  # that brought the operator

_mean_square = op.Add(mean(square(var("x")), "mean_square"), const("epsilon"))
RMSNORM = either(over_root(var("x"), _mean_square, const("gamma")), over_root(var("x"), _mean_square))


@dataclass(frozen=True)
class RecoverRmsnorm(Pass):
    """x / sqrt(mean(x^2) + eps) * gamma -> RMSNormalization"""

    name = "recover-rmsnorm"
    requires = frozenset({Fact.CANONICAL})
    exact = True

    def run(self, c: Compilation) -> int:
        recovered: set[int] = set()  # mean(x^2) of each; what is left of its chain is no RMSNormalization of its own
        failures: dict[int, MatchFailure] = {}
        for node in reversed(c.graph.clean().find("Mul", "Div")):  # the longest form of a chain ends last
            bound = match(RMSNORM, node.outputs[0])
            if bound is None or id(bound["mean_square"]) in recovered:
                continue
            try:
                _rewrite(c.graph, node, bound, width_of(bound, ("mean_square",)))
                recovered.add(id(bound["mean_square"]))
            except MatchFailure as failure:
                failures[id(bound["mean_square"])] = MatchFailure(failure.reason, node.name)
        for missed in [failure for key, failure in failures.items() if key not in recovered]:
            self.note(c, missed.where, f"not an RMSNormalization: {missed.reason}")
        if recovered:
            raise_opset(c.graph, OPSET)
        c.graph.clean()
        return len(recovered)


def _rewrite(graph: Graph, node: Node, bound: Bindings, width: int) -> None:
    gamma = graph.constant(f"{node.name}/gamma", parameter(bound, "gamma", width, 1.0))
    epsilon = scalar(bound["epsilon"])
    output = graph.insert(
        "RMSNormalization", [bound["x"], gamma], name=f"{node.name}/rmsnorm", like=node.outputs[0], axis=-1, epsilon=epsilon
    )
    graph.replace(node.outputs[0], output)
