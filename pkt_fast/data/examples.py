"""What encoding makes of rows: examples of token ids and labels, and how they came about.

Rows may be many, so examples are held in a few flat arrays (:class:`Examples`): five bytes a token,
and twelve more a token with a text.  A Python object for each (:class:`Example`) is made when it is
asked for.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np

IGNORE_INDEX = -100
"""Label of a token that carries no loss (the convention of torch and Transformers)."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One tokenised row.

    Attributes:
        input_ids: token ids.
        labels: same length; ``labels[t]`` is ``input_ids[t]`` or -100 where there is no loss.
        row: 0-based number of the row in the input.
        utf8: the rendered text, encoded.
        spans: what :attr:`offsets` says, as native int32 pairs; None when the tokenizer cannot
            tell.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    row: int
    utf8: bytes = b""
    spans: bytes | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def num_supervised(self) -> int:
        """Positions with a loss: the first token is never predicted."""
        return max(len(self) - 1, 0) - self.labels[1:].count(IGNORE_INDEX)

    @cached_property
    def text(self) -> str:
        """The rendered text, special tokens included; "" where it was not kept."""
        return self.utf8.decode("utf-8", "surrogatepass")

    @cached_property
    def offsets(self) -> tuple[Span, ...] | None:
        """Character span of every token in ``text``, without gaps; (0, 0) for tokens that are not
        in the text (BOS).  None when the tokenizer cannot tell.
        """
        if self.spans is None:
            return None
        table = np.frombuffer(self.spans, dtype=np.intc).reshape(-1, 2)
        return tuple((start, end) for start, end in table.tolist())


@dataclass(eq=False)
class Packed:
    """Examples one behind the other in flat arrays, added to one by one.

    Attributes:
        ids: token ids of all examples.
        supervised: one byte a token: 1 where the token is its own label, 0 where there is none.
        stops: where each example ends in ``ids``.
        rows: each example's row in the input.
        utf8: the texts of all examples.
        utf8_stops: where each example's ends in ``utf8``.
        spans: characters of every token, (start, end) each; None when the tokenizer cannot tell,
            or when no text is kept.
    """

    ids: array[int] = field(default_factory=lambda: array("i"))
    supervised: bytearray = field(default_factory=bytearray)
    stops: array[int] = field(default_factory=lambda: array("q"))
    rows: array[int] = field(default_factory=lambda: array("q"))
    utf8: bytearray = field(default_factory=bytearray)
    utf8_stops: array[int] = field(default_factory=lambda: array("q"))
    spans: array[int] | None = None

    def add(
        self,
        ids: np.ndarray,
        supervised: np.ndarray,
        row: int,
        text: str = "",
        spans: np.ndarray | None = None,
    ) -> None:
        """Append an example: ``ids`` (T,), ``supervised`` (T,) bool and ``spans`` (T, 2)."""
        self.ids.frombytes(ids.astype(np.intc).tobytes())
        self.supervised += supervised.astype(np.uint8).tobytes()
        self.stops.append(len(self.ids))
        self.rows.append(row)
        self.utf8 += text.encode("utf-8", "surrogatepass")
        self.utf8_stops.append(len(self.utf8))
        if spans is not None:
            self.spans = array("i") if self.spans is None else self.spans
            self.spans.frombytes(spans.astype(np.intc).tobytes())


class Examples(Sequence[Example]):
    """A sequence of examples, held compactly."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._ids = np.asarray(packed.ids)
        self._supervised = np.asarray(memoryview(packed.supervised))

    def __len__(self) -> int:
        return len(self._packed.stops)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self._picked(range(len(self))[index])
        index = range(len(self))[index]
        packed, part = self._packed, self._part(index)
        text = slice(packed.utf8_stops[index - 1] if index else 0, packed.utf8_stops[index])
        spans = packed.spans
        return Example(
            tuple(packed.ids[part]),
            tuple(self._labels(index).tolist()),
            packed.rows[index],
            bytes(packed.utf8[text]),
            None if spans is None else spans[2 * part.start : 2 * part.stop].tobytes(),
        )

    def _picked(self, indices: Sequence[int]) -> Examples:
        packed = Packed()
        for index in indices:
            example, part = self[index], self._part(index)
            spans = example.spans
            packed.add(
                self._ids[part],
                self._supervised[part],
                example.row,
                example.text,
                None if spans is None else np.frombuffer(spans, np.intc),
            )
        return Examples(packed)

    def _part(self, index: int) -> slice:
        """Where an example's tokens are."""
        stops = self._packed.stops
        return slice(stops[index - 1] if index else 0, stops[index])

    def _labels(self, index: int) -> np.ndarray:
        part = self._part(index)
        return np.where(self._supervised[part], self._ids[part], IGNORE_INDEX)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every example."""
        return tuple(np.diff(np.asarray(self._packed.stops), prepend=0).tolist())

    @cached_property
    def num_supervised(self) -> tuple[int, ...]:
        """Positions with a loss of every example; see :attr:`Example.num_supervised`."""
        parts = map(self._part, range(len(self)))
        count = self._packed.supervised.count
        return tuple(count(1, part.start + 1, part.stop) for part in parts)

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples."""
        return int(self._ids.max(initial=0))

    def drop_text(self) -> None:
        """Let go of texts and offsets, most of the memory beside the tokens."""
        self._packed.utf8.clear()
        self._packed.spans = None

    def supervised_positions(self, index: int) -> np.ndarray:
        """Positions of one example whose next token carries loss: (``num_supervised[index]``,)."""
        return np.flatnonzero(self._supervised[self._part(index)][1:])

    def fingerprint(self) -> str:
        """Return a SHA-256 of all ids and labels: equal iff a model would see the same data."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            table = np.stack([self._ids[self._part(index)], self._labels(index)]).astype("<i8")
            digest.update(table.shape[1].to_bytes(8, "little"))
            digest.update(table.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class DataSummary:
    """What was read, kept, shortened and dropped, and why.

    ``dropped`` maps a reason to the 0-based row numbers it applies to.
    """

    source: str
    rows: int
    examples: int
    tokens: int
    supervised_tokens: int
    truncated: int
    max_length: int
    formats: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        """Rows that gave no example."""
        return sum(len(rows) for rows in self.dropped.values())

    def lines(self) -> list[str]:
        """Return the summary as short lines for a terminal."""
        shapes = ", ".join(f"{count:,} {name}" for name, count in sorted(self.formats.items()))
        out = [
            f"read {self.rows:,} rows from {self.source} ({shapes})",
            f"kept {self.examples:,} examples: {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised",
        ]
        if self.truncated:
            out.append(f"truncated {self.truncated:,} rows to {self.max_length:,} tokens")
        out += [
            f"dropped {len(rows):,} rows: {reason} (rows {_shortlist(rows)})"
            for reason, rows in self.dropped.items()
        ]
        return out

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types, for ``report.json``."""
        return {
            "source": self.source,
            "rows": self.rows,
            "examples": self.examples,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "truncated": self.truncated,
            "max_length": self.max_length,
            "formats": dict(self.formats),
            "dropped": {reason: list(rows) for reason, rows in self.dropped.items()},
        }


class ExampleSet(Examples):
    """Examples with the summary of how they came about."""

    def __init__(self, packed: Packed, summary: DataSummary) -> None:
        super().__init__(packed)
        self.summary = summary


def _shortlist(rows: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, rows[:most]))
    return shown if len(rows) <= most else f"{shown}, and {len(rows) - most:,} more"
