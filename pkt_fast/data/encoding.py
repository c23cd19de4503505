"""Rows to examples: the steps of this package in their order."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from ..errors import DataError
from .examples import DataSummary, Examples, ExampleSet, Packed
from .reading import Origin, Row, stream_rows
from .rendering import Rendered, Renderer
from .rows import parse_row
from .templates import Dropped
from .tokenising import prefix_ids, tokenised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 64
_NOTHING_SUPERVISED = "no supervised token"


def encode(
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    limit: int | None = None,
    supervise: Literal["assistant", "all"] = "assistant",
    keep_text: bool = True,
) -> ExampleSet:
    """Read, render and tokenise ``data`` (anything :func:`read_rows` takes), a few rows at a time.

    Args:
        data: rows, or where to find them.
        tokenizer: a Transformers tokenizer; its chat template is used where it has one.
        max_length: longest example in tokens, at least 2; see the package's notes on truncation.
        limit: use only this many rows from the front.
        supervise: "assistant" puts loss on assistant turns and completions, "all" on every token
            but BOS.  Plain text is always supervised throughout.
        keep_text: without it examples have no text and no offsets, and take less memory.

    Raises:
        DataError: the input cannot be read, a row is malformed, or no row has a supervised token.
    """
    if max_length < 2:
        raise DataError(
            f"max_length must be at least 2 (one token predicts the next), not {max_length}"
        )
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 row, not {limit}")
    if supervise not in ("assistant", "all"):
        raise DataError(f"supervise must be 'assistant' or 'all', not {supervise!r}")
    rows, origin = stream_rows(data, limit=limit)
    return _Encoder(tokenizer, supervise, max_length, keep_text).encode(rows, origin)


class _Encoder:
    """Encodes rows and counts what becomes of them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        supervise: str,
        max_length: int,
        keep_text: bool,
    ) -> None:
        self.tokenizer, self.max_length, self.keep_text = tokenizer, max_length, keep_text
        self.render = Renderer(tokenizer, supervise)
        self.prefix = prefix_ids(tokenizer)
        self.packed = Packed()
        self.truncated = 0
        self.formats: Counter[str] = Counter()
        self.dropped: dict[str, list[int]] = {}
        self.unsupervised: list[int] = []

    def encode(self, rows: Iterable[Row], origin: Origin) -> ExampleSet:
        """The examples of ``rows``, with their summary."""
        rendered = self._rendered(rows, origin)
        while some := list(itertools.islice(rendered, _AT_ONCE)):
            self._add(some)
        dropped = {reason: tuple(numbers) for reason, numbers in self.dropped.items()}
        if self.unsupervised:
            dropped[_NOTHING_SUPERVISED] = tuple(self.unsupervised)
        return self._finished(origin.name, dropped)

    def _rendered(self, rows: Iterable[Row], origin: Origin) -> Iterator[Rendered]:
        for i, row in enumerate(rows):
            shape, parsed = parse_row(row, origin.where(i))
            self.formats[shape] += 1
            try:
                rendered = self.render(parsed, i)
            except Dropped as reason:
                self.dropped.setdefault(str(reason), []).append(i)
            else:
                yield rendered

    def _add(self, rendered: list[Rendered]) -> None:
        """Tokenise rendered rows and pack those that have something to learn from."""
        tokens = tokenised(rendered, self.tokenizer, self.prefix)
        for item, whole in zip(rendered, tokens, strict=True):
            if not whole.supervised[1:].any():
                self.unsupervised.append(item.row)
                continue
            self.truncated += len(whole.ids) > self.max_length
            kept = whole.truncated(self.max_length)
            if self.keep_text:
                self.packed.add(kept.ids, kept.supervised, item.row, item.text, kept.spans)
            else:
                self.packed.add(kept.ids, kept.supervised, item.row)

    def _finished(self, source: str, dropped: dict[str, tuple[int, ...]]) -> ExampleSet:
        count = sum(self.formats.values())
        if not self.packed.stops:
            reasons = "; ".join(f"{reason}: {len(rows)}" for reason, rows in dropped.items())
            raise DataError(
                f"{source}: none of its {count} rows has anything to learn from ({reasons})"
            )
        summary = DataSummary(
            source=source,
            rows=count,
            examples=len(self.packed.stops),
            tokens=len(self.packed.ids),
            supervised_tokens=sum(Examples(self.packed).num_supervised),
            truncated=self.truncated,
            max_length=self.max_length,
            formats=dict(self.formats),
            dropped=dropped,
        )
        return ExampleSet(self.packed, summary)
