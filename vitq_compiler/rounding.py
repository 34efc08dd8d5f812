"""Which of the codes a weight shall become, when the layer's output counts and not the weight itself.

With inputs H = E[x^T x] a layer x W loses  |x W - x V|^2 = (W - V)^T H (W - V)  by computing with V, so errors may cancel
among correlated inputs. Columns of W [inputs, outputs] do not meet; rows are rounded one after the other, and what one row
loses the rows after it make good (GPTQ, arXiv 2210.17323):

    inverse(H) = U^T U, U upper;   e = (w_i - v_i) / U_ii;   w_j -= e U_ij  for j > i

GPTAQ (arXiv 2504.02692) also lets them make good that the input itself is no longer x + d but x: d_i w_i, w_i the weight as it
came, is regressed on the inputs after i. `flip` moves single codes as long as that helps (the second step of ERQ, arXiv
2407.06794).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.quant import QuantParams

Matrix = NDArray[np.float64]
Codes = NDArray[Any]
BLOCK = 128  # rows whose effect on later rows is gathered into one product


def damped(hessian: Matrix, damping: float) -> Matrix:
    """``hessian`` with ``damping`` times its mean diagonal added to the diagonal; dead inputs count as average ones."""
    diagonal = np.diag(hessian)
    mean = float(diagonal.mean()) or 1.0
    result = hessian.copy()
    result[np.diag_indices_from(result)] += damping * mean + np.where(diagonal == 0, mean, 0.0)
    return result


def second_order(
    weight: Matrix, params: QuantParams, hessian: Matrix, *, cross: Matrix | None = None, damping: float = 0.01, reorder: bool = True
) -> Codes:
    """Codes of ``weight`` rounded row by row with feedback: GPTQ, or GPTAQ where ``cross`` is given.

    Args:
        weight: [inputs, outputs].
        params: one quantizer, or one per output (axis 1).
        hessian: E[x^T x] of the quantized inputs, [inputs, inputs].
        cross: E[d^T x], d what the float inputs have more than the quantized ones, [inputs, inputs].
        damping: part of the mean diagonal added to the diagonal.
        reorder: round inputs with much energy first (act-order).
    """
    order = np.argsort(-np.diag(hessian), kind="stable") if reorder else np.arange(len(hessian))
    hessian = damped(hessian, damping)[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    carried = np.zeros_like(upper) if cross is None else np.triu(cross[np.ix_(order, order)] @ upper.T, 1) @ upper
    scale, zero_point = np.float64(params.scale), np.float64(params.zero_point)
    wanted = weight[order].astype(np.float64)
    rows = wanted.copy()
    codes = np.empty(rows.shape, params.dtype)
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        errors = np.empty((stop - start, rows.shape[1]))
        for i in range(start, stop):
            code = np.clip(np.rint(rows[i] / scale) + zero_point, params.quant_min, params.quant_max)
            errors[i - start] = (rows[i] - scale * (code - zero_point)) / upper[i, i]
            codes[i] = code
            rows[i + 1 : stop] -= np.outer(upper[i, i + 1 : stop], errors[i - start])
            if cross is not None:
                rows[i + 1 : stop] += np.outer(carried[i, i + 1 : stop], wanted[i])
        rows[stop:] -= upper[start:stop, stop:].T @ errors
        if cross is not None:
            rows[stop:] += carried[start:stop, stop:].T @ wanted[start:stop]
    result = np.empty_like(codes)
    result[order] = codes
    return result


def flip(codes: Codes, params: QuantParams, goal: Matrix, hessian: Matrix, steps: int) -> Codes:
    """Move one code of each output by one, where that lowers V^T H V - 2 V^T G the most, up to ``steps`` times.

    Args:
        codes: [inputs, outputs], where to start.
        params: their meaning.
        goal: G = E[x^T y] of the outputs y that are wanted, [inputs, outputs]; H T, where T is the weight to come close to.
        hessian: H = E[x^T x], [inputs, inputs].
        steps: most moves of each output.
    """
    scale = np.broadcast_to(np.float64(params.scale), codes.shape[1:])
    moved = codes.astype(np.int64)
    slope = hessian @ (scale * (moved - params.zero_point)) - goal  # half the gradient
    bend = np.diag(hessian)[:, None] * scale
    columns = np.arange(codes.shape[1])
    for _ in range(steps):
        direction = -np.sign(slope)
        possible = (moved + direction >= params.quant_min) & (moved + direction <= params.quant_max)
        change = np.where(possible, scale * (bend - 2 * np.abs(slope)), 0.0)
        rows = change.argmin(0)
        active = columns[change[rows, columns] < 0]
        if not active.size:
            break
        chosen = rows[active]
        step = direction[chosen, active]
        moved[chosen, active] += step.astype(np.int64)
        slope[:, active] += hessian[:, chosen] * (step * scale[active])
    return moved.astype(codes.dtype)
