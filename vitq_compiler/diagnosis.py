"""What makes a model hard to quantize, which exact rewrite cures it, and where the error of a recipe comes from.

The float graph is run on a few calibration samples before and after each rewrite. Limits are those above which published
methods see a reason to act; they are rules of thumb and judge nothing: a compile measures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitq_compiler import outliers, runtime
from vitq_compiler.blocks.attention import OPERANDS
from vitq_compiler.catalog import find_pass, load_target
from vitq_compiler.errors import InvariantError, ModelError, VitqError
from vitq_compiler.graph import Array, Node, Tensor, is_constant, producer
from vitq_compiler.model_source import ModelSource, find_model
from vitq_compiler.opening import open_model, open_samples, run_front
from vitq_compiler.pipeline import Compilation, Pipeline
from vitq_compiler.plots import Picture, Ranges
from vitq_compiler.probing import find_probes, first_run
from vitq_compiler.progress import Progress, silent
from vitq_compiler.recipe import load_recipe
from vitq_compiler.sensitivity import SensitivityRow, sensitivity
from vitq_compiler.verify import Parity
from vitq_compiler.views import VIEWS

SAMPLES = 16  # looked at
KURTOSIS, PEAK = 50.0, 30.0  # above: rotate
SPREAD = 10.0  # above: equalize channels
OFFSET = 1.0  # above: centre
REGISTER = 10.0  # a token this far above the median one is like a register: no channel method helps
IDLE = 0.95  # a head that puts this much on one key does nothing
EVENED = 0.95  # a rewrite is drawn where the channels waste less than this part of what they did
WORTH = 1.5  # a rewrite is recommended where it divides a measure above its limit by this

LIMITS = {"kurtosis": KURTOSIS, "peak": PEAK, "spread": SPREAD, "offset": OFFSET}
LABELS = {"kurtosis": "kurtosis", "peak": "max/rms", "spread": "spread of channel ranges", "offset": "offset of channels"}


@dataclass(frozen=True)
class Rewrite:
    """An exact rewrite: the passes after annotate that do it, and the measures it is meant to lower."""

    passes: str
    lowers: tuple[str, ...]


REWRITES: Mapping[str, Rewrite] = {
    "rotate-residual": Rewrite("rotate-residual", ("kurtosis", "peak", "spread")),
    "rotate-heads": Rewrite("rotate-heads", ("kurtosis", "peak", "spread")),
    "center-keys": Rewrite("center-keys", ("offset",)),
    "center-values": Rewrite("center-values", ("offset",)),
    "equalize-heads": Rewrite("equalize-heads", ("spread",)),
    "equalize-values": Rewrite("calibrate,equalize-values", ("spread",)),
    "reparameterize-layernorm": Rewrite("calibrate,reparameterize-layernorm", ("spread", "offset")),
}


@dataclass(frozen=True)
class TensorRow:
    """One activation.

    Attributes:
        layer: the node that reads it.
        block: its block, such as ``mlp 3``; empty outside blocks.
        role: of the Linear that reads it; of `OPERANDS` for operands of attention products; ``stream`` before LayerNormalization.
        quantized: whether the recipe quantizes it.
        kurtosis, peak, spread, offset, tokens: see `outliers`; the last three are None for probabilities, whose channels are keys.
        idle_heads: of probabilities: heads with more than `IDLE` of `outliers.sink_mass`.
    """

    layer: str
    block: str
    role: str
    quantized: bool
    kurtosis: float
    peak: float
    spread: float | None = None
    offset: float | None = None
    tokens: float | None = None
    idle_heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Effect:
    """The largest value of a measure over all blocks, before and after a rewrite."""

    role: str
    measure: str
    before: float
    after: float


@dataclass(frozen=True)
class RewriteRow:
    """One rewrite: how much it changed, why it left something alone, and what the activations are like after it."""

    name: str
    passes: str
    changes: int
    reasons: tuple[str, ...]
    effects: tuple[Effect, ...]
    tensors: tuple[TensorRow, ...]


@dataclass(frozen=True)
class Diagnosis:
    """All that was found; ``sensitivity`` is empty unless asked for, ``pictures`` are for `plots.draw` and in no report."""

    model: str
    recipe: str
    bits: str
    data: str
    tensors: tuple[TensorRow, ...]
    rewrites: tuple[RewriteRow, ...]
    recommendations: tuple[str, ...]
    sensitivity: tuple[SensitivityRow, ...]
    warnings: tuple[str, ...]
    pictures: tuple[Picture, ...] = field(default=(), repr=False)

    def to_json(self) -> str:
        """Everything but the pictures, as text."""
        table = {name: item for name, item in asdict(replace(self, pictures=())).items() if name != "pictures"}
        return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


RangeTable = dict[tuple[str, str], Ranges]  # block and role -> ranges of its channels


@dataclass(frozen=True)
class _Place:
    """Where an activation is read; ``heads`` is 0 unless it is an operand of attention products."""

    node: str
    tensor: str
    block: str
    role: str
    quantized: bool
    heads: int = 0


def diagnose(
    model: ModelSource | Path | str,
    *,
    recipe: str = "w8a8",
    bits: str | None = None,
    definition: str | None = None,
    target: str = "onnxruntime",
    target_options: Mapping[str, Any] | None = None,
    attention: str | None = None,
    calibration: Path | None = None,
    samples: int | None = None,
    augment: int = 0,
    batch_size: int = 8,
    preprocess: str | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
    threads: int = 0,
    with_sensitivity: bool = False,
    progress: Progress = silent,
) -> Diagnosis:
    """Diagnose a model; options as of `compiler.compile`, and ``with_sensitivity``: quantize each role and block alone too.

    Raises:
        VitqError: the model cannot be compiled, or the data not be read; the message says why.
    """
    source = find_model(model)
    model = source.file
    plan = load_recipe(recipe).with_bits(bits).defined(definition).with_attention(attention).excluding(tuple(exclude))
    chosen = load_target(target, target_options)
    opened = open_model(model, chosen)
    graph = opened.graph
    data = open_samples(
        graph, model, plan, calibration, samples=samples, augment=augment, batch_size=batch_size, preprocess=preprocess, seed=seed
    )
    feeds = list(runtime.limited(graph.inputs, data.calibration(), SAMPLES))
    try:
        first = first_run(graph, graph, feeds[0], threads)
    except ModelError as error:
        raise ModelError(f"model {model}: {error}") from error
    c = Compilation(graph, plan, chosen, data, find_probes(graph, feeds[0], first.runner), threads=threads)
    run_front(c, model)
    before, ranges = measure(c, feeds)
    rewrites, narrowed = [], {}
    for index, name in enumerate(REWRITES):
        progress("diagnosing", index, len(REWRITES))
        row, narrowed[name] = _rewritten(c, name, feeds, before)
        rewrites.append(row)
    progress("diagnosing", len(REWRITES), len(REWRITES))
    return Diagnosis(
        model=source.name,
        recipe=plan.name,
        bits=plan.bits,
        data=data.description,
        tensors=before,
        rewrites=tuple(rewrites),
        recommendations=tuple(recommended(before, rewrites)),
        sensitivity=sensitivity(_copy(c), progress) if with_sensitivity else (),
        warnings=(*source.warnings, *opened.mended, *first.warnings, *data.warnings),
        pictures=tuple(_pictures(ranges, narrowed)),
    )


def measure(c: Compilation, feeds: Sequence[runtime.Feed]) -> tuple[tuple[TensorRow, ...], RangeTable]:
    """The activations of an annotated graph on some batches, in graph order, and the ranges of their channels."""
    places = _places(c)
    seen = runtime.probe(c.graph, [place.tensor for place in places], feeds, threads=c.threads)
    rows, ranges = [], {}
    for place in places:
        x = _by_channel(place, np.concatenate([values[place.tensor] for values in seen]))
        rows.append(_row(place, x))
        if place.role != "probs":
            ranges[place.block, place.role] = Ranges(x.min((0, 1)), x.max((0, 1)))
    return tuple(rows), ranges


def _by_channel(place: _Place, array: Array) -> Array:
    """As [samples, tokens, channels], the channels of all heads side by side; probabilities as [samples, heads, queries, keys]."""
    if not place.heads:
        return array.reshape(len(array), -1, array.shape[-1])
    array = array.reshape(-1, place.heads, *array.shape[-2:])  # heads may be counted into the batch
    if place.role == "probs":
        return array
    array = (array.swapaxes(2, 3) if place.role == "k" else array).swapaxes(1, 2)
    return array.reshape(*array.shape[:2], -1)


def _row(place: _Place, x: Array) -> TensorRow:
    where = (place.node, place.block, place.role, place.quantized)
    if place.role == "probs":
        idle = np.flatnonzero(outliers.sink_mass(x) > IDLE).tolist()
        return TensorRow(*where, outliers.kurtosis(x), outliers.peak(x), idle_heads=tuple(idle))
    numbers = (outliers.kurtosis(x), outliers.peak(x), outliers.channel_spread(x), outliers.channel_offset(x), outliers.token_spread(x))
    return TensorRow(*where, *numbers)


def _pictures(before: RangeTable, narrowed: Mapping[str, RangeTable]) -> Iterator[Picture]:
    """For each role the activation whose channels are least alike, and what the rewrite makes of it that evens them most."""
    for role in dict.fromkeys(role for _, role in before):
        place = max((key for key in before if key[1] == role), key=lambda key: before[key].waste)
        found = {name: ranges[place] for name, ranges in narrowed.items() if place in ranges}
        found = {name: ranges for name, ranges in found.items() if ranges.waste < EVENED * before[place].waste}
        best = min(found, key=lambda name: found[name].waste, default="no rewrite")
        yield Picture(f"{subject(role)}{f' of {place[0]}' if place[0] else ''}", best, before[place], found.get(best, before[place]))


def _places(c: Compilation) -> list[_Place]:
    """Inputs of Linear layers and of the LayerNormalizations before them, and operands of attention, each once."""
    found: dict[tuple[str, str, str], _Place] = {}

    def add(node: Node, tensor: Tensor, block: str, role: str, heads: int = 0) -> None:
        if not is_constant(tensor) and not c.graph.is_input(tensor):
            quantized = role != "stream" and any(e.node == node.name and node.inputs[e.index] is tensor for e in c.specs)
            found.setdefault((block, role, tensor.name), _Place(node.name, tensor.name, block, role, quantized, heads))

    for linear in c.annotations.linears:
        norm = _norm_before(linear.input)
        if norm is not None:
            add(norm, norm.inputs[0], linear.block, "stream")
        add(linear.matmul, linear.input, linear.block, linear.role)
    for attention in c.annotations.values:
        for operand, edge in attention.edges.items():
            node = c.graph.node(edge.node)
            add(node, node.inputs[edge.index], f"attention {attention.index}", operand, attention.heads)
    order = {node.name: place for place, node in enumerate(c.graph.clean().nodes)}
    return sorted(found.values(), key=lambda place: order[place.node])


def _norm_before(tensor: Tensor) -> Node | None:
    """The LayerNormalization that gives ``tensor``, at most moved by views."""
    node = producer(tensor)
    while node is not None and node.op in VIEWS:
        node = producer(node.inputs[0])
    return node if node is not None and node.op == "LayerNormalization" else None


def _copy(c: Compilation) -> Compilation:
    """The same graph for passes to edit, without tables."""
    return Compilation(c.graph.snapshot(), c.recipe, c.target, c.data, c.probes, threads=c.threads)


def _rewritten(c: Compilation, name: str, feeds: Sequence[runtime.Feed], before: tuple[TensorRow, ...]) -> tuple[RewriteRow, RangeTable]:
    """Rewrite a copy and look again; what the rewrite refuses, or what breaks parity, is a reason."""
    passes, copy = REWRITES[name].passes, _copy(c)
    reference = runtime.run(runtime.session(c.graph, threads=c.threads, brief=True), feeds[0], c.graph.output_names)
    parity = Parity(feeds[0], reference, c.threads)
    try:
        results = Pipeline.parse(f"canonicalize,annotate,{passes}", find_pass).run(copy, (parity,))
        parity.check()
    except (VitqError, InvariantError) as error:
        return RewriteRow(name, passes, 0, (str(error),), (), ()), {}
    steps = passes.split(",")
    reasons = tuple(dict.fromkeys(f"{note.where}: {note.reason}" for note in copy.notes if note.stage in steps))
    changes = next(result.changes for result in results if result.spec == name)
    after, ranges = measure(copy, feeds) if changes else ((), {})
    return RewriteRow(name, passes, changes, reasons, _effects(before, after), after), ranges


def _effects(before: Sequence[TensorRow], after: Sequence[TensorRow]) -> tuple[Effect, ...]:
    """Measures that a rewrite moved by more than a tenth, by role; the largest over blocks each."""
    old, new = _largest(before), _largest(after)
    both = [Effect(*key, old[key], new[key]) for key in old if key in new]
    return tuple(e for e in both if not 0.9 * e.before <= e.after <= 1.1 * e.before)


def _largest(rows: Sequence[TensorRow]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        for name in LIMITS:
            number = getattr(row, name)
            if number is not None:
                found[row.role, name] = max(number, found.get((row.role, name), 0.0))
    return found


def recommended(before: Sequence[TensorRow], rewrites: Sequence[RewriteRow]) -> list[str]:
    """Sentences: the rewrites that bring a measure down from above its limit, and what no rewrite cures."""
    lines: list[str] = []
    for row in rewrites:
        for e in row.effects:
            if e.measure in REWRITES[row.name].lowers and e.before > LIMITS[e.measure] and e.after * WORTH < e.before:
                lines.append(f"{row.name}: {LABELS[e.measure]} of {subject(e.role)} falls from {e.before:.3g} to {e.after:.3g}")
    registers = [row for row in before if (row.tokens or 0.0) > REGISTER]
    if registers:
        worst = max(registers, key=lambda row: row.tokens or 0.0)
        lines.append(
            f"register-like tokens in {len(registers)} activations, the worst {subject(worst.role)} of {worst.block or worst.layer}, "
            f"{worst.tokens:.3g} times the median token: no rewrite of channels helps; give these layers more bits, or --exclude them"
        )
    idle = [(row.block, len(row.idle_heads)) for row in before if row.idle_heads]
    if idle:
        lines.append(
            f"{sum(count for _, count in idle)} heads do nothing, with more than {IDLE:.0%} of their probability on one key: "
            f"{', '.join(f'{count} of {block}' for block, count in idle)}"
        )
    return lines


def subject(role: str) -> str:
    """What a role is called in a sentence."""
    return "LayerNormalization inputs" if role == "stream" else role if role in OPERANDS else f"{role} inputs"
