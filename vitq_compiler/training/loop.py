"""The optimizer: minibatches, falling rates, samples held back, and a file from which to go on.

The state that serves held-back samples best, computed as it will be deployed, is kept: the loss on them never grows. Products of
training, not those of judging, are computed in bfloat16 where the processor is built for it: several times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vitq_compiler.errors import RecipeError
from vitq_compiler.torch_graph import Taps, Tensor, require_torch
from vitq_compiler.training.learned import Noise
from vitq_compiler.training.rounding_styles import sharpness

Loss = Callable[[int, Taps], Tensor]  # number of a batch, quantizers -> loss
PENALTY = 1.0  # weight of `Learned.penalty`; losses begin near 1 too


class Trainable(Protocol):
    """What can be trained: tensors by name in three groups, each with a rate of its own (see `learned.Learned`)."""

    device: str

    @property
    def codes(self) -> dict[str, Tensor]: ...
    @property
    def scales(self) -> dict[str, Tensor]: ...
    @property
    def steps(self) -> dict[str, Tensor]: ...
    @property
    def parameters(self) -> dict[str, Tensor]: ...
    def taps(self, noise: Noise | None = None) -> Taps: ...
    def penalty(self, sharpness: float) -> Tensor | None: ...


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps: number of minibatches.
        code_rate: learning rate of weights, in codes.
        scale_rate: learning rate of the logarithms of scales, and of zero points in parts of all codes.
        bias_rate: learning rate of biases, in their units.
        drop: see `Noise`.
        checks: how often the held-back samples are looked at.
        seed: of the order of batches.
    """

    steps: int
    code_rate: float
    scale_rate: float
    bias_rate: float
    drop: float = 0.0
    checks: int = 8
    seed: int = 0


def pick_device(wanted: str) -> str:
    """The name of the device to train on: ``auto`` is a GPU where torch has one.

    Raises:
        RecipeError: torch has no such device here.
    """
    torch = require_torch("training")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {wanted!r} cannot be used: {str(error).splitlines()[0]}; --device auto takes what there is") from None
    return wanted


def has_bfloat16(device: str) -> bool:
    """Whether a device of torch multiplies matrices in bfloat16 faster than in float32."""
    torch = require_torch("training")
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(feature) for feature in ("avx512_bf16", "amx_bf16"))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute with as many threads as the runtime may."""
    torch = require_torch("training")
    before = torch.get_num_threads()
    try:
        if threads:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def train(
    learned: Trainable,
    loss: Loss,
    fitted: Sequence[int],
    held_back: Sequence[int],
    schedule: Schedule,
    *,
    checkpoint: Path | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, float]:
    """Train in place; returns the loss on the held-back batches before and after.

    Args:
        learned: what to train.
        loss: of one batch.
        fitted: numbers of the batches to train on.
        held_back: numbers of the batches to judge by.
        schedule: how.
        checkpoint: a file to go on from where it is there, and to write to now and then.
        advance: told after every step.
    """
    torch = require_torch("training")
    rates = ((learned.codes, schedule.code_rate), (learned.scales, schedule.scale_rate), (learned.steps, schedule.bias_rate))
    for group, rate in rates:
        for parameter in group.values():
            parameter.requires_grad_(rate > 0)
    optimizer = torch.optim.Adam([{"params": list(group.values()), "lr": rate} for group, rate in rates if group and rate > 0], fused=True)
    products = torch.autocast(learned.device.partition(":")[0], torch.bfloat16, enabled=has_bfloat16(learned.device))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.steps)
    parameters = learned.parameters

    def judged() -> float:
        with torch.no_grad():
            return float(np.mean([float(loss(batch, learned.taps())) for batch in held_back]))

    def copied() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in parameters.items()}

    state: dict[str, Any] = {"step": 0}
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        falling.load_state_dict(state["falling"])
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state["now"][name])
    else:
        before = judged()
        state |= {"before": before, "least": before, "best": copied()}
    order = np.random.default_rng(schedule.seed).permuted(np.tile(fitted, (-(-schedule.steps // len(fitted)), 1)), axis=1).reshape(-1)
    every = max(1, schedule.steps // schedule.checks)
    for step in range(state["step"], schedule.steps):
        optimizer.zero_grad()
        with products:
            total = loss(int(order[step]), learned.taps(Noise(schedule.drop, step)))
        if (exponent := sharpness(step / schedule.steps)) is not None and (penalty := learned.penalty(exponent)) is not None:
            total = total + PENALTY * penalty
        total.backward()
        optimizer.step()
        falling.step()
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            if (now := judged()) < state["least"]:
                state |= {"least": now, "best": copied()}
            if checkpoint is not None:
                state |= {"step": step + 1, "now": copied(), "optimizer": optimizer.state_dict(), "falling": falling.state_dict()}
                partial = checkpoint.with_suffix(".partial")
                torch.save(state, partial)
                partial.replace(checkpoint)
        advance(step + 1, schedule.steps)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state["best"][name])
    return float(state["before"]), float(state["least"])
