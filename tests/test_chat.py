"""Chats of a corpus: in every form rendered whole, or refused with the reason."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from predict_train.data_collection.corpus import read_documents
from predict_train.data_collection.refusals import Refusals
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

# A template with calls and tools, one that strips and escapes, one that wants arguments as text, and one that knows few roles.
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
FULL = f"{TOOLS}{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{CALLS}{{% endfor %}}"
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] | trim | tojson }}{% endfor %}"
AS_TEXT = FULL.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
FEW = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% elif m.role == 'assistant' %}<A>{{ m.content }}"
    "{% elif m.role == 'tool' %}{{ raise_exception('no tools\nhere') }}{% endif %}{% endfor %}"
)
DATED = "\n{{ strftime_now('%d %b %Y, %Y-%m-%d') }}" + FULL

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
RENDERED = "<user>Why?<assistant>Because."
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture
def read(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    """`read(rows, template)`: the documents of a file with these rows, and the reasons of its refusals."""

    def documents(
        rows: list[dict[str, Any]] | Path, template: str | None = FULL, **settings: Any
    ) -> tuple[list[str], list[str]]:
        chatty, refusals, file = copy.deepcopy(tokenizer), Refusals(), tmp_path / "rows.jsonl"
        chatty.chat_template = template
        if isinstance(rows, Path):
            file = rows
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return list(read_documents(file, tokenizer=chatty, refuse=refusals.add, **settings)), list(refusals.counts)

    return documents


def calling(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    function = {"name": "weather", "arguments": arguments}
    return [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]} | more,
    ]


def turns(role: str, content: str, *names: str) -> list[dict[str, str]]:
    return [{role: name, content: text} for name, text in zip(names, ("Why?", "Because."), strict=True)]


SAME = [
    {"messages": CHAT},
    {"conversations": CHAT},
    {"conversation": CHAT},
    {"messages": json.dumps(CHAT)},
    {"text": None, "messages": CHAT},
    {"messages": {"role": ["user", "assistant"], "content": ["Why?", "Because."]}},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, CHAT[1]]},
    {"messages": turns("from", "value", "human", "gpt")},
    {"messages": turns("from", "text", "human", "gpt")},
    {"messages": turns("role", "value", "user", "assistant")},
    {"messages": turns("role", "text", "User", "ASSISTANT")},
    {"messages": turns("from", "content", "prompter", "model")},
    {"messages": [turn | {"weight": 1} for turn in turns("from", "value", "human", "chatgpt")]},
]


def test_every_form_of_a_chat_is_the_same_text(read):
    assert read(SAME) == ([RENDERED] * len(SAME), [])
    assert read([{"chat": CHAT}], text_column="chat") == ([RENDERED], [])


def test_calls_tools_and_the_system_message_reach_the_template(read):
    call = '<user>Why?<assistant>[weather {"city": "Oslo", "days": 2}]'
    arguments = {"city": "Oslo", "days": 2}
    forms = [arguments, json.dumps(arguments), arguments | {"unit": None}]
    rows = [{"messages": calling(form)} for form in forms]
    legacy = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": json.dumps(arguments)},
    }
    rows.append({"messages": [CHAT[0], legacy]})
    for template in (FULL, AS_TEXT):
        assert read(rows, template) == ([call] * 4, [])
    for tools in ([TOOL], json.dumps([TOOL])):
        assert read([{"messages": CHAT, "tools": tools}]) == ([f"{json.dumps(TOOL)}\n{RENDERED}"], [])
    found, _ = read([{"messages": CHAT, "system": "Be kind."}, {"messages": CHAT, "tools": None, "system": ""}])
    assert found == [f"<system>Be kind.{RENDERED}", RENDERED]
    results = [{"from": "observation", "value": '{"degrees": 3}'}, {"from": "function_call", "value": "{}"}]
    assert read([{"conversations": results}]) == (['<tool>{"degrees": 3}<assistant>{}'], [])


def test_nulls_that_arrow_fills_in_are_left_out(read, tmp_path):
    rows = [{"messages": calling({"city": "Oslo"}), "tools": [TOOL]}, {"messages": calling({"days": 2}), "tools": None}]
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    found, refused = read(file)
    assert not refused
    assert found[0].endswith('<user>Why?<assistant>[weather {"city": "Oslo"}]')
    assert found[1] == '<user>Why?<assistant>[weather {"days": 2}]'


def test_times_beside_the_text_do_no_harm(read, tmp_path):
    file, now = tmp_path / "rows.parquet", datetime(2024, 5, 1)
    rows = [
        {"messages": [turn | {"at": now, "weight": 0} for turn in CHAT]},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert read(file) == ([RENDERED, "<user>x"], [])
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": calling({"day": now})}, *rows]), file)
    found, refused = read(file)
    assert found == [RENDERED, "<user>x"]
    assert refused == ["holds a datetime in its chat, which is neither text nor a number"]


def test_dates_stay_text_and_today_is_always_the_same_day(read):
    row = {"messages": [{"role": "user", "content": "2024-05-01"}, calling({"day": "2024-05-02"})[1]]}
    text = '<user>2024-05-01<assistant>[weather {"day": "2024-05-02"}]'
    assert read([row]) == ([text], [])
    assert read([row], DATED) == ([f"\n26 Jul 2024, 2024-07-26{text}"], [])


def test_templates_may_strip_escape_and_leave_out_thoughts(read):
    chat = [
        {"role": "user", "content": ' "Why?" \n'},
        {"role": "assistant", "content": "<think>Hm.</think>\n\nOh\nno."},
    ]
    assert read([{"messages": chat}], TRIMMED) == (['<user>"\\"Why?\\""<assistant>"Oh\\nno."'], [])


REFUSED = {
    "a system message that the chat template leaves out": {
        "messages": [{"role": "system", "content": "Be kind."}, *CHAT]
    },
    "a narrator message that the chat template leaves out": {
        "messages": [{"from": "narrator", "value": "Once"}, *CHAT]
    },
    "a tool call that the chat template leaves out": {"messages": calling({"city": "Oslo"}, content="")},
    "tools that the chat template leaves out": {"messages": CHAT, "tools": [TOOL]},
    r"can't be rendered with the tokenizer's chat template (no tools here)": {
        "messages": [*CHAT, {"role": "tool", "content": "3"}]
    },
    "a message without a role (role or from)": {"messages": [{"content": "x"}]},
    "a message without a text (content, value, text)": {"messages": [{"role": "user", "body": "x"}]},
    "a message with both content and text": {"messages": [{"role": "user", "content": "x", "text": "y"}]},
    "a message with a part of type image": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "an empty chat": {"messages": []},
    "tool calls that are no list": {"messages": [{"role": "assistant", "tool_calls": {"name": "x"}}]},
    "tools that are no list": {"messages": CHAT, "tools": "weather"},
    "neither text nor a chat but list": {"messages": ["Why?"]},
}


def test_what_a_template_leaves_out_is_refused_with_the_reason(read):
    for reason, row in REFUSED.items():
        found, refused = read([row, {"messages": CHAT}], FEW)
        assert found == ["<U>Why?<A>Because."], reason
        assert len(refused) == 1
        assert reason in refused[0]
    found, refused = read([{"messages": CHAT}, {"text": "plain"}], None)
    assert found == ["plain"]
    assert "has no chat template" in refused[0]
