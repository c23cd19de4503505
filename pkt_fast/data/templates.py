"""A conversation as text: by the tokenizer's chat template, or as plain lines without one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Dropped(Exception):
    """Raised for a row that is well-formed but has nothing to learn from; the reason is shown."""


class Template:
    """A tokenizer's chat template; without one, ``User: ...`` and ``Assistant: ...`` lines.

    Attributes:
        exists: whether the tokenizer has a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tools: list[Any] | None = None
        self.exists = bool(getattr(tokenizer, "chat_template", None))
        self.eos: str = tokenizer.eos_token or ""

    def with_tools(self, tools: list[Any] | None) -> Template:
        """The same template, for a conversation that has ``tools``."""
        if tools is None:
            return self
        other = copy.copy(self)
        other.tools = tools
        return other

    def render(self, messages: list[Message], generate: bool = False) -> str:
        """Return the text of ``messages``, with ``generate`` up to where an answer has to begin.

        Raises :class:`Dropped` where the template refuses them.
        """
        if not self.exists:
            if self.tools is not None or any("tool_calls" in message for message in messages):
                raise Dropped("tools need a chat template, and the tokenizer has none")
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
            raise Dropped(f"the chat template refuses the conversation: {reason}") from error
        return str(text)

    def render_or_merge(
        self, messages: list[Message], *, generate: bool = False
    ) -> tuple[list[Message], str]:
        """Render; where the template refuses a system message, put it into the first user one.

        Returns the messages that were rendered, and their text.
        """
        try:
            return messages, self.render(messages, generate)
        except Dropped:
            merged = _merge_system(messages)
            if merged is None:
                raise
            return merged, self.render(merged, generate)

    def render_or_nothing(self, messages: list[Message], *, generate: bool = True) -> str:
        """Return the text before the next answer; "" where the template refuses the messages."""
        try:
            return self.render(messages, generate)
        except Dropped:
            return ""


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
