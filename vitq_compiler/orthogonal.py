"""Orthogonal matrices that spread what sits in one channel over all of them.

A matrix with entries of +-1/sqrt(n), a Hadamard matrix with random signs, turns one outlier channel of size a into n channels
of size a/sqrt(n). Orders: every n = m 2^k for which Paley's constructions give m (1, 12, 20, 28, 36, 44 ...), which covers
the widths and head sizes in use; any other order gets a random orthogonal matrix, which does nearly as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def hadamard(order: int) -> NDArray[np.int8] | None:
    """A matrix of +-1 with H H' = order I, or None where neither doubling nor Paley's constructions give one.

    Source: Sylvester 1867; Paley, "On orthogonal matrices", 1933.
    """
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order % 2:
        return None
    half = hadamard(order // 2)
    if half is not None:
        return np.block([[half, half], [half, -half]])
    if order % 4 == 0 and _is_prime(order - 1):  # of the form 4 k + 3
        border = np.pad(_residues(order - 1), ((1, 0), (1, 0)))
        border[0, 1:], border[1:, 0] = 1, -1
        return border + np.eye(order, dtype=np.int8)
    prime = order // 2 - 1
    if prime % 4 == 1 and _is_prime(prime):
        border = np.pad(_residues(prime), ((1, 0), (1, 0)), constant_values=1)
        border[0, 0] = 0
        block = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
        doubled: NDArray[np.int8] = np.kron(border, block[0]) + np.kron(np.eye(prime + 1, dtype=np.int8), block[1])
        return doubled
    return None


def random_orthogonal(order: int, random: np.random.Generator) -> Matrix:
    """A random orthogonal matrix: Hadamard with random signs where there is one of that order, else uniformly distributed."""
    signs = hadamard(order)
    if signs is not None:
        turned: Matrix = random.choice([-1.0, 1.0], order)[:, None] * signs / np.sqrt(order)
        return turned
    q, r = np.linalg.qr(random.standard_normal((order, order)))
    uniform: Matrix = q * np.sign(np.diag(r))  # without the signs of r the distribution depends on the algorithm
    return uniform


def keeping_ones(matrix: Matrix) -> Matrix:
    """``matrix``, reflected so that R 1 = 1 and 1' R = 1': it then keeps the mean of a vector, and with it LayerNormalization."""
    ones = np.full(len(matrix), len(matrix) ** -0.5)
    normal = ones @ matrix - ones
    length = float(normal @ normal)
    if length < 1e-24:
        return matrix
    reflected: Matrix = matrix - np.outer(matrix @ normal, normal) * (2 / length)
    return reflected


def apply_along(array: NDArray[Any], axis: int, matrix: Matrix) -> NDArray[np.float32]:
    """x -> x R along ``axis``, which may hold several vectors of the order of R one after the other (then I (x) R).

    The same contraction writes x R and lets a reader undo it: for orthogonal R, (x R) (R' W) = x W.
    """
    last = np.moveaxis(array.astype(np.float32), axis, -1)
    turned = (last.reshape(*last.shape[:-1], -1, len(matrix)) @ matrix.astype(np.float32)).reshape(last.shape)
    return np.ascontiguousarray(np.moveaxis(turned, -1, axis), np.float32)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _residues(prime: int) -> NDArray[np.int8]:
    """The Jacobsthal matrix: entry 0 on the diagonal, 1 where i - j is a square modulo ``prime``, else -1."""
    squares = {i * i % prime for i in range(1, prime)}
    row = np.array([0] + [1 if i in squares else -1 for i in range(1, prime)], np.int8)
    index = np.subtract.outer(np.arange(prime), np.arange(prime)) % prime
    matrix: NDArray[np.int8] = row[index]
    return matrix
