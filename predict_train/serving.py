"""The command `serve`."""

from __future__ import annotations

import importlib.util
import socket

import typer

from .generating import loaded
from .predictors.errors import UserError
from .runtime.settings import ServeConfig

NEEDED = ("starlette", "uvicorn", "prometheus_client")


def serve(config: ServeConfig) -> None:
    """Serves until the process is told to end (Ctrl-C, SIGTERM). Requests that are there by then are answered, unless
    Ctrl-C is pressed a second time.
    """
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"serve needs {name}, which is not installed; pip install 'predict-train[serve]'")
    import uvicorn

    from .runtime.serve.app import Server, make_app
    from .runtime.serve.worker import Worker

    with _listening(config) as listener:
        model, tokenizer = loaded(config)
        app = make_app(Worker(model, tokenizer, config.queue), config)
        listener.listen(128)  # from now on clients are taken, and wait until uvicorn has begun
        host, port = listener.getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        typer.echo(f"{config.model} is served at http://{where}:{port}/v1", err=True)
        server = Server(uvicorn.Config(app, log_level="warning", access_log=False))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn hands on what has stopped it
            typer.echo("stopped; all requests have been answered", err=True)


def _listening(config: ServeConfig) -> socket.socket:
    """A socket that listens. It is made before the model is loaded, which takes longer."""
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"{config.host}:{config.port} can't be listened at ({error.strerror}); give another --host or --port"
        ) from error
    return listener
