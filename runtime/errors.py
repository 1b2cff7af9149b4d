"""Errors of the runtime that its user can correct."""

from __future__ import annotations

from ..predictors.errors import UserError


class OffloadError(UserError):
    """The model can't be offloaded as asked. The message says why and what to do."""


class StoreError(UserError):
    """Experts can't be stored, read or held in memory. The message says why and what to do."""
