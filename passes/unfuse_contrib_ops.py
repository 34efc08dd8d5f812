"""What ONNX Runtime's optimizers have fused -> the standard operators it was fused from.

    com.microsoft.Attention(x, W, b)   ->   Split(MatMul(x, W) + b), softmax(scale q k^T + mask) v
    com.microsoft.BiasGelu(x, b)       ->   Gelu(x + b)                     and so on; see `vitq_compiler.contrib`
    Attention(q, k, v)                 ->   softmax(scale q k^T + mask) v   the standard operator, as torch exports it

Only then are the Linear layers inside visible. What cannot be taken apart is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.contrib import DOMAIN, UNFUSE, unfuse
from vitq_compiler.errors import ModelError
from vitq_compiler.graph import is_constant
from vitq_compiler.opset import decompose, raise_opset
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Pass
from vitq_compiler.runtime import probe

RMS_OPSET = 23  # that brought RMSNormalization
SHAPED = frozenset({"FusedMatMul", "Attention", "MultiHeadAttention"})  # need the shapes of their inputs


@dataclass(frozen=True)
class UnfuseContribOps(Pass):
    """com.microsoft.Attention, SkipLayerNormalization, BiasGelu, ... -> standard operators"""

    name = "unfuse-contrib-ops"
    exact = True

    def run(self, c: Compilation) -> int:
        nodes = [n for n in c.graph.nodes if (n.domain == DOMAIN and n.op in UNFUSE) or (n.domain != DOMAIN and n.op == "Attention")]
        shapes = _shapes(c, [t.name for n in nodes if n.op in SHAPED for t in n.inputs if t.name and not is_constant(t)])
        for node in nodes:
            try:
                if node.domain == DOMAIN:
                    unfuse(c.graph, node, shapes)
                else:
                    decompose(c.graph, node)
            except MatchFailure as failure:
                what = f"operator {node.domain or 'ai.onnx'}.{node.op} (node {node.name})"
                raise ModelError(
                    f"{what} is fused and cannot be taken apart: {failure.reason}; "
                    "give the model as it was before an optimizer, or export with an older opset"
                ) from None
        if c.graph.find("RMSNormalization"):
            raise_opset(c.graph, RMS_OPSET)
        c.graph.clean()
        return len(nodes)


def _shapes(c: Compilation, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors, which ONNX shape inference does not find behind fused operators."""
    known = {name: tuple(c.graph.tensor(name).shape or ()) for name in names}
    open_names = [n for n, shape in known.items() if not shape or not isinstance(shape[-1], int)]
    if open_names:
        values = probe(c.graph, open_names, [c.probes[0].feed(c.graph.inputs)], threads=c.threads)[0]
        known.update({name: values[name].shape for name in open_names})
        for name in open_names:
            c.graph.tensor(name).shape = _closed_sizes(known[name])
    return known


def _closed_sizes(observed: tuple[int, ...]) -> list[int | None]:
    """Of a shape that was observed what cannot depend on the input: features, and the heads between batch and tokens."""
    return [size if axis == len(observed) - 1 or (axis == 1 and len(observed) == 4) else None for axis, size in enumerate(observed)]
