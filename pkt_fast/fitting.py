"""Affine maps fitted in closed form from streamed second moments.

Rows pass by batch after batch and are forgotten; what stays is D×D.  Everything here is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NumericsError


class PairedMoments:
    """Means and centred second moments of paired rows x (N, p) and y (N, q).

    Batches are merged by Chan's update instead of subtracting N·mean·meanᵀ at the end, so that a
    channel whose mean is far larger than its spread (common in residual streams) keeps its digits.

    Attributes:
        count: rows seen, N.
        mean_x, mean_y: (p,), (q,).
        xx, xy, yy: Σ x_c·x_cᵀ (p, p), Σ x_c·y_cᵀ (p, q) and Σ‖y_c‖² of the centred rows.
    """

    def __init__(self, width_x: int, width_y: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self.mean_x, self.mean_y = zeros(width_x), zeros(width_y)
        self.xx, self.xy, self.yy = zeros(width_x, width_x), zeros(width_x, width_y), zeros()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in the rows of one batch, x (n, p) beside y (n, q)."""
        if not len(x):
            return
        x, y = x.to(self.xx), y.to(self.xx)
        mean_x, mean_y = x.mean(0), y.mean(0)
        step_x, step_y = mean_x - self.mean_x, mean_y - self.mean_y
        x, y = x - mean_x, y - mean_y
        total = self.count + len(x)
        between = self.count * len(x) / total
        self.xx.addmm_(x.T, x).addr_(step_x, step_x, alpha=between)
        self.xy.addmm_(x.T, y).addr_(step_x, step_y, alpha=between)
        self.yy += y.square().sum() + between * step_y.square().sum()
        self.mean_x += step_x * (len(x) / total)
        self.mean_y += step_y * (len(x) / total)
        self.count = total


@dataclass(frozen=True, eq=False)
class Affine:
    """x ↦ matrix·x + offset, matrix (q, p), offset (q,)."""

    matrix: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(..., p) -> (..., q)."""
        return x.to(self.matrix) @ self.matrix.T + self.offset

    def after(self, first: Affine) -> Affine:
        """The map that applies ``first``, then this one."""
        return Affine(self.matrix @ first.matrix, self.matrix @ first.offset + self.offset)

    def inverse(self, strength: float, about: Tensor) -> Affine:
        """The map of y to argmin over x of ‖matrix·x + offset − y‖² + λ‖x − about‖².

        λ = ``strength``·tr(matrixᵀmatrix)/p.  Directions the map hardly uses stay at ``about``.
        """
        gram = self.matrix.T @ self.matrix
        inverse = solve_ridge(gram, self.matrix.T, strength)
        return Affine(inverse, about - inverse @ self(about))


def solve_ridge(gram: Tensor, right: Tensor, strength: float) -> Tensor:
    """(G + λI)⁻¹·right with λ = ``strength``·tr(G)/p, for a Gram matrix G (p, p), right (p, q).

    Raises :class:`NumericsError` when there is no finite solution.
    """
    penalty = strength * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    regular = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(regular)
    if failed:
        raise NumericsError(
            "second moments of the activations are not finite or too badly conditioned: "
            "raise the ridge strength or use dtype='float32'"
        )
    return torch.cholesky_solve(right, factor)


def fit_ridge(moments: PairedMoments, strength: float) -> Affine:
    """M, c that minimise Σ‖M·x + c − y‖² + λ‖M‖², λ = ``strength``·tr(Σ x_c·x_cᵀ)/p."""
    matrix = solve_ridge(moments.xx, moments.xy, strength).T
    return Affine(matrix, moments.mean_y - matrix @ moments.mean_x)


def fit_procrustes(moments: PairedMoments) -> Affine:
    """Rotation, one scale and a shift: M = s·U·Vᵀ with U·Σ·Vᵀ = Σ y_c·x_cᵀ.

    M/s has orthonormal rows (q ≤ p) or columns; among those it maximises Σ⟨y_c, M·x_c⟩, and for
    q = p it is the least squares rotation.  s is the least squares scale.
    """
    left, singular, right = torch.linalg.svd(moments.xy.T, full_matrices=False)
    rotation = left @ right
    energy = ((rotation @ moments.xx) * rotation).sum()
    scale = singular.sum() / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    matrix = scale * rotation
    return Affine(matrix, moments.mean_y - matrix @ moments.mean_x)
