"""Runs mixture-of-experts models whose experts don't fit the device, fetching experts before they are needed."""

from runtime.cache import Eviction
from runtime.load import load_experts, load_offloaded
from runtime.offload import ExpertOffload, OffloadError, offload_experts, offloaded
from runtime.pack import pack, pack_random
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
    "pack",
    "pack_random",
]
