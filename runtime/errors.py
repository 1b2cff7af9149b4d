"""What goes wrong in the runtime through no fault of its code."""

from __future__ import annotations

from ..predictors.errors import UserError


class OffloadError(UserError):
    """The model can't be offloaded as asked; the message says why and what to do."""


class StoreError(UserError):
    """Experts that can't be stored, read or held; the message says why and what to do."""
