"""Attaches the offload runtime to a transformers model, and detaches it.

One decode step at source layer l (DESIGN: everything known as early as it can be):

    computing   attention l | router l | speculate t | experts l | attention t | router t ...
    copying                            | misses of l | candidates of t that are not on the device
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..predictors.architecture import MoELayer, farther, override_forward, sources
from ..predictors.checkpoint import Predictors, make_speculators
from ..predictors.discovery import find_moe_layers
from ..predictors.errors import UserError
from ..predictors.experts import expert_parameters
from .automatic import AUTO, Trial
from .host.cache import Eviction
from .host.slots import Counters, ExpertSlots
from .packfile import PackedStore
from .policy import Replay, RoutingControl, candidates_from_recall
from .settings import Gating, Policy
from .store import ExpertStore, HostStore

SPECULATED_TOKENS = 16


class OffloadError(UserError):
    """The model can't be offloaded as asked; the message says why and what to do."""


def offload_experts(
    model: PreTrainedModel,
    predictors: Predictors | None = None,
    *,
    policy: Policy | str = Policy.PREFETCH,
    gating: Gating | str = Gating.TRUE,
    device: torch.device | str | None = None,
    slots: int | None = None,
    candidates: int | str | None = None,
    horizon: int | None = None,
    speculated_tokens: int = SPECULATED_TOKENS,
    readers: int = 2,
    eviction: Eviction | str = Eviction.LEAST_STALE,
    store: ExpertStore | str | Path | None = None,
) -> PreTrainedModel:
    """Moves a model's experts to host memory and lets it run with `slots` of them on the device at a time.

    Returns the same model, which stays a transformers model: `generate`, pipelines and streamers work on it. Its
    `expert_offload` attribute is the `ExpertOffload` that counts what happens and detaches it again. Several threads
    may run the model: their forward passes take turns.

    Args:
        predictors: what `load_predictors` returned; without them speculation is training-free.
        policy, gating: see `runtime.policy`. `on_demand` and `prefetch` are exact. `auto` is exact too: it measures both
            on the first decoded tokens, by turns, and goes on with the faster (`runtime.automatic`); it never picks
            `speculative`, which changes tokens and so is for the user to choose.
        device: where the model computes; by default CUDA where there is one. Everything but the experts moves there.
        slots: experts that fit on the device, over all layers, from `top_k` up; by default a quarter of them all.
        candidates: experts fetched for each speculated token, `top_k` or more; by default `top_k`, and two more under
            gating `resident`. `auto` takes for each layer as many as its recall in `predictors` says are worth it
            (`runtime.policy.candidates_from_recall`).
        horizon: how many MoE layers ahead is guessed, 1 or 2; by default what `predictors` were trained for, or else 1. With
            2 a copy has two layers' time, and a training-free guess is right less often.
        speculated_tokens: a forward pass over more tokens than this is a prompt: it is executed exactly, streaming the
            experts through the slots, since it needs nearly all of them and a guess saves nothing.
        readers: copying threads, on the CPU or from a file.
        eviction: which expert makes room for another; see `runtime.cache`.
        store: where the experts are, if not in the model: a packed file. It is closed when the model is detached.
            A model that `load_offloaded` loaded with a packed file knows its own.

    Raises `OffloadError`, `StoreError`, `UnsupportedModelError` or `PredictorsError`, and then leaves the model as it was.
    """
    is_auto = policy == AUTO
    try:
        policy = Policy.PREFETCH if is_auto else Policy(policy)
        gating, eviction = Gating(gating), Eviction(eviction)
    except ValueError as error:
        raise OffloadError(
            f"{error}; policies are {', '.join(Policy)}, {AUTO}, gatings {', '.join(Gating)}, evictions {', '.join(Eviction)}"
        ) from error
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda" and not torch.cuda.is_available():
        raise OffloadError("CUDA was asked for, and this machine has no CUDA device; use device cpu")
    if getattr(model, "expert_offload", None) is not None:
        raise OffloadError("the model's experts are offloaded already; detach it first: model.expert_offload.detach()")
    layers = find_moe_layers(model)
    top_k, total = layers[0].top_k, sum(layer.num_experts for layer in layers)
    slots = max(2 * top_k, total // 4) if slots is None else slots
    if not top_k <= slots <= total:
        raise OffloadError(
            f"{slots} slots are asked for; this model takes from {top_k} (its top k) to {total} (all its experts)"
        )
    wanted = candidates_of(candidates, layers, predictors, policy, gating)
    if readers < 1:
        raise OffloadError(f"{readers} readers are asked for; at least one must copy")
    if predictors is not None:
        predictors.check(model, layers)
    source_of = sources_for(layers, predictors, horizon)
    for layer in layers:
        expert_parameters(layer.experts)
    opened = _open_store(model, layers, store, target)
    offload = ExpertOffload(
        model,
        layers,
        predictors,
        opened,
        policy,
        gating,
        target,
        slots,
        wanted,
        speculated_tokens,
        readers,
        eviction,
        source_of,
        Trial() if is_auto else None,
    )
    vars(model)["expert_offload"] = offload
    return model


def candidates_of(
    asked: int | str | None, layers: list[MoELayer], predictors: Predictors | None, policy: Policy, gating: Gating
) -> dict[int, int]:
    """The number of candidates by target layer."""
    top_k, experts = layers[0].top_k, layers[0].num_experts
    usual = min(top_k + 2, experts) if gating is Gating.RESIDENT else top_k
    if asked == "auto":
        # Exports of before recall was written have none, and neither has speculation without predictors.
        recall = {} if predictors is None else predictors.recall
        return {
            layer.index: min(candidates_from_recall(recall[layer.index], top_k, policy, gating), experts)
            if recall.get(layer.index)
            else usual
            for layer in layers
        }
    if asked is not None and (not isinstance(asked, int) or not top_k <= asked <= experts):
        raise OffloadError(f"{asked} candidates are asked for; this model takes from {top_k} to {experts}, or auto")
    return {layer.index: usual if asked is None else int(asked) for layer in layers}


def sources_for(layers: list[MoELayer], predictors: Predictors | None, horizon: int | None) -> dict[int, int | None]:
    """The source of each target layer; raises what `sources_read` does."""
    return sources_read(sources(layers), predictors, horizon)


def sources_read(
    nearest: dict[int, int | None], predictors: Predictors | None, horizon: int | None
) -> dict[int, int | None]:
    """The source of each target layer, where `nearest` names its nearest one: what `predictors` read, or without them what
    is `horizon` layers before, by default 1.

    Raises `OffloadError` for a horizon that `predictors` were not trained for, or sources that the model does not have.
    """
    if horizon not in (None, 1, 2):
        raise OffloadError(f"a horizon of {horizon} is asked for; guess 1 or 2 layers ahead")
    asked = farther(nearest, horizon or 1)
    if predictors is None:
        return asked
    trained = {target: predictors.sources.get(target, source) for target, source in nearest.items()}
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


def _open_store(
    model: PreTrainedModel, layers: list[MoELayer], store: ExpertStore | str | Path | None, device: torch.device
) -> ExpertStore:
    store = vars(model).get("expert_pack") if store is None else store
    if store is None:
        if any(p.is_meta for layer in layers for p in layer.experts.parameters(recurse=False)):
            raise OffloadError("the experts of this model are not in memory; name their packed file: store=PATH")
        return HostStore(layers, pinned=device.type == "cuda")
    opened = PackedStore(store) if isinstance(store, str | Path) else store
    if isinstance(opened, PackedStore):
        try:
            opened.check(model, layers)
        except BaseException:
            opened.close()
            raise
    return opened


@contextmanager
def offloaded(
    model: PreTrainedModel, predictors: Predictors | None = None, **arguments: Any
) -> Iterator[ExpertOffload]:
    """`offload_experts` for the length of a `with`: yields the `ExpertOffload` and detaches it at the end."""
    offload: ExpertOffload = vars(offload_experts(model, predictors, **arguments))["expert_offload"]
    try:
        yield offload
    finally:
        offload.detach()


class ExpertOffload:
    """A model's experts in a store and some of them on the device; made by `offload_experts`."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[MoELayer],
        predictors: Predictors | None,
        store: ExpertStore,
        policy: Policy,
        gating: Gating,
        device: torch.device,
        slots: int,
        candidates: dict[int, int],
        speculated_tokens: int,
        readers: int,
        eviction: Eviction,
        source_of: dict[int, int | None],
        trial: Trial | None,
    ):
        self.policy, self.gating, self.device, self.slots = policy, gating, device, slots
        self.eviction, self.store = eviction, store
        self._model, self._layers = model, layers
        self._number = {layer.index: number for number, layer in enumerate(layers)}
        self._without_source = {self._number[target] for target, source in source_of.items() if source is None}
        self._trial, self._speculated_tokens = trial, speculated_tokens
        self._turn = threading.RLock()
        self._depth = 0
        self._stalled_before = 0.0
        self._attached = ExitStack()
        try:
            self._attached.callback(store.close)
            self._attached.callback(store.restore)
            self._move_rest()
            executes_guess = policy is Policy.SPECULATIVE and gating is not Gating.RESIDENT
            num_experts = [layer.num_experts for layer in layers]
            self._slots = ExpertSlots(store, num_experts, slots, device, readers, eviction, executes_guess)
            self._attached.callback(self._slots.close)
            self._take_turns()
            for number, layer in enumerate(layers):
                self._attach(number, layer)
            self._control = RoutingControl(
                layers,
                make_speculators(model, predictors, layers, source_of),
                policy,
                gating,
                num_candidates=candidates,
                max_tokens=speculated_tokens,
                fetch=self._announce,
                resident=lambda index: self._slots.resident(self._number[index]),
                sources=source_of,
            )
            self._attached.callback(self._control.detach)
        except BaseException:
            self._attached.close()
            raise

    @property
    def counters(self) -> Counters:
        """What has happened so far. On CUDA, reading it waits for the device."""
        counters = self._slots.counters
        counters.stalled_seconds = self._slots.transfers.stalled_seconds() - self._stalled_before
        counters.speculating_seconds = self._control.seconds
        counters.speculation_hit_rate = self._control.hit_rate()
        return counters

    def reset(self) -> None:
        """Sets the counters back to zero."""
        self._stalled_before = self._slots.transfers.stalled_seconds()
        self._slots.counters = Counters()
        self._control.reset()

    def replay(self, routing: Replay) -> None:
        """Has the candidates of `routing` in the place of those that are speculated; see `runtime.routing.replaying`."""
        self._control.replayed = routing

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's block."""
        return self.store.layout.bytes

    def detach(self) -> None:
        """Takes the runtime off the model, whose weights, devices and forwards are then what they were.

        A model that was loaded with a packed file has no experts then; see `load_offloaded`.
        """
        with self._turn:
            vars(self._model).pop("expert_offload", None)
            self._attached.close()

    # -- attaching -----------------------------------------------------------------------------------------------

    def _move_rest(self) -> None:
        """Moves everything but the experts to the device, and has `detach` move it back."""
        experts = {id(p) for layer in self._layers for p in layer.experts.parameters(recurse=False)}
        for tensor in [*self._model.parameters(), *self._model.buffers()]:
            if id(tensor) not in experts and tensor.device != self.device:
                self._attached.callback(_move, tensor, tensor.device)
                _move(tensor, self.device)

    def _take_turns(self) -> None:
        """Lets one forward pass run at a time: the slots are in the hands of one, from its first layer to its last."""
        for module in {self._model, self._model.base_model}:
            original = self._attached.enter_context(override_forward(module, None))
            module.forward = self._in_turn(original)
        generation_config = getattr(self._model, "generation_config", None)
        if generation_config is not None:  # a compiled graph could not ask which experts are where
            self._attached.callback(setattr, generation_config, "disable_compile", generation_config.disable_compile)
            generation_config.disable_compile = True

    def _in_turn(self, original: Any) -> Any:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._turn:
                if self._trial is None or self._depth:  # the outermost forward pass is the one that is measured
                    return original(*args, **kwargs)
                self._control.is_on = self._trial.prefetches
                before, begun = self._slots.counters.tokens, time.perf_counter()
                try:
                    self._depth = 1
                    output = original(*args, **kwargs)
                finally:
                    self._depth = 0
                if 0 < self._slots.counters.tokens - before <= self._speculated_tokens:
                    self._trial.took(time.perf_counter() - begun)
                return output

        return forward

    def _attach(self, number: int, layer: MoELayer) -> None:
        def forward(
            hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *_: Any, **__: Any
        ) -> torch.Tensor:
            with torch.no_grad():
                return self._slots.execute(number, layer.experts, hidden_states, top_k_index, top_k_weights)

        if number == 0:
            begin = layer.decoder.register_forward_pre_hook(lambda *_: self._slots.begin_pass(), prepend=True)
            self._attached.callback(begin.remove)
        self._attached.enter_context(override_forward(layer.experts, forward))

    def _announce(self, index: int, candidates: torch.Tensor) -> None:
        number = self._number[index]
        # Where no layer computes before the target, its copies begin at once.
        self._slots.announce(number, candidates, now=number in self._without_source)


def _move(tensor: torch.Tensor, device: torch.device) -> None:
    # In place: a router's arguments may be buffers, and the layers hold them too.
    tensor.data = tensor.data.to(device)
