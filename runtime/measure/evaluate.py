"""Measures what speculation costs: hit rates by layer, and the cross-entropy under every policy and gating."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ...predictors.architecture import MoELayer, first_tensor
from ...predictors.checkpoint import Predictors, as_predictors, make_speculators
from ...predictors.confidence import Confidence, margins_among
from ...predictors.direct import DirectMLP
from ...predictors.discovery import find_moe_layers
from ...predictors.errors import UserError
from ...predictors.loading import check_tokens, resolve_device
from ...predictors.metrics import Calibration
from ...predictors.routing import read_routing
from ...predictors.speculation import Speculator
from ..control import RoutingControl
from ..guess import Guess
from ..offload import offloaded
from ..policy import Gating, Policy
from ..room import for_batches
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
    """Runs `model`, on its device, over `batches` of token ids `[sequences, length]`, once for each policy and gating.

    `on_demand` and `prefetch` run through the offload runtime, with `config`, and so does all else where the experts are in a
    file or quantised: then the model is never in memory whole, and runs on the device of `config`. For gating `resident` only the candidates of
    `config` are on the device, and nothing else, which is its worst case.

    Returns `layers` (for each target layer `layer` and the hit rates `training_free`, `predictor` (None without one) and
    `control`, and the `calibration_error` of its candidates' probabilities, None where these are not known), `cross_entropy` in nats per token, `training_free_cross_entropy` (without predictors), and `tokens`.
    Raises `UserError` where there is no token to predict, or one that the model does not have.
    """
    batches = _checked(batches, model)
    config = Evaluating() if config is None else config
    predictors = as_predictors(predictors)
    layers = find_moe_layers(model)
    without = None if predictors is None else predictors.training_free()
    wide = targets_of(layers, predictors, config.horizon, config.candidates, Policy.SPECULATIVE, Gating.RESIDENT)
    targets = targets_of(layers, predictors, config.horizon)
    source_of = {target.layer.index: target.source for target in targets}
    given = {"predictor": predictors, "training_free": without}
    trained = set() if predictors is None else set(predictors.mlps)
    passes = 3 + (5 if trained else 0) + 5
    bar = tqdm(total=passes * sum(batch.numel() for batch in batches), unit=" tokens", desc=f"evaluate, {passes} passes", leave=False,
               disable=None if progress else True)  # fmt: skip

    entropy_of = partial(_cross_entropy, model, batches, bar)
    # The candidates of `config` are meant for gating resident. Prefetched ones do not change the loss.
    settings = config.values_of(OffloadConfig) | {"candidates": None}
    if not is_away(model):
        settings["device"] = model.device
    else:
        settings |= for_batches(config, resolve_device(config.device), *_batch_bytes(batches, model))
    rates: dict[str, Any] = {}
    table: dict[str, dict[str, float]] = {}
    with plainly_run(model, settings):
        full = entropy_of()
        for kind, chosen in given.items():
            speculators = make_speculators(model, chosen, layers, source_of)
            rates[kind] = _hit_rates(entropy_of, targets, speculators)
            if kind == "predictor" and not trained:
                continue
            table[kind] = {}
            for gating in Gating:
                if gating is Gating.SPECULATED and any(isinstance(own.mlp, DirectMLP) for own in speculators.values()):
                    continue  # they guess no weights
                seen = wide if gating is Gating.RESIDENT else targets
                _, entropy = _controlled(entropy_of, seen, speculators, Policy.SPECULATIVE, gating)
                table[kind][f"{Policy.SPECULATIVE}/{gating}"] = entropy
    for kind, speculated in table.items():
        entropies = {"full": full}
        for policy in (Policy.ON_DEMAND, Policy.PREFETCH):
            with offloaded(model, given[kind], **settings | {"policy": policy}):
                entropies[policy] = entropy_of()
        table[kind] = entropies | speculated
    errors = rates["predictor"][2]
    bar.close()
    return {
        "layers": [
            {
                "layer": layer.index,
                "training_free": rates["training_free"][0][layer.index],
                "predictor": rates["predictor"][0][layer.index] if layer.index in trained else None,
                "control": rates["training_free"][1][layer.index],
                "calibration_error": errors.get(layer.index),
            }
            for layer in layers
        ],
        "cross_entropy": table["predictor" if trained else "training_free"],
        "training_free_cross_entropy": table["training_free"],
        "tokens": sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches),
    }


def _batch_bytes(batches: list[torch.Tensor], model: PreTrainedModel) -> tuple[int, int]:
    """The tokens of the largest batch, and the bytes of its logits (also in fp32, twice) and its hidden states."""
    text, most = model.config.get_text_config(), max(batch.numel() for batch in batches)
    token = text.vocab_size * (model.dtype.itemsize + 8) + 64 * text.hidden_size * model.dtype.itemsize
    return most, most * token


def is_away(model: PreTrainedModel) -> bool:
    """Whether the experts of a model are in a packed file or in a quantised form, so that it can't run by itself."""
    return not {"expert_pack", "expert_blocks"}.isdisjoint(vars(model))


def plainly_run(model: PreTrainedModel, settings: dict[str, Any]) -> AbstractContextManager[Any]:
    """Has a model run as if it were in memory whole: with `settings` of `offload_experts` where its experts are away."""
    return offloaded(model, **settings | {"policy": Policy.ON_DEMAND}) if is_away(model) else nullcontext()


def cross_entropy(model: PreTrainedModel, batches: Iterable[torch.Tensor], progress: bool = False) -> float:
    """Mean cross-entropy of the next token, in nats, over `batches` of token ids `[sequences, length]`.

    The first token of each sequence does not count. Raises `UserError` as `evaluate` does.
    """
    batches = _checked(batches, model)
    with tqdm(total=sum(batch.numel() for batch in batches), unit=" tokens", desc="before", leave=False,
              disable=None if progress else True) as bar:  # fmt: skip
        return _cross_entropy(model, batches, bar)


def _checked(batches: Iterable[torch.Tensor], model: PreTrainedModel) -> list[torch.Tensor]:
    """The batches that have a token to predict. Raises `UserError` if there is none, or one that the model does not have."""
    found = [batch for batch in batches if batch.shape[-1] > 1]
    if not found:
        raise UserError("there is no text to evaluate on; give a corpus of at least two tokens")
    for batch in found:
        check_tokens(batch, model)
    return found


@torch.inference_mode()
def _cross_entropy(model: PreTrainedModel, batches: list[torch.Tensor], bar: tqdm) -> float:
    """Mean cross-entropy of the next token, in nats, over all tokens of `batches` but the first of each sequence.

    Raises `UserError` if it is not finite.
    """
    total, count = 0.0, 0
    for batch in batches:
        ids = batch.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
        bar.update(batch.numel())
    if not math.isfinite(total):
        raise UserError(
            f"the model's logits are not finite in {str(model.dtype).removeprefix('torch.')}; give --dtype bfloat16 or float32"
        )
    return total / count


def _controlled(
    cross_entropy: Callable[[], float],
    targets: list[Target],
    speculators: dict[int, Speculator],
    policy: Policy,
    gating: Gating,
    errors: dict[int, Calibration] | None = None,
) -> tuple[RoutingControl, float]:
    """The cross-entropy under a `RoutingControl` with these arguments, and that control, detached again.

    `errors` gets the calibration of each layer whose confidence is known, by the model's number of the layer.
    """
    made = RoutingControl(targets, speculators, policy, gating, in_order=True, sure=errors is not None)
    for layer in made.layers if errors is not None else []:
        confidence = layer.target.confidence
        if confidence is not None:
            assert errors is not None
            errors[layer.target.layer.index] = counted = Calibration(1)
            layer.told = partial(_count, counted, confidence)
    try:
        return made, cross_entropy()
    finally:
        made.detach()


def _count(calibration: Calibration, confidence: Confidence, guess: Guess, own: torch.Tensor) -> None:
    """Counts the candidates of a guess by their probabilities. `own` are the ids that the router chose."""
    if guess.values is not None:
        found = margins_among(guess.values, own.shape[-1])[:, : guess.candidates.shape[-1]]
        right = (guess.candidates.unsqueeze(-1) == own.unsqueeze(-2)).any(-1)
        calibration.update(confidence.probabilities(found)[None].cpu(), right[None].cpu())


def _hit_rates(
    cross_entropy: Callable[[], float], targets: list[Target], speculators: dict[int, Speculator]
) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
    """Hit rates, control hit rates and calibration errors by target layer, from an exact run of the model.

    The errors are those of the confidence in what `targets` say; they mean something for the speculators that it is of.
    """
    errors: dict[int, Calibration] = {}
    with _control_hit_rates([target.routed for target in targets]) as exact:
        control, _ = _controlled(cross_entropy, targets, speculators, Policy.PREFETCH, Gating.TRUE, errors)
    shares = {index: hits / total for index, (hits, total) in exact.items()}
    return (
        control.hit_rates(),
        shares,
        {index: float(found.compute().error()) for index, found in errors.items() if found.update_called},
    )


@contextmanager
def _control_hit_rates(layers: list[MoELayer]) -> Iterator[dict[int, tuple[int, int]]]:
    """Counts for each layer how many of the router's experts norm and router find again in the layer's true input, of how many.

    It must be all of them. If not, the hooks do not see what the router reads.
    """
    counts = {layer.index: (0, 0) for layer in layers}

    def watch(layer: MoELayer, stack: ExitStack) -> None:
        stream: list[torch.Tensor] = []
        route = layer.router.forward  # before a policy overrides it

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream[:] = [first_tensor((*args, *kwargs.values()))]

        def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if layer.unfollowed is None:
                args, kwargs = (layer.norm.forward(stream.pop()).reshape(args[0].shape), *layer.router_arguments), {}
            again = read_routing(route(*args, **kwargs), layer).ids
            found = (read_routing(output, layer).ids.unsqueeze(-1) == again.unsqueeze(-2)).any(-1)
            hits, total = counts[layer.index]
            counts[layer.index] = hits + int(found.sum()), total + found.numel()

        if layer.unfollowed is None:
            stack.callback(layer.entry.register_forward_pre_hook(keep, with_kwargs=True).remove)
        stack.callback(layer.router.register_forward_hook(compare, with_kwargs=True).remove)

    with ExitStack() as stack:
        for layer in layers:
            watch(layer, stack)
        yield counts
