"""Attention whose operands are more than views of Linear layers: pooled, normalized, of another token count, cut into windows.

    softmax(f(q) g(k)^T + bias) h(v) W      q, k, v from Linear layers; f, g, h channelwise; W the projection

DINOv3 and EVA-02 rotate q and k by their positions, others normalize them, SigLIP learns q, CaiT mixes scores and probabilities
over heads by small Linear layers, EVA-02 normalizes before W. Swin v2 divides q and k by their lengths, Hiera and MViT pool them,
XCiT attends over channels, SAM adds products of q to the scores, LeViT has an activation before W. All of them keep their Linear
layers apart from other blocks, so the operands are followed upwards, and the result downwards, until a Linear is met. Passes that
must know where every feature goes use `blocks.attention.Attention`; here only roles are known.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.blocks.attention import Values, match_values
from vitq_compiler.blocks.linear import Linear, is_depthwise
from vitq_compiler.blocks.normalization import NORMS
from vitq_compiler.graph import Node, Tensor, is_constant, producer, readers
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.views import VIEWS

ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Reciprocal", "Exp", "Clip", "Max", "Min", "Where", "Cast"})
LAYOUT = VIEWS | frozenset({"Concat", "Expand", "Pad", "Tile", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMax"})
REDUCTIONS = frozenset({"ReduceL2", "ReduceSum", "ReduceSumSquare", "ReduceMean"})
PRODUCTS = frozenset({"MatMul", "Einsum"})
KINDS = (  # operations between the Linear layers and the scores, and what they say
    (frozenset({"Neg"}), "queries and keys are rotated by their positions"),
    (REDUCTIONS - {"ReduceMean"}, "queries and keys are divided by their lengths"),
    (NORMS, "queries and keys are normalized"),
)
ACTIVATIONS = frozenset({"Relu", "HardSwish", "HardSigmoid", "Gelu", "Sigmoid", "Swish"})


@dataclass(eq=False)
class ComputedAttention:
    """One attention block of which the parts are known, but not how operands lie in their Linear layers.

    Attributes:
        softmax: the Softmax node.
        linears: the distinct Linear layers that queries, keys and values are computed from.
        proj: the Linear that reads the result.
        reason: what keeps it from being an `Attention`, in general where that is known and in particular.
        mixers: Linear layers over heads, on scores or probabilities.
        values: the half behind the softmax where that is plain, or why it is not.
        index: position among all attention blocks of the graph.
    """

    softmax: Node
    linears: list[Linear]
    proj: Linear
    reason: str
    mixers: list[Linear]
    values: Values | MatchFailure
    index: int = 0


def match_computed_attention(softmax: Node, linears: list[Linear], reason: str) -> ComputedAttention:
    """The attention block around ``softmax``, which is no `Attention` for ``reason``.

    Raises:
        MatchFailure: no block is found; its reason is then ``reason``.
    """
    heads = list(softmax.outputs[0].shape or [])[1:2]
    mixers = {id(linear.matmul): linear for linear in linears if [linear.in_features] == [linear.out_features] == heads}
    by_output = {id(linear.output): linear for linear in linears if id(linear.matmul) not in mixers}
    context = _context(softmax, mixers)
    if context is None:
        raise MatchFailure(reason, softmax.name)
    values = next((t for t in context.inputs if not _comes_from(t, softmax, mixers)), None)
    scores, before = _sources(softmax.inputs[0], by_output, mixers, products=1)
    found = [*scores, *(_sources(values, by_output, {}, products=0)[0] if values is not None else [])]
    behind = _sources(next(t for t in context.inputs if t is not values), {}, mixers, products=0)[1]
    proj = _projection(context, {id(linear.matmul): linear for linear in linears})
    if not scores or len(found) == len(scores) or proj is None or any(linear is proj for linear in found):
        raise MatchFailure(reason, softmax.name)
    distinct = [list({id(linear): linear for linear in group}.values()) for group in (found, [*before, *behind])]
    ops = _ops_before(softmax, {id(linear.output) for linear in scores})
    kind = next((f"{text}; " for known, text in KINDS if known & ops), "")
    return ComputedAttention(softmax, distinct[0], proj, kind + reason, distinct[1], _values(softmax, linears))


def _values(softmax: Node, linears: list[Linear]) -> Values | MatchFailure:
    try:
        return match_values(softmax, linears)
    except MatchFailure as failure:
        return failure


def _ops_before(softmax: Node, ends: set[int]) -> set[str]:
    """Everything between the Linear layers that give the outputs ``ends`` and ``softmax``."""
    ops: set[str] = set()
    seen: set[int] = set()
    stack = [softmax.inputs[0]]
    while stack:
        tensor = stack.pop()
        node = producer(tensor)
        if node is None or id(node) in seen or id(tensor) in ends:
            continue
        seen.add(id(node))
        ops.add(node.op)
        stack.extend(t for t in node.inputs if not is_constant(t))
    return ops


def _context(softmax: Node, mixers: dict[int, Linear]) -> Node | None:
    """The product of the probabilities and the values."""
    stack = readers(softmax.outputs[0])
    while stack:
        node = stack.pop()
        if node.op in PRODUCTS and not any(is_constant(t) for t in node.inputs):
            return node
        if node.op in VIEWS | ELEMENTWISE or id(node) in mixers:
            stack.extend(reader for t in node.outputs for reader in readers(t))
    return None


def _comes_from(tensor: Tensor, softmax: Node, mixers: dict[int, Linear]) -> bool:
    node = producer(tensor)
    while node is not None and node is not softmax and (node.op in VIEWS | ELEMENTWISE or id(node) in mixers):
        node = producer(next((t for t in node.inputs if not is_constant(t)), node.inputs[0]))
    return node is softmax


def _sources(tensor: Tensor, by_output: dict[int, Linear], mixers: dict[int, Linear], products: int) -> tuple[list[Linear], list[Linear]]:
    """The Linear layers that ``tensor`` is computed from, through at most so many products; and the mixers on the way.

    Behind a normalization only layout may lie: a sum there would be the residual stream, which leads to other blocks.
    """
    found: dict[int, Linear] = {}
    passed: dict[int, Linear] = {}
    seen: set[tuple[int, int, bool]] = set()
    stack = [(tensor, products, False)]
    while stack:
        current, left, normed = stack.pop()
        node = producer(current)
        if (id(current), left, normed) in seen or node is None:
            continue
        seen.add((id(current), left, normed))
        if (linear := by_output.get(id(current))) is not None:
            found[id(linear)] = linear
            continue
        if (mixer := mixers.get(id(node))) is not None:
            passed[id(node)] = mixer
        elif node.op in PRODUCTS:
            if not left:
                continue
            left -= 1
        elif node.op in NORMS:
            normed = True
        elif not (node.op in LAYOUT or is_depthwise(node) or (node.op in ELEMENTWISE | REDUCTIONS and not normed)):
            continue
        stack.extend((t, left, normed) for t in node.inputs if not is_constant(t))
    return list(found.values()), list(passed.values())


def _projection(context: Node, by_matmul: dict[int, Linear]) -> Linear | None:
    """The one Linear that reads the result, if there is one.

    Behind a sum of two activations no normalization may lie: such a sum would be the residual stream.
    """
    found: dict[int, Linear] = {}
    seen: set[tuple[int, bool]] = set()
    stack = [(reader, False) for t in context.outputs for reader in readers(t)]
    while stack:
        node, summed = stack.pop()
        if (id(node), summed) in seen:
            continue
        seen.add((id(node), summed))
        if (linear := by_matmul.get(id(node))) is not None:
            found[id(linear)] = linear
            continue
        if node.op == "Add" and not any(is_constant(t) for t in node.inputs):
            summed = True
        elif not (node.op in VIEWS | ELEMENTWISE | ACTIVATIONS or node.op == "Concat" or (node.op in NORMS and not summed)):
            continue
        stack.extend((reader, summed) for t in node.outputs for reader in readers(t))
    return next(iter(found.values())) if len(found) == 1 else None
