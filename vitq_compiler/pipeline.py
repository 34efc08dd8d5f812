"""Passes and pipelines: the contract of a pass, and pipelines as text.

A pipeline is written ``canonicalize,calibrate{observer=minmax},insert-qdq``: pass names in kebab-case, options in braces,
which are the fields of the pass. ``Pipeline.parse(str(p)) == p``.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vitq_compiler.errors import InternalError, PassError, RecipeError, VitqError
from vitq_compiler.progress import Progress, silent

if TYPE_CHECKING:
    from vitq_compiler.annotations import Annotations
    from vitq_compiler.calibration import CalibrationTable
    from vitq_compiler.data import Data
    from vitq_compiler.graph import Array, Graph
    from vitq_compiler.quant import Edge, QuantParams, QuantSpec
    from vitq_compiler.recipe import Recipe
    from vitq_compiler.report import AttentionRow, TrainingRow
    from vitq_compiler.sizes import Probe
    from vitq_compiler.target import Target


class Fact(Enum):
    """What is known about a compilation; passes require, provide and drop facts."""

    CANONICAL = "canonical"
    ANNOTATED = "annotated"
    CALIBRATED = "calibrated"
    QPARAMS = "qparams"
    QUANTIZED = "quantized"
    LEGAL = "legal"


@dataclass(frozen=True)
class Note:
    """Something a pass left alone, and why.

    Attributes:
        stage: the pass that says it.
        where: the node or block it is about.
        reason: one sentence.
    """

    stage: str
    where: str
    reason: str


@dataclass
class Compilation:
    """The only thing a pass receives; passes talk to each other through its tables."""

    graph: Graph
    recipe: Recipe
    target: Target
    data: Data
    probes: Sequence[Probe] = ()  # what to run the graph on to see its shapes: first one of the shapes of the data
    annotations: Annotations = None  # type: ignore[assignment]  # set by annotate
    table: CalibrationTable = None  # type: ignore[assignment]  # set by calibrate
    specs: dict[Edge, QuantSpec] = field(default_factory=dict)
    params: dict[Edge, QuantParams] = field(default_factory=dict)
    rounding: dict[Edge, Array] = field(default_factory=dict)  # weight edge -> its codes, where they are not the nearest ones
    reference: Graph | None = None  # the float graph, kept by the first pass that fits weights to it
    codes: dict[Edge, str] = field(default_factory=dict)  # weight edge -> the initializer of its codes, set by insert-qdq
    runnable: Graph | None = None  # what onnxruntime can run in place of the graph, where it cannot run that
    floating: Path | Graph | None = None  # the model that everything is held against
    prices: list[AttentionRow] = field(default_factory=list)  # set by price-attention
    training: list[TrainingRow] = field(default_factory=list)  # set by reconstruct-blocks
    notes: list[Note] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    threads: int = 0
    progress: Progress = silent
    device: str = "auto"  # of torch, for passes that train
    work_dir: Path | None = None  # where passes keep activations that memory should not hold, and what they can resume from
    providers: tuple[str, ...] = ("CPUExecutionProvider",)  # of the runtime that validates the result

    def move_specs(self, old: str, new: Sequence[str]) -> None:
        """Let the nodes ``new``, which take the place of the node ``old``, become what it was to become, for the same reasons."""
        for edge in [e for e in self.specs if e.node == old]:
            spec = self.specs.pop(edge)
            self.specs.update({replace(edge, node=name): spec for name in new})
        for note in [n for n in self.notes if n.where == old]:
            self.notes.remove(note)
            self.notes += [replace(note, where=name) for name in new]


@dataclass(frozen=True)
class Pass(ABC):
    """One step. Its options are its dataclass fields; `run` returns how many changes it made (0: nothing to do).

    ``exact`` promises that the float meaning of the graph is unchanged; the pipeline has it checked. A pass that only fills
    tables says so with ``edits = False``.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset()
    exact: ClassVar[bool] = False
    edits: ClassVar[bool] = True

    @abstractmethod
    def run(self, c: Compilation) -> int: ...

    def check(self, c: Compilation) -> None:  # noqa: B027  # most passes need nothing
        """Refuse, before any pass has run, what this one could only find out after them.

        Raises:
            VitqError: something is missing here.
        """

    def note(self, c: Compilation, where: str, reason: str) -> None:
        """Record what was left alone, and why."""
        c.notes.append(Note(self.name, where, reason))

    def __str__(self) -> str:
        options = [f"{f.name.replace('_', '-')}={_show(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default]
        return self.name + (f"{{{' '.join(options)}}}" if options else "")


@dataclass(frozen=True)
class PassResult:
    """What one pass did: its text, changes made, seconds taken."""

    spec: str
    changes: int
    seconds: float


class Hook(Protocol):
    """Called around every pass; raises a VitqError or an InternalError to stop the compile."""

    def before(self, p: Pass, c: Compilation) -> None: ...

    def after(self, p: Pass, c: Compilation, result: PassResult) -> None: ...


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; building one checks that each finds what it requires."""

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        known: set[Fact] = set()
        for p in self.passes:
            missing = sorted(f.value for f in p.requires - known)
            if missing:
                raise RecipeError(f"pass {p.name} needs what is {' and '.join(missing)}: put a pass that provides this before it")
            known = (known | p.provides) - p.drops

    @classmethod
    def parse(cls, text: str, find: Callable[[str], type[Pass]]) -> Pipeline:
        """Read ``name{option=value ...},name,...``; ``find`` maps a pass name to its class.

        Raises:
            RecipeError: bad syntax, unknown pass or option, or a value of the wrong type.
        """
        items = re.findall(r"\s*([^,{}\s]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)", text)
        rebuilt = ",".join(name + (f"{{{options}}}" if options else "") for name, options in items)
        if re.sub(r"\s|\{\}|,$", "", rebuilt) != re.sub(r"\s|\{\}|,$", "", text) or not items:
            raise RecipeError(f"cannot read the pipeline {text!r}: write pass,pass{{option=value option=value}},pass")
        return cls(tuple(_build(find(name), options) for name, options in items))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(self, c: Compilation, hooks: tuple[Hook, ...] = ()) -> list[PassResult]:
        """Run every pass in order, hooks around each.

        Raises:
            InternalError: a pass failed in a way that is not the user's fault, or a hook found that it broke a promise.
            VitqError: as raised by a pass or a hook.
            OSError, MemoryError: the operating system refused something.
        """
        for p in self.passes:
            p.check(c)
        results: list[PassResult] = []
        for index, p in enumerate(self.passes):
            c.progress("compiling", index, len(self.passes))
            for hook in hooks:
                hook.before(p, c)
            began = time.perf_counter()
            try:
                changes = p.run(c)
            except (VitqError, InternalError, OSError, MemoryError):
                raise
            except Exception as error:
                ran = tuple(q.name for q in self.passes[:index])
                raise PassError(p.name, ran, f"{type(error).__name__}: {error}") from error
            result = PassResult(str(p), changes, time.perf_counter() - began)
            results.append(result)
            for hook in hooks:
                hook.after(p, c, result)
        c.progress("compiling", len(self.passes), len(self.passes))
        return results


def _build(kind: type[Pass], options: str) -> Pass:
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for item in options.split():
        key, _, text = item.partition("=")
        option = known.get(key.replace("-", "_"))
        if option is None:
            raise RecipeError(f"pass {kind.name} has no option {key!r}: it has {', '.join(known).replace('_', '-') or 'none'}")
        if option.name in values:
            raise RecipeError(f"pass {kind.name}: option {key} is given twice; keep one")
        try:
            values[option.name] = _read(text, type(option.default))
        except ValueError:
            raise RecipeError(f"pass {kind.name}: option {key} cannot be {text!r}, it needs type {type(option.default).__name__}") from None
    try:
        return kind(**values)
    except ValueError as error:
        raise RecipeError(f"pass {kind.name}: {error}") from None


def _read(text: str, kind: type) -> Any:
    if kind is bool:
        return {"": True, "true": True, "false": False}[text] if text in ("", "true", "false") else _refuse(text)
    return kind(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
