"""Processes that the fork server begins, and jobs of such. Each of them imports this file, so it imports little itself."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO


def exit_code(
    forkserver: ForkServerContext, job: Callable[..., object], *given: object, within: int = 100
) -> int | None:
    """That of a process which does a job with what is `given`; None if it has not ended within so many seconds."""
    process = forkserver.Process(target=job, args=given)
    process.start()
    process.join(within)
    return process.exitcode


def command_line(arguments: list[str], said: Connection) -> None:
    """The command line, which writes what it says to `said`."""
    os.dup2(said.fileno(), 2)
    said.close()
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # the server's own is a file, and a pipe is none
    # Children of a shell's background job ignore it, and so would this one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["predict-train", *arguments]
    from predict_train import cli

    cli.main()


@contextmanager
def begun(forkserver: ForkServerContext, arguments: list[str]) -> Iterator[tuple[BaseProcess, TextIO]]:
    """The command line in a process of its own, and its standard error. Afterwards there is no such process."""
    reader, writer = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=command_line, args=(arguments, writer))
    process.start()
    writer.close()
    with reader, open(os.dup(reader.fileno())) as said:
        try:
            yield process, said
        finally:
            process.kill()
            process.join()


def module(name: str, arguments: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    """`python -m NAME ARGUMENTS` in a folder and with an environment of its own; what it says goes to `log`."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, folder)
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def inspect_from_a_notebook(folder: Path, figure: Path, told: Path) -> None:
    """`inspect`, where what a notebook sets is there, and a terminal that knows ASCII only."""
    from predict_train import cli

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        del sys.modules[name]  # it asks for the environment when it is imported, so it is imported again
    os.environ |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "LC_ALL": "C"}
    sys.stdout = sys.stderr = told.open("w", encoding="ascii")
    sys.argv = ["predict-train", "inspect", str(folder), "--plot", str(figure)]
    cli.main()
