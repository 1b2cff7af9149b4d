"""Runs mixture-of-experts models whose experts don't fit the device, fetching experts before they are needed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.cache import Eviction
    from runtime.load import load_experts, load_offloaded
    from runtime.offload import ExpertOffload, OffloadError, offload_experts, offloaded
    from runtime.policy import Gating, Policy
    from runtime.store import StoreError

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

_MODULES = ("cache", "load", "offload", "policy", "store")


def __getattr__(name: str) -> Any:
    # On first use: the command line imports this package for its commands' options, and torch takes seconds to import.
    if name not in __all__:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    modules = (import_module(f"runtime.{module}") for module in _MODULES)
    return next(getattr(module, name) for module in modules if hasattr(module, name))
