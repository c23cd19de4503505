"""Final answers in replies: numbers as in GSM8K, letters as in MMLU, or the whole text.

The reference reply decides which of the three is compared, so that a model cannot change the
question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

_NUMBER = re.compile(
    r"""(?<![\w.])[-+]?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?   # 12   1,234.5   -$3
      | (?<![\w.])[-+]?\.\d+                                      # .5""",
    re.VERBOSE,
)
_STATED = re.compile(r"(?:answer\s+is|answer:|####)\s*(.*)", re.IGNORECASE)
_LETTER_ALONE = re.compile(r"\s*\(?([A-J])\)?[.):]?\s*\Z")
_LETTER_FIRST = re.compile(r"\s*(?:\(([A-J])\)|([A-J])[.):])(?=\s|\Z)")
_LETTER_STATED = re.compile(r"answer(?:\s+is|:)\s*\(?([A-J])\b", re.IGNORECASE)

Kind = Literal["number", "letter", "text"]


@dataclass(frozen=True)
class Answer:
    """A normalised final answer; two answers are equal when kind and value are."""

    kind: Kind
    value: str


def answer_of(reply: str, kind: Kind | None = None) -> Answer | None:
    """The final answer in ``reply``.

    ``kind`` None finds the kind as for a reference: a letter when the reply names a choice, else a
    number when there is one, else the text.  With a ``kind``, that one or None.
    """
    if kind is None:
        return answer_of(reply, "letter") or answer_of(reply, "number") or answer_of(reply, "text")
    value = {"letter": _letter, "number": _number, "text": _text}[kind](reply)
    return None if value is None else Answer(kind, value)


def matches(reply: str, reference: str) -> bool:
    """Whether ``reply`` gives the final answer of ``reference``."""
    wanted = answer_of(reference)
    return wanted is not None and answer_of(reply, wanted.kind) == wanted


def reference_reply(row: Mapping[str, Any] | str) -> str | None:
    """The assistant's words that end a row, or None for plain text and rows without them."""
    if isinstance(row, str):
        return None
    turns = row.get("messages") or row.get("completion")
    if isinstance(turns, str):
        return turns
    if not turns or turns[-1].get("role") != "assistant":
        return None
    content = turns[-1].get("content")
    if content is None or isinstance(content, str):
        return content  # None: the turn only calls tools
    return "".join(part["text"] for part in content)


def _number(reply: str) -> str | None:
    """The number after "the answer is" or "####", else the last one: "$1,234.50" → "1234.5"."""
    stated = _STATED.findall(reply)
    found = _NUMBER.search(stated[-1]) if stated else None
    if found is None:
        every = list(_NUMBER.finditer(reply))
        if not every:
            return None
        found = every[-1]
    digits = re.sub(r"[$,\s]", "", found.group())
    return format(Decimal(digits).normalize(), "f")


def _letter(reply: str) -> str | None:
    """The choice a reply names: "B", "(B)", "B. Paris", "The answer is (B)."."""
    stated = _LETTER_STATED.findall(reply)
    if stated:
        return str(stated[-1]).upper()
    found = _LETTER_ALONE.match(reply) or _LETTER_FIRST.match(reply)
    return None if found is None else next(group for group in found.groups() if group)


def _text(reply: str) -> str | None:
    return " ".join(reply.split()) or None
