"""Where the assistant's turns stand in a rendered conversation.

A turn is found in text space, by rendering the conversation up to it once more and comparing; no
template is taken apart.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from .examples import Span
from .rows import Message, call_names, said
from .templates import Dropped, Template

_PROBE = "@@pkt-assistant-turn@@"


class TurnFinder:
    """Finds the assistant's turns in what ``template`` rendered.

    ``special`` finds special tokens in a text (:func:`special_tokens`): the first one behind the
    words ends a turn.
    """

    def __init__(self, template: Template, special: re.Pattern[str]) -> None:
        self.template, self.special = template, special

    def spans(self, messages: list[Message], text: str) -> tuple[Span, ...]:
        """Character spans of the turns of ``messages`` in their rendered ``text``.

        Raises :class:`Dropped` when a turn is not shown, or when no turn says anything.
        """
        spans: list[Span] = []
        cursor = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if "tool_calls" in message:
                span = self._calling_span(messages, i, text)
            elif said(message).strip():
                span = self._assistant_span(messages, i, text, cursor)
            else:
                continue
            if span is None:
                shown = "tool calls" if "tool_calls" in message else "words"
                raise Dropped(f"the chat template does not show the assistant's {shown}")
            spans.append(span)
            cursor = span[1]
        if not spans:
            raise Dropped("no supervised token (empty assistant messages)")
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
        before, found, behind = self.template.render([*messages[:i], probe]).partition(_PROBE)
        before = before if found else ""
        prompt = self.template.render_or_nothing(messages[:i])
        starts = [
            len(head)
            for head in (before, prompt)
            if head and text.startswith(head) and len(head) >= cursor
        ]
        if not starts:
            # Not prefix-stable (a system turn that moves, say): anchor on the previous message.
            starts = _after_anchor(text, before, messages[i - 1] if i else None, cursor)
        closing = behind[: self._turn_end(behind, behind)]
        words = _find_words(text, _visible_forms(said(messages[i])), starts, closing, cursor)
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
        if lead.strip() and prompt == self.template.render_or_nothing(messages[:i], generate=False):
            lead = ""
        return start - len(lead), end

    def _calling_span(self, messages: list[Message], i: int, text: str) -> Span | None:
        """Find turn ``i``, which calls tools, in the rendered ``text``.

        How a template writes a call is its own affair, so the turn is what rendering it adds to the
        prompt, up to the closing that turns of words have.
        """
        prompt = self.template.render_or_nothing(messages[:i])
        turn = self.template.render(messages[: i + 1]).removeprefix(prompt)
        if not prompt or any(name not in turn for name in call_names(messages[i]["tool_calls"])):
            return None
        probe = {"role": "assistant", "content": _PROBE}
        behind = self.template.render([*messages[:i], probe]).partition(_PROBE)[2]
        if behind and turn.endswith(behind):
            turn = turn.removesuffix(behind) + behind[: self._turn_end(behind, behind)]
        else:  # calls are closed in a way of their own
            turn = turn.rstrip()
        return (len(prompt), len(prompt) + len(turn)) if text.startswith(prompt + turn) else None

    def _turn_end(self, rest: str, behind: str) -> int:
        """Length of the turn's closing in ``rest``, the text after the assistant's words.

        ``behind`` is what the template writes after a *last* turn; only what both share closes
        the turn.
        """
        shared = common_prefix(rest, behind)
        match = self.special.search(rest)
        if match and match.end() <= shared:
            return match.end()
        if match:  # both may go on with the same beginning of two different special tokens
            shared = min(shared, match.start())
        closing = rest[:shared]
        return len(closing.rstrip()) or len(closing)


def _after_anchor(text: str, before: str, previous: Message | None, cursor: int) -> list[int]:
    """Where ``text`` goes on behind the last part of ``before``, from the previous message on."""
    words = said(previous).strip() if previous is not None else ""
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


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    differs = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differs, min(len(a), len(b)))
