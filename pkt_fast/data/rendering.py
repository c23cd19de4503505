"""Rows to text and the parts of it that carry loss."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .examples import Span
from .reading import Origin, as_row
from .rows import Chat, Completion, Message, Text, parse_row
from .templates import Dropped, Template
from .turns import TurnFinder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """Text, the character spans that carry loss, and whether BOS has still to be put in front."""

    row: int
    text: str
    spans: tuple[Span, ...]
    needs_prefix: bool


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern that finds any special or added token in a text, the longest that fits."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values()}
    # Some tokenizers list runs of blanks among their added tokens: those end no turn.
    words = [token for token in special if token.strip()]
    ordered = sorted(words, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


class Renderer:
    """Turns parsed rows into text with supervised spans for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, supervise: str) -> None:
        self.supervise_all = supervise == "all"
        self.template = Template(tokenizer)
        self.bos: str = tokenizer.bos_token or ""
        self.eos: str = tokenizer.eos_token or ""
        self.special = special_tokens(tokenizer)

    def __call__(self, parsed: Chat | Completion | Text, row: int) -> Rendered:
        """Render row number ``row``; raises :class:`Dropped` when nothing in it can be learnt."""
        if isinstance(parsed, Text):
            if not parsed.text.strip():
                raise Dropped("empty text")
            text = self._close(parsed.text)
            return Rendered(row, text, ((0, len(text)),), needs_prefix=True)
        if isinstance(parsed, Completion) and not self.template.exists:
            text = self._close(parsed.prompt + parsed.completion)
            start = 0 if self.supervise_all else len(parsed.prompt)
            if not parsed.completion.strip():
                raise Dropped("no supervised token (empty completion)")
            return Rendered(row, text, ((start, len(text)),), needs_prefix=True)
        return self._chat(parsed.messages, parsed.tools, row)

    def prompt(self, parsed: Chat | Completion | Text) -> str:
        """Return what a model gets to see before it has to answer."""
        if isinstance(parsed, Text):
            return parsed.text
        if isinstance(parsed, Completion) and not self.template.exists:
            return parsed.prompt
        messages = parsed.messages
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        template = self.template.with_tools(parsed.tools)
        return template.render_or_merge(messages, generate=True)[1]

    def _close(self, text: str) -> str:
        return text if self.eos and text.endswith(self.eos) else text + self.eos

    def _chat(self, messages: list[Message], tools: list[Any] | None, row: int) -> Rendered:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise Dropped("no supervised token (no assistant message)")
        template = self.template.with_tools(tools)
        messages, text = template.render_or_merge(messages[: turns[-1] + 1])
        if self.supervise_all:
            start = len(self.bos) if self.bos and text.startswith(self.bos) else 0
            spans: tuple[Span, ...] = ((start, len(text)),)
        else:
            spans = TurnFinder(template, self.special).spans(messages, text)
        return Rendered(row, text, spans, needs_prefix=not template.exists)


def render_prompt(row: Mapping[str, Any] | str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text a model sees before the last assistant turn of ``row``, ready to continue.

    It is a prefix of what :func:`encode` trains on, unless the chat template itself renders a
    conversation that ends differently.

    Raises:
        DataError: the row has no known shape, or the chat template refuses it.
    """
    _, parsed = parse_row(as_row(row, Origin("prompt"), 0), "prompt")
    try:
        return Renderer(tokenizer, "assistant").prompt(parsed)
    except Dropped as reason:
        raise DataError(f"prompt: {reason}") from reason
