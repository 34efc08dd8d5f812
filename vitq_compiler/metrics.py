"""How far one array is from another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
STILL = 1e-6  # of the largest number: differences up to this are those of rounding


def sqnr(reference: Array, other: Array) -> float:
    """Signal to quantization noise in dB: 10 log10(sum y^2 / sum (y - other)^2); inf where equal, -inf without signal or with a NaN."""
    signal = float(np.sum(np.square(reference, dtype=np.float64)))
    noise = float(np.sum(np.square(np.subtract(reference, other, dtype=np.float64))))
    if noise == 0:
        return float("inf")
    if not np.isfinite(noise):
        return float("-inf")  # an output that is NaN or Inf is all noise
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def cosine(reference: Array, other: Array) -> float:
    """Cosine similarity of the flattened arrays; 1 where both are zero."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (reference, other))
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norm == 0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(a @ b / norm)


def agreement(reference: Array, other: Array) -> float | None:
    """Part of samples with the same decision, or None where the array holds none.

    Logits [N, classes] are compared by their largest entry, class ids (integers [N, ...]) row by row.
    """
    if reference.dtype.kind in "iu" and reference.ndim >= 1:
        return float(np.mean((reference == other).reshape(len(reference), -1).all(axis=1)))
    if reference.dtype.kind == "f" and reference.ndim == 2 and reference.shape[1] > 1:
        return float(np.mean(reference.argmax(1) == other.argmax(1)))
    return None


def varies(samples: Array) -> bool:
    """Whether samples [N, ...] differ from each other by more than rounding; a single one, or one that is not finite, counts as if."""
    if len(samples) < 2 or samples.dtype.kind not in "fiu" or not np.isfinite(samples).all() or not samples.size:
        return True
    differences = np.abs(np.subtract(samples[1:], samples[:1], dtype=np.float64))
    return bool(differences.max() > STILL * np.abs(samples).max())


def max_relative_error(reference: Array, other: Array) -> float:
    """max |y - other| / max |y|; infinite where shapes differ or a value is not finite."""
    if reference.shape != other.shape or not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return float("inf")
    if reference.size == 0:
        return 0.0
    largest = float(np.abs(reference).max())
    worst = float(np.abs(np.subtract(reference, other, dtype=np.float64)).max())
    return worst / largest if largest > 0 else worst
