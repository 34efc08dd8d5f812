"""What counts as the error d of a block's result: all of its values alike, or as much as the network's answer minds them.

    mse        mean d^2, in parts of the energy of the result
    fisher     mean w d^2            w = diag F: BRECQ (arXiv 2102.05426)
    hessian    mean w d^2            w = |F 1|, averaged over samples, by differences of gradients: APHQ-ViT (arXiv 2504.02508)
    low-rank   mean w d^2 + mean_k (g_k . d)^2 / n           n the size of d: FIMA-Q (arXiv 2506.11543)

F = J^T (diag p - p p^T) J is the Fisher matrix of the answer p = softmax(z): to second order d moves the answer by a divergence of
d^T F d / 2, where J is the slope of the logits z with the block's result. It is sampled by `probes`: with r of independent standard
normal numbers,

    g = J^T (sqrt(p) r - p (sqrt(p) . r)),      E[g g^T] = F

so neither labels nor the matrix are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vitq_compiler.torch_graph import Tensor, require_torch

PROBES = 8  # samples of F; also the rank of low-rank
NUDGE = 0.01  # of a value, in standard deviations, for differences of gradients
METRICS = ("mse", "fisher", "hessian", "low-rank")
Suffix = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # what is added to each of the blocks' results -> logits [..., classes]


def error(metric: str, difference: Tensor, weights: Tensor) -> Tensor:
    """The error ``difference`` [samples, ...] of one result by ``metric``, with what `weigh` gave for it."""
    if metric == "mse":
        return difference.square().mean() / weights
    if metric != "low-rank":
        return (weights * difference.square()).mean()
    along = (weights * difference).flatten(2).sum(2)  # [probes, samples]
    return (weights.square().mean(0) * difference.square()).mean() + along.square().mean() / difference[0].numel()


def weigh(metric: str, suffix: Suffix, results: Sequence[Tensor], seed: int) -> list[Tensor]:
    """What `error` needs to know of each of ``results`` under a metric other than mse."""
    if metric == "hessian":
        return [_curvature(suffix, results, number) for number in range(len(results))]
    sampled = probes(suffix, results, seed)
    return sampled if metric == "low-rank" else [g.square().mean(0) for g in sampled]


def probes(suffix: Suffix, results: Sequence[Tensor], seed: int, count: int = PROBES) -> list[Tensor]:
    """Samples g of the Fisher matrix with each of ``results``, [count, *its shape]."""
    torch = require_torch("a loss")
    nudges = [torch.zeros_like(x, requires_grad=True) for x in results]
    heads = suffix(nudges)
    generator = torch.Generator(heads[0].device).manual_seed(seed)
    found = []
    for number in range(count):
        along = sum((z * _sample(z.detach().softmax(-1), generator)).sum() for z in heads)
        found.append(torch.autograd.grad(along, nudges, retain_graph=number + 1 < count))
    return [torch.stack(of_one) for of_one in zip(*found, strict=True)]


def _sample(p: Tensor, generator: object) -> Tensor:
    """A random vector with the covariance diag p - p p^T, for each p along the last axis."""
    torch = require_torch("a loss")
    spread = p.sqrt() * torch.randn(p.shape, generator=generator, device=p.device)
    return spread - p * spread.sum(-1, keepdim=True)


def divergence(heads: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean Kullback-Leibler divergence of softmax(``heads``) from softmax(``wanted``) over the last axis, summed over heads."""
    return sum(((t := w.log_softmax(-1)).exp() * (t - z.log_softmax(-1))).sum(-1).mean() for z, w in zip(heads, wanted, strict=True))


def _curvature(suffix: Suffix, results: Sequence[Tensor], which: int) -> Tensor:
    """|F 1| of one result, averaged over samples: how the gradient changes along the vector of ones."""
    torch = require_torch("a loss")
    step = NUDGE * float(results[which].std())
    zeros = [torch.zeros_like(x) for x in results]
    with torch.no_grad():
        wanted = suffix(zeros)
    slopes = []
    for sign in (1, -1):
        nudge = torch.full_like(results[which], sign * step).requires_grad_()
        heads = suffix([nudge if i == which else zero for i, zero in enumerate(zeros)])
        slopes.append(torch.autograd.grad(divergence(heads, wanted) * len(nudge), nudge)[0])
    return ((slopes[0] - slopes[1]) / (2 * step)).mean(0, keepdim=True).abs()
