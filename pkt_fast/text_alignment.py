"""Two tokenizers, one text: which source token position answers a target token position.

Source and target of different families cut the same text differently.  A target position that has
read the text up to character c is answered by the last source position that has read no further
than c, so the source never knows more of the text than the target does.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from .data.examples import IGNORE_INDEX, Example, Examples, Packed
from .data.tokenising import prefix_ids, tokenize, without_gaps
from .errors import DataError

_AT_ONCE = 64


def retokenized(examples: Examples, tokenizer: Any) -> Examples:
    """The examples' text in the tokens of another ``tokenizer``, row by row.

    A token is supervised when its first character belongs to a supervised token of the original.
    Text that truncation removed stays removed.  Raises :class:`DataError` when either tokenizer
    cannot tell which characters a token covers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "source and target tokenize differently, and the source's tokenizer gives no character "
            "offsets: use a fast tokenizer"
        )
    prefix = np.array(prefix_ids(tokenizer), dtype=np.int64)
    packed = Packed()
    for start in range(0, len(examples), _AT_ONCE):
        some = examples[start : start + _AT_ONCE]
        kept = [_kept_text(example) for example in some]
        encoded = tokenize(tokenizer, [text for text, _ in kept], offsets=True)
        for i, (example, (text, ends)) in enumerate(zip(some, kept, strict=True)):
            ids = np.array(encoded["input_ids"][i], dtype=np.int64)
            spans = without_gaps(encoded["offset_mapping"][i])
            supervised = _supervised_characters(example, ends)
            starts = np.minimum(spans[:, 0], max(len(supervised) - 1, 0))
            mask = supervised[starts] if len(supervised) else np.zeros(len(ids), dtype=bool)
            packed.add(
                np.r_[prefix, ids],
                np.r_[np.zeros(len(prefix), dtype=bool), mask],
                example.row,
                text,
                np.r_[np.zeros((len(prefix), 2), dtype=np.int64), spans],
            )
    return Examples(packed)


def answering_positions(target: Example, source: Example) -> list[int]:
    """For every supervised position of ``target``, the position of ``source`` that answers it.

    ``source`` is ``target`` retokenized.
    """
    _, target_ends = _kept_text(target)
    assert source.offsets is not None
    # Special tokens of no width share their end with the token before them; take the last of
    # equals.
    source_ends = list(accumulate((end for _, end in source.offsets), max))
    return [
        max(0, bisect.bisect_right(source_ends, target_ends[t]) - 1)
        for t, label in enumerate(target.labels[1:])
        if label != IGNORE_INDEX
    ]


def _kept_text(example: Example) -> tuple[str, list[int]]:
    """The text the example's tokens cover, and how much of it each token's end has read."""
    if example.offsets is None:
        raise DataError(
            "source and target tokenize differently, and the target's tokenizer gives no character "
            "offsets: use a fast tokenizer"
        )
    pieces, reached = [], 0
    for start, end in example.offsets:
        pieces.append(example.text[max(start, reached) : end])
        reached = max(reached, end)
    return "".join(pieces), list(accumulate(map(len, pieces)))


def _supervised_characters(example: Example, ends: Sequence[int]) -> np.ndarray:
    """Whether each character of the kept text belongs to a supervised token."""
    mask = np.zeros(ends[-1] if ends else 0, dtype=bool)
    for label, (start, end) in zip(example.labels, pairwise([0, *ends]), strict=True):
        if label != IGNORE_INDEX:
            mask[start:end] = True
    return mask
