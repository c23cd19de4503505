"""What an LM head W (V, D) is reduced to, once, so that V need never meet the tokens.

G = WᵀW and a root R with RᵀR = G give ‖W·h‖ = ‖R·h‖ and W⁺ᵀ = W·G⁻¹.  Both are accumulated over
blocks of vocabulary rows in float64: G squares the head's condition number, and float64 leaves room
for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NumericsError
from .ops._gemm import gram as own_gram
from .ops._gemm import mirror_, serves

BLOCK_ROWS = 4096
"""Vocabulary rows converted to float64 at a time: the only temporary that grows with D alone."""

_COLUMN_BLOCKS = 4
_POWER_STEPS = 12


def row_blocks(count: int, block: int = BLOCK_ROWS) -> Iterator[slice]:
    """Slices that cut ``count`` rows into blocks."""
    for start in range(0, count, block):
        yield slice(start, min(start + block, count))


def streamed_gram(weight: Tensor) -> Tensor:
    """G = WᵀW (D, D) in float64, streamed over V; symmetric to the bit.

    Only the upper triangle is multiplied by our own kernel, which converts as it packs; by the
    library the block-upper one (5/8 of the full product with four column blocks).
    """
    if serves(weight.T, weight):
        return own_gram(weight)
    width = weight.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
    columns = list(row_blocks(width, max(1, -(-width // _COLUMN_BLOCKS))))
    for rows in row_blocks(weight.shape[0]):
        block = weight[rows].to(torch.float64)
        for cut in columns:
            gram[cut, cut.start :].addmm_(block[:, cut].T, block[:, cut.start :])
    return mirror_(gram)


@dataclass(frozen=True)
class GramRoot:
    """Upper triangular R (D, D) with RᵀR = G, and G⁺, both float64.

    ``rank`` < D when the head is singular.
    """

    factor: Tensor
    inverse: Tensor
    rank: int


def gram_root(gram: Tensor) -> GramRoot:
    """Cholesky root and inverse of a Gram matrix, by eigenvalues when it is (nearly) singular.

    Directions whose eigenvalue is below 4·D·eps of the largest are rounding noise of the Gram
    matrix itself; the eigenvalue route cuts them off, as a pseudoinverse does, and a QR step makes
    its root triangular.
    """
    width = gram.shape[0]
    cutoff = 4 * width * torch.finfo(torch.float64).eps
    factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
    if not failed:
        inverse = torch.cholesky_inverse(factor, upper=True)
        if better_conditioned(gram, inverse, 4 * cutoff):
            return GramRoot(factor, inverse, width)
    values, vectors = torch.linalg.eigh(gram)
    keep = values > cutoff * values[-1].clamp_min(0)
    kept = values.clamp_min(0).sqrt()
    reciprocal = torch.where(keep, 1 / values.where(keep, torch.ones_like(values)), 0.0)
    return GramRoot(
        factor=torch.linalg.qr((kept * keep)[:, None] * vectors.T, mode="r").R.triu(),
        inverse=(vectors * reciprocal) @ vectors.T,
        rank=int(keep.sum()),
    )


def better_conditioned(gram: Tensor, inverse: Tensor, least: float) -> bool:
    """Whether λ_min/λ_max of G (D, D) exceeds ``least``, given G⁻¹.

    Both are symmetric: the largest row sums of magnitudes bound the eigenvalues, which settles
    most heads.  The others take power iterations on both matrices.
    """
    sums = (torch.linalg.vector_norm(x, 1, dim=1).max() for x in (gram, inverse))
    bound = math.prod(map(float, sums))
    return bound * least < 1 or _largest_eigenvalue(gram) * _largest_eigenvalue(inverse) * least < 1


def _largest_eigenvalue(matrix: Tensor) -> float:
    """Of a symmetric positive definite matrix, by power iteration: a lower bound, and near it."""
    vector = torch.ones(len(matrix), dtype=matrix.dtype, device=matrix.device)
    vector[1::2] = -0.5
    size = vector.norm()
    for _ in range(_POWER_STEPS):
        vector = matrix @ (vector / size)
        size = vector.norm()
    return float(size)


@dataclass(frozen=True)
class HeadStatistics:
    """All that the label cosine needs of a head z = W·h + b besides the rows of its labels.

    ‖z‖² = ‖R·h + c‖² + ρ with R ``factor`` (D, D) upper triangular, c ``shift`` (D,), ρ ``rest``;
    1ᵀz = ``label_sum``·h + ``bias_sum``.  Without a bias c and ρ are 0.
    """

    factor: Tensor
    shift: Tensor
    rest: float
    label_sum: Tensor
    bias_sum: float


@torch.no_grad()
def head_statistics(weight: Tensor, bias: Tensor | None = None) -> HeadStatistics:
    """Stream the head (V, D) once; results in float32 (float64 for a float64 head).

    ``bias`` is (V,).  Raises :class:`~pkt_fast.errors.NumericsError` for a head that is not finite.
    """
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    gram = streamed_gram(weight)
    if not (torch.isfinite(gram.diagonal()).all() and (bias is None or torch.isfinite(bias).all())):
        raise NumericsError("the LM head holds NaN or inf: check the checkpoint")
    root = gram_root(gram)
    label_sum = weight.sum(0, dtype=torch.float64)
    shift = torch.zeros_like(label_sum)
    rest = bias_sum = 0.0
    if bias is not None:
        bias = bias.to(torch.float64)
        projected = torch.zeros_like(label_sum)
        for rows in row_blocks(weight.shape[0]):
            projected += weight[rows].to(torch.float64).T @ bias[rows]
        # c solves Rᵀc = Wᵀb; R·G⁺ is the pseudoinverse of Rᵀ whichever route gave R.
        shift = root.factor @ (root.inverse @ projected)
        rest = max(0.0, float(bias @ bias - shift @ shift))
        bias_sum = float(bias.sum())
    return HeadStatistics(root.factor.to(work), shift.to(work), rest, label_sum.to(work), bias_sum)
