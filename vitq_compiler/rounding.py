"""Which of the codes a weight shall become, when the layer's output counts and not the weight itself.

With inputs H = E[x^T x] a layer x W loses  |x W - x V|^2 = (W - V)^T H (W - V)  by computing with V, so errors may cancel
among correlated inputs. Columns of W [inputs, outputs] do not meet; rows are rounded one after the other, and what one row
loses the rows after it make good (GPTQ, arXiv 2210.17323):

    inverse(H) = U^T U, U upper;   e = (w_i - v_i) / U_ii;   w_j -= e U_ij  for j > i

GPTAQ (arXiv 2504.02692) also lets them make good that the input itself is no longer x + d but x: d_i w_i, w_i the weight as it
came, is regressed on the inputs after i. `flip` moves single codes as long as that helps (the second step of ERQ, arXiv
2407.06794). Where two neighbouring codes have a limit to keep to (see `pairs`), the first is rounded with its partner in sight, and
leaves the room that costs both together least.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.pairs import nearest_first, partners
from vitq_compiler.quant import QuantParams

Matrix = NDArray[np.float64]
Codes = NDArray[Any]
BLOCK = 32  # rows whose effect on later rows is gathered into one product


def damped(hessian: Matrix, damping: float) -> Matrix:
    """``hessian``, or a stack of them, with ``damping`` times its mean diagonal added to the diagonal; dead inputs count as average."""
    diagonal = np.diagonal(hessian, axis1=-2, axis2=-1)
    mean = diagonal.mean(-1, keepdims=True)
    mean = np.where(mean == 0, 1.0, mean)
    result = hessian.copy()
    place = np.arange(diagonal.shape[-1])
    result[..., place, place] += damping * mean + np.where(diagonal == 0, mean, 0.0)
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
        reorder: round inputs with much energy first (act-order); with a pair limit, pairs of them.
    """
    inputs = len(hessian)
    order = _order(np.diag(hessian), pairs=params.pairs is not None) if reorder else np.arange(inputs)
    upper = feedback_factor(hessian[np.ix_(order, order)], damping)
    carried = None if cross is None else np.triu(cross[np.ix_(order, order)] @ upper.T, 1) @ upper
    steps = weight[order].astype(np.float64) / np.float64(params.scale)
    result = np.empty(weight.shape, params.dtype)
    result[order] = feed_back(steps, params, upper, carried=carried)
    return result


def feedback_factor(hessian: Matrix, damping: float) -> Matrix:
    """U, upper, with U^T U the inverse of the damped ``hessian``; of a stack of matrices, for each."""
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped(hessian, damping))).swapaxes(-1, -2))


def feed_back(steps: Matrix, params: QuantParams, upper: Matrix, *, carried: Matrix | None = None) -> Codes:
    """Round ``steps`` row by row; what a row loses the rows after it make good.

    Args:
        steps: the weight in steps (zero at 0), [..., inputs, outputs]: the first axes are a stack of separate problems.
        params: the grid; its scale does not matter here, and its zero point is one for all, or [outputs].
        upper: see `feedback_factor`, [..., inputs, inputs].
        carried: what a row of the weight adds to the rows after it, strictly upper, [..., inputs, inputs].

    Returns:
        Codes, in the shape of ``steps``.
    """
    inputs, limit = steps.shape[-2], params.pairs.limit if params.pairs is not None else 0
    zero_point, rows, codes = params.zero_point.astype(steps.dtype), steps.copy(), np.empty(steps.shape, params.dtype)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = np.empty((*steps.shape[:-2], stop - start, steps.shape[-1]), steps.dtype)
        for i in range(start, stop):
            row, later = rows[..., i, :], slice(i + 1, stop)
            code = np.clip(np.rint(row) + zero_point, params.quant_min, params.quant_max)
            if limit and i % 2 == 0 and i + 1 < inputs:
                _leave_room(code, row, rows[..., i + 1, :], upper[..., i : i + 2, i : i + 2], limit)
            elif limit and i % 2:
                partner = codes[..., i - 1, :].astype(steps.dtype)
                code = np.clip(code, -limit - partner, limit - partner)
            codes[..., i, :] = code
            errors[..., i - start, :] = (row - (code - zero_point)) / upper[..., i, i, None]
            rows[..., later, :] -= upper[..., i, later, None] * errors[..., i - start, None, :]
            if carried is not None:
                rows[..., later, :] += carried[..., i, later, None] * steps[..., i, None, :]
        rows[..., stop:, :] -= upper[..., start:stop, stop:].swapaxes(-1, -2) @ errors
        if carried is not None:
            rows[..., stop:, :] += carried[..., start:stop, stop:].swapaxes(-1, -2) @ steps[..., start:stop, :]
    return codes


def _order(energy: Matrix, *, pairs: bool) -> NDArray[np.intp]:
    """Inputs, those with most energy first; neighbours that form pairs stay together."""
    if not pairs:
        return np.argsort(-energy, kind="stable")
    both = np.pad(energy, (0, len(energy) % 2)).reshape(-1, 2).sum(1)
    if len(energy) % 2:
        both[-1] = -1.0  # the last one has no partner, and stays last
    chosen = np.argsort(-both, kind="stable")
    order = np.stack([2 * chosen, 2 * chosen + 1], 1).ravel()
    return order[order < len(energy)]


def _leave_room(code: Matrix, first: Matrix, second: Matrix, corner: Matrix, limit: int) -> None:
    """Change ``code`` of the row ``first`` where the row after it, ``second``, would have no code left that keeps to the limit.

    ``corner`` is the part of the feedback factor that both share, [..., 2, 2]. Codes have zero points of zero here.
    """
    feedback = np.broadcast_to(corner[..., 0, 1, None] / corner[..., 0, 0, None], code.shape)
    after = second - feedback * (first - code)
    where = np.nonzero(np.abs(code + np.rint(after)) > limit)
    if where[0].size:
        stiffness = np.broadcast_to(np.square(corner[..., 0, 0, None] / corner[..., 1, 1, None]), code.shape)
        code[where] = nearest_first(first[where], second[where], limit, stiffness=stiffness[where], feedback=feedback[where])


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
        if params.pairs is not None:
            possible &= np.abs(moved + direction + partners(moved)) <= params.pairs.limit
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
