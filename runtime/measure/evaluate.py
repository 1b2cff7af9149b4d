"""What speculation costs: hit rates by layer, and the model's cross-entropy under every policy and gating."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ...predictors.architecture import MoELayer, first_tensor
from ...predictors.checkpoint import Predictors, as_predictors, make_speculators
from ...predictors.discovery import find_moe_layers
from ...predictors.errors import UserError
from ...predictors.speculation import Speculator, flat_routing
from ..control import RoutingControl
from ..offload import offloaded
from ..policy import Gating, Policy
from ..settings import OffloadConfig
from ..targets import Target, targets_of
from .settings import Evaluating


def evaluate(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    predictors: Predictors | str | Path | None = None,
    config: Evaluating | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Runs `model` over `batches` of token ids `[sequences, length]` once for each way to execute it.

    It runs where it is. `on_demand` and `prefetch` go through the offload runtime, as `config` says. Gating `resident` sees the
    candidates of `config` and no cache, which is its worst case.

    Returns `layers`: `layer`, `training_free`, `predictor` (None where there is none), `control` for each target, and
    `cross_entropy` and `training_free_cross_entropy` (the same without predictors) in nats per token, and `tokens`.
    Raises `UserError` where there is no token to predict.
    """
    batches = [batch for batch in batches if batch.shape[-1] > 1]
    if not batches:
        raise UserError("there is no text to evaluate on; give a corpus of at least two tokens")
    config = Evaluating() if config is None else config
    predictors = as_predictors(predictors)
    layers = find_moe_layers(model)
    without = None if predictors is None else predictors.training_free()
    wide = targets_of(layers, predictors, config.horizon, config.candidates, Policy.SPECULATIVE, Gating.RESIDENT)
    targets = targets_of(layers, predictors, config.horizon)
    source_of = {target.layer.index: target.source for target in targets}
    speculators = {"predictor": make_speculators(model, predictors, layers, source_of)}
    speculators["training_free"] = make_speculators(model, without, layers, source_of)
    trained = set() if predictors is None else set(predictors.mlps)
    passes = 3 + (5 if trained else 0) + 5
    bar = tqdm(total=passes * sum(batch.numel() for batch in batches), unit=" tokens", desc="evaluate", leave=False,
               disable=None if progress else True)  # fmt: skip

    def cross_entropy() -> float:
        return _cross_entropy(model, batches, bar)

    # Its candidates are those of gating resident; those that are prefetched change no loss.
    settings = config.values_of(OffloadConfig) | {"device": model.device, "candidates": None}
    full = cross_entropy()
    rates = {kind: _hit_rates(model, batches, targets, chosen, bar) for kind, chosen in speculators.items()}
    table: dict[str, dict[str, float]] = {}
    for kind, chosen in speculators.items():
        if kind == "predictor" and not trained:
            continue
        entropies = {"full": full}
        for policy in (Policy.ON_DEMAND, Policy.PREFETCH):
            chosen_predictors = predictors if kind == "predictor" else without
            with offloaded(model, chosen_predictors, **settings | {"policy": policy}):
                entropies[policy] = cross_entropy()
        for gating in Gating:
            chosen_targets = wide if gating is Gating.RESIDENT else targets
            control = RoutingControl(chosen_targets, chosen, Policy.SPECULATIVE, gating)
            try:
                entropies[f"{Policy.SPECULATIVE}/{gating}"] = cross_entropy()
            finally:
                control.detach()
        table[kind] = entropies
    bar.close()
    return {
        "layers": [
            {
                "layer": layer.index,
                "training_free": rates["training_free"][0][layer.index],
                "predictor": rates["predictor"][0][layer.index] if layer.index in trained else None,
                "control": rates["training_free"][1][layer.index],
            }
            for layer in layers
        ],
        "cross_entropy": table["predictor" if trained else "training_free"],
        "training_free_cross_entropy": table["training_free"],
        "tokens": sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches),
    }


@torch.inference_mode()
def _cross_entropy(model: PreTrainedModel, batches: list[torch.Tensor], bar: tqdm) -> float:
    """Mean next-token cross-entropy in nats over all tokens of `batches` but each sequence's first."""
    total, count = 0.0, 0
    for batch in batches:
        ids = batch.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
        bar.update(batch.numel())
    return total / count


def _hit_rates(
    model: PreTrainedModel,
    batches: list[torch.Tensor],
    targets: list[Target],
    speculators: dict[int, Speculator],
    bar: tqdm,
) -> tuple[dict[int, float], dict[int, float]]:
    """Hit rate and control hit rate by target layer, over a full and exact run of the model."""
    with _control_hit_rates([target.layer for target in targets]) as exact:
        control = RoutingControl(targets, speculators, Policy.PREFETCH, Gating.TRUE)
        try:
            _cross_entropy(model, batches, bar)
        finally:
            control.detach()
    return control.hit_rates(), {index: hits / total for index, (hits, total) in exact.items()}


@contextmanager
def _control_hit_rates(layers: list[MoELayer]) -> Iterator[dict[int, tuple[int, int]]]:
    """Counts, by layer, how many of the router's experts are found again by norm and router on its true input."""
    counts = {layer.index: (0, 0) for layer in layers}

    def watch(layer: MoELayer, stack: ExitStack) -> None:
        stream: list[torch.Tensor] = []
        route = layer.router.forward  # as it is before any policy overrides it

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream[:] = [first_tensor((*args, *kwargs.values()))]

        def compare(_: nn.Module, args: tuple[Any, ...], routing: tuple[torch.Tensor, ...]) -> None:
            x = layer.norm.forward(stream.pop()).reshape(args[0].shape)
            again = flat_routing(route(x, *layer.router_arguments)).ids
            found = (flat_routing(routing).ids.unsqueeze(-1) == again.unsqueeze(-2)).any(-1)
            hits, total = counts[layer.index]
            counts[layer.index] = hits + int(found.sum()), total + found.numel()

        stack.callback(layer.entry.register_forward_pre_hook(keep, with_kwargs=True).remove)
        stack.callback(layer.router.register_forward_hook(compare).remove)

    with ExitStack() as stack:
        for layer in layers:
            watch(layer, stack)
        yield counts
