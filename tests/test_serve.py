"""The server: OpenAI's own client, clients that go away, requests that make no sense, and its end."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TextIO

import pytest
from alone import begun
from conftest import save_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predict_train.runtime import offload_experts
from predict_train.runtime.conversation import Conversation
from predict_train.runtime.generate import generate
from predict_train.runtime.settings import Sampling, ServeConfig
from test_cli import run
from test_conversation import TEMPLATE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from predict_train.runtime.serve.app import make_app  # noqa: E402  # they need what may be missing
from predict_train.runtime.serve.worker import Worker  # noqa: E402

MODEL = "tiny"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": "The stone", "max_tokens": 1900, "temperature": 0}
"""An answer that takes seconds."""


class Served:
    """A server in a thread of this process."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: Any):
        self.config = ServeConfig(model=MODEL, **options)
        self.worker = Worker(model, tokenizer, self.config.queue)
        app = make_app(self.worker, self.config)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def client(self, key: str = "any") -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def send(self, path: str, body: Any, method: str = "POST") -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(
            method, path, body if isinstance(body, bytes) else json.dumps(body), {"Authorization": "Bearer k"}
        )
        return connection

    def ask(self, path: str, body: Any, method: str = "POST") -> tuple[int, Any]:
        response = self.send(path, body, method).getresponse()
        text = response.read()
        return response.status, json.loads(text) if response.headers["content-type"] == "application/json" else text

    def metric(self, name: str, default: float | None = None) -> float:
        """What was counted; `default` if nothing was so far."""
        found = re.search(
            rf"^predict_train_{re.escape(name)} (\S+)$", self.ask("/metrics", b"", "GET")[1].decode(), re.M
        )
        assert found or default is not None, name
        return float(found[1] if found else default)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)


@pytest.fixture
def model(tiny_moe: PreTrainedModel) -> PreTrainedModel:
    tiny_moe.generation_config.eos_token_id = None
    tiny_moe.config.max_position_embeddings = 2048
    return offload_experts(tiny_moe, policy="prefetch", slots=6, device="cpu")


@pytest.fixture
def serve(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Served]]:
    opened: list[Served] = []

    def begin(template: str | None = TEMPLATE, **options: Any) -> Served:
        tokenizer.chat_template = template
        opened.append(Served(model, tokenizer, **options))
        return opened[-1]

    yield begin
    tokenizer.chat_template = None
    for served in opened:
        served.close()


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until and not holds():
        time.sleep(0.02)
    return holds()


def test_answers_are_those_of_generate(
    serve: Callable[..., Served], model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    served = serve()
    client = served.client()
    assert [listed.id for listed in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    greedy = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    for prompt in ("The stone", "The river and"):
        expected = generate(model, tokenizer, prompt, Sampling(max_new_tokens=12))
        answer = client.completions.create(prompt=prompt, **greedy)
        assert answer.choices[0].text == expected.text
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokenizer(prompt)["input_ids"]), 12)
        pieces = [
            *client.completions.create(prompt=prompt, stream=True, stream_options={"include_usage": True}, **greedy)
        ]
        assert "".join(piece.choices[0].text for piece in pieces[:-1]) == expected.text
        assert pieces[-1].usage == answer.usage
        by_ids = client.completions.create(prompt=tokenizer(prompt)["input_ids"], **greedy)
        assert by_ids.choices[0].text == expected.text
        stop = expected.text[3:5]
        stopped = client.completions.create(prompt=prompt, stop=[stop], **greedy)
        assert stopped.choices[0].text == expected.text.partition(stop)[0]
        assert stopped.choices[0].finish_reason == "stop"
        pieces = [*client.completions.create(prompt=prompt, stop=[stop], stream=True, **greedy)]
        assert "".join(piece.choices[0].text for piece in pieces) == expected.text.partition(stop)[0]
    messages: list[Any] = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "The stone"}]
    expected = Conversation(model, tokenizer, Sampling(max_new_tokens=12), "Be brief").answer("The stone")
    said = client.chat.completions.create(messages=messages, **greedy).choices[0].message
    assert (said.role, said.content) == ("assistant", expected.text)
    deltas = [
        piece.choices[0].delta for piece in client.chat.completions.create(messages=messages, stream=True, **greedy)
    ]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected.text
    messages += [said.model_dump(exclude_none=False), {"role": "user", "content": [{"type": "text", "text": "And?"}]}]
    assert client.chat.completions.create(messages=messages, **greedy).choices[0].message.content
    drawn = [
        client.completions.create(model=MODEL, prompt="The", max_tokens=12, temperature=1.5, seed=seed).choices[0].text
        for seed in (1, 2, 1)
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    assert served.metric("generated_tokens_total") > 100
    assert served.metric("expert_copies_total") > 0


def test_what_can_not_be_answered_is_refused_in_openais_form(serve: Callable[..., Served]) -> None:
    served = serve(api_key="k", max_request="20KiB", template=None)
    ok = {"prompt": "The", "max_tokens": 1}
    cases: list[tuple[str, Any, int, str]] = [
        (TEXT, b"{", 400, "JSON"), (TEXT, b"", 400, "JSON"), (TEXT, [], 400, ""), (TEXT, {}, 400, "prompt"),
        (TEXT, {"prompt": ""}, 400, "empty"), (TEXT, {"prompt": []}, 400, "empty"), (TEXT, {"prompt": [-1]}, 400, "prompt"),
        (TEXT, {"prompt": [10**9]}, 400, "rows"), (TEXT, {"prompt": [10**30]}, 400, ""), (TEXT, {"prompt": ["a", "b"]}, 400, "one"),
        (TEXT, ok | {"temperature": "hot"}, 400, "temperature"), (TEXT, ok | {"temperature": -1}, 400, "temperature"),
        (TEXT, ok | {"max_tokens": 0}, 400, "max_tokens"), (TEXT, ok | {"top_p": 2}, 400, "top_p"), (TEXT, ok | {"n": 2}, 400, "n is"),
        (TEXT, ok | {"logprobs": 3}, 400, "logprobs"), (TEXT, ok | {"nonsense": 1}, 400, "nonsense"), (TEXT, ok | {"stop": [""]}, 400, "stop"),
        (TEXT, ok | {"stop": ["a"] * 17}, 400, "up to 16"), (TEXT, ok | {"stop": "a" * 201}, 400, "up to 16"),
        (TEXT, ok | {"repetition_penalty": 1e-40}, 400, "repetition_penalty"), (TEXT, ok | {"max_tokens": 10**6}, 400, "context"),
        (TEXT, ok | {"model": "gpt-4"}, 404, "gpt-4"),
        (TEXT, {"prompt": "x" * 30_000}, 413, "larger"), (TEXT, {"prompt": "\ud800"}, 400, ""), (TEXT, ok | {"seed": 2**64}, 400, "seed"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}, 400, "no chat template"), (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "cat", "content": "x"}]}, 400, "role"), ("/v1/nothing", ok, 404, "Not Found"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "type"),
    ]  # fmt: skip
    for path, body, status, words in cases:
        found, said = served.ask(path, body)
        assert found == status, (path, body, said)
        assert words in said["error"]["message"], (body, said)
        assert {"message", "type", "param", "code"} == said["error"].keys()
    assert served.ask(TEXT, ok | {"temperature": 1e-300})[0] == 200
    assert served.ask(TEXT, ok | {"n": 1, "user": "me", "presence_penalty": 0, "logit_bias": None})[0] == 200
    assert served.ask("/v1/models/other", b"", "GET")[0] == 404
    assert served.ask(TEXT, b"", "GET")[0] == 405
    with pytest.raises(openai.AuthenticationError):
        served.client("wrong").models.list()
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200, "without a key"
    assert served.worker.places == 0


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "prompt",
        "messages",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "n",
        "model",
    ]
)


def test_no_request_is_an_error_of_the_server(serve: Callable[..., Served]) -> None:
    served = serve(max_new_tokens=2)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(body=st.dictionaries(NAMES, VALUES, max_size=4), chats=st.booleans(), valid=st.booleans())
    def check(body: dict[str, Any], chats: bool, valid: bool) -> None:
        prompt = {"messages": [{"role": "user", "content": "x"}]} if chats else {"prompt": "The"}
        status, _ = served.ask(CHAT if chats else TEXT, body | (prompt if valid else {}))
        assert status in (200, 400, 404)

    check()
    assert served.ask("/health", b"", "GET")[0] == 200
    assert eventually(lambda: served.worker.places == 0)


def test_who_goes_away_frees_the_place_and_who_is_too_many_waits_outside(
    serve: Callable[..., Served], capsys: pytest.CaptureFixture[str]
) -> None:
    served = serve(queue=1)
    for streams in (True, False):
        running = served.send(TEXT, LONG | {"stream": streams})
        assert eventually(lambda: served.worker.places == 1)
        waiting = served.send(TEXT, LONG)
        assert eventually(lambda: served.worker.places == 2)
        status, said = served.ask(TEXT, {"prompt": "The", "max_tokens": 1})
        assert status == 429
        assert said["error"]["type"] == "rate_limit_error"
        waiting.close()
        assert eventually(lambda: served.worker.places == 1)
        begun = time.monotonic()
        running.close()
        assert eventually(lambda: served.worker.places == 0)
        status, _ = served.ask(TEXT, {"prompt": "The", "max_tokens": 1})
        assert status == 200
        assert time.monotonic() - begun < 5, "the model did not go on with what nobody waits for"
    assert served.metric("generated_tokens_total") == 2, "answers that nobody took are not counted"
    capsys.readouterr()
    gone = 'requests_total{path="/v1/completions",status="gone"}'
    before = served.metric(gone, default=0)
    with socket.create_connection(("127.0.0.1", served.port)) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        time.sleep(0.1)
    assert eventually(lambda: served.metric(gone, default=0) == before + 1)
    assert "Traceback" not in capsys.readouterr().err


def test_the_next_turn_of_a_chat_computes_what_is_new(serve: Callable[..., Served], model: PreTrainedModel) -> None:
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: lengths.append(given["input_ids"].shape[-1]), with_kwargs=True)
    served = serve()
    messages: list[Any] = [{"role": "user", "content": "The stone and the river. " * 10}]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0}
    _, said = served.ask(CHAT, body)
    messages += [said["choices"][0]["message"], {"role": "user", "content": "And the tree?"}]
    lengths.clear()
    _, said = served.ask(CHAT, body)
    assert lengths[0] < 60
    assert said["usage"]["prompt_tokens"] > 60


def test_the_first_signal_answers_what_is_there_and_a_second_ctrl_c_ends_at_once(
    tiny_moe: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forkserver: ForkServerContext,
) -> None:
    tiny_moe.generation_config.eos_token_id = None
    tiny_moe.config.max_position_embeddings = 2048
    folder = save_model(tiny_moe, tokenizer, tmp_path / "model")
    command = ["serve", str(folder), "--device", "cpu", "--port", "0"]
    with begun(forkserver, command) as (patient, its_words), begun(forkserver, command) as (hasty, words):
        connections = [ask(its_words, {"prompt": "The", "max_tokens": 60}, of=3), ask(words, LONG, of=2)]
        time.sleep(0.3)
        assert patient.pid is not None
        assert hasty.pid is not None
        os.kill(patient.pid, signal.SIGTERM)
        os.kill(hasty.pid, signal.SIGINT)
        assert "Ctrl-C again stops at once" in words.readline()
        os.kill(hasty.pid, signal.SIGINT)
        assert words.read() == "predict-train: stopped\n"
        hasty.join(30)
        assert hasty.exitcode == 130
        answers = [connection.getresponse().read() for connection in connections[0]]
        assert [json.loads(answer)["usage"]["completion_tokens"] for answer in answers] == [60, 60, 60]
        rest = its_words.read()
        patient.join(30)
        assert patient.exitcode == 0
        assert "all requests have been answered" in rest
        assert "Traceback" not in rest
    assert run(monkeypatch, *command[:-1], "1" * 6) == 2


def ask(said: TextIO, body: Any, of: int) -> list[http.client.HTTPConnection]:
    """Sends so many requests to a server that begins."""
    before = [*takewhile(lambda line: "experts are on the device at a time" not in line, said)]  # how it is loaded
    line = said.readline()
    found = re.search(r"127\.0\.0\.1:(\d+)/v1", line)
    assert found, (before, line)
    connections = [http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60) for _ in range(of)]
    for connection in connections:
        connection.request("POST", TEXT, json.dumps(body))
    return connections
