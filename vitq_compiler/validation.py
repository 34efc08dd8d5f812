"""ONNX Runtime's verdict on the integer graph: accuracy against float, speed, and which kernels really ran."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import nan

import numpy as np
import onnx
import onnxruntime as ort

from vitq_compiler import metrics
from vitq_compiler.graph import Array, Graph
from vitq_compiler.quant import Edge
from vitq_compiler.report import BlockRow, LatencyRow, OutputRow
from vitq_compiler.runtime import Feed, narrowed, run, session

ROUNDS = 15
SECONDS_PER_SETTING = 0.35  # timing stops after this, with at least three rounds


def outputs(
    runtime: ort.InferenceSession, batches: Iterable[Feed], progress: Callable[[Feed], None] | None = None
) -> Iterator[list[Array]]:
    """All outputs, batch by batch, each when it is asked for; ``progress`` is told what has been run."""
    for feed in batches:
        yield run(runtime, feed)
        if progress is not None:
            progress(feed)


def compare_outputs(
    names: Sequence[str], floating: Iterable[list[Array]], integer: Iterable[list[Array]], classes: frozenset[str], *, batched: bool = True
) -> tuple[OutputRow, ...]:
    """Every output of two sessions on the same batches.

    Args:
        names: the outputs.
        floating: their values, batch by batch.
        integer: likewise.
        classes: names those of which the largest entry is a decision.
        batched: whether outputs have a batch axis; else each is that of one sample.
    """
    pairs = list(zip(floating, integer, strict=True))
    rows = []
    for index, name in enumerate(names):
        reference, other = (_together([p[side][index] for p in pairs], batched) for side in (0, 1))
        decides = name in classes or reference.dtype.kind in "iu"
        numbers = (metrics.sqnr(reference, other), metrics.cosine(reference, other)) if reference.dtype.kind == "f" else (nan, nan)
        agreement = metrics.agreement(reference, other) if decides else None
        rows.append(OutputRow(name, *numbers, agreement, varies=metrics.varies(reference)))
    return tuple(rows)


def _together(parts: Sequence[Array], batched: bool) -> Array:
    """One output on all batches; of samples without a batch axis a row of each, or all in one where their sizes differ."""
    if batched:
        return np.concatenate([np.atleast_1d(part) for part in parts])
    flat = [part.reshape(-1) for part in parts]
    return np.stack(flat) if len({part.size for part in parts}) == 1 else np.concatenate(flat)


def probe_blocks(graph: Graph, edges: Mapping[str, Edge], feed: Feed, threads: int, *, brief: bool) -> dict[str, tuple[Edge, Array]]:
    """What each block adds to the residual stream, and the edge that carries it.

    Args:
        graph: before or after quantization.
        edges: block name -> edge; left out where the graph has no such node.
        feed: one batch.
        threads: as in `runtime.session`.
        brief: likewise.
    """
    copy = graph.snapshot()
    nodes = {n.name: n for n in copy.nodes}
    edges = {block: edge for block, edge in edges.items() if edge.node in nodes}
    if not edges:
        return {}
    tensors = [nodes[e.node].inputs[e.index] for e in edges.values()]
    for tensor in tensors:
        tensor.dtype = tensor.dtype or np.dtype(np.float32)
    copy.set_outputs(tensors)
    values = run(session(copy, threads=threads, brief=brief), feed, [t.name for t in tensors])
    return {block: (edge, array) for (block, edge), array in zip(edges.items(), values, strict=True)}


def compare_blocks(floating: Mapping[str, tuple[Edge, Array]], integer: Graph, feed: Feed, threads: int) -> tuple[BlockRow, ...]:
    """SQNR of what each block adds to the residual stream; blocks are left out where lowering has replaced the reading node.

    Args:
        floating: of the graph before quantization, see `probe_blocks`.
        integer: the graph after.
        feed: the same batch.
        threads: as in `runtime.session`.
    """
    # integer kernels come from the optimizer
    found = probe_blocks(integer, {block: edge for block, (edge, _) in floating.items()}, feed, threads, brief=False)
    rows = []
    for block, (_, b) in found.items():
        a = floating[block][1]
        rows.append(BlockRow(block, metrics.sqnr(a, b.reshape(a.shape).astype(a.dtype))))  # a target may have flattened or narrowed it
    return tuple(rows)


def time_pair(floating: ort.InferenceSession, integer: ort.InferenceSession, feed: Feed, threads: int, batch: int) -> LatencyRow:
    """Median latency of both on a feed of ``batch`` samples, in turn A B B A, and the median of the paired ratios."""
    rounds: list[tuple[float, float]] = []
    feeds = {id(runtime): narrowed(runtime, feed) for runtime in (floating, integer)}
    for runtime in (floating, integer):
        run(runtime, feeds[id(runtime)])
    began = time.perf_counter()
    while len(rounds) < ROUNDS and (len(rounds) < 3 or time.perf_counter() - began < SECONDS_PER_SETTING):
        order = (floating, integer) if len(rounds) % 2 == 0 else (integer, floating)
        seconds = {}
        for runtime in order:
            start = time.perf_counter()
            run(runtime, feeds[id(runtime)])
            seconds[id(runtime)] = time.perf_counter() - start
        rounds.append((seconds[id(floating)], seconds[id(integer)]))
    a, b = np.array(rounds).T
    return LatencyRow(threads, batch, float(np.median(a) * 1e3), float(np.median(b) * 1e3), float(np.median(b / a)))


def time_alone(runtime: ort.InferenceSession, feed: Feed) -> float:
    """Median latency in ms of a session that cannot be in memory beside the one it is compared with."""
    feed = narrowed(runtime, feed)
    run(runtime, feed)
    seconds: list[float] = []
    while len(seconds) < ROUNDS and (len(seconds) < 3 or sum(seconds) < SECONDS_PER_SETTING):
        start = time.perf_counter()
        run(runtime, feed)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds) * 1e3)


def kernels(optimized: onnx.ModelProto) -> dict[str, str]:
    """Weight tensor -> op type of its reader in the runtime's optimized graph, through shape operations and DequantizeLinear."""
    found: dict[str, str] = {}
    source = {t.name: t.name for t in optimized.graph.initializer}
    for node in optimized.graph.node:
        for index, name in enumerate(node.input):
            if name in source:
                if index == 0 and node.op_type in ("DequantizeLinear", "Transpose", "Reshape", "Cast"):
                    source[node.output[0]] = source[name]
                else:
                    found.setdefault(source[name], node.op_type)
    return found
