"""The server's paths. Requests wait in front of one model, which answers them one after another.

    POST /v1/chat/completions, /v1/completions     answers, whole or as a stream of events
    GET  /v1/models, /v1/models/NAME               the one model
    GET  /health, /metrics                         whether it lives, and what it counted, for Prometheus

Where a client goes away, its place is free at once, and the model stops at its next token.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import signal
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import PurePath
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...predictors.errors import UserError
from ...predictors.loading import check_tokens
from ..conversation import context_of, token_ids_of
from ..settings import ServeConfig
from .answers import Answer, ChatForm, TextForm
from .forms import ChatRequest, CompletionRequest, RequestError, parsed
from .metrics import Metrics
from .worker import Worker


class Service:
    """What the paths share."""

    def __init__(self, worker: Worker, config: ServeConfig):
        self.worker, self.config = worker, config
        self.metrics = Metrics(worker)
        self.begun = int(time.time())

    @property
    def name(self) -> str:
        """Of the model, as clients call it."""
        return PurePath(self.config.model).name if PurePath(self.config.model).is_absolute() else self.config.model

    async def chat(self, request: Request) -> Answer:
        asked = parsed(ChatRequest, await request.body())
        self._check_model(asked.model)
        tokenizer = self.worker.tokenizer
        if not tokenizer.chat_template:
            raise RequestError(400, "the model has no chat template; use /v1/completions")
        ids = await asyncio.to_thread(token_ids_of, [message.plain() for message in asked.messages], tokenizer)
        return self._answer(asked, ids, ChatForm)

    async def complete(self, request: Request) -> Answer:
        asked = parsed(CompletionRequest, await request.body())
        self._check_model(asked.model)
        ids = asked.prompt
        if isinstance(ids, str):
            ids = (await asyncio.to_thread(self.worker.tokenizer, ids))["input_ids"]
        return self._answer(asked, ids, TextForm)

    def models(self, request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self.begun, "owned_by": "predict-train"}
        if (asked := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [model]})
        self._check_model(asked)
        return JSONResponse(model)

    def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.name})

    def counts(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name, self.config.model):
            raise RequestError(404, f"there is no model {name} here, only {self.name}", "model", "model_not_found")

    def _answer(self, asked: Any, ids: list[int], form: Any) -> Answer:
        import torch

        model, context = self.worker.model, context_of(self.worker.model)
        if not ids:
            raise RequestError(400, "the prompt is empty", "prompt")
        check_tokens(torch.tensor(ids), model)
        most = self.config.max_new_tokens if context is None else context - len(ids)
        sampling = asked.sampling(self.config, max(most, 1))
        if most < sampling.max_new_tokens and context is not None:
            raise RequestError(
                400,
                f"the prompt has {len(ids)} tokens and the answer up to {sampling.max_new_tokens}, and the model's context is "
                f"{context}; give a shorter prompt or fewer max_tokens",
                code="context_length_exceeded",
            )
        return Answer(self.worker, self.metrics, asked, ids, sampling, form(self.name))


class Door:
    """Refuses who has no key, and bodies that are too large; counts requests; gives every error OpenAI's form."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, read = 0, 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._service.config.max_request:
                raise RequestError(413, f"the request is larger than {self._service.config.max_request} bytes")
            return message

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check_key(scope)
            await self._app(scope, limited, watched)
        except ClientDisconnect:  # before its request was whole
            return
        except Exception as error:
            if status:  # the answer has begun
                raise
            response = _as_response(error)
            await response(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._service.metrics.requests.labels(path, str(status or "gone")).inc()

    def _check_key(self, scope: Scope) -> None:
        key = self._service.config.key
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        if key is not None and scope["path"] != "/health" and not hmac.compare_digest(given, key.encode()):
            raise RequestError(
                401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`", None, "invalid_api_key"
            )


def _as_response(error: Exception) -> Response:
    if isinstance(error, RequestError):
        return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 429 else None)
    if isinstance(error, HTTPException):
        return JSONResponse(RequestError(error.status_code, error.detail).body, error.status_code, error.headers)
    if isinstance(error, UserError):
        return JSONResponse(RequestError(400, str(error)).body, 400)
    traceback.print_exception(error)
    return JSONResponse(RequestError(500, "an error of the server; its log says more").body, 500)


async def _as_answer(_: Request, error: Exception) -> Response:
    return _as_response(error)


def make_app(worker: Worker, config: ServeConfig) -> Starlette:
    """The server as an ASGI application. It closes `worker` at its end."""
    service = Service(worker, config)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        worker.close()

    return Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.complete, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.models),
            Route("/health", service.health),
            Route("/metrics", service.counts),
        ],
        middleware=[Middleware(Door, service=service)],
        exception_handlers={HTTPException: _as_answer},
        lifespan=lifespan,
    )


class Server(uvicorn.Server):
    """Answers the requests that it has when it is stopped. A second Ctrl-C ends the process at once, with exit code 130."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Written by the system's own call, as a signal may come while the same stream is written to.
        if sig == signal.SIGINT and self.should_exit:
            os.write(2, b"predict-train: stopped\n")
            os._exit(130)  # a prompt that is computed can't be broken off, and its thread would be waited for
        super().handle_exit(sig, frame)  # before all words, since the second one may come while they are written
        if sig == signal.SIGINT and self.server_state.tasks:
            os.write(2, b"the requests that are there are being answered; Ctrl-C again stops at once\n")
