"""What ends a command with one sentence: errors that the user can repair, and requests to stop."""

from __future__ import annotations

import re


class UserError(ValueError):
    """Bad input. The message is one sentence that says what is wrong and what to do."""

    exit_code = 2
    """Of the command line."""


class TerminatedError(KeyboardInterrupt):
    """The system asks this process to end, as with Ctrl-C; the command line raises it on SIGTERM."""


class StoppedError(UserError):
    """A command was stopped; the message says how to go on."""

    def __init__(self, stop: KeyboardInterrupt):
        super().__init__(str(stop) or "stopped")
        # As a shell counts: 128 and the number of the signal.
        self.exit_code = 143 if isinstance(stop, TerminatedError) else 130


def lack_of_memory(error: Exception) -> UserError | None:
    """What to say if `error` says that the host has not the memory that was asked for; None if it says something else."""
    asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error))  # torch's words
    if asked is None and not isinstance(error, MemoryError):
        return None
    size = f" for {int(asked[1]):,} bytes" if asked else ""
    return UserError(f"there is no room in memory{size}; give smaller settings")


def one_line(error: Exception) -> str:
    """What an error of another library says, in one line; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
