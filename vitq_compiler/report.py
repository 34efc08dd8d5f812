"""The report of one compile: typed rows, as JSON. What a user is told, and nothing else, is in here."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PassRow:
    """One pass: its text, how many changes it made, and how long it took."""

    spec: str
    changes: int
    seconds: float


@dataclass(frozen=True)
class LinearRow:
    """One Linear layer (or patch embedding) of the model as given.

    Attributes:
        name: its node.
        scope: the module it came from, where the exporter recorded it.
        role: what it does: qkv, mix, proj, fc1, gate, fc2, head, output, linear, patch_embed.
        block: its block, such as ``attention 3``.
        in_features, out_features: its size.
        quantized: whether weight and activation are integers in the output.
        kernel: the runtime's operator that computes it, such as QGemm, or several; empty where unknown.
        integer: whether that operator computes on integers.
        reason: why it is not quantized, or not computed on integers.
        parts: the nodes that it was taken apart into, or its one node; it has what all of them have.
    """

    name: str
    scope: str
    role: str
    block: str
    in_features: int
    out_features: int
    quantized: bool
    kernel: str
    integer: bool
    reason: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoteRow:
    """Something left alone: by which pass, where, and why."""

    stage: str
    where: str
    reason: str


@dataclass(frozen=True)
class NodeRow:
    """What became of one node of the input model.

    Attributes:
        name, op, scope: the node, its operator, and the module it came from.
        block: the block it belongs to, or the role of the layer it is a part of.
        history: what the passes made of it, one sentence each.
        state: how the result computes what stands in its place, and why; empty where nothing does.
    """

    name: str
    op: str
    scope: str
    block: str
    history: tuple[str, ...]
    state: str


@dataclass(frozen=True)
class DataRow:
    """What the compiler saw: source of the samples, preprocessing and why, counts, and files that could not be read."""

    source: str
    preprocess: str
    calibration_samples: int
    validation_samples: int
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class OutputRow:
    """One output of the integer graph against the float one, on samples that calibration did not see.

    Attributes:
        name: the output.
        sqnr_db: 10 log10(sum y^2 / sum (y - y_int)^2); infinite where equal, NaN where the output is no float.
        cosine: cosine similarity of the flattened outputs, NaN likewise.
        agreement: part of samples with the same top-1, or None where the output does not look like logits or class ids.
        saturated_db: the SQNR on x86 CPUs without VNNI, where that differs; None where products of codes cannot saturate.
        varies: whether the float output differs between samples.
    """

    name: str
    sqnr_db: float
    cosine: float
    agreement: float | None
    saturated_db: float | None = None
    varies: bool = True


@dataclass(frozen=True)
class LatencyRow:
    """Paired timing in one process: medians in milliseconds, ratio = median of the paired ratios int / float."""

    threads: int
    batch: int
    float_ms: float
    integer_ms: float
    ratio: float


@dataclass(frozen=True)
class BlockRow:
    """SQNR of what one block adds to the residual stream."""

    name: str
    sqnr_db: float


@dataclass(frozen=True)
class NeedsRow:
    """What the compiled graph asks of what runs it.

    Attributes:
        opset, ir_version: of the file, the lowest for its operators and types.
        onnxruntime: the first release that runs it on the CPU, such as 1.17, as all later ones do; empty where none does.
        reason: what in the graph needs that one.
    """

    opset: int
    ir_version: int
    onnxruntime: str
    reason: str

    @property
    def releases(self) -> str:
        """The releases of ONNX Runtime in words."""
        return f"onnxruntime {self.onnxruntime} and later" if self.onnxruntime else "no onnxruntime so far"


@dataclass(frozen=True)
class TrainingRow:
    """What training one part of the network was worth.

    Attributes:
        where: the block it begins with.
        before: its loss (see `training.objective`) on samples held back from training, as it came.
        after: the same as it was left: never more.
    """

    where: str
    before: float
    after: float

    @property
    def gain(self) -> float:
        """The part of the loss that training took away."""
        return 1 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True)
class AttentionRow:
    """What one choice for the operands of the attention products would cost.

    Attributes:
        choice: of ``--attention``; ``recipe`` where the recipe has a choice of its own.
        chosen: whether the compiled graph has it.
        quantized: number of attention blocks whose products it quantizes.
        blocks: number of attention blocks.
        sqnr_db: least of the outputs that hold classes (of all where none does), everything else quantized as in the compiled graph,
            what is not quantized in float32; None where the target cannot take the choice.
        images: number of samples it was measured on.
        reason: why not, or why not in all blocks.
    """

    choice: str
    chosen: bool
    quantized: int
    blocks: int
    sqnr_db: float | None
    images: int
    reason: str = ""


@dataclass(frozen=True)
class GateRow:
    """A requirement the user set: ``required`` and ``measured`` in its own unit."""

    name: str
    required: float
    measured: float
    passed: bool


@dataclass(frozen=True)
class Validation:
    """What ONNX Runtime says of the integer graph."""

    runtime: str
    outputs: tuple[OutputRow, ...]
    blocks: tuple[BlockRow, ...]
    latency: tuple[LatencyRow, ...]
    float_bytes: int
    integer_bytes: int

    @property
    def worst_block(self) -> BlockRow | None:
        """The block with the lowest SQNR."""
        return min(self.blocks, key=lambda b: b.sqnr_db, default=None)


@dataclass(frozen=True)
class CompileReport:
    """Everything about one compile.

    Attributes:
        model: the file, or ``hf:owner/name@commit/file.onnx`` for a model from the hub.
        bits: of weights and activations, such as ``w4a8``.
        definition: which ends of the network got them, ``strict`` or ``deploy``; empty where the recipe says it itself.
        cpu: which CPUs the graph gives these results on, ``any`` or ``vnni``; empty where the target is none.
        integer_unit: the integer instructions of the CPU that measured, see `cpu.integer_unit`.
        needs: what the output asks of what runs it.
        command: what takes the output further, where its target needs that.
        attention: the price of each choice for the attention products, where the target has several.
        chosen: why this file of a folder was taken; empty where there was no other.
    """

    version: str
    model: str
    output: str | None
    recipe: str
    bits: str
    definition: str
    target: str
    pipeline: str
    seconds: float
    data: DataRow
    passes: tuple[PassRow, ...]
    linears: tuple[LinearRow, ...]
    notes: tuple[NoteRow, ...]
    validation: Validation
    needs: NeedsRow
    gates: tuple[GateRow, ...]
    warnings: tuple[str, ...]
    nodes: tuple[NodeRow, ...] = ()
    cpu: str = ""
    integer_unit: str = ""
    command: str = ""
    attention: tuple[AttentionRow, ...] = ()
    training: tuple[TrainingRow, ...] = ()
    chosen: str = ""

    @property
    def quantized(self) -> int:
        """How many Linear layers of the model as given are quantized."""
        return sum(row.quantized for row in self.linears)

    @property
    def integer(self) -> int:
        """How many Linear layers the runtime executes in integer kernels."""
        return sum(row.integer for row in self.linears)

    @property
    def passed(self) -> bool:
        """Whether every gate is met."""
        return all(gate.passed for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, with its totals; an infinite or undefined number becomes None."""
        worst = self.validation.worst_block
        totals = {
            "linears": len(self.linears),
            "quantized": self.quantized,
            "integer": self.integer,
            "worst_block": asdict(worst) if worst else None,
            "passed": self.passed,
        }
        return _plain({**asdict(self), "totals": totals})  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
