"""Rendered text to token ids and which of them are supervised, shortened to the longest length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .examples import Span
from .rendering import Rendered
from .turns import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one rendered row.

    Attributes:
        ids: (T,) token ids.
        supervised: (T,) bool, whether a token carries loss.
        spans: (T, 2) characters of every token; None when the tokenizer cannot tell.
        head: tokens at the front that must stay (BOS).
    """

    ids: np.ndarray
    supervised: np.ndarray
    spans: np.ndarray | None
    head: int

    def truncated(self, max_length: int) -> Tokens:
        """Shorten to ``max_length`` tokens, the supervised ones last (see :mod:`pkt_fast.data`)."""
        if len(self.ids) <= max_length:
            return self
        supervised = np.flatnonzero(self.supervised).tolist()
        end = max(supervised[-1] + 1, max_length)
        head = min(self.head, max_length - 1)
        spare = supervised[0] - max(head, 1)
        drop = min(end - max_length, max(spare, 0))
        kept = np.r_[:head, head + drop : end][:max_length]
        spans = None if self.spans is None else self.spans[kept]
        return replace(self, ids=self.ids[kept], supervised=self.supervised[kept], spans=spans)


def tokenised(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, prefix: list[int]
) -> Iterator[Tokens]:
    """Yield the tokens of each row; ``prefix`` are :func:`prefix_ids` of ``tokenizer``."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenize(tokenizer, [item.text for item in rendered], offsets=fast)
    for i, item in enumerate(rendered):
        ids: list[int] = encoded["input_ids"][i]
        spans: np.ndarray | None = None
        if fast:
            spans = without_gaps(encoded["offset_mapping"][i])
            mask = _overlaps(spans, item.spans)
        else:
            mask = _slow_mask(tokenizer, item, ids)
        head = _head(ids, prefix, tokenizer.bos_token_id)
        mask[:head] = False
        if item.needs_prefix and not head:
            head = len(prefix)
            ids, mask = prefix + ids, np.r_[np.zeros(head, dtype=bool), mask]
            if spans is not None:
                spans = np.r_[np.zeros((head, 2), dtype=np.int64), spans]
        yield Tokens(np.array(ids, dtype=np.int64), mask, spans, head)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, offsets: bool) -> Any:
    """Token ids of ``texts`` as they are, and with ``offsets`` the characters of every token."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids the tokenizer puts in front of any text (BOS), found by trying."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for k in range(len(full) - len(bare) + 1):
        if full[k : k + len(bare)] == bare:
            return full[:k]
    return []


def _head(ids: Sequence[int], prefix: list[int], bos: int | None) -> int:
    """Tokens at the front of ``ids`` that already are the BOS part."""
    if prefix and list(ids[: len(prefix)]) == prefix:
        return len(prefix)
    return int(bool(ids) and ids[0] == bos)


def without_gaps(offsets: Sequence[Span]) -> np.ndarray:
    """Let every token begin no later than the one before ended: (T, 2).

    Byte-level tokenizers may leave the blank of " word" out of its span, or give blanks no span at
    all; they do belong to the token.
    """
    table = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    reached = np.maximum.accumulate(table[:, 1])
    table[:1, 0] = 0
    table[1:, 0] = np.minimum(table[1:, 0], reached[:-1])
    return table


def _overlaps(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Whether each token shares a character with a span (or, if empty, lies in one): (T,) bool."""
    start, end = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    mask = np.zeros(len(offsets), dtype=bool)
    for low, high in spans:
        mask |= (start < high) & (end > low)
    return mask


def _slow_mask(
    tokenizer: PreTrainedTokenizerBase, item: Rendered, ids: Sequence[int]
) -> np.ndarray:
    """Do the same for a tokenizer without offsets, by tokenising the text up to each border."""
    borders = [border for span in item.spans for border in span]
    pieces = tokenize(tokenizer, [item.text[:border] for border in borders], offsets=False)
    # Tokens wholly before a border; the one that straddles it, if any, comes next.
    whole = [common_prefix(piece, ids) for piece in pieces["input_ids"]]
    mask = np.zeros(len(ids), dtype=bool)
    for k in range(len(item.spans)):
        straddles = whole[2 * k + 1] < len(pieces["input_ids"][2 * k + 1])
        mask[whole[2 * k] : whole[2 * k + 1] + straddles] = True
    return mask
