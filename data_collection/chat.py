"""Chats as the model reads them: in the forms that data sets have, rendered with the tokenizer's chat template.

    role and content          OpenAI's form; also `from` for the role, and `value` or `text` for the content
    human, gpt, ...           ShareGPT's roles; `ROLES` says which roles of a template they are
    tool_calls, function_call what the assistant calls; arguments are an object, or JSON text of one
    tools, system             columns beside the chat: the tools that may be called, and a system message

A row is refused if its template leaves out a message, a call or a tool. Only what an assistant thinks, before `</think>`,
may be left out: many templates keep it of the last turn only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..predictors.errors import one_line
from .refusals import RefusedError

Message = dict[str, Any]

CHAT_COLUMNS = ("messages", "conversations", "conversation")
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value", "text")
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "ai", "bot", "model", "function_call"), "assistant"
    ),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
    "system": "system",
}
"""The role of a template by that of a data set, in lower case; all others stay as they are."""

TODAY = datetime(2024, 7, 26)
"""The date that a template is told, or a corpus would be another one each day."""
_DATE_CODES = "aAbBcdHIjmMpSuUwWxXyYZ"


def chat_in(value: Any, column: str) -> list[Any] | None:
    """The chat that a column holds, or None if it is something else.

    It is a list of messages, JSON text of one, or as older releases of `datasets` have it, a dict with a list for each key.
    """
    if isinstance(value, str) and column in CHAT_COLUMNS and value.lstrip().startswith("["):
        value = _parsed(value)
    if isinstance(value, dict) and all(isinstance(part, list) for part in value.values()):
        is_even = len({len(part) for part in value.values()}) == 1
        value = (
            [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)] if is_even else None
        )
    is_chat = isinstance(value, list) and all(isinstance(message, dict) for message in value)
    return value if is_chat else None


def render(chat: list[Any], row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text of the `chat` of a `row`, with the row's `tools` and `system`. Raises `RefusedError` if it can't be rendered whole."""
    if tokenizer is None or not tokenizer.chat_template:
        raise RefusedError(
            "is a chat, and the model's tokenizer has no chat template; give a model with one, or plain text"
        )
    messages = [_message(message) for message in chat]
    if not messages:
        raise RefusedError("is an empty chat")
    system, tools = row.get("system"), _tools(_plain(row.get("tools")))
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    text = _rendered(messages, tools, tokenizer)
    if lost := _lost(messages, tools, text):
        raise RefusedError(f"has {lost} that the chat template leaves out")
    return text


def _rendered(messages: list[Message], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        template = tokenizer.get_chat_template(tools=tools)
        template = _date_macro() + template if "strftime_now" in template else template
        try:
            text = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False)
        except Exception:
            # Most templates want a call's arguments as an object, but some as JSON text.
            as_text = [_with_arguments(message, _as_text) for message in messages]
            if as_text == messages:
                raise
            text = tokenizer.apply_chat_template(as_text, tools=tools, chat_template=template, tokenize=False)
    # A template is a program of the model's authors: it raises errors of any kind.
    except Exception as error:
        raise RefusedError(f"can't be rendered with the tokenizer's chat template ({one_line(error)[:300]})") from error
    assert isinstance(text, str)
    return text


def _date_macro() -> str:
    """A function of the template in the place of transformers' own `strftime_now`, which tells today's date."""
    replaced = "".join(f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in _DATE_CODES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro +%}}"


def _plain(value: Any) -> Any:
    """The value without nulls in its objects: Arrow fills in those fields that other rows have."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise RefusedError(f"holds a {type(value).__name__} in its chat, which is neither text nor a number")


def _message(message: Message) -> Message:
    """The message in the form that templates read."""
    # Numbers and times beside the text are for other readers than templates.
    message = {
        key: _plain(part)
        for key, part in message.items()
        if part is not None and (key in TEXT_KEYS or isinstance(part, str | list | dict))
    }
    role = next((message[key] for key in ROLE_KEYS if key in message), None)
    if not isinstance(role, str):
        raise RefusedError(f"has a message without a role ({' or '.join(ROLE_KEYS)})")
    texts = [key for key in TEXT_KEYS if key in message]
    filled = [key for key in texts if message[key]]
    if len(filled) > 1:
        raise RefusedError(f"has a message with both {filled[0]} and {filled[1]}, and only one can be its text")
    rest = {key: part for key, part in message.items() if key not in (*ROLE_KEYS, *TEXT_KEYS)}
    if "function_call" in rest:  # what tool_calls was once
        rest["tool_calls"] = [{"type": "function", "function": rest.pop("function_call")}]
    if not texts and "tool_calls" not in rest:
        raise RefusedError(f"has a message without a text ({', '.join(TEXT_KEYS)})")
    # A call has no text, and some templates can't do without: an empty one is right for all.
    content = _joined(message[(filled or texts)[0]]) if texts else ""
    return _with_arguments({"role": ROLES.get(role.lower(), role), "content": content, **rest}, _parsed)


def _joined(content: Any) -> Any:
    """The text of a content that is given in parts."""
    if not isinstance(content, list):
        return content
    if other := [part for part in content if not isinstance(part, dict) or not isinstance(part.get("text"), str)]:
        kind = other[0].get("type", "unknown") if isinstance(other[0], dict) else type(other[0]).__name__
        raise RefusedError(f"has a message with a part of type {kind}, and only text can be read")
    return "\n".join(part["text"] for part in content)


def _functions(message: Message) -> list[Message]:
    """The functions that a message calls, each with its `name` and `arguments`."""
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RefusedError("has tool calls that are no list of objects")
    return [_function(call) for call in calls]


def _function(tool: Message) -> Message:
    """What a tool or a call says of its function: the object itself, or the one in it."""
    inner = tool.get("function")
    return inner if isinstance(inner, dict) else tool


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    """The message with the arguments of its calls changed."""
    changed = [
        function | ({"arguments": change(function["arguments"])} if "arguments" in function else {})
        for function in _functions(message)
    ]
    if not changed:
        return message
    calls = zip(message["tool_calls"], changed, strict=True)
    return message | {"tool_calls": [call | {"function": own} if "function" in call else own for call, own in calls]}


def _parsed(value: Any) -> Any:
    """The object or list that a JSON text holds; other values are returned unchanged."""
    try:
        found = _plain(json.loads(value)) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict | list) else value


def _as_text(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tools(tools: Any) -> list[Any] | None:
    tools = _parsed(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RefusedError("has tools that are no list of JSON schemas")
    return tools


def _lost(messages: list[Message], tools: list[Any] | None, text: str) -> str | None:
    """What of a chat is not in its rendered `text`, or None."""

    def is_there(value: Any) -> bool:
        return all(part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text for part in _strings(value))

    for message in messages:
        content = message.get("content")
        said = content.rpartition("</think>")[2] if isinstance(content, str) else content
        if not is_there(said):
            return f"a {message['role']} message"
        if not all(is_there([call.get("name"), call.get("arguments")]) for call in _functions(message)):
            return "a tool call"
    return None if is_there([_function(tool).get("name") for tool in tools or []]) else "tools"


def _strings(value: Any) -> Iterator[str]:
    """All text in a value, without the spaces around it."""
    if isinstance(value, str):
        if stripped := value.strip():
            yield stripped
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
