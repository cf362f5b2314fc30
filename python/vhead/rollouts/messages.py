"""Chat messages and tools as they come in: checked, and without what is null."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vhead.errors import FieldError
from vhead.rollouts.wording import shown

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def checked_messages(value: Sequence[Message], field: str, record: str | None) -> tuple[Message, ...]:
    """Messages without what is null in them, their contents as text.

    Raises:
        FieldError: One has no role that is known, no content that is text or text parts, or half a surrogate pair.
    """
    checked = []
    for position, message in enumerate(value):
        present = _present(message, field, record) if isinstance(message, Mapping) else {}
        if present.get("tool_calls"):
            # A call needs no words, and templates want text.
            present.setdefault("content", "")
        if isinstance(present.get("content"), list | tuple):
            present["content"] = _joined(present["content"], position, field, record)
        if not isinstance(present.get("role"), str) or not isinstance(present.get("content"), str):
            raise FieldError(
                record,
                field,
                expected="messages with a text `role` and a text `content`, or with `tool_calls`",
                got=f"{shown(message)} at position {position}",
            )
        for text in texts_in(message):
            check_unicode(text, record, field)
        if present["role"] not in ROLES:
            got = f"the role {shown(present['role'])} at position {position}"
            raise FieldError(record, field, expected=f"messages with a role of {', '.join(ROLES)}", got=got)
        checked.append(present)
    return tuple(checked)


def without_null(value: Any) -> Any:
    """Objects without null members, however deep.

    Arrow, and so Parquet and data sets, gives each object every member that any has; a template would take null for a
    value.
    """
    if isinstance(value, Mapping):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list | tuple) else value


def _present(value: Mapping[str, Any], field: str, record: str | None) -> dict[str, Any]:
    try:
        present: dict[str, Any] = without_null(value)
    except RecursionError:
        expected = "objects that are not nested as deeply"
        raise FieldError(record, field, expected=expected, got=shown(value)) from None
    return present


def argument_texts(messages: Sequence[Message]) -> list[str]:
    """The arguments of calls that come as JSON text of an object, as OpenAI's interface gives them."""
    calls = (call for message in messages for call in _calls(message))
    return [call["arguments"] for call in calls if _parsed(call["arguments"]) is not None]


def with_parsed_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages, and in the place of such texts the objects."""
    parsed = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            for function in _functions(call):
                arguments = _parsed(function.get("arguments"))
                if arguments is not None:
                    whole = {**function, "arguments": arguments}
                    call = whole if function is call else {**call, "function": whole}  # noqa: PLW2901
            calls.append(call)
        parsed.append({**message, "tool_calls": calls} if calls else message)
    return parsed


def _calls(message: Message) -> Iterator[Mapping[str, Any]]:
    for call in message.get("tool_calls") or ():
        yield from (function for function in _functions(call) if isinstance(function.get("arguments"), str))


def _functions(call: object) -> list[Mapping[str, Any]]:
    """What of a call holds its name and arguments: the call, or its `function`."""
    if not isinstance(call, Mapping):
        return []
    function = call.get("function")
    return [function] if isinstance(function, Mapping) else [call]


def _parsed(arguments: object) -> dict[str, Any] | None:
    if not isinstance(arguments, str):
        return None
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _joined(parts: Sequence[object], position: int, field: str, record: str | None) -> str:
    """The text of a content that comes in parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            got = f"a part of type {shown(part['type'])} at position {position}"
            expected = "text parts alone, because images and other media cannot be scored yet"
            raise FieldError(record, field, expected=expected, got=got)
        if not isinstance(text, str):
            got = f"{shown(part)} at position {position}"
            raise FieldError(record, field, expected='parts like {"type": "text", "text": ...}', got=got)
        texts.append(text)
    return "".join(texts)


def checked_tools(value: object, record: str | None) -> tuple[Tool, ...]:
    """The functions that a model may call.

    Raises:
        FieldError: `value` is not a list of objects, or holds half a surrogate pair.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        expected = "a list of function schemas, each an object as chat templates take it"
        raise FieldError(record, "tools", expected=expected, got=shown(value))
    for text in texts_in(value):
        check_unicode(text, record, "tools")
    return tuple(_present(tool, "tools", record) for tool in value)


def check_unicode(text: str, record: str | None, field: str) -> None:
    """Half of a surrogate pair is no text, and tokenizers raise what they like at one; JSON can write it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"half of a surrogate pair at character {error.start}"
        raise FieldError(record, field, expected="text that Unicode can hold", got=got) from None


def texts_in(value: object) -> Iterator[str]:
    """Every text in a value, however deep: a chat template may use any of them."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
