"""What the source writes itself: replies to given questions, and whole rows.

Where the data is small, or has no labels, the source can make more of it.  A new question begins
like one of the given rows (a random share of its tokens is kept) and goes on as the source samples
it, up to the end of the user's turn; then the source answers it greedily.  Some questions come out
odd, and a reply to those is worth little: more rows are written than wanted, and those are kept in
whose replies the source doubted no token much.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from torch import nn

from ._random import seeded
from .data.batches import batches
from .data.encoding import encode
from .data.rendering import render_prompt, special_tokens
from .data.rows import parse_turns
from .errors import DataError, ModelError
from .evaluation.answers import reference_reply
from .evaluation.generation import complete, generate_replies, open_ids
from .evaluation.rows import token_losses
from .loading import pad_token_id

Row = dict[str, Any]

LARGEST_BEGINNING = 0.5
"""Largest share of a question's tokens that a new question begins with; the least is none."""

SPARE = 1.5
"""Rows written for every row wanted; those with the surest replies are kept."""

ROUNDS = 4
"""Rounds of attempts, so that a source that cannot do it does not go on for ever."""

_MARK = "@@pkt-question@@"


def answer_rows(
    source: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """``rows`` with the source's own greedy replies in place of theirs; a row need not have one.

    Raises :class:`DataError` for a row of plain text, which has no reply.
    """
    asked = [with_reply(row, "", number) for number, row in enumerate(rows)]
    replies = generate_replies(
        source, asked, tokenizer,
        max_new_tokens=max_new_tokens, batch_size=batch_size, advance=advance,
    )  # fmt: skip
    return [with_reply(row, reply) for row, reply in zip(asked, replies, strict=True)]


def write_rows(
    source: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    count: int,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """Up to ``count`` new rows, in the shape of the rows they begin like, no question twice.

    A question that the source does not end within ``max_new_tokens``, that holds a special token,
    was asked before or gets an empty reply is tried again, in :data:`ROUNDS` rounds, until there
    are :data:`SPARE` times as many rows as wanted.  Of these, the ones with the highest least
    log-probability of a supervised token are kept.  Rows of plain text are continued to their end.
    ``seed`` decides what is drawn, and leaves torch's own random state alone.

    Raises :class:`DataError` for a row that does not show where its question ends (a
    prompt/completion pair without a chat template), :class:`ModelError` when nothing usable came.
    """
    random = Random(seed)
    openings = [_Opening.of(row, tokenizer, number) for number, row in enumerate(rows)]
    asked = {opening.words for opening in openings}
    enough, written = math.ceil(SPARE * count), list[Row]()
    for _ in range(ROUNDS):
        begun = [random.choice(openings).begin(random) for _ in range(enough - len(written))]
        if not begun:
            break
        questions = _go_on(source, begun, tokenizer, max_new_tokens, batch_size, random)
        pairs = dict(zip(questions, (begin.opening for begin in begun), strict=True))
        fresh = {words: of for words, of in pairs.items() if words and words not in asked}
        asked.update(fresh)
        new = _answered(
            source,
            [_with_question(opening.given, words) for words, opening in fresh.items()],
            tokenizer,
            max_new_tokens,
            batch_size,
        )
        written += new
        advance(len(new))
    if count and not written:
        raise ModelError(
            f"the source wrote none of the {count} rows that are missing, in {ROUNDS} rounds; give "
            "more or longer rows, or set min_rows=0"
        )
    return _surest(source, written, tokenizer, count, batch_size)


@dataclass(frozen=True)
class _Opening:
    """A given row up to its question, and what ends a question there."""

    given: Row
    before: tuple[int, ...]
    question: tuple[int, ...]
    words: str
    closing: str

    @classmethod
    def of(cls, row: Mapping[str, Any], tokenizer: Any, number: int) -> _Opening:
        """Find the last question of ``row`` in the text that the source would see."""
        words = question_of(row, number)
        marked = render_prompt(_with_question(row, _MARK), tokenizer)
        before, _, behind = marked.partition(_MARK)
        closing = _closing(behind, tokenizer)
        if row.get("text") is None and not closing:
            raise DataError(
                f"row {number}: to write rows like it the source has to see where its question "
                "ends, and a prompt/completion pair without a chat template does not show it: "
                "set min_rows=0"
            )
        head = open_ids(before, tokenizer)
        ids = open_ids(before + words, tokenizer)
        return cls(dict(row), tuple(head), tuple(ids[len(head) :]), words, closing)

    def begin(self, random: Random) -> _Begun:
        """The row's beginning and a random share of its question."""
        kept = round(random.uniform(0, LARGEST_BEGINNING) * len(self.question))
        return _Begun(self, self.question[:kept])


@dataclass(frozen=True)
class _Begun:
    """The beginning of a new question: token ids of the ``opening``'s own one."""

    opening: _Opening
    kept: tuple[int, ...]


def _closing(behind: str, tokenizer: Any) -> str:
    """What ends a question, of the text that stands ``behind`` one: a special token, or all."""
    text = behind.strip()
    token = special_tokens(tokenizer).match(text)
    return token.group() if token else text


def _go_on(
    source: nn.Module,
    begun: Sequence[_Begun],
    tokenizer: Any,
    max_new_tokens: int,
    batch_size: int,
    random: Random,
) -> list[str]:
    """Complete the questions; an empty string for one that did not come to its end."""
    closings = sorted({begin.opening.closing for begin in begun} - {""})
    stopping: dict[str, Any] = {"stop_strings": closings} if closings else {}
    with seeded(random.randrange(1 << 31), next(source.parameters()).device):
        new = complete(
            source, [[*begin.opening.before, *begin.kept] for begin in begun], tokenizer,
            max_new_tokens=max_new_tokens, batch_size=batch_size,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_beams=1, **stopping,
        )  # fmt: skip
    texts = tokenizer.batch_decode(
        [[*begin.kept, *ids] for begin, ids in zip(begun, new, strict=True)]
    )
    special = special_tokens(tokenizer)
    return [
        _finished(text, begin.opening.closing, tokenizer.eos_token, special)
        for text, begin in zip(texts, begun, strict=True)
    ]


def _finished(text: str, closing: str, eos: str | None, special: re.Pattern[str]) -> str:
    """The words of a completed question; an empty string when it has no end or a special token.

    Plain text, which has no ``closing``, needs no end.
    """
    end = closing or eos
    words, found, _ = text.partition(end) if end else (text, "", "")
    return words.strip() if (found or not closing) and not special.search(words) else ""


def _answered(
    source: nn.Module, rows: list[Row], tokenizer: Any, max_new_tokens: int, batch_size: int
) -> list[Row]:
    """The rows with the source's replies, but for those it answers with nothing."""
    texts = [row for row in rows if "text" in row]
    asked = [row for row in rows if "text" not in row]
    done = answer_rows(
        source, asked, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return texts + [row for row in done if (reference_reply(row) or "").strip()]


def _surest(
    source: nn.Module, rows: list[Row], tokenizer: Any, count: int, batch_size: int
) -> list[Row]:
    """The ``count`` rows in which the source's least sure token is the surest, in their order."""
    if len(rows) <= count:
        return rows
    examples = encode(rows, tokenizer)
    sureness = {example.row: -math.inf for example in examples}
    for batch in batches(examples, batch_size, pad_token_id=pad_token_id(tokenizer)):
        losses = token_losses(source, batch).split(batch.supervised.sum(1).tolist())
        for i, loss in zip(batch.rows, losses, strict=True):
            sureness[examples[i].row] = -float(loss.max())
    kept = sorted(sureness, key=lambda row: -sureness[row])[:count]
    return [rows[i] for i in sorted(kept)]


# --------------------------------------------------------------------------- rows and their parts


def with_reply(row: Mapping[str, Any], reply: str, number: int = 0) -> Row:
    """``row`` with another last reply, or with one where it ends in a question.

    Raises :class:`DataError` for a row without a question.
    """
    if isinstance(row.get("prompt"), str):
        return {**row, "completion": reply}
    asked = _up_to_question(row, number)
    return {**_rest(row), "messages": [*asked, {"role": "assistant", "content": reply}]}


def question_of(row: Mapping[str, Any], number: int = 0) -> str:
    """The last question of a row, or all of a plain text.

    Raises :class:`DataError` for a row without a question, or with one that is not plain text.
    """
    if row.get("text") is not None:
        return str(row["text"])
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    content = _up_to_question(row, number)[-1]["content"]
    if not isinstance(content, str):
        raise DataError(f"row {number}: rows are written only like questions of plain text")
    return content


def _with_question(row: Mapping[str, Any], words: str) -> Row:
    """``row`` with another question and no reply."""
    if row.get("text") is not None:
        return {"text": words}
    if isinstance(row.get("prompt"), str):
        return {**row, "prompt": words, "completion": ""}
    *earlier, last = _up_to_question(row, 0)
    return {**_rest(row), "messages": [*earlier, {**last, "content": words}]}


def _up_to_question(row: Mapping[str, Any], number: int) -> list[Any]:
    """The messages of a row up to its last question, which is what stands before the last reply."""
    asked = list(row.get("messages") or row.get("prompt") or [])
    if asked:
        parse_turns(asked, "user", f"row {number}: turns")
    while asked and asked[-1]["role"] != "user":
        asked.pop()
    if not asked:
        raise DataError(f"row {number}: it holds no question that the source could answer")
    return asked


def _rest(row: Mapping[str, Any]) -> Row:
    return {k: v for k, v in row.items() if k not in ("messages", "prompt", "completion")}
