"""Chats: each answer is what the model would say to the whole chat, however much of it is kept from turn to turn."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import save_model
from predict_train.runtime import offloaded
from predict_train.runtime.conversation import ChatError, Conversation
from predict_train.runtime.settings import Sampling
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from predict_train import cli

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
FORGETFUL = TEMPLATE.replace("m.content", "m.content if m.role == 'user' or loop.last else m.content[:9]")
"""Writes the answers of earlier turns otherwise than they were generated, as templates do that drop what was thought."""
GREEDY = Sampling(max_new_tokens=7)
Templated = Callable[[str | None], PreTrainedTokenizerFast]


@pytest.fixture
def templated(tokenizer: PreTrainedTokenizerFast) -> Iterator[Templated]:
    """Gives the tokenizer with another chat template."""

    def change(template: str | None) -> PreTrainedTokenizerFast:
        tokenizer.chat_template = template
        return tokenizer

    yield change
    tokenizer.chat_template = None


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL, None], ids=["template", "forgetful", "plain"])
def test_each_answer_is_that_to_the_whole_chat(
    template: str | None, templated: Templated, tiny_moe: PreTrainedModel
) -> None:
    tokenizer = templated(template)
    tiny_moe.generation_config.eos_token_id = None
    with offloaded(tiny_moe, policy="prefetch", slots=6, device="cpu"):
        chat = Conversation(tiny_moe, tokenizer, GREEDY)
        texts = ["The stone ", "What of the river and the tree? ", "And "]
        passed = []
        for text in texts:
            said = [*chat.messages, {"role": "user", "content": text}]
            answer = chat.answer(text)
            passed.append(tiny_moe.expert_offload.counters.tokens)
            whole = Conversation(tiny_moe, tokenizer, GREEDY)
            whole.messages = said[:-1]
            expected = whole.answer(text)
            assert answer.token_ids == expected.token_ids
            assert chat.messages == [*said, {"role": "assistant", "content": answer.text}]
        chat.reset()
        assert chat.answer(texts[0]).token_ids == Conversation(tiny_moe, tokenizer, GREEDY).answer(texts[0]).token_ids


def test_what_was_said_is_not_computed_again(templated: Templated, tiny_moe: PreTrainedModel) -> None:
    tokenizer = templated(TEMPLATE)
    lengths = []
    tiny_moe.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[-1]), with_kwargs=True
    )
    tiny_moe.generation_config.eos_token_id = None
    chat = Conversation(tiny_moe, tokenizer, GREEDY, system="Be brief. " * 20)
    chat.answer("The stone")
    first = lengths[0]
    lengths.clear()
    chat.answer("The river")
    assert first > 60
    assert lengths[0] < 60, "the system message is cached"
    assert lengths[1:] == [1] * 6


def test_an_answer_that_is_broken_off_counts_as_said(templated: Templated, tiny_moe: PreTrainedModel) -> None:
    tokenizer = templated(TEMPLATE)
    tiny_moe.generation_config.eos_token_id = None
    pieces: list[str] = []

    def stop(piece: str) -> None:
        pieces.append(piece)
        if "".join(pieces).strip():
            raise KeyboardInterrupt

    with offloaded(tiny_moe, policy="prefetch", slots=6, device="cpu"):
        chat = Conversation(tiny_moe, tokenizer, Sampling(max_new_tokens=60))
        with pytest.raises(KeyboardInterrupt):
            chat.answer("The stone", stop)
        assert chat.messages[1]["content"] == "".join(pieces)
        whole = Conversation(tiny_moe, tokenizer, GREEDY)
        whole.messages = list(chat.messages)
        assert chat.answer("The river").text.startswith(whole.answer("The river").text)


def test_what_can_not_be_answered_is_not_said(templated: Templated, tiny_moe: PreTrainedModel) -> None:
    tiny_moe.config.max_position_embeddings = 40
    chat = Conversation(tiny_moe, templated(TEMPLATE), Sampling(max_new_tokens=30))
    with pytest.raises(ChatError, match="context is 40"):
        chat.answer("The stone and the river and the tree and more of it")
    assert chat.messages == []
    broken = Conversation(tiny_moe, templated("{{ raise_exception('roles must alternate') }}"), GREEDY)
    with pytest.raises(ChatError, match="roles must alternate"):
        broken.answer("x")
    with pytest.raises(ChatError, match="no system message"):
        Conversation(tiny_moe, templated(None), GREEDY, system="Be brief")


def ended(monkeypatch: pytest.MonkeyPatch, stdin: bytes, *arguments: object) -> int:
    """The exit code of a command that reads `stdin`."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", ["predict-train", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_chat_answers_lines_and_obeys_commands(
    templated: Templated,
    tiny_moe: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_moe.generation_config.eos_token_id = None
    folder = save_model(tiny_moe, templated(TEMPLATE), tmp_path / "model")
    arguments = [folder, "--device", "cpu", "--max-new-tokens", 5, "--temperature", 0]
    lines = b"/stats\nThe stone\n/stats\n/reset\n\nThe stone\n/nothing\n/exit\nThe river\n"
    assert ended(monkeypatch, lines, "chat", *arguments) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert out[: len(out) // 2] == out[len(out) // 2 :], "after /reset it is the same chat"
    assert "nothing has been answered yet" in err
    assert err.count("time per output token") == 1
    assert "there is no command /nothing" in err
    assert ended(monkeypatch, b"The \xff stone\n", "chat", *arguments) == 2
    assert "is not UTF-8" in capsys.readouterr().err
    assert ended(monkeypatch, b"The stone\n", "chat", *arguments[:-4], "--max-new-tokens", 10**6) == 2
    assert "context" in capsys.readouterr().err


def test_generate_takes_several_prompts_standard_input_and_chats(
    templated: Templated,
    tiny_moe: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_moe.generation_config.eos_token_id = None
    tokenizer = templated(TEMPLATE)
    folder, out = save_model(tiny_moe, tokenizer, tmp_path / "model"), tmp_path / "texts.json"
    arguments = [folder, "--device", "cpu", "--max-new-tokens", 6, "--policy", "prefetch", "--json", out]
    prompts = ["--prompt", "The stone", "--prompt", "-"]
    assert ended(monkeypatch, b"The river\nand", "generate", *arguments, *prompts) == 0
    printed, told = capsys.readouterr()
    texts = json.loads(out.read_text())["texts"]
    assert [text["prompt"] for text in texts] == ["The stone", "The river\nand"]
    assert all(text["text"].rstrip() in printed for text in texts)
    assert "prompt 2 of 2: The river" in printed
    assert "time per output token" in told
    for text in texts:
        ids = tokenizer(text["prompt"], return_tensors="pt")["input_ids"]
        whole = tiny_moe.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert text["token_ids"] == whole[0, ids.shape[1] :].tolist()
    assert ended(monkeypatch, b"", "generate", *arguments, "--prompt", "The stone", "--chat") == 0
    chatted = json.loads(out.read_text())["texts"][0]
    ids = tokenizer("user: The stone\nassistant: ", return_tensors="pt")["input_ids"]
    whole = tiny_moe.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert chatted["token_ids"] == whole[0, ids.shape[1] :].tolist()
    stop = texts[0]["text"][1:3]
    assert ended(monkeypatch, b"", "generate", *arguments, "--prompt", "The stone", "--stop", stop) == 0
    assert len(json.loads(out.read_text())["texts"][0]["token_ids"]) <= 6
    capsys.readouterr()
    for wrong, words in {
        ("--prompt", "-"): "standard input is empty",
        ("--prompt", "-", "--prompt", "-"): "only once",
        ("--prompt", "x", "--top-p", "0.5"): "nothing is drawn",
        ("--prompt", "x", "--top-p", "1.5", "--temperature", "1"): "top-p",
        ("--prompt", "x", "--stop", ""): "empty",
    }.items():
        assert ended(monkeypatch, b"", "generate", *arguments, *wrong) == 2, wrong
        said = capsys.readouterr().err
        assert words in said, (wrong, said)
        assert len(said.strip().splitlines()) == 1
