"""Find the blocks, give every Linear its role, and let the recipe say what each becomes.

Linear layer -> QuantSpec on its activation edge and on its weight edge; patch embedding likewise. Operands of the attention
products get one where the recipe has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.annotations import understand
from vitq_compiler.blocks.attention import Attention
from vitq_compiler.errors import ModelError
from vitq_compiler.graph import Node
from vitq_compiler.passes._operand_specs import excluding_pattern, operand_specs
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import Edge


@dataclass(frozen=True)
class Annotate(Pass):
    """graph -> roles of Linear layers and a QuantSpec for each edge to quantize"""

    name = "annotate"
    requires = frozenset({Fact.CANONICAL})
    provides = frozenset({Fact.ANNOTATED})
    edits = False

    def run(self, c: Compilation) -> int:
        c.graph.infer_shapes()
        c.annotations = understand(c.graph)
        if not (c.annotations.attentions or c.annotations.computed_attentions):
            near = "; ".join(f"{f.where}: {f.reason}" for f in c.annotations.failures[:1]) or "it has no softmax of a product"
            raise ModelError(f"no transformer block found ({near}); give a vision transformer with its attention in standard operators")
        for failure in c.annotations.failures:
            self.note(c, failure.where, f"not an attention block: {failure.reason}")
        for linear in c.annotations.linears:
            self._specify(c, linear.matmul, linear.role)
        for node in c.annotations.patch_embeddings:
            self._specify(c, node, "patch_embed")
        for attention in c.annotations.attentions:
            self._specify_products(c, attention)
        for computed in c.annotations.computed_attentions if c.recipe.attention else ():
            self.note(c, computed.softmax.name, f"operands of its products stay in float: {computed.reason}")
        if not c.specs:
            raise ModelError("every Linear is excluded or of a role that the recipe keeps in float; leave one to quantize")
        return len(c.specs)

    def _specify(self, c: Compilation, node: Node, role: str) -> None:
        if self._kept(c, node):
            return
        if role in c.recipe.float_roles:
            self.note(c, node.name, f"role {role} stays in float in recipe {c.recipe.name}")
        else:
            activation = c.target.fit(c.recipe.activation_spec(role))
            c.specs[Edge(node.name, 0)] = activation
            c.specs[Edge(node.name, 1)] = c.target.fit_weight(c.recipe.weight_spec(role), activation)

    def _specify_products(self, c: Compilation, attention: Attention) -> None:
        """Operands of the attention products: all that the recipe names, or none."""
        specs = c.recipe.attention_specs()
        if not specs or self._kept(c, attention.softmax):
            return
        try:
            c.specs.update(operand_specs(c, attention, specs))
        except MatchFailure as failure:
            self.note(c, attention.softmax.name, f"attention stays in float: {failure.reason}")

    def _kept(self, c: Compilation, node: Node) -> bool:
        """Whether the user keeps ``node`` in float; if so it is noted."""
        pattern = excluding_pattern(c, node)
        if pattern is not None:
            self.note(c, node.name, f"excluded by {pattern!r}")
        return pattern is not None
