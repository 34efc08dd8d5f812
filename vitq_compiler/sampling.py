"""Samples of activations: rows of what Linear layers read, whole matrices of what attention products read.

One sweep over the calibration data, reduced inside ONNX Runtime to the same few tokens of every image, so that neither
memory nor the cost of a search grows with the model's resolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.graph import Graph, Tensor
from vitq_compiler.progress import Progress
from vitq_compiler.runtime import Feed, run, sample_count, session, some_samples

Samples = NDArray[np.floating[Any]]


def sample_rows(
    graph: Graph, names: Sequence[str], batches: Iterable[Feed], total: int, *, rows: int, threads: int, progress: Progress, seed: int = 0
) -> dict[str, Samples]:
    """About ``rows`` vectors of each tensor, taken from all batches, [rows, channels] with channels on the last axis.

    Args:
        graph: the float graph; not changed.
        names: tensors of at least two axes.
        batches: inputs by name.
        total: number of samples to come.
        rows: how many vectors to keep at most.
        threads: as in `runtime.session`.
        progress: told after every batch.
        seed: of the choice of tokens.
    """
    copy = graph.snapshot()
    random = np.random.default_rng(seed)
    outputs = [_some_tokens(copy, copy.tensor(name), -(-rows // max(total, 1)), random) for name in names]
    found: dict[str, list[Samples]] = {name: [] for name in names}
    for results in _sweep(copy, outputs, batches, total, threads, progress):
        for name, array in zip(names, results, strict=True):
            found[name].append(array.reshape(-1, array.shape[-1]))
    return {name: _thin(np.concatenate(parts), rows, random) for name, parts in found.items()}


def sample_matrices(
    graph: Graph, names: Sequence[str], batches: Iterable[Feed], total: int, *, images: int, threads: int, progress: Progress
) -> dict[str, Samples]:
    """Whole entries of the first axis of each tensor, at most ``images``, the first ones of samples spread over all; see `sample_rows`.

    However samples are divided into batches, these are the same; only a model that fixes its batch gives entries of whole batches.
    """
    copy = graph.snapshot()
    each = max(1, -(-images // max(total, 1)))
    wanted = {number * total // images for number in range(images)}
    outputs = []
    for name in names:
        tensor = copy.tensor(name)
        ends = [copy.constant(f"{name}/{end}", np.array([number], np.int64)) for end, number in (("first", 0), ("last", each), ("axis", 0))]
        outputs.append(copy.insert("Slice", [tensor, *ends], name=f"{name}/some", like=tensor))
        outputs[-1].shape = None
    found: dict[str, list[Samples]] = {name: [] for name in names}
    for results in _sweep(copy, outputs, _picked(graph, batches, wanted), len(wanted), threads, progress):
        for name, array in zip(names, results, strict=True):
            found[name].append(array)
    return {name: np.concatenate(parts)[:images] for name, parts in found.items()}


def _picked(graph: Graph, batches: Iterable[Feed], wanted: set[int]) -> Iterator[Feed]:
    """The samples of these numbers, each alone; the batches that hold them where the model fixes its batch."""
    start = 0
    for feed in batches:
        count = sample_count(graph.inputs, feed)
        chosen = [number - start for number in sorted(wanted) if start <= number < start + count]
        start += count
        alone = [some_samples(graph.inputs, feed, number, number + 1) for number in chosen]
        yield from alone[:1] if alone and alone[0] is feed else alone


def _some_tokens(graph: Graph, tensor: Tensor, each: int, random: np.random.Generator) -> Tensor:
    """A few entries of the second to last axis, the same for all images."""
    tokens = tensor.shape[-2] if len(tensor.shape or ()) > 2 else None
    if not isinstance(tokens, int) or tokens <= each:
        return tensor
    chosen = graph.constant(f"{tensor.name}/tokens", np.sort(random.choice(tokens, each, replace=False)).astype(np.int64))
    result = graph.insert("Gather", [tensor, chosen], name=f"{tensor.name}/some", like=tensor, axis=len(tensor.shape) - 2)
    result.shape = [*tensor.shape[:-2], each, tensor.shape[-1]]
    return result


def _sweep(
    graph: Graph, outputs: Sequence[Tensor], batches: Iterable[Feed], total: int, threads: int, progress: Progress
) -> Iterable[list[NDArray[Any]]]:
    for tensor in outputs:
        tensor.dtype = np.dtype(np.float32)
    graph.set_outputs(outputs)
    runtime = session(graph, threads=threads)
    done = 0
    for feed in batches:
        yield run(runtime, feed, [t.name for t in outputs])
        done += sample_count(graph.inputs, feed)
        progress("sampling", min(done, total), total)


def _thin(rows: Samples, count: int, random: np.random.Generator) -> Samples:
    return rows if len(rows) <= count else rows[np.sort(random.choice(len(rows), count, replace=False))]
