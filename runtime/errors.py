"""Errors of the runtime that its user can correct."""

from __future__ import annotations

import traceback
from contextlib import suppress

from ..predictors.errors import UserError


class OffloadError(UserError):
    """The model can't be offloaded as asked. The message says why and what to do."""


class StoreError(UserError):
    """Experts can't be stored, read or held in memory. The message says why and what to do."""


def let_go(error: BaseException | None) -> None:
    """Empties the frames of the runtime that an exception refers to. Whoever keeps the exception would keep the slots too."""
    package, reason = __name__.partition(".")[0], error
    while reason is not None:
        for frame, _ in traceback.walk_tb(reason.__traceback__):
            if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
                with suppress(RuntimeError):  # it still runs
                    frame.clear()
        reason = reason.__cause__ or reason.__context__
