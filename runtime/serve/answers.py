"""Answers on their way to a client: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from contextlib import suppress
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ...predictors.errors import UserError
from ..generate import Generation
from ..settings import Sampling
from .forms import RequestError
from .metrics import Metrics
from .worker import Job, Worker


class Form(Protocol):
    """How an answer is written: OpenAI has one form for chats, and one for texts."""

    def whole(self, text: str, reason: str) -> dict[str, Any]:
        """The whole answer."""

    def piece(self, text: str | None, reason: str | None, is_first: bool = False) -> dict[str, Any]:
        """One piece of a stream. The last one has no text but the reason of the end."""


class _Form:
    def __init__(self, model: str, kind: str, prefix: str):
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def _with(self, choice: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return self._head | {"choices": [{"index": 0, **choice, "logprobs": None, "finish_reason": reason}]}


class ChatForm(_Form):
    def __init__(self, model: str):
        super().__init__(model, "chat.completion", "chatcmpl")

    def whole(self, text: str, reason: str) -> dict[str, Any]:
        return self._with({"message": {"role": "assistant", "content": text, "refusal": None}}, reason)

    def piece(self, text: str | None, reason: str | None, is_first: bool = False) -> dict[str, Any]:
        delta = ({"role": "assistant"} if is_first else {}) | ({} if text is None else {"content": text})
        return self._with({"delta": delta}, reason) | {"object": "chat.completion.chunk"}


class TextForm(_Form):
    def __init__(self, model: str):
        super().__init__(model, "text_completion", "cmpl")

    def whole(self, text: str, reason: str) -> dict[str, Any]:
        return self._with({"text": text}, reason)

    def piece(self, text: str | None, reason: str | None, is_first: bool = False) -> dict[str, Any]:  # noqa: ARG002
        return self._with({"text": text or ""}, reason)


def _usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}


class Answer(Response):
    """The answer to one request. It has a place in front of the model as long as it lasts."""

    def __init__(self, worker: Worker, metrics: Metrics, asked: Any, ids: list[int], sampling: Sampling, form: Form):
        super().__init__()
        self._worker, self._metrics, self._asked, self._form = worker, metrics, asked, form
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        self._job = Job(ids, sampling, seed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._worker.place():
            gone = asyncio.ensure_future(_gone(receive))
            try:
                if self._asked.stream:
                    await self._stream(send, gone)
                else:
                    await self._whole(scope, receive, send, gone)
            finally:
                self._job.is_given_up.set()
                gone.cancel()
                with suppress(asyncio.CancelledError):
                    await gone

    async def _whole(self, scope: Scope, receive: Receive, send: Send, gone: asyncio.Future[Any]) -> None:
        made: asyncio.Future[Any] = asyncio.wrap_future(self._worker.begin(self._job))
        await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            return
        result = made.result()
        assert result is not None
        answer = self._form.whole(result.text, result.finish_reason) | {"usage": self._counted(result)}
        await JSONResponse(answer)(scope, receive, send)

    async def _stream(self, send: Send, gone: asyncio.Future[Any]) -> None:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def put(text: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        self._job.on_text = put
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def tell(event: dict[str, Any] | str, more: bool = True) -> None:
            text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

        await tell(self._form.piece("", None, is_first=True))
        made = asyncio.wrap_future(self._worker.begin(self._job))
        made.add_done_callback(lambda _: pieces.put_nowait(None))
        while True:
            piece: asyncio.Future[Any] = asyncio.ensure_future(pieces.get())
            await asyncio.wait({piece, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not piece.done():
                piece.cancel()
                return
            if (text := piece.result()) is None:
                break
            await tell(self._form.piece(text, None))
        if (error := made.exception()) is not None:
            message = str(error) if isinstance(error, UserError) else "an error of the server"
            await tell(RequestError(500, message).body, more=False)
            if not isinstance(error, UserError):
                raise error
            return
        result = made.result()
        assert result is not None
        await tell(self._form.piece(None, result.finish_reason))
        usage, options = self._counted(result), self._asked.stream_options
        if options is not None and options.include_usage:
            await tell(self._form.piece(None, None) | {"choices": [], "usage": usage})
        await tell("[DONE]", more=False)

    def _counted(self, result: Generation) -> dict[str, int]:
        self._metrics.answered(len(self._job.ids), result)
        return _usage(len(self._job.ids), len(result.token_ids))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
