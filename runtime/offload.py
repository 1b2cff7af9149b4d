"""Attaches the offload runtime to a transformers model, and detaches it.

One decode step at source layer l, whose next layer is t:

    computing   attention l | router l | speculate t | experts l | attention t | router t ...
    copying                            | misses of l | candidates of t that are not on the device
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from ..predictors.architecture import ExpertLayer, first_tensor, with_first_tensor
from ..predictors.checkpoint import Predictors, as_predictors, make_speculators
from ..predictors.discovery import find_layers
from ..predictors.experts import OnOutputs, expert_parameters
from ..predictors.loading import resolve_device
from ..predictors.override import override_forward, refuse_copy
from ..predictors.settings import combined
from . import operations
from .asked import watch_generate
from .automatic import AUTO, Trial
from .control import RoutingControl
from .dense import dense_forward, is_dense
from .device.graphs import StepGraphs
from .engine import Counters, Decision
from .engines import make_engine
from .errors import OffloadError, let_go
from .guard import Guard, refuse_unfit, without_gradients
from .guess import FoldedGuesser, Guesser
from .host.cache import Eviction
from .host.slots import ExpertSlots
from .observer import Observer
from .operations import is_traced, on_device
from .passes import Passes
from .placement import move_rest
from .policy import Gating, Policy
from .reusing import tell_routed
from .room import Slots, slots_of
from .settings import OffloadConfig
from .steps import Steps, shape_of
from .store import ExpertStore
from .stores import open_store
from .targets import Target, possible, targets_of
from .trial import tried


@torch.inference_mode(False)  # what is made here is used outside of it too
def offload_experts(
    model: PreTrainedModel,
    predictors: Predictors | str | Path | None = None,
    config: OffloadConfig | None = None,
    *,
    store: ExpertStore | str | Path | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Moves a model's experts to host memory. The model then runs with only some of them on the device at a time.

    Returns the same model, which stays a transformers model: `generate`, pipelines and streamers work on it. Its
    `expert_offload` attribute is the `ExpertOffload`, which counts what happens and can detach itself. Several threads
    may run the model: their forward passes take turns. None may run it while this is called.

    Args:
        predictors: what `load_predictors` returned, or a path or name for it; without them speculation is training-free.
        config, settings: the fields of `OffloadConfig`, as one object or by name. Those given by name win.
        store: where the experts are, if not in the model: a packed file, or an open store, which the caller closes. A model
            that `load_offloaded` has loaded with a packed file knows its file.

    Raises `SettingsError`, `OffloadError`, `StoreError`, `UnsupportedModelError` or `PredictorsError`, and then leaves the
    model as it was.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise OffloadError(f"something of type {type(model).__name__} can't be offloaded; give a transformers model")
    config = combined(OffloadConfig, config, settings)
    device = resolve_device(config.device)
    refuse_unfit(model)
    found = find_layers(model)
    layers = found.layers
    for layer in layers:
        expert_parameters(layer.experts)
    config = possible(config, found, predictors)
    predictors = as_predictors(predictors)
    if predictors is not None:
        predictors.check(model, layers)
    targets = targets_of(
        layers, predictors, config.horizon, config.candidates, policy_of(config), Gating(config.gating)
    )
    try:
        with ExitStack() as attached:
            opened = open_store(attached, model, layers, store, device, config.host_memory)
            attach = functools.partial(_attach, model, targets, predictors, opened, config)
            slots = slots_of(config, model, layers, opened, device)
            if config.slots is None and config.expert_memory is None:
                slots = tried(model, attach, slots, layers[0].top_k, config)
            attach(slots, attached)
    except BaseException as error:
        let_go(error)
        raise
    return model


def _attach(
    model: PreTrainedModel,
    targets: list[Target],
    predictors: Predictors | None,
    store: ExpertStore,
    config: OffloadConfig,
    slots: Slots,
    attached: ExitStack,
) -> None:
    settled = {"slots": slots.number, "expert_memory": None, "device": str(resolve_device(config.device))}
    offload = ExpertOffload(
        model, targets, predictors, store, config.model_copy(update=settled), attached, slots.reason
    )
    vars(model)["expert_offload"] = offload


def policy_of(config: OffloadConfig) -> Policy:
    """The policy of `config`. For `auto`, which turns prefetching on and off, it is `prefetch`."""
    return Policy.PREFETCH if config.policy == AUTO else Policy(config.policy)


@contextmanager
def offloaded(
    model: PreTrainedModel,
    predictors: Predictors | str | Path | None = None,
    config: OffloadConfig | None = None,
    **settings: Any,
) -> Iterator[ExpertOffload]:
    """`offload_experts` for the length of a `with`. It yields the `ExpertOffload`, and detaches it at the end."""
    offload: ExpertOffload = vars(offload_experts(model, predictors, config, **settings))["expert_offload"]
    try:
        yield offload
    finally:
        offload.detach()


class ExpertOffload:
    """A model with its experts in a store and some of them on the device. `offload_experts` makes it."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: list[Target],
        predictors: Predictors | None,
        store: ExpertStore,
        config: OffloadConfig,
        attached: ExitStack,
        why_slots: str,
    ):
        """`config` gives the number of slots and names the device. `detach` closes what `attached` holds, after all else.

        Where this raises, the caller closes `attached`, and the model is as it was.
        """
        assert config.slots is not None
        self.config, self.store = config, store
        self.why_slots = why_slots
        """In words, why it has so many slots."""
        self.policy, self.gating = policy_of(config), Gating(config.gating)
        # With its number, as tensors have it.
        self.device, self.slots = torch.empty(0, device=config.device).device, config.slots
        self._model, self._targets = model, targets
        self._turn = threading.RLock()
        self._steps = Steps()
        self._is_attached = True
        layers = [target.layer for target in targets]
        move_rest(model, [layer.experts for layer in layers], self.device, attached)
        with on_device(self.device):
            engine, self.why_host = make_engine(store, layers, config, predictors)
        """In one sentence why the engine is not the device's; None if it is."""
        attached.callback(engine.close)
        self._engine = engine
        self._graphs: StepGraphs | None = None
        if self.why_host is None and self.device.type == "cuda":
            self._graphs = StepGraphs(self.device)
            attached.callback(self._graphs.clear)
        if hasattr(model, "generate"):
            watch_generate(model, self._graphs, attached)
        prices = engine.prices if isinstance(engine, ExpertSlots) else None
        choice = None if config.policy != AUTO else Trial() if prices is None else prices
        self._passes = Passes(self._turn, self.device, engine, targets, choice, config.speculated_tokens)
        attached.callback(operations.unregister, self._passes.handle)
        self._take_turns(attached)
        for target in targets:
            self._attach(target, attached)
        sources = {target.layer.index: target.source for target in targets}
        routed = [] if self.policy is Policy.ON_DEMAND else [target.routed for target in targets]
        speculators = make_speculators(model, predictors, routed, sources) if routed else {}
        self._control = RoutingControl(
            targets, speculators, self.policy, self.gating, config.speculated_tokens, engine, sure=prices is not None
        )
        attached.callback(self._control.detach)
        self._control.compiled.handle, self._passes.control = self._passes.handle, self._control
        folded = [layer.target.routed for layer in self._control.layers if isinstance(layer.guesser, FoldedGuesser)]
        folded = [layer for layer in folded if layer.unfollowed is None]  # of others nothing of the model's is folded
        self._guard = self._passes.guard = Guard(model, layers, folded, self.device, attached)
        self._known = {layer.target.number: layer for layer in self._control.layers}
        if config.eviction is Eviction.LEARNED:
            tell_routed(engine, [target.routed for target in targets], self._known, attached)
        self._attached = attached.pop_all()

    def __setattr__(self, name: str, value: Any) -> None:
        if "_attached" in vars(self) and not name.startswith("_"):
            raise OffloadError(
                f"{name} can't be set on offloaded experts; detach the model and offload it again with it"
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, _: Any) -> NoReturn:
        refuse_copy()

    @property
    def counters(self) -> Counters:
        """What has happened since the last `reset`. On CUDA this waits for the device."""
        counters = self._engine.counters()
        counters.speculation_hit_rate = self._control.hit_rate()
        return counters

    def reset(self) -> None:
        """Sets the counters back to zero."""
        with self._turn:
            self._engine.reset()
            self._control.reset()

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Tells `observer` what happens, for the length of a `with`."""
        if not isinstance(observer, Observer):
            raise OffloadError(
                f"something of type {type(observer).__name__} can't observe; give a subclass of Observer"
            )
        self._observe(observer)
        try:
            yield
        finally:
            self._observe(None)

    @contextmanager
    def outputs_watched(self, layer: ExpertLayer, on_outputs: OnOutputs) -> Iterator[None]:
        """Tells `on_outputs` the unweighted outputs of a layer's experts in each pass, for the length of a `with`."""
        number = next(target.number for target in self._targets if target.layer.index == layer.index)
        self._engine.watch(number, on_outputs)
        try:
            yield
        finally:
            self._engine.watch(number, None)

    def guess_by(self, substitute: Callable[[int, Guesser], Guesser]) -> None:
        """Replaces the guesser of each layer by `substitute(the model's number of the layer, its guesser)`."""
        with self._turn:
            for layer in self._control.layers:
                layer.guesser = substitute(layer.target.layer.index, layer.guesser)
            if self._graphs is not None:
                self._graphs.clear()

    @property
    def captures(self) -> bool:
        """Whether decode steps over a static cache are captured as CUDA graphs and replayed."""
        return self._graphs is not None

    @property
    def why_not_captured(self) -> str | None:
        """Why the last decode step was not replayed, in one sentence. None if it was, or will be the next time."""
        return self.why_host if self._graphs is None else self._graphs.reason

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's block."""
        return self.store.format.bytes

    @torch.inference_mode(False)
    def detach(self) -> None:
        """Removes the runtime from the model. Its weights, devices and forwards are then what they were.

        Weights that were changed meanwhile stay changed. A model that was loaded with a packed file then has no experts; see
        `load_offloaded`. Raises `OffloadError` in a forward pass.
        """
        with self._turn:
            if self._passes.is_running:
                raise OffloadError("the model can't be detached in a forward pass; detach it when the pass is over")
            if self._is_attached:
                self._is_attached = False
                vars(self._model).pop("expert_offload", None)
                self._attached.close()

    def _take_turns(self, attached: ExitStack) -> None:
        """Lets only one forward pass run at a time, since it needs the slots from its first layer to its last."""
        for module in {self._model, self._model.base_model}:
            attached.enter_context(override_forward(module, self._in_turn(module.forward)))
        generation_config = getattr(self._model, "generation_config", None)
        if generation_config is not None and self.device.type != "cpu":
            # `generate` would compile by itself there: for minutes, and past the steps that are captured.
            attached.callback(setattr, generation_config, "disable_compile", generation_config.disable_compile)
            generation_config.disable_compile = True

    def _in_turn(self, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if is_traced():  # each operation takes a turn
                return self._control.compiled.whole(lambda: original(*args, **kwargs))
            with self._turn, on_device(self.device):
                # A part of the pass that has its turn, or a pass that waited until the model was detached.
                if self._passes.is_running or not self._is_attached:
                    return original(*args, **kwargs)
                try:
                    self._passes.is_running = True
                    self._control.is_exact = not self._steps.is_step(args, kwargs)
                    return self._timed(functools.partial(self._remembered, original, args, kwargs))
                except BaseException as error:
                    let_go(error)
                    raise
                finally:
                    self._passes.is_running = False

        return forward

    def _timed(self, forward: Callable[[], Any]) -> Any:
        """A forward pass, whose time policy `auto` may read."""
        begun = self._passes.start()
        output = forward()
        self._passes.end(begun)
        return output

    def _remembered(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pass, with what its tokens remember of the pass before. While nothing is guessed, nothing is kept."""
        with self._control.memory.during(shape_of(args, kwargs) if self._control.is_on else None, args, kwargs):
            return self._captured(original, args, kwargs)

    def _captured(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pass, replayed as a graph where the device decides in it."""
        shape = shape_of(args, kwargs)
        if self._graphs is None or shape is None:
            return original(*args, **kwargs)
        tokens = shape.numel()
        if not self._engine.prepare(tokens):
            self._graphs.look_at(self._model)
            return original(*args, **kwargs)
        self._guard.check_all()  # where a graph is replayed, no layer does it
        self._graphs.look_again(self._model)
        mode = (self._control.is_on, self._control.is_exact)
        output = self._graphs.run(original, args, kwargs, mode)
        self._passes.tokens = tokens  # where a graph was replayed, no hook has counted them
        return output

    def _attach(self, target: Target, attached: ExitStack) -> None:
        number, layer, handle = target.number, target.layer, self._passes.handle

        def execute(x: torch.Tensor, decision: Decision) -> torch.Tensor:
            return self._passes.execute(number, x, decision)

        def forward(
            hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *_: Any, **__: Any
        ) -> torch.Tensor:
            if is_traced():
                return operations.experts(hidden_states, top_k_index, top_k_weights, handle, number)
            with torch.no_grad():
                control = self._known.get(number)
                known = control is not None and control.known and not layer.identities
                output = execute(hidden_states, Decision(top_k_index, top_k_weights, known))
            return without_gradients(output, (hidden_states, top_k_weights), layer.experts)

        if number == 0:

            def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if is_traced():
                    return with_first_tensor(args, kwargs, lambda x: operations.begin(x, handle))
                self._engine.begin_pass(first_tensor((*args, *kwargs.values())).numel() // layer.input_size)
                return None

            begin = layer.decoder.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            attached.callback(begin.remove)
        instead = dense_forward(layer.experts, execute) if is_dense(layer.experts) else forward
        attached.enter_context(override_forward(layer.experts, instead))

    def _observe(self, observer: Observer | None) -> None:
        self._passes.observer = self._control.observer = observer
        self._engine.observe(observer)
