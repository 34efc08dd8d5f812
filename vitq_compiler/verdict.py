"""Both graphs, finished, in ONNX Runtime: on samples that calibration did not see, block by block, and against the clock."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime as ort

from vitq_compiler import runtime, saturation, validation
from vitq_compiler.blocks.ordering import sorted_outputs
from vitq_compiler.graph import LARGE_MODEL, Array, Graph, Node, proto_bytes
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge
from vitq_compiler.report import LatencyRow, LinearRow, OutputRow, Validation
from vitq_compiler.verify import Parity

Batches = Callable[[], Iterator[runtime.Feed]]
Measured = tuple[tuple[OutputRow, ...], tuple[LatencyRow, ...], dict[str, str]]


def validate(
    floating: Path | Graph, float_bytes: int, integer: onnx.ModelProto, c: Compilation, parity: Parity
) -> tuple[Validation, dict[str, str]]:
    """Run both graphs.

    Args:
        floating: what the integer graph is held against.
        float_bytes: the size of its file.
        integer: the compiled graph.
        c: the compilation it comes from; warnings are added to it.
        parity: knows what the blocks gave out in float, and on which batch.

    Returns:
        The runtime's verdict, and weight tensor -> op type of the kernel that reads it.
    """
    blocks = validation.compare_blocks(parity.blocks, c.runnable or c.graph, parity.feed, c.threads)
    unseen, count = c.data.validation, c.data.validation_count
    if not count:
        unseen, count = c.data.calibration, c.data.calibration_count
        c.warnings.append("too few samples to keep any back: the accuracy figures are on the calibration samples themselves and flatter")
    if unstable := sorted_outputs(c.graph):
        sorting = ", ".join(dict.fromkeys(unstable.values()))
        c.warnings.append(
            f"{', '.join(unstable)}: sorted by score (node {sorting}), and that order is unstable: entries of nearly equal scores change "
            "places, and the figures then compare unlike ones; judge by what is made of these outputs"
        )
    one = runtime.first_samples(c.graph.inputs, parity.feed, 1)
    every = c.threads or os.cpu_count() or 1
    settings = sorted({every, 1}, reverse=True) if c.target.runs_here else [every]
    measure = _measure_in_turn if float_bytes > LARGE_MODEL else _measure_side_by_side
    outputs, latency, kernel_of = measure(floating, integer, c, unseen, count, one, settings)
    if c.target.may_saturate and saturation.saturates(c.graph):
        outputs = _on_both_kinds_of_cpu(floating, c, unseen)
    if count > 1 and not any(row.varies for row in outputs):
        c.warnings.append(
            f"the float model gives the same for all {count} samples that it was validated on: on such data its layers show no ranges, and "
            "the figures mean nothing; check the calibration data and the preprocessing"
        )
    if not c.target.runs_here:
        kernel_of = c.target.kernels(c.graph)
    c.progress("timing", 2, 2)
    return Validation(f"onnxruntime {ort.__version__}", outputs, blocks, latency, float_bytes, proto_bytes(integer)), kernel_of


def _on_both_kinds_of_cpu(floating: Path | Graph, c: Compilation, unseen: Batches) -> tuple[OutputRow, ...]:
    """The accuracy where products of codes are exact, with the SQNR where they saturate beside it."""

    def compare(graph: Graph) -> tuple[OutputRow, ...]:
        a, b = tee(unseen())
        sessions = runtime.session(floating, threads=c.threads), runtime.session(graph, threads=c.threads)
        return _compare(c, validation.outputs(sessions[0], a), validation.outputs(sessions[1], b))

    exact, cut_off = compare(c.graph), compare(saturation.saturated(c.graph))
    return tuple(replace(row, saturated_db=other.sqnr_db) for row, other in zip(exact, cut_off, strict=True))


def _measure_side_by_side(
    floating: Path | Graph, integer: onnx.ModelProto, c: Compilation, unseen: Batches, count: int, one: runtime.Feed, settings: list[int]
) -> Measured:
    """Both sessions at once, so that whatever else the computer does slows both down."""
    outputs: tuple[OutputRow, ...] = ()
    latency: list[LatencyRow] = []
    kernel_of: dict[str, str] = {}
    runnable = c.runnable.to_proto() if c.runnable is not None else integer
    for index, threads in enumerate(settings):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            pair = (
                runtime.session(floating, threads=threads, as_deployed=c.target.runs_here),
                runtime.session(runnable, threads=threads, as_deployed=c.target.runs_here, optimized_path=path),
            )
            if index == 0:
                kernel_of = validation.kernels(onnx.load(path, load_external_data=False))
                a, b = tee(unseen())
                judged = pair[1] if c.providers == runtime.CPU else runtime.session(integer, threads=threads, providers=c.providers)
                outputs = _compare(c, validation.outputs(pair[0], a), validation.outputs(judged, b, _advance(c, count)))
        if c.target.runs_here:
            c.progress("timing", index, 2)
            latency.insert(0, validation.time_pair(*pair, one, threads, runtime.sample_count(c.graph.inputs, one)))
        del pair
    return outputs, tuple(latency), kernel_of


def _measure_in_turn(
    floating: Path | Graph, integer: onnx.ModelProto, c: Compilation, unseen: Batches, count: int, one: runtime.Feed, settings: list[int]
) -> Measured:
    """One session after the other, which a large model leaves no memory for otherwise."""
    c.warnings.append("the model is large: both graphs were timed one after the other, not in turn, so the ratio is less certain")
    references: list[list[Array]] = []
    rows: tuple[OutputRow, ...] = ()
    milliseconds: list[list[float]] = []
    kernel_of: dict[str, str] = {}
    for index, threads in enumerate(settings):
        session = runtime.session(floating, threads=threads, as_deployed=True)
        if index == 0:
            references = list(validation.outputs(session, unseen()))
        milliseconds.append([validation.time_alone(session, one)] if c.target.runs_here else [])
        del session
        runtime.release_memory()
    for index, threads in enumerate(settings):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            session = runtime.session(c.runnable or c.graph, threads=threads, as_deployed=c.target.runs_here, optimized_path=path)
            if index == 0:
                kernel_of = validation.kernels(onnx.load(path, load_external_data=False))
                if c.providers != runtime.CPU:
                    session = runtime.session(c.graph, threads=threads, providers=c.providers)
                rows = _compare(c, references, validation.outputs(session, unseen(), _advance(c, count)))
        if c.target.runs_here:
            c.progress("timing", index, 2)
            milliseconds[index].append(validation.time_alone(session, one))
        del session
        runtime.release_memory()
    batch = runtime.sample_count(c.graph.inputs, one)
    latency = (
        [LatencyRow(threads, batch, a, b, b / a) for threads, (a, b) in zip(settings, milliseconds, strict=True)] if milliseconds[0] else []
    )
    return rows, tuple(reversed(latency)), kernel_of


def _compare(c: Compilation, floating: Iterable[list[Array]], integer: Iterable[list[Array]]) -> tuple[OutputRow, ...]:
    batched = any(spec.batched for spec in c.graph.inputs)
    return validation.compare_outputs(c.graph.output_names, floating, integer, c.annotations.class_outputs, batched=batched)


def _advance(c: Compilation, total: int) -> Callable[[runtime.Feed], None]:
    """Counts the samples that have been run."""
    done = 0

    def advance(feed: runtime.Feed) -> None:
        nonlocal done
        done += runtime.sample_count(c.graph.inputs, feed)
        c.progress("validating", done, total)

    return advance


def linear_rows(c: Compilation, kernel_of: dict[str, str]) -> tuple[LinearRow, ...]:
    """What became of every Linear layer of the model as given; ``kernel_of`` is that of `validate`.

    One that passes took apart is quantized, and integer, where all its parts are; not counted are products that they put beside it.
    """
    products: dict[str, list[tuple[str, Node]]] = {layer.name: [] for layer in c.annotations.layers}
    for linear in c.annotations.linears:
        for name in linear.layers if not linear.aside else ():
            products[name].append((linear.name, linear.matmul))
    for node in c.annotations.patch_embeddings:
        products[node.name].append((node.name, node))
    reasons = {note.where: note.reason for note in c.notes}
    rows = []
    for layer in c.annotations.layers:
        parts = [_part(c, name, node, kernel_of, reasons) for name, node in products[layer.name]]
        state = _Part(
            all(part.quantized for part in parts),
            ", ".join(dict.fromkeys(part.kernel for part in parts if part.kernel)),
            all(part.integer for part in parts),
            next((part.reason for part in parts if part.reason), ""),
        )
        rows.append(LinearRow(**asdict(layer), **state._asdict(), parts=tuple(name for name, _ in products[layer.name])))
    return tuple(rows)


class _Part(NamedTuple):
    quantized: bool
    kernel: str
    integer: bool
    reason: str


def _part(c: Compilation, name: str, node: Node, kernel_of: dict[str, str], reasons: dict[str, str]) -> _Part:
    """What became of the product ``node``, called ``name``; lowering has replaced it where its weight has codes."""
    codes = c.codes.get(Edge(name, 1))
    kernel = kernel_of.get(codes or node.inputs[1].name, "")
    integer = codes is not None and kernel in c.target.integer_kernels
    reason = "" if integer else reasons.get(name, "")
    if codes is not None and not integer:
        reason = f"the runtime computes it with {kernel or 'another operator'}"
    return _Part(codes is not None, kernel, integer, reason)
