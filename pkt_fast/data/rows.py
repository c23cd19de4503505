"""The shape of a row: messages, prompt and completion, or text; checked, with the place named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import DataError
from .reading import Origin, json_type

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Completion:
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
class Text:
    text: str


def parse_row(row: Mapping[str, Any], where: str) -> tuple[str, Chat | Completion | Text]:
    """Recognise the shape of a row and check its types.

    A None value counts as absent, because ``datasets`` fills the keys a row lacks with None.
    """
    present = {key for key, value in row.items() if value is not None}
    if "messages" in present:
        tools = row.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise DataError(f"{where}: tools must be a list, not {json_type(tools)}")
        return "messages", Chat(_parse_messages(row["messages"], f"{where}: messages"), tools)
    if {"prompt", "completion"} <= present:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            _check_text(prompt, f"{where}: prompt")
            _check_text(completion, f"{where}: completion")
            return "prompt/completion", Completion(prompt, completion)
        head = parse_turns(prompt, "user", f"{where}: prompt")
        tail = parse_turns(completion, "assistant", f"{where}: completion")
        return "prompt/completion", Chat(head + tail)
    if "text" in present:
        _check_text(row["text"], f"{where}: text")
        return "text", Text(row["text"])
    keys = ", ".join(repr(str(key)) for key in row) or "none"
    raise DataError(
        f"{where}: no known shape (its keys: {keys}); a row needs 'messages', 'prompt' and "
        "'completion', or 'text'"
    )


def check_rows(rows: Sequence[Mapping[str, Any]], origin: Origin) -> None:
    """Raise :class:`DataError`, naming the place, for the first row whose shape is not known."""
    for i, row in enumerate(rows):
        parse_row(row, origin.where(i))


def parse_turns(value: Any, role: str, where: str) -> list[Message]:
    """Messages of a conversation, or of a string that ``role`` says.

    Raises :class:`DataError`, beginning with ``where``, for anything else.
    """
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    return _parse_messages(value, where)


def _parse_messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{where} must be a list of messages, not {json_type(value)}")
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
    if calls is not None and not (isinstance(calls, list) and call_names(calls)):
        raise DataError(f"{where}: tool_calls must be a list of calls with a function's name")
    if content is None and calls is not None:
        return {**others, **({"content": None} if "content" in message else {})}
    if isinstance(content, list):
        content = "".join(
            _parse_part(part, f"{where}: content[{i}]") for i, part in enumerate(content)
        )
    _check_text(content, f"{where}: content")
    return {**others, "content": content}


def call_names(calls: Sequence[Any]) -> list[str]:
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


def said(message: Message) -> str:
    """A message's content; "" for one that only calls tools."""
    return message.get("content") or ""


def _parse_part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise DataError(f'{where} must be {{"type": "text", "text": ...}}')
    return text


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where} must be a string, not {json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}") from error
