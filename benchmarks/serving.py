"""Clients of all sorts on `predict-train serve`: is an answer lost or wrong, and does memory grow?

    python -m benchmarks.serving

Eight clients send requests to the embedded model for ten minutes: questions by OpenAI's client, whole and streamed, answers that
nobody waits for, bodies that are no JSON, hostile ones, ones that are too large, and prompts beyond the context. After three quarters of the
time the server is told to end while clients wait, and started again. All answers are compared with those of
`runtime.generate.generate` in this process. Both are prefetched and in float32: in bfloat16 a text whose beginning is kept from the
request before may be rounded otherwise, and a tie between two tokens be broken otherwise.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import psutil
from predict_train.predictors.loading import load_tokenizer
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.runtime.generate import generate
from predict_train.runtime.settings import Sampling

from benchmarks.runtime import RESULTS, ROOT
from predict_train import load_offloaded

MODEL, PREDICTORS = ROOT / "checkpoints" / "tiny-moe", ROOT / "checkpoints" / "tiny-moe-predictors"
CLIENTS, QUEUE, MOST_BYTES, CONTEXT = 8, 3, 1 << 16, 2048
STARTS = ("def ", "class ", "import ", "for item in ", "    return ", "with open(", "try:\n    ", "# ")
LENGTHS = (4, 12, 24)
KEY = "a key"
HOSTILE: list[Any] = [
    b"", b"{", b"\xff\xfe", b"[" * 20_000, [], 7, {}, {"prompt": None}, {"prompt": [-1]}, {"prompt": [10**30]},
    {"prompt": "x", "temperature": "hot"}, {"prompt": "x", "max_tokens": -1}, {"prompt": "x", "nonsense": 1},
    {"prompt": "x", "stop": [""]}, {"prompt": "x", "seed": 2**70}, {"prompt": "\ud800"},
]  # fmt: skip


class Server:
    """`predict-train serve` as a process, always at the same port."""

    def __init__(self, port: int):
        words = [sys.executable, "-m", "predict_train", "serve", MODEL, "--predictors", PREDICTORS, "--device", "cpu", "--port",
                 port, "--queue", QUEUE, "--max-request", f"{MOST_BYTES >> 10}KiB", "--dtype", "float32", "--policy", "prefetch"]  # fmt: skip
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PREDICT_TRAIN_API_KEY": KEY, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stderr is not None
        line = ""
        for line in self.process.stderr:
            if " is served at " in line:
                self.port = int(line.rsplit(":", 1)[1].partition("/")[0])
                return
        raise SystemExit(f"the server has not started: {line}")

    @property
    def bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def end(self) -> tuple[int, str]:
        """Tells it to end. Returns its exit code, and what it said since it has begun."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stderr is not None
        said = self.process.stderr.read()
        return self.process.wait(), said


class Client(threading.Thread):
    """Sends requests until it is told to end."""

    def __init__(self, number: int, port: int, expected: dict[tuple[str, int], str], restart: threading.Event):
        super().__init__()
        self.port, self.expected, self.restart = port, expected, restart
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.is_over = False
        self._random = random.Random(number)
        url, once = f"http://127.0.0.1:{port}/v1", {"Connection": "close"}
        self._openai = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=300, default_headers=once)

    def run(self) -> None:
        kinds = [self.ask, self.leave, self.send_nonsense, self.send_too_much]
        while not self.is_over:
            kind = self._random.choices(kinds, (70, 15, 10, 5))[0]
            try:
                self.counts[kind()] += 1
            except openai.RateLimitError:
                self.counts["refused with 429"] += 1
                time.sleep(0.2)
            except (openai.APIConnectionError, ConnectionError, http.client.HTTPException) as error:
                if self.restart.is_set():
                    self.counts["no server there"] += 1
                    time.sleep(0.5)
                else:
                    self.counts["lost"] += 1
                    self.wrong.append(f"{kind.__name__}: {error!r} from {error.__cause__!r}")
            except Exception as error:
                self.counts["wrong"] += 1
                self.wrong.append(f"{kind.__name__}: {error!r}")

    def ask(self) -> str:
        """A question with one right answer."""
        start, length = self._random.choice(list(self.expected))
        streams = self._random.random() < 0.5
        asked: dict[str, Any] = {"model": str(MODEL), "prompt": start, "max_tokens": length, "temperature": 0}
        if streams:
            pieces = self._openai.completions.create(stream=True, **asked)
            text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
        else:
            text = self._openai.completions.create(**asked).choices[0].text
        if text != self.expected[start, length]:
            raise ValueError(f"{text!r} in the place of {self.expected[start, length]!r}")
        return "streamed" if streams else "answered"

    def leave(self) -> str:
        """Asks for much, and goes away."""
        connection = self._send({"prompt": "def ", "max_tokens": 1024, "stream": self._random.random() < 0.5})
        time.sleep(self._random.random())
        connection.close()
        return "left"

    def send_nonsense(self) -> str:
        return self._refused(self._random.choice(HOSTILE), (400,), "nonsense refused")

    def send_too_much(self) -> str:
        if self._random.random() < 0.5:
            return self._refused({"prompt": "x" * (2 * MOST_BYTES)}, (413,), "too large refused")
        return self._refused({"prompt": [5] * CONTEXT, "max_tokens": CONTEXT}, (400,), "too long refused")

    def _send(self, body: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/v1/completions", data, {"Authorization": f"Bearer {KEY}"})
        return connection

    def _refused(self, body: Any, codes: tuple[int, ...], name: str) -> str:
        response = self._send(body).getresponse()
        said = json.loads(response.read())
        if response.status not in codes or "message" not in said["error"]:
            raise ValueError(f"{response.status} {said} to {str(body)[:80]}")
        return name


def answers() -> dict[tuple[str, int], str]:
    """The right answers, by the prompt and the most tokens."""
    model: Any = load_offloaded(MODEL, PREDICTORS, device="cpu", dtype="float32")
    tokenizer = load_tokenizer(str(MODEL))
    return {
        (start, length): generate(model, tokenizer, start, Sampling(max_new_tokens=length, temperature=0.0)).text
        for start in STARTS
        for length in LENGTHS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path, default=RESULTS / "serving.json")
    arguments = parser.parse_args()
    expected, restart = answers(), threading.Event()
    server = Server(0)
    clients = [Client(number, server.port, expected, restart) for number in range(CLIENTS)]
    begun = time.monotonic()
    for client in clients:
        client.start()
    memory: list[list[tuple[float, int]]] = [[]]
    ended: list[tuple[int, str]] = []
    while (passed := time.monotonic() - begun) < 60 * arguments.minutes:
        if passed > 45 * arguments.minutes and not ended:
            restart.set()
            ended.append(server.end())
            server = Server(server.port)
            memory.append([])
            time.sleep(5)  # clients that wait to try again
            restart.clear()
        memory[-1].append((time.monotonic() - begun, server.bytes))
        time.sleep(1)
    for client in clients:
        client.is_over = True
    for client in clients:
        client.join()
    ended.append(server.end())
    counts = dict(sum((client.counts for client in clients), Counter()).most_common())
    first = [size for _, size in memory[0]]
    part = max(1, len(first) // 5)
    grown = [statistics.median(some) for some in (first[part : 2 * part], first[-part:])]
    result = {
        "minutes": arguments.minutes,
        "clients": CLIENTS,
        "requests": counts,
        "wrong": [line for client in clients for line in client.wrong][:20],
        "exit_codes": [code for code, _ in ended],
        "tracebacks": sum(said.count("Traceback") for _, said in ended),
        "bytes_in_the_second_and_last_fifth_before_the_restart": grown,
        "most_bytes": max(size for some in memory for _, size in some),
    }
    print(json.dumps(result, indent=2))
    result |= {"versions": versions(), "hardware": hardware(), "command": command()}
    arguments.json.write_text(json.dumps(result, indent=2).replace(str(ROOT), ".") + "\n")


if __name__ == "__main__":
    main()
