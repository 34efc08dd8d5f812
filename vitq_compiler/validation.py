"""ONNX Runtime's verdict on the integer graph: accuracy against float, speed, and which kernels really ran."""

from __future__ import annotations

import time
from collections.abc import Iterable
from math import nan

import numpy as np
import onnx
import onnxruntime as ort

from vitq_compiler import metrics
from vitq_compiler.graph import Array, Graph
from vitq_compiler.progress import Progress
from vitq_compiler.quant import Edge
from vitq_compiler.report import BlockRow, LatencyRow, OutputRow
from vitq_compiler.runtime import Feed, narrowed, run, session

ROUNDS = 15
SECONDS_PER_SETTING = 0.35  # timing stops after this, with at least three rounds


def compare_outputs(
    floating: ort.InferenceSession,
    integer: ort.InferenceSession,
    batches: Iterable[Feed],
    total: int,
    classes: frozenset[str],
    progress: Progress,
) -> tuple[OutputRow, ...]:
    """Every output of two sessions on the same batches; ``classes`` names those of which the largest entry is a decision."""
    names = [o.name for o in floating.get_outputs()]
    pairs: list[tuple[list[Array], list[Array]]] = []
    done = 0
    for feed in batches:
        pairs.append((run(floating, feed, names), run(integer, feed, names)))
        done += len(next(iter(feed.values())))
        progress("validating", done, total)
    rows = []
    for index, name in enumerate(names):
        reference, other = (np.concatenate([np.atleast_1d(p[side][index]) for p in pairs]) for side in (0, 1))
        decides = name in classes or reference.dtype.kind in "iu"
        numbers = (metrics.sqnr(reference, other), metrics.cosine(reference, other)) if reference.dtype.kind == "f" else (nan, nan)
        rows.append(OutputRow(name, *numbers, metrics.agreement(reference, other) if decides else None))
    return tuple(rows)


def compare_blocks(floating: Graph, integer: Graph, edges: dict[str, Edge], feed: Feed, threads: int) -> tuple[BlockRow, ...]:
    """SQNR of what each block adds to the residual stream.

    Args:
        floating: the graph before quantization.
        integer: the graph after.
        edges: block name -> the edge that carries its result; left out where lowering has replaced its node.
        feed: one batch.
        threads: as in `runtime.session`.
    """
    names = [{n.name for n in graph.nodes} for graph in (floating, integer)]
    edges = {block: edge for block, edge in edges.items() if all(edge.node in known for known in names)}
    if not edges:
        return ()
    values = []
    for graph, brief in ((floating, True), (integer, False)):  # integer kernels come from the optimizer
        copy = graph.snapshot()
        nodes = {n.name: n for n in copy.nodes}
        tensors = [nodes[e.node].inputs[e.index] for e in edges.values()]
        for tensor in tensors:
            tensor.dtype = tensor.dtype or np.dtype(np.float32)
        copy.set_outputs(tensors)
        values.append(run(session(copy, threads=threads, brief=brief), feed, [t.name for t in tensors]))
    # a target may have flattened the tokens, or narrowed the type
    return tuple(BlockRow(name, metrics.sqnr(a, b.reshape(a.shape).astype(a.dtype))) for name, a, b in zip(edges, *values, strict=True))


def time_pair(floating: ort.InferenceSession, integer: ort.InferenceSession, feed: Feed, threads: int) -> LatencyRow:
    """Median latency of both, in turn A B B A, and the median of the paired ratios."""
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
    return LatencyRow(
        threads, len(next(iter(feed.values()))), float(np.median(a) * 1e3), float(np.median(b) * 1e3), float(np.median(b / a))
    )


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
