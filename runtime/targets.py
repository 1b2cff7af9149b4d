"""The targets of guesses: for each MoE layer its source, and how many candidates are fetched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..predictors.architecture import ExpertLayer, MoELayer, UnsupportedModelError, farther, sources
from ..predictors.checkpoint import Predictors
from ..predictors.confidence import Confidence
from ..predictors.discovery import Found
from .errors import OffloadError
from .policy import Gating, Policy, candidates_from_recall
from .settings import OffloadConfig


class Target(NamedTuple):
    """An MoE layer as the target of a guess."""

    layer: ExpertLayer
    number: int
    """Counted from 0 among the MoE layers."""
    source: int | None
    """The model's number of the layer whose residual is read. None where the target's own input is read."""
    candidates: int
    """How many experts are fetched for each speculated token; at least `top_k`."""
    confidence: Confidence | None = None
    """How sure the speculation is of a candidate; None if that is not known."""

    @property
    def routed(self) -> MoELayer:
        """The layer, whose router is watched. Only such layers are guessed."""
        assert isinstance(self.layer, MoELayer)
        return self.layer


def targets_of(
    layers: Sequence[ExpertLayer],
    predictors: Predictors | None = None,
    horizon: int | None = None,
    candidates: int | str | None = None,
    policy: Policy = Policy.PREFETCH,
    gating: Gating = Gating.TRUE,
) -> list[Target]:
    """Every MoE layer as a target, in the model's order.

    For `horizon` see `sources_read`. `candidates` is their number, or `auto`, which takes for each layer as many as the recall
    in `predictors` justifies. By default it is `top_k`, and two more under gating `resident`. Raises `OffloadError` for a number
    that the model can't have, and what `sources_read` raises.
    """
    top_k, experts = layers[0].top_k, layers[0].num_experts
    if candidates not in (None, "auto") and (not isinstance(candidates, int) or not top_k <= candidates <= experts):
        raise OffloadError(
            f"{candidates} candidates are asked for; this model takes from {top_k} to {experts}, or auto"
        )
    usual = candidates if isinstance(candidates, int) else min(top_k + 2 * (gating is Gating.RESIDENT), experts)
    source_of = sources_read(sources(layers), predictors, horizon)
    targets = []
    for number, layer in enumerate(layers):
        # Old exports have no recall, and neither has speculation without predictors.
        recall = predictors.of(layer.index).recall if predictors is not None and candidates == "auto" else []
        count = min(candidates_from_recall(recall, top_k, policy, gating), experts) if recall else usual
        confidence = None if predictors is None else predictors.of(layer.index).confidence
        targets.append(Target(layer, number, source_of[layer.index], count, confidence))
    return targets


def sources_read(
    nearest: dict[int, int | None], predictors: Predictors | None, horizon: int | None
) -> dict[int, int | None]:
    """The source of each target layer: the layer that `predictors` read, or without them the one `horizon` layers before.

    `nearest` gives the nearest source of each target. `horizon` is by default 1. Raises `OffloadError` for a horizon that
    `predictors` were not trained for, or for sources that the model does not have.
    """
    if horizon not in (None, 1, 2):
        raise OffloadError(f"a horizon of {horizon} is asked for; guess 1 or 2 layers ahead")
    asked = farther(nearest, horizon or 1)
    if predictors is None:
        return asked
    trained = predictors.sources_among(nearest)
    for target, source in trained.items():
        if source is not None and (source not in nearest or source >= target):
            raise OffloadError(
                f"these predictors read layer {source} for layer {target}, which is no mixture-of-experts layer before it; "
                "export them again"
            )
    if horizon is not None and trained != asked:
        raise OffloadError(
            f"a horizon of {horizon} is asked for, and these predictors were trained to read other layers; leave the "
            "horizon out or train predictors for it"
        )
    return trained


def possible(config: OffloadConfig, found: Found, predictors: Any) -> OffloadConfig:
    """`config`, but on demand where the experts can't be guessed; then a warning says why.

    Raises `UnsupportedModelError` where predictors are given and can't be used.
    """
    reason = found.unrecorded or found.unfollowed
    if reason is None or config.policy == Policy.ON_DEMAND:
        return config
    if predictors is not None:
        if found.unrecorded:
            raise UnsupportedModelError(f"no predictors can be used with this model: {reason}")
        return config
    cure = "can't be guessed" if found.unrecorded else "can't be guessed without predictors, which collect and fit make"
    warnings.warn(f"this model's experts are fetched on demand, since they {cure}: {reason}", stacklevel=3)
    return config.model_copy(update={"policy": Policy.ON_DEMAND.value})
