"""Quantized blocks trained until they compute what the float blocks do.

    codes, scales, zero points, biases  ->  those of least loss

Only these change: the deployed graph stays plain. One part of the network is trained after another (``unit``, see
`training.windows`), on what the quantized parts before it give out, or the float ones (``prefix``), towards ``loss`` (see
`training.objective`). ``round`` says how codes are found (`training.rounding_styles`), ``margin`` how far from its code a weight may
begin, ``drop`` which part of the activations stays float in each step (QDrop). A rate of 0 leaves weights, scales (and zero points),
or biases as they are.

An eighth of the samples is held back, and the state that serves these best is kept. With a work directory an interrupted training
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vitq_compiler.errors import DataError
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.prefix import Inputs, Store, walk
from vitq_compiler.repair import quantized_part, reference, repairable
from vitq_compiler.report import TrainingRow
from vitq_compiler.torch_graph import require_torch
from vitq_compiler.training.batches import split, temporary_store
from vitq_compiler.training.loop import Schedule, pick_device, torch_threads, train
from vitq_compiler.training.objective import LOSSES, Goal, Objective, store_outputs
from vitq_compiler.training.rounding_styles import STYLES
from vitq_compiler.training.windows import UNITS, Window, cut, keep, learn

CHOICES = {"unit": UNITS, "loss": LOSSES, "round": tuple(STYLES), "prefix": ("quantized", "float")}


@dataclass(frozen=True)
class ReconstructBlocks(Pass):
    """codes, scales, zero points, biases -> those with which the blocks compute what they do in float"""

    name = "reconstruct-blocks"
    requires = frozenset({Fact.QPARAMS})
    steps: int = 1000
    unit: str = "network"
    loss: str = "feature"
    round: str = "nearest"
    margin: float = 0.1
    prefix: str = "quantized"
    drop: float = 0.0
    code_rate: float = 0.003
    scale_rate: float = 0.001
    bias_rate: float = 0.003
    local: float = 2.0

    def __post_init__(self) -> None:
        for option, known in CHOICES.items():
            if getattr(self, option) not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, got {getattr(self, option)}")
        rates = self.code_rate, self.scale_rate, self.bias_rate
        if self.steps < 1 or not min(*rates, self.local) >= 0 or not max(rates) > 0 or not 0 <= self.drop < 1 or not 0 <= self.margin < 0.5:
            raise ValueError("steps and one of the rates must be positive, no number negative, drop below 1 and margin below a half")

    def check(self, c: Compilation) -> None:
        require_torch(f"pass {self.name}")
        pick_device(c.device)

    def run(self, c: Compilation) -> int:
        floating, goal = reference(c), Goal(self.loss, self.local, self.prefix)
        windows, sources = cut(c.graph, repairable(c), self.unit), tuple(spec.name for spec in floating.inputs)
        helped = 0
        with temporary_store(c) as finals, torch_threads(c.threads):
            feeds = ((feed[n] for n in sources) for feed in c.data.calibration())
            store_outputs(floating, sources, goal.finals(c), feeds, finals, c.threads)
            walked = walk(
                floating,
                [window.stage for window in windows],
                c.data.calibration(),
                lambda stage: quantized_part(c, stage),
                threads=c.threads,
                work_dir=c.work_dir,
            )
            for index, (window, (_, inputs)) in enumerate(zip(windows, walked, strict=True)):
                advance = partial(_advance, c, index, len(windows))
                helped += self._train(c, window, inputs, finals, goal, index, advance)
        return helped

    def _train(
        self, c: Compilation, window: Window, inputs: Inputs, finals: Store, goal: Goal, index: int, advance: Callable[[int, int], None]
    ) -> bool:
        """Train one window; whether that served the samples held back."""
        if inputs.count < 2 * c.data.copies:
            raise DataError(f"pass {self.name} holds samples back: give more of them, or a smaller --batch-size")
        with temporary_store(c) as weights:
            learned = learn(c, window, self.margin, self.round, pick_device(c.device))
            objective = Objective(c, window, inputs, (finals, weights), learned, goal)
            schedule = Schedule(self.steps, self.code_rate, self.scale_rate, self.bias_rate, self.drop, seed=index)
            checkpoint = self._checkpoint(c, learned.fingerprint(self, index, inputs.count))
            fitted, held_back = split(inputs.count, c.data.copies)
            before, after = train(learned, objective, fitted, held_back, schedule, checkpoint=checkpoint, advance=advance)
        c.training.append(TrainingRow(_name(window), before, after))
        if after < before:
            keep(c, learned)
        else:
            self.note(c, _name(window), "training lowers no error on samples it does not see; codes and scales stay as they were")
        return after < before

    def _checkpoint(self, c: Compilation, fingerprint: str) -> Path | None:
        return c.work_dir / f"{self.name}-{fingerprint}.pt" if c.work_dir else None


def _advance(c: Compilation, index: int, windows: int, done: int, steps: int) -> None:
    c.progress("training", index * steps + done, windows * steps)


def _name(window: Window) -> str:
    first = window.stage.linears[0]
    return first.block or first.name
