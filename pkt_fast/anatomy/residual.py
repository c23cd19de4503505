"""Step 2 of a probe, the solving: which module outputs make up what a block adds to the stream.

``out - in = sum_i s_i * c_i`` with one or two terms is solved on inner products alone: the relative
residual of scales s is 1 - 2 s·g + sᵀGs, where g and G are in units of the contribution's squared
norm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .findings import Source
from .sublayers import BlockRecord
from .trial import short

_LOOSEST_TOLERANCE = 0.5
_RESOLUTION = 1e-7  # relative residual below which the inner products cannot resolve


class _Fit(NamedTuple):
    """The relative residual left by ``chosen`` candidates (indices into a Gram matrix) at
    ``scales``.
    """

    residual: float
    chosen: tuple[int, ...]
    scales: tuple[float, ...]


def explain_blocks(
    blocks: Sequence[nn.Module], records: Sequence[BlockRecord]
) -> list[tuple[Source, ...] | None]:
    """For every block the terms of its contribution, with their scales, in execution order.

    Blocks of one kind are solved together, and what is found must hold for each.  None where no
    one or two tensors explain the block.
    """
    kinds = [_kind(block) for block in blocks]
    found: dict[tuple[Any, ...], tuple[Source, ...] | None] = {}
    for kind in dict.fromkeys(kinds):
        found[kind] = _explain([r for r, k in zip(records, kinds, strict=True) if k == kind])
    result: list[tuple[Source, ...] | None] = []
    for kind, record in zip(kinds, records, strict=True):
        terms = found[kind]
        result.append(terms if terms and _holds(record, terms) else None)
    return result


def same(gram: Tensor, i: int, j: int) -> bool:
    """Whether candidates ``i`` and ``j`` of a Gram matrix have the same values."""
    distance = float(gram[i, i] + gram[j, j] - 2 * gram[i, j])
    return distance <= 1e-11 * float(gram[i, i])


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Blocks of one class with the same submodules are explained together."""
    return type(block), tuple(name for name, _ in block.named_modules())


def _explain(records: Sequence[BlockRecord]) -> tuple[Source, ...] | None:
    """The one or two tensors that sum to the contribution in all blocks of one kind."""
    shared = [s for s in records[0].sources if all(s in record.sources for record in records)]
    moving = [record for record in records if record.gram[0, 0] > 0]
    if not moving:
        return None
    gram = torch.stack([_relative(record, shared) for record in moving]).mean(0)
    noise = max(record.noise / math.sqrt(float(record.gram[0, 0])) for record in moving)
    best = _best_fit(gram, _distinct(shared, gram), noise)
    if best is None or best.residual > min(1e-5 + noise, _LOOSEST_TOLERANCE):
        return None
    overwritten = frozenset[Source]().union(*(record.overwritten for record in records))
    terms = sorted(zip(best.chosen, best.scales, strict=True))
    found = [(shared[i - 1], scale) for i, scale in terms]
    return tuple(replace(s, scale=short(scale), copy=s in overwritten) for s, scale in found)


def _relative(record: BlockRecord, shared: Sequence[Source]) -> Tensor:
    """The record's inner products for the shared sources, in units of the contribution's norm."""
    index = torch.tensor([0, *record.index(shared)])
    return record.gram[index][:, index] / record.gram[0, 0]


def _distinct(sources: Sequence[Source], gram: Tensor) -> list[int]:
    """Candidates in order of preference: plain before differences, outermost, then latest.

    Of several with the same values (a module and its last submodule) only the first is kept.
    """

    def preference(i: int) -> tuple[bool, int, int]:
        source = sources[i - 1]
        return source.minus is not None, source.path.count("."), -i

    kept: list[int] = []
    for i in sorted(range(1, len(sources) + 1), key=preference):
        size = float(gram[i, i])
        if size > 1e-10 and not any(same(gram, i, j) for j in kept):
            kept.append(i)
    return kept


def _best_fit(gram: Tensor, candidates: Sequence[int], noise: float) -> _Fit | None:
    """The simplest of the best sums of one or two candidates."""
    units: list[_Fit] = []
    scaled: list[_Fit] = []
    for size in (1, 2):
        for chosen in itertools.combinations(candidates, size):
            ones = (1.0,) * size
            units.append(_Fit(_residual(gram, chosen, ones), chosen, ones))
            scales = _least_squares(gram, chosen)
            if scales is not None:
                scaled.append(_Fit(_residual(gram, chosen, scales), chosen, scales))
    best, free = _simplest(units, noise / 8), _simplest(scaled, noise / 8)
    # A free scale must earn itself: it wins only where scale one is clearly worse.
    if free is not None and (best is None or free.residual < 0.5 * best.residual):
        return free
    return best


def _residual(gram: Tensor, chosen: Sequence[int], scales: Sequence[float]) -> float:
    return max(_distance(gram, chosen, scales), _RESOLUTION)


def _distance(gram: Tensor, chosen: Sequence[int], scales: Sequence[float]) -> float:
    """Norm of the contribution (index 0 of ``gram``) minus the scaled sum of ``chosen``."""
    index = torch.tensor([0, *chosen])
    weights = torch.tensor([-1.0, *scales], dtype=torch.float64)
    return math.sqrt(max(float(weights @ gram[index][:, index] @ weights), 0.0))


def _least_squares(gram: Tensor, chosen: Sequence[int]) -> tuple[float, ...] | None:
    """The scales that leave the smallest residual; None when they are no sane factors."""
    index = torch.tensor(chosen)
    matrix, target = gram[index][:, index], gram[index, 0]
    norms = matrix.diagonal().sqrt()
    if len(chosen) == 2 and float(matrix[0, 1].abs()) > (1 - 1e-9) * float(norms.prod()):
        return None
    scales = torch.linalg.solve(matrix, target)
    sane = (scales.abs() > 1e-3) & (scales.abs() < 1e3)
    return tuple(scales.tolist()) if bool(sane.all()) else None


def _simplest(fits: Sequence[_Fit], rounding: float) -> _Fit | None:
    """The first (fewest terms, most preferred) of those as good as the best, up to rounding."""
    if not fits:
        return None
    best = min(fit.residual for fit in fits)
    return next(fit for fit in fits if fit.residual <= max(2 * best, rounding))


def _holds(record: BlockRecord, terms: Sequence[Source]) -> bool:
    """Whether terms found on all blocks of a kind are right for this one."""
    chosen = record.index([term.bare() for term in terms])
    distance = _distance(record.gram, chosen, [term.scale for term in terms])
    return distance <= 1e-4 * math.sqrt(float(record.gram[0, 0])) + record.noise
