"""Runs mixture-of-experts models whose experts don't fit the device, fetching experts before they are needed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .host.cache import Eviction
    from .load import load_experts, load_offloaded
    from .offload import ExpertOffload, OffloadError, offload_experts, offloaded
    from .settings import Gating, Policy
    from .store import StoreError

__all__ = [
    "Eviction",
    "ExpertOffload",
    "Gating",
    "OffloadError",
    "Policy",
    "StoreError",
    "load_experts",
    "load_offloaded",
    "offload_experts",
    "offloaded",
]

_MODULES = ("host.cache", "load", "offload", "settings", "store")


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds to import, and the command line's help needs none of it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = (import_module(f"predict_train.runtime.{module}") for module in _MODULES)
    return next(getattr(module, name) for module in modules if hasattr(module, name))
