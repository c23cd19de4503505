"""Which examples go into one batch: shuffled, like lengths together, little padding."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

_WINDOW_BATCHES = 50
_MIXING = 0.02
_MAX_PADDING = 0.10


def batch_indices(
    lengths: Sequence[int],
    batch_size: int,
    *,
    seed: int | None = None,
    epoch: int = 0,
    bucket: bool = True,
) -> list[list[int]]:
    """Split ``range(len(lengths))`` into batches; every index appears exactly once.

    Without a seed the order is that of the input.  With one it is shuffled, the same way for the
    same (seed, epoch).  With ``bucket`` the shuffled indices are cut into windows of 50 batches,
    sorted by length inside each window (give or take 2 %, so that every epoch mixes its batches
    anew), cut into batches, and the batches shuffled.

    A window whose batches would be more than a tenth padding is cut where padding is least, into
    smaller batches if need be, at most one more in eight: the number of batches may exceed
    ``ceil(len(lengths) / batch_size)`` by that, and no batch is larger than ``batch_size``.
    """
    order = list(range(len(lengths)))
    if seed is None:
        return _chunks(order, batch_size)
    generator = random.Random(f"{seed}/{epoch}")
    generator.shuffle(order)
    if not bucket:
        return _chunks(order, batch_size)
    key = [length * generator.uniform(1 - _MIXING, 1 + _MIXING) for length in lengths]
    out: list[list[int]] = []
    for window in _chunks(order, _WINDOW_BATCHES * batch_size):
        window.sort(key=key.__getitem__)
        stops = np.cumsum(_batch_sizes([lengths[i] for i in window], batch_size)).tolist()
        out += [window[i:j] for i, j in zip([0, *stops], stops, strict=False)]
    generator.shuffle(out)
    return out


def _batch_sizes(lengths: Sequence[int], batch_size: int) -> list[int]:
    """Cut (nearly) sorted rows into batches; see :func:`batch_indices` for when sizes differ."""
    rows = list(range(len(lengths)))
    plain = _chunks(rows, batch_size)
    allowed = sum(lengths) / (1 - _MAX_PADDING)
    area = sum(len(batch) * max(lengths[i] for i in batch) for batch in plain)
    extra = len(plain) // 8
    if area <= allowed or not extra:
        return [len(batch) for batch in plain]
    return _least_padding(np.array(lengths), batch_size, len(plain) + extra, allowed)


def _least_padding(lengths: np.ndarray, batch_size: int, most: int, allowed: float) -> list[int]:
    """Sizes of the fewest batches with a padded area <= ``allowed``, or of ``most`` batches.

    Dynamic programme over the number of batches: ``best[j]`` is the least area of the first j
    rows, ``area[j, i]`` that of one batch of i + 1 rows ending with row j.
    """
    count, width = len(lengths), min(batch_size, len(lengths))

    def backwards(values: np.ndarray, fill: float) -> np.ndarray:
        padded = np.concatenate([np.full(width - 1, fill), values])
        return np.lib.stride_tricks.sliding_window_view(padded, width)[:, ::-1]

    area = np.maximum.accumulate(backwards(lengths, 0), axis=1) * np.arange(1, width + 1)
    best = np.full(count + 1, np.inf)
    best[0] = 0
    choices: list[np.ndarray] = []
    while len(choices) < most and best[-1] > allowed:
        total = backwards(best[:-1], np.inf) + area
        choices.append(total.argmin(axis=1) + 1)
        best = np.concatenate([[np.inf], total.min(axis=1)])
    sizes: list[int] = []
    for choice in reversed(choices):
        sizes.append(int(choice[count - sum(sizes) - 1]))
    return sizes[::-1]


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
