"""Runs mixture-of-experts models whose experts don't fit the device, fetching experts before they are needed."""

from runtime.offload import ExpertOffload, OffloadError, offload_experts, offloaded
from runtime.policy import Gating, Policy

__all__ = ["ExpertOffload", "Gating", "OffloadError", "Policy", "offload_experts", "offloaded"]
