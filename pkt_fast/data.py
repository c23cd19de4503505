"""Training rows to token ids: read, render, tokenise, truncate, batch.

Rows come in three shapes, and files, lists and ``datasets.Dataset`` objects may mix them::

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2?", "completion": "4"}
    {"text": "any text"}          # or just the string

**Rendering.**  Conversations go through the tokenizer's chat template, with all that a message
holds (``tool_calls``, ``name``, ...) and the row's ``tools``.  Without one they become
``User: ...`` and ``Assistant: ...`` lines with the EOS token after each assistant turn, and a
prompt/completion pair of strings is simply concatenated (plus EOS).  Plain text gets EOS at its
end.  Special tokens that the tokenizer adds in front (BOS) are added exactly when no template does
the job, so BOS never appears twice.  Messages after the last assistant message are not rendered:
nothing can be learnt from them.

**Supervision.**  Loss falls on assistant turns (or the completion, or all of a plain text).  A turn
is what the model would have to generate after the generation prompt: the words, and the first
special token behind them, so that it learns to stop.  Boilerplate after that token (a newline, the
next header) is not supervised.  A template without such a token ends its turn with whatever text
it puts there.  Tool calls are part of their turn, as the template shows them; its content may then
be null.  Turns are found in *text* space and carried to tokens by character offsets; a token that
straddles the border belongs to the turn.

**Truncation.**  A row longer than ``max_length`` first loses unsupervised tokens behind the last
turn, then prompt tokens from the front (BOS stays, and the supervised part always keeps one token
before it to be predicted from), and only then the end of its supervised part.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import numpy as np
import torch

from pkt_fast._files import local
from pkt_fast.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a token that carries no loss (the convention of torch and Transformers)."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have."""

_SUFFIXES = (".jsonl", ".json", ".txt")
_PROBE = "@@pkt-assistant-turn@@"
_WINDOW_BATCHES = 50
_MIXING = 0.02
_MAX_PADDING = 0.10
_TOKENISED_AT_ONCE = 256

Message = dict[str, Any]
Span = tuple[int, int]


# ---------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One tokenised row.

    Attributes:
        input_ids: token ids.
        labels: same length; ``labels[t]`` is ``input_ids[t]`` or -100 where there is no loss.
        row: 0-based number of the row in the input.
        text: the rendered text, special tokens included.
        offsets: character span of every token in ``text``, without gaps; (0, 0) for tokens that
            are not in the text (BOS).  None when the tokenizer cannot tell.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    row: int
    text: str = ""
    offsets: tuple[Span, ...] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def num_supervised(self) -> int:
        """Positions with a loss: the first token is never predicted."""
        return max(len(self) - 1, 0) - self.labels[1:].count(IGNORE_INDEX)


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


@dataclass(frozen=True)
class ExampleSet(Sequence[Example]):
    """An immutable sequence of examples with the summary of how it came about."""

    examples: tuple[Example, ...]
    summary: DataSummary

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self.examples[index]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every example."""
        return tuple(len(example) for example in self.examples)

    def fingerprint(self) -> str:
        """Return a SHA-256 of all ids and labels: equal iff a model would see the same data."""
        digest = hashlib.sha256()
        for example in self.examples:
            table = np.array([example.input_ids, example.labels], dtype="<i8")
            digest.update(len(example).to_bytes(8, "little"))
            digest.update(table.tobytes())
        return digest.hexdigest()


def moved(
    tensor: torch.Tensor, device: torch.device | str, non_blocking: bool = False
) -> torch.Tensor:
    """``tensor`` on ``device``.

    With ``non_blocking`` a copy from host memory to a GPU does not wait: it goes through pinned
    memory, because from any other the driver copies while the caller stands.
    """
    on_gpu = torch.device(device).type == "cuda"
    if non_blocking and on_gpu and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=non_blocking)


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded examples, ready for a model.

    Attributes:
        input_ids, attention_mask, labels, position_ids: (B, T) int64.  Padding has mask 0, label
            -100 and position 0; real tokens count positions from 0 on either padding side.
        rows: indices of the examples in their ExampleSet.
        padding_side: "right" or "left".
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    rows: tuple[int, ...]
    padding_side: str = "right"

    @cached_property
    def targets(self) -> torch.Tensor:
        """(B, T): what each position has to predict, ``labels`` one to the left; last column -100.

        Left-padded rows start with padding whose target is the first real label, which no model
        can predict from padding: it is -100 there.
        """
        targets = torch.full_like(self.labels, IGNORE_INDEX)
        targets[:, :-1] = self.labels[:, 1:]
        return targets.masked_fill_(self.attention_mask == 0, IGNORE_INDEX)

    @cached_property
    def supervised(self) -> torch.Tensor:
        """(B, T) bool: positions whose next token carries loss."""
        return self.targets != IGNORE_INDEX

    @cached_property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.attention_mask.sum())

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of a model's forward.

        ``position_ids`` is among them only under left padding: with right padding every model
        counts the same positions by itself, and some families refuse the argument.
        """
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.padding_side == "left":
            inputs["position_ids"] = self.position_ids
        return inputs

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on ``device``; see :func:`moved` for non_blocking."""
        names = ("input_ids", "attention_mask", "labels", "position_ids")
        tensors: dict[str, Any] = {
            name: moved(getattr(self, name), device, non_blocking) for name in names
        }
        return replace(self, **tensors)

    def __len__(self) -> int:
        return self.input_ids.shape[0]


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where rows came from; ``lines[i]`` is the 1-based line of row i where there are lines."""

    name: str
    lines: tuple[int, ...] | None = None

    def where(self, row: int) -> str:
        """Name one row for an error message."""
        if self.lines is None:
            return f"{self.name} row {row}"
        return f"{self.name} line {self.lines[row]}"


def read_rows(data: Any = None, *, limit: int | None = None) -> tuple[list[dict[str, Any]], Origin]:
    """Read rows, without looking into them, and say where they came from.

    Args:
        data: a path to .jsonl (one JSON value a line), .json (a list) or .txt (one text a line);
            an iterable of dicts or strings; a ``datasets.Dataset``; None for the bundled set.
        limit: stop after this many rows.

    Raises:
        DataError: the file is missing, empty, not UTF-8, not JSON (with the line), of another
            kind; or a row is neither a dict nor a string.
    """
    if data is None:
        from pkt_fast.demo import bundled_rows

        raw, origin = list(itertools.islice(bundled_rows(), limit)), Origin("bundled data")
    elif isinstance(data, str | os.PathLike):
        raw, origin = _read_file(local(data), limit)
    else:
        raw, origin = _read_object(data, limit)
    if not raw:
        raise DataError(f"{origin.name}: no rows in it; give at least one example")
    return [_as_row(value, origin, i) for i, value in enumerate(raw)], origin


def _read_file(path: Path, limit: int | None) -> tuple[list[Any], Origin]:
    if path.is_dir():
        raise DataError(f"{path}: is a directory; name a file ending in {', '.join(_SUFFIXES)}")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(
            f"{path}: unknown file type {path.suffix!r}; give a file ending in "
            f"{', '.join(_SUFFIXES)}"
        )
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    if path.suffix.lower() == ".json":
        values = _parse_json(text, str(path))
        if not isinstance(values, list):
            raise DataError(
                f"{path}: a .json file must hold a list of rows, this one holds "
                f"{_json_type(values)}; one row a line goes into a .jsonl file"
            )
        return values[:limit], Origin(str(path))
    # "\n" only: str.splitlines would also break at the Unicode separators inside the text.
    lines = ((n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), start=1))
    kept = list(itertools.islice(((n, line) for n, line in lines if line.strip()), limit))
    origin = Origin(str(path), tuple(n for n, _ in kept))
    if path.suffix.lower() == ".txt":
        return [line for _, line in kept], origin
    return [_parse_json(line, str(path), n) for n, line in kept], origin


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save it as UTF-8"
        ) from error


def _parse_json(text: str, name: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = error.lineno if line is None else line
        raise DataError(
            f"{name} line {at}: not valid JSON ({error.msg}, column {error.colno})"
        ) from error
    except RecursionError as error:
        raise DataError(f"{name} line {line or 1}: JSON nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{name} line {line or 1}: {error}") from error


def _read_object(data: Any, limit: int | None) -> tuple[list[Any], Origin]:
    kind = type(data)
    # By name, so that the datasets library is not imported (nor needed) for a list of dicts.
    from_datasets = kind.__module__.split(".")[0] == "datasets"
    if isinstance(data, Mapping):
        hint = f"choose a split: {', '.join(map(str, data))}" if from_datasets else "wrap it in []"
        raise DataError(f"data is a {kind.__name__}, not a sequence of rows; {hint}")
    if not isinstance(data, Iterable):
        raise DataError(
            f"data of type {kind.__name__} is not understood; give a path, a list of dicts or "
            "strings, or a datasets.Dataset"
        )
    name = f"datasets.{kind.__name__}" if from_datasets else kind.__name__
    return list(itertools.islice(data, limit)), Origin(name)


def _as_row(value: Any, origin: Origin, row: int) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Mapping):
        return dict(value)
    raise DataError(
        f"{origin.where(row)}: a row must be an object or a string, not {_json_type(value)}"
    )


# ---------------------------------------------------------------------------------------------
# From rows to text with supervised spans
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rendered:
    """Text, the character spans that carry loss, and whether BOS has still to be put in front."""

    row: int
    text: str
    spans: tuple[Span, ...]
    needs_prefix: bool


class _Dropped(Exception):
    """Raised for a row that is well-formed but has nothing to learn from; the reason is shown."""


@dataclass(frozen=True)
class _Chat:
    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class _Completion:
    prompt: str
    completion: str
    tools: ClassVar[None] = None

    @property
    def messages(self) -> list[Message]:
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.completion},
        ]


@dataclass(frozen=True)
class _Text:
    text: str


def _parse_row(row: Mapping[str, Any], where: str) -> tuple[str, _Chat | _Completion | _Text]:
    """Recognise the shape of a row and check its types.

    A None value counts as absent, because ``datasets`` fills the keys a row lacks with None.
    """
    present = {key for key, value in row.items() if value is not None}
    if "messages" in present:
        tools = row.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise DataError(f"{where}: tools must be a list, not {_json_type(tools)}")
        return "messages", _Chat(_parse_messages(row["messages"], f"{where}: messages"), tools)
    if {"prompt", "completion"} <= present:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            _check_text(prompt, f"{where}: prompt")
            _check_text(completion, f"{where}: completion")
            return "prompt/completion", _Completion(prompt, completion)
        head = parse_turns(prompt, "user", f"{where}: prompt")
        tail = parse_turns(completion, "assistant", f"{where}: completion")
        return "prompt/completion", _Chat(head + tail)
    if "text" in present:
        _check_text(row["text"], f"{where}: text")
        return "text", _Text(row["text"])
    keys = ", ".join(repr(str(key)) for key in row) or "none"
    raise DataError(
        f"{where}: no known shape (its keys: {keys}); a row needs 'messages', 'prompt' and "
        "'completion', or 'text'"
    )


def check_rows(rows: Sequence[Mapping[str, Any]], origin: Origin) -> None:
    """Raise :class:`DataError`, naming the place, for the first row whose shape is not known."""
    for i, row in enumerate(rows):
        _parse_row(row, origin.where(i))


def parse_turns(value: Any, role: str, where: str) -> list[Message]:
    """Messages of a conversation, or of a string that ``role`` says.

    Raises :class:`DataError`, beginning with ``where``, for anything else.
    """
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    return _parse_messages(value, where)


def _parse_messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{where} must be a list of messages, not {_json_type(value)}")
    if not value:
        raise DataError(f"{where}: the list is empty")
    return [_parse_message(message, f"{where}[{i}]") for i, message in enumerate(value)]


def _parse_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or not (
        {"role", "content"} <= message.keys() or {"role", "tool_calls"} <= message.keys()
    ):
        raise DataError(f"{where} must be an object with 'role' and 'content'")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}")
    # Of what else there is, nulls are left out: templates ask whether a key is there.
    others = {key: value for key, value in message.items() if value is not None}
    calls = others.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and _call_names(calls)):
        raise DataError(f"{where}: tool_calls must be a list of calls with a function's name")
    if content is None and calls is not None:
        return {**others, **({"content": None} if "content" in message else {})}
    if isinstance(content, list):
        content = "".join(
            _parse_part(part, f"{where}: content[{i}]") for i, part in enumerate(content)
        )
    _check_text(content, f"{where}: content")
    return {**others, "content": content}


def _call_names(calls: Sequence[Any]) -> list[str]:
    """The functions that ``tool_calls`` name, in OpenAI's form or without its wrapping; [] when one
    has no name.
    """
    names = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            return []
        names.append(name)
    return names


def _words(message: Message) -> str:
    """A message's content; "" for one that only calls tools."""
    return message.get("content") or ""


def _parse_part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise DataError(f'{where} must be {{"type": "text", "text": ...}}')
    return text


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where} must be a string, not {_json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}") from error


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern that finds any special or added token in a text, the longest that fits."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values()}
    # Some tokenizers list runs of blanks among their added tokens: those end no turn.
    words = [token for token in special if token.strip()]
    ordered = sorted(words, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


class _Renderer:
    """Turns parsed rows into text with supervised spans for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, supervise: str) -> None:
        self.tokenizer = tokenizer
        self.supervise_all = supervise == "all"
        self.tools: list[Any] | None = None
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.bos: str = tokenizer.bos_token or ""
        self.eos: str = tokenizer.eos_token or ""
        self.special = special_tokens(tokenizer)

    def __call__(self, parsed: _Chat | _Completion | _Text, row: int) -> _Rendered:
        if isinstance(parsed, _Text):
            if not parsed.text.strip():
                raise _Dropped("empty text")
            text = self._close(parsed.text)
            return _Rendered(row, text, ((0, len(text)),), needs_prefix=True)
        if isinstance(parsed, _Completion) and not self.has_template:
            text = self._close(parsed.prompt + parsed.completion)
            start = 0 if self.supervise_all else len(parsed.prompt)
            if not parsed.completion.strip():
                raise _Dropped("no supervised token (empty completion)")
            return _Rendered(row, text, ((start, len(text)),), needs_prefix=True)
        return self._with(parsed.tools)._chat(parsed.messages, row)

    def prompt(self, parsed: _Chat | _Completion | _Text) -> str:
        """Return what a model gets to see before it has to answer."""
        if isinstance(parsed, _Text):
            return parsed.text
        if isinstance(parsed, _Completion) and not self.has_template:
            return parsed.prompt
        messages = parsed.messages
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self._with(parsed.tools)._render_or_merge(messages, generate=True)[1]

    def _with(self, tools: list[Any] | None) -> _Renderer:
        """The same renderer, for a conversation that has ``tools``."""
        if tools is None:
            return self
        other = copy.copy(self)
        other.tools = tools
        return other

    def _close(self, text: str) -> str:
        return text if self.eos and text.endswith(self.eos) else text + self.eos

    def _chat(self, messages: list[Message], row: int) -> _Rendered:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise _Dropped("no supervised token (no assistant message)")
        messages, text = self._render_or_merge(messages[: turns[-1] + 1])
        if self.supervise_all:
            start = len(self.bos) if self.bos and text.startswith(self.bos) else 0
            spans: tuple[Span, ...] = ((start, len(text)),)
        else:
            spans = self._assistant_spans(messages, text)
        return _Rendered(row, text, spans, needs_prefix=not self.has_template)

    def _render_or_merge(
        self, messages: list[Message], *, generate: bool = False
    ) -> tuple[list[Message], str]:
        """Render; where the template refuses a system message, put it into the first user one."""
        try:
            return messages, self._render(messages, generate)
        except _Dropped:
            merged = _merge_system(messages)
            if merged is None:
                raise
            return merged, self._render(merged, generate)

    def _render(self, messages: list[Message], generate: bool = False) -> str:
        if not self.has_template:
            if self.tools is not None or any("tool_calls" in message for message in messages):
                raise _Dropped("tools need a chat template, and the tokenizer has none")
            return _plain_chat(messages, self.eos, generate)
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages,  # type: ignore[arg-type]
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except (TemplateError, TypeError) as error:  # TypeError: null content where it adds strings
            reason = " ".join(str(error).split()) or type(error).__name__
            raise _Dropped(f"the chat template refuses the conversation: {reason}") from error
        return str(text)

    def _assistant_spans(self, messages: list[Message], text: str) -> tuple[Span, ...]:
        spans: list[Span] = []
        cursor = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if "tool_calls" in message:
                span = self._calling_span(messages, i, text)
            elif _words(message).strip():
                span = self._assistant_span(messages, i, text, cursor)
            else:
                continue
            if span is None:
                shown = "tool calls" if "tool_calls" in message else "words"
                raise _Dropped(f"the chat template does not show the assistant's {shown}")
            spans.append(span)
            cursor = span[1]
        if not spans:
            raise _Dropped("no supervised token (empty assistant messages)")
        return tuple(spans)

    def _assistant_span(
        self, messages: list[Message], i: int, text: str, cursor: int
    ) -> Span | None:
        """Find turn ``i`` in the rendered ``text``, at or after ``cursor``.

        The turn is rendered once more with a probe in place of its words: what stands before and
        behind the probe is the template's, so words that also occur in the template or in the
        question cannot mislead the search.
        """
        probe = {"role": "assistant", "content": _PROBE}
        before, found, behind = self._render([*messages[:i], probe]).partition(_PROBE)
        before = before if found else ""
        prompt = self._try_prompt(messages[:i])
        starts = [
            len(head)
            for head in (before, prompt)
            if head and text.startswith(head) and len(head) >= cursor
        ]
        if not starts:
            # Not prefix-stable (a system turn that moves, say): anchor on the previous message.
            starts = _after_anchor(text, before, messages[i - 1] if i else None, cursor)
        closing = behind[: self._turn_end(behind, behind)]
        words = _find_words(text, _visible_forms(_words(messages[i])), starts, closing, cursor)
        if words is None:
            return None
        start, end = words
        end += self._turn_end(text[end:], behind)
        # Between the generation prompt and the words stands what the model has to write as well: a
        # blank, an empty reasoning block.  A template without a generation prompt puts its header
        # there, and that is nobody's to write.
        lead = ""
        if prompt and text.startswith(prompt) and cursor <= len(prompt) <= start:
            lead = text[len(prompt) : start]
        elif prompt and before.startswith(prompt) and text[:start].endswith(before[len(prompt) :]):
            lead = before[len(prompt) :]
        if lead.strip() and prompt == self._try_prompt(messages[:i], generate=False):
            lead = ""
        return start - len(lead), end

    def _calling_span(self, messages: list[Message], i: int, text: str) -> Span | None:
        """Find turn ``i``, which calls tools, in the rendered ``text``.

        How a template writes a call is its own affair, so the turn is what rendering it adds to the
        prompt, up to the closing that turns of words have.
        """
        prompt = self._try_prompt(messages[:i])
        turn = self._render(messages[: i + 1]).removeprefix(prompt)
        if not prompt or any(name not in turn for name in _call_names(messages[i]["tool_calls"])):
            return None
        probe = {"role": "assistant", "content": _PROBE}
        behind = self._render([*messages[:i], probe]).partition(_PROBE)[2]
        if behind and turn.endswith(behind):
            turn = turn.removesuffix(behind) + behind[: self._turn_end(behind, behind)]
        else:  # calls are closed in a way of their own
            turn = turn.rstrip()
        return (len(prompt), len(prompt) + len(turn)) if text.startswith(prompt + turn) else None

    def _try_prompt(self, messages: list[Message], *, generate: bool = True) -> str:
        try:
            return self._render(messages, generate)
        except _Dropped:
            return ""

    def _turn_end(self, rest: str, behind: str) -> int:
        """Length of the turn's closing in ``rest``, the text after the assistant's words.

        ``behind`` is what the template writes after a *last* turn; only what both share closes
        the turn.
        """
        shared = _common_prefix(rest, behind)
        match = self.special.search(rest)
        if match and match.end() <= shared:
            return match.end()
        if match:  # both may go on with the same beginning of two different special tokens
            shared = min(shared, match.start())
        closing = rest[:shared]
        return len(closing.rstrip()) or len(closing)


def _after_anchor(text: str, before: str, previous: Message | None, cursor: int) -> list[int]:
    """Where ``text`` goes on behind the last part of ``before``, from the previous message on."""
    words = _words(previous).strip() if previous is not None else ""
    anchor = before[max(before.rfind(words), 0) :] if words else before
    at = text.find(anchor, cursor) if anchor else -1
    return [at + len(anchor)] if at >= 0 else []


def _find_words(
    text: str, forms: Sequence[str], starts: Sequence[int], closing: str, cursor: int
) -> Span | None:
    """Span of the assistant's words: at one of ``starts``, else the next ones that are closed."""
    for start, words in itertools.product(starts, forms):
        if text.startswith(words, start):
            return start, start + len(words)
    low = min(starts, default=cursor)
    for end, words in itertools.product((closing, ""), forms):
        at = text.find(words + end, low)
        if at >= 0:
            return at, at + len(words)
    return None


def _visible_forms(content: str) -> list[str]:
    """Forms in which templates show an assistant's words: as is, trimmed, without reasoning."""
    answer = content.rpartition("</think>")[2]
    forms = [content, content.rstrip(), content.strip(), answer, answer.strip()]
    return [form for form in dict.fromkeys(forms) if form.strip()]


def _merge_system(messages: list[Message]) -> list[Message] | None:
    """Put a leading system message in front of the user message behind it."""
    roles = [message["role"] for message in messages[:2]]
    if roles not in (["system", "user"], ["developer", "user"]):
        return None
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": content}, *messages[2:]]


def _plain_chat(messages: Sequence[Message], eos: str, generate: bool) -> str:
    """Render without a template: ``User: ...`` lines, EOS (or a newline) after each answer."""
    lines = [
        f"{message['role'].capitalize()}: {message['content']}"
        + (eos if message["role"] == "assistant" else "")
        for message in messages
    ]
    if generate:
        return "\n".join([*lines, "Assistant:"])
    return "\n".join(lines) + ("" if eos else "\n")


def render_prompt(row: Mapping[str, Any] | str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text a model sees before the last assistant turn of ``row``, ready to continue.

    It is a prefix of what :func:`encode` trains on, unless the chat template itself renders a
    conversation that ends differently.

    Raises:
        DataError: the row has no known shape, or the chat template refuses it.
    """
    _, parsed = _parse_row(_as_row(row, Origin("prompt"), 0), "prompt")
    try:
        return _Renderer(tokenizer, "assistant").prompt(parsed)
    except _Dropped as reason:
        raise DataError(f"prompt: {reason}") from reason


# ---------------------------------------------------------------------------------------------
# From text to examples
# ---------------------------------------------------------------------------------------------


def encode(
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    limit: int | None = None,
    supervise: Literal["assistant", "all"] = "assistant",
) -> ExampleSet:
    """Read, render and tokenise ``data`` (anything :func:`read_rows` takes).

    Args:
        data: rows, or where to find them.
        tokenizer: a Transformers tokenizer; its chat template is used where it has one.
        max_length: longest example in tokens, at least 2; see the module's notes on truncation.
        limit: use only this many rows from the front.
        supervise: "assistant" puts loss on assistant turns and completions, "all" on every token
            but BOS.  Plain text is always supervised throughout.

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
    rows, origin = read_rows(data, limit=limit)
    render = _Renderer(tokenizer, supervise)
    formats: Counter[str] = Counter()
    dropped: dict[str, list[int]] = {}
    rendered: list[_Rendered] = []
    for i, row in enumerate(rows):
        shape, parsed = _parse_row(row, origin.where(i))
        formats[shape] += 1
        try:
            rendered.append(render(parsed, i))
        except _Dropped as reason:
            dropped.setdefault(str(reason), []).append(i)
    examples: list[Example] = []
    truncated = 0
    for example, head in _tokenise(rendered, tokenizer):
        if not example.num_supervised:
            dropped.setdefault("no supervised token", []).append(example.row)
            continue
        truncated += len(example) > max_length
        examples.append(_truncate(example, head, max_length))
    if not examples:
        reasons = "; ".join(f"{reason}: {len(rows)}" for reason, rows in dropped.items())
        raise DataError(
            f"{origin.name}: none of its {len(rows)} rows has anything to learn from ({reasons})"
        )
    summary = DataSummary(
        source=origin.name,
        rows=len(rows),
        examples=len(examples),
        tokens=sum(map(len, examples)),
        supervised_tokens=sum(example.num_supervised for example in examples),
        truncated=truncated,
        max_length=max_length,
        formats=dict(formats),
        dropped={reason: tuple(numbers) for reason, numbers in dropped.items()},
    )
    return ExampleSet(tuple(examples), summary)


def _tokenise(
    rendered: Sequence[_Rendered], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Example, int]]:
    """Yield each row's untruncated example and how many tokens at its front must stay."""
    if not rendered:
        return
    prefix = prefix_ids(tokenizer)
    # The same numbers and spans come again in every row: one object for each saves most of the
    # memory that examples take.
    known: dict[Any, Any] = {}
    for start in range(0, len(rendered), _TOKENISED_AT_ONCE):
        yield from _tokenise_some(
            rendered[start : start + _TOKENISED_AT_ONCE], tokenizer, prefix, known
        )


def _tokenise_some(
    rendered: Sequence[_Rendered],
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    known: dict[Any, Any],
) -> Iterator[tuple[Example, int]]:
    def shared(values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(known.setdefault(value, value) for value in values)

    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenize(tokenizer, [item.text for item in rendered], offsets=fast)
    for i, item in enumerate(rendered):
        ids: list[int] = encoded["input_ids"][i]
        offsets: list[Span] | None = None
        if fast:
            table = without_gaps(encoded["offset_mapping"][i])
            mask = _overlaps(table, item.spans)
            offsets = list(map(tuple, table.tolist()))
        else:
            mask = _slow_mask(tokenizer, item, ids)
        labels: list[int] = np.where(mask, ids, IGNORE_INDEX).tolist()
        head = _head(ids, prefix, tokenizer.bos_token_id)
        labels[:head] = [IGNORE_INDEX] * head
        if item.needs_prefix and not head:
            head = len(prefix)
            ids, labels = prefix + ids, [IGNORE_INDEX] * head + labels
            offsets = None if offsets is None else [(0, 0)] * head + offsets
        spans = None if offsets is None else shared(offsets)
        yield Example(shared(ids), shared(labels), item.row, item.text, spans), head


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, offsets: bool) -> Any:
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
    tokenizer: PreTrainedTokenizerBase, item: _Rendered, ids: Sequence[int]
) -> np.ndarray:
    """Do the same for a tokenizer without offsets, by tokenising the text up to each border."""
    borders = [border for span in item.spans for border in span]
    pieces = tokenize(tokenizer, [item.text[:border] for border in borders], offsets=False)
    # Tokens wholly before a border; the one that straddles it, if any, comes next.
    whole = [_common_prefix(piece, ids) for piece in pieces["input_ids"]]
    mask = np.zeros(len(ids), dtype=bool)
    for k in range(len(item.spans)):
        straddles = whole[2 * k + 1] < len(pieces["input_ids"][2 * k + 1])
        mask[whole[2 * k] : whole[2 * k + 1] + straddles] = True
    return mask


def _truncate(example: Example, head: int, max_length: int) -> Example:
    """Shorten to ``max_length`` tokens, the supervised ones last (see the module's notes)."""
    if len(example) <= max_length:
        return example
    supervised = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
    end = max(supervised[-1] + 1, max_length)
    head = min(head, max_length - 1)
    spare = supervised[0] - max(head, 1)
    drop = min(end - max_length, max(spare, 0))

    def cut(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return (values[:head] + values[head + drop : end])[:max_length]

    return replace(
        example,
        input_ids=cut(example.input_ids),
        labels=cut(example.labels),
        offsets=None if example.offsets is None else cut(example.offsets),
    )


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


def collate(
    examples: Sequence[Example],
    indices: Sequence[int],
    *,
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int = 1,
) -> Batch:
    """Pad ``examples[i] for i in indices`` to a common length T.

    Returns:
        A batch of (B, T) tensors, T the longest length rounded up to ``pad_to_multiple_of``.
    """
    chosen = [examples[i] for i in indices]
    longest = max(map(len, chosen))
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(chosen), width)
    ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(chosen):
        n = len(example)
        real = slice(0, n) if padding_side == "right" else slice(width - n, width)
        ids[row, real] = example.input_ids
        labels[row, real] = example.labels
        mask[row, real] = 1
        positions[row, real] = np.arange(n)
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        rows=tuple(indices),
        padding_side=padding_side,
    )


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


def batches(
    examples: ExampleSet,
    batch_size: int,
    *,
    pad_token_id: int,
    seed: int | None = None,
    epoch: int = 0,
    bucket: bool = True,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int = 1,
) -> Iterator[Batch]:
    """Yield all examples as padded batches in the order of :func:`batch_indices`."""
    for indices in batch_indices(
        examples.lengths, batch_size, seed=seed, epoch=epoch, bucket=bucket
    ):
        yield collate(
            examples,
            indices,
            pad_token_id=pad_token_id,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
        )


def padding_fraction(batches: Iterable[Batch]) -> float:
    """Share of all positions that are padding; 0.0 for no batches."""
    real = total = 0
    for batch in batches:
        real += batch.num_tokens
        total += batch.input_ids.numel()
    return 1.0 - real / total if total else 0.0


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    differs = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differs, min(len(a), len(b)))


def _shortlist(rows: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, rows[:most]))
    return shown if len(rows) <= most else f"{shown}, and {len(rows) - most:,} more"


def _json_type(value: Any) -> str:
    names: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "a string"),
        (Mapping, "an object"),
        (Sequence, "a list"),
    ]
    if value is None:
        return "null"
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)
