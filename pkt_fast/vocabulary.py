"""Matching the vocabularies of two models, token by token.

Row i of an LM head belongs to token i of that model's own tokenizer.  Heads can be padded beyond
the tokenizer, differ by a token (32,000 and 32,001), or belong to different families that spell the
same string differently (byte-level "Ġthe", SentencePiece "▁the").
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import VocabularyError

MINIMUM_SHARED = 256
MINIMUM_FRACTION = 0.05


@dataclass(frozen=True)
class SharedVocabulary:
    """Rows of two LM heads that mean the same token: ``source[i]`` and ``target[i]`` (int64,
    sorted).
    """

    source: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.source)

    def covers(self, source_rows: int, target_rows: int) -> bool:
        """Whether every row of both heads is shared, in order."""
        return len(self) == source_rows == target_rows and bool(
            torch.equal(self.source, self.target)
        )


def match_vocabularies(
    source_rows: int,
    target_rows: int,
    source_tokenizer: Any | None = None,
    target_tokenizer: Any | None = None,
) -> SharedVocabulary:
    """Match the rows of two LM heads with ``source_rows`` and ``target_rows`` rows.

    With both tokenizers, rows are matched by token string (spellings normalised) and padding rows
    are left out.  Without them, the heads must have the same number of rows.  Raises
    :class:`VocabularyError` when they share fewer than 5 % of the smaller vocabulary or 256 tokens
    (half of a smaller vocabulary than that).
    """
    if source_tokenizer is None or target_tokenizer is None:
        if source_rows != target_rows:
            raise VocabularyError(
                f"LM heads have {source_rows} and {target_rows} rows: pass the tokenizers of both "
                "models so that rows can be matched by token"
            )
        rows = torch.arange(source_rows)
        return SharedVocabulary(rows, rows)
    if source_tokenizer is target_tokenizer and source_rows == target_rows:
        indices = source_tokenizer.get_vocab().values()
        rows = torch.tensor(sorted({i for i in indices if i < source_rows}), dtype=torch.int64)
        return SharedVocabulary(rows, rows)
    source = _token_table(source_tokenizer, source_rows)
    target = _token_table(target_tokenizer, target_rows)
    shared = sorted((index, target[token]) for token, index in source.items() if token in target)
    smaller = min(len(source), len(target))
    needed = min(max(MINIMUM_SHARED, int(MINIMUM_FRACTION * smaller)), max(1, smaller // 2))
    if len(shared) < needed:
        raise VocabularyError(
            f"source and target share {len(shared)} tokens of {len(source)} and {len(target)}; "
            f"alignment needs at least {needed}: choose models of one family"
        )
    pairs = torch.tensor(shared, dtype=torch.int64)
    return SharedVocabulary(pairs[:, 0].contiguous(), pairs[:, 1].contiguous())


def same_tokenization(source_tokenizer: Any, target_tokenizer: Any) -> bool:
    """Whether both tokenizers give every shared string the same ids (same vocabulary and
    merges).
    """
    if source_tokenizer is target_tokenizer:
        return True
    source, target = source_tokenizer.get_vocab(), target_tokenizer.get_vocab()
    shared = source.keys() & target.keys()
    if len(shared) < 0.99 * max(len(source), len(target)):
        return False
    if any(source[token] != target[token] for token in shared):
        return False
    probe = "The 12 quick brown foxes, isn't it? def f(x):\n    return x**2  # 3.14 — ünïcödé"
    return bool(
        source_tokenizer(probe, add_special_tokens=False)["input_ids"]
        == target_tokenizer(probe, add_special_tokens=False)["input_ids"]
    )


def _token_table(tokenizer: Any, rows: int) -> dict[bytes, int]:
    """Normalised spelling → row, for the tokens that have a row in the head."""
    vocabulary = tokenizer.get_vocab()
    byte_level = _is_byte_level(vocabulary)
    special = set(tokenizer.all_special_tokens)
    table: dict[bytes, int] = {}
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        if index < rows:
            spelling = token.encode() if token in special else _spelling(token, byte_level)
            table.setdefault(spelling, index)
    return table


def _is_byte_level(vocabulary: dict[str, int]) -> bool:
    return any(token.startswith("Ġ") for token in vocabulary) and "<0x0A>" not in vocabulary


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte value, inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(value): value for value in printable}
    others = [value for value in range(256) if value not in printable]
    return table | {chr(256 + position): value for position, value in enumerate(others)}


def _spelling(token: str, byte_level: bool) -> bytes:
    """The bytes a token stands for, the same for byte-level and SentencePiece spellings."""
    if byte_level:
        with contextlib.suppress(KeyError):  # a character outside the alphabet: not byte-level
            return bytes(map(_byte_alphabet().__getitem__, token))
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
