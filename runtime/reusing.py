"""Eviction `learned`: the reuse predictors beside a running model, and what its routers tell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from ..predictors.architecture import ExpertLayer, MoELayer
from ..predictors.checkpoint import Predictors
from ..predictors.reuse import Reuse, ReuseScores
from ..predictors.routing import flat_routing
from .engine import Engine
from .errors import OffloadError
from .host.cache import Eviction
from .layercontrol import LayerControl
from .operations import is_traced
from .settings import OffloadConfig, Slots


def reuse_wanted(predictors: Predictors | None, layers: list[int], config: Slots) -> Reuse | None:
    """The reuse predictors of a model's `layers`, given by the model's numbers; None if the eviction does not need them.

    Raises `OffloadError` where it does and there are none.
    """
    if config.eviction is not Eviction.LEARNED:
        return None
    reuse = None if predictors is None else predictors.reuse
    if reuse is None:
        raise OffloadError(
            "eviction learned needs predictors that say which experts are used again soon, and there are none; give predictors "
            "that were trained with fit --reuse, or eviction=frequency"
        )
    if reuse.layers != layers:
        raise OffloadError(
            f"eviction learned needs reuse predictors of all MoE layers, and these are of {len(reuse.layers)} of {len(layers)}; train "
            "on a trace of --layers all, or give eviction=frequency"
        )
    return reuse


def reuse_scores(
    predictors: Predictors | None, layers: Sequence[ExpertLayer], config: OffloadConfig
) -> ReuseScores | None:
    """What keeps the scores of the layers; None if the eviction does not need them. Raises `OffloadError` where it can't have them."""
    reuse = reuse_wanted(predictors, [layer.index for layer in layers], config)
    return None if reuse is None else ReuseScores(reuse.predictors)


def tell_routed(
    engine: Engine, layers: Sequence[MoELayer], known: Mapping[int, LayerControl], attached: ExitStack
) -> None:
    """Has the engine told what each router says in a forward pass, until `attached` is closed.

    `known` are the layers with guesses, by their number: what a router is asked for a guess is not told. A compiled model tells
    nothing; its slots then go by the order of use.
    """
    for number, layer in enumerate(layers):

        def tell(_: Any, __: Any, output: Any, number: int = number) -> None:
            control = known.get(number)
            if not is_traced() and not (control is not None and control.is_guessing):
                engine.routed(number, flat_routing(output).logits.detach())

        attached.callback(layer.router.register_forward_hook(tell).remove)
