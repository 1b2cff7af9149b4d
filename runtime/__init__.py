"""Runs mixture-of-experts models whose experts don't fit the device, fetching experts before they are needed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import OffloadError, StoreError
    from .host.cache import Eviction
    from .load import load_experts, load_offloaded
    from .observer import Observer
    from .offload import ExpertOffload, offload_experts, offloaded
    from .policy import Gating, Policy
    from .settings import LoadConfig, OffloadConfig

__all__ = [
    "Eviction",
    "ExpertOffload",
    "Gating",
    "LoadConfig",
    "Observer",
    "OffloadConfig",
    "OffloadError",
    "Policy",
    "StoreError",
    "load_experts",
    "load_offloaded",
    "offload_experts",
    "offloaded",
]

_MODULES = ("errors", "host.cache", "load", "observer", "offload", "policy", "settings")


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds to import, and the command line's help needs none of it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = (import_module(f"predict_train.runtime.{module}") for module in _MODULES)
    return next(getattr(module, name) for module in modules if hasattr(module, name))
