"""Captures decode steps as CUDA graphs, one for each shape and cache, and replays them.

The first step of a kind runs as it is: kernels are compiled in it. The second is captured, and from then on it is replayed.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import Cache

MOST_GRAPHS = 8
THE_CACHE = object()
OWN = ("torch", "transformers", "transformers_modules")
"""The libraries whose modules models are made of."""
PLAIN = (bool, int, float, str, type(None))


class NotCapturable(Exception):  # noqa: N818  # it says a fact, not an error of the user
    """A step can't be captured. The message says why."""


class Inputs(NamedTuple):
    """The arguments of a step: its tensors, and all else that it depends on."""

    leaves: list[Any]
    spec: Any
    tensors: list[torch.Tensor]
    cache: Cache
    key: tuple[Any, ...]
    """Steps with the same key are the same graph."""


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    tensors: list[torch.Tensor]
    """The graph reads its inputs here."""
    output: Any


class StepGraphs:
    """The captured steps of one model."""

    def __init__(self, device: torch.device):
        """`device` has its number, as those of tensors have."""
        self.reason: str | None = None
        """Why the last decode step was not captured. None if it was, or will be the next time."""
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._graphs: OrderedDict[tuple[Any, ...], Captured | str | None] = OrderedDict()
        """By key: the graph, or why there can't be one. None after the first step of a kind."""
        self._seen: Any = None
        self._added: list[nn.Module] = []
        """Modules that are not transformers' own, as those of adapters."""
        self._switches: list[Any] = []

    def clear(self) -> None:
        """Forgets all graphs, since what they do is no longer what is to be done."""
        self._graphs.clear()

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: Any) -> Any:
        """`forward(*args, **kwargs)`, replayed from a graph where there is one. `mode` is what else a step depends on."""
        try:
            inputs = self._inputs(args, kwargs, mode)
        except NotCapturable as reason:
            self.reason = str(reason)
            return forward(*args, **kwargs)
        if inputs.key not in self._graphs:
            return self._first(forward, args, kwargs, inputs)
        self._graphs.move_to_end(inputs.key)
        found = self._graphs[inputs.key]
        if found is None:
            try:
                found = self._capture(forward, inputs)
            except NotCapturable as reason:
                found = str(reason)
            self._graphs[inputs.key] = found
        if isinstance(found, str):
            self.reason = found
            return forward(*args, **kwargs)
        self.reason = None
        for own, given in zip(found.tensors, inputs.tensors, strict=True):
            own.copy_(given)
        found.graph.replay()
        return pytree.tree_map(partial(_returned, inputs.cache), found.output)

    def look_at(self, model: nn.Module) -> None:
        """Forgets all graphs if the model is not what it was at the last look.

        It may have other weights, modules, hooks or flags. By flags, for one, adapters are switched on and off.
        """
        weights = [tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]]
        config: Any = getattr(model, "config", None)
        configs = [] if config is None else [_flags(config), _flags(config.get_text_config())]
        now = weights, configs, [_facts(module) for module in model.modules()]
        if now != self._seen:
            self._seen = now
            self._added = [module for module in model.modules() if _library(module) not in OWN]
            self._switches = [*map(_facts, self._added)]
            self.clear()

    def look_again(self, model: nn.Module) -> None:
        """Does the same before each step, and looks at added modules only: at all of them this would take as long as a step."""
        if self._seen is None or [*map(_facts, self._added)] != self._switches:
            self.look_at(model)

    def _first(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Inputs) -> Any:
        """Runs the first step of a kind as it is."""
        self.reason, self._graphs[inputs.key] = None, None
        # A later cache may have the same id.
        weakref.finalize(inputs.cache, self._graphs.pop, inputs.key, None).atexit = False
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        before = _counted(inputs.cache)
        output = forward(*args, **kwargs)
        if _counted(inputs.cache) != before:  # a replayed step would not count
            kinds = ", ".join(sorted({type(layer).__name__ for layer in inputs.cache.layers}))
            self._graphs[inputs.key] = self.reason = f"its cache counts tokens in Python ({kinds})"
        return output

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Any) -> Inputs:
        """Raises `NotCapturable`."""
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_cache)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        others = tuple(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor | Cache))
        caches = [leaf for leaf in leaves if isinstance(leaf, Cache)]
        if torch.is_grad_enabled():
            raise NotCapturable("gradients are on, and a replayed step has none; run it under torch.no_grad()")
        if len(caches) != 1 or not caches[0].is_compileable:
            raise NotCapturable("its cache is not static; generate with cache_implementation='static'")
        if not all(getattr(layer, "is_initialized", True) for layer in caches[0].layers):
            raise NotCapturable("its cache is empty")
        if any(tensor.device != self._device for tensor in tensors):
            raise NotCapturable(f"an argument is not on {self._device}")
        strange = next((leaf for leaf in others if not isinstance(leaf, PLAIN)), None)
        if strange is not None:
            raise NotCapturable(f"an argument is a {type(strange).__name__}, which may change from step to step")
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        key = str(spec), shapes, others, id(caches[0]), _places(caches[0]), mode, torch.is_inference_mode_enabled()
        return Inputs(leaves, spec, tensors, caches[0], key)

    def _capture(self, forward: Callable[..., Any], inputs: Inputs) -> Captured:
        """Captures a step; this computes nothing. Raises `NotCapturable`."""
        with torch.inference_mode(False):
            tensors = [tensor.clone() for tensor in inputs.tensors]
        own = iter(tensors)
        leaves = [next(own) if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, inputs.spec)
        graph, parts = torch.cuda.CUDAGraph(), [inputs.cache, *inputs.cache.layers]
        before = [dict(vars(part)) for part in parts]
        try:
            # Other threads may go on: only what this one does is captured.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = forward(*args, **kwargs)
        except BaseException as error:
            for part, values in zip(parts, before, strict=True):  # nothing was computed, so nothing has changed
                vars(part).clear()
                vars(part).update(values)
            if not isinstance(error, RuntimeError):
                raise
            torch.cuda.synchronize(self._device)
            raise NotCapturable(f"its own code can't be captured ({_cause(error)})") from error
        # The cache stays the user's alone: when it is gone, so is the graph.
        output = pytree.tree_map(lambda leaf: THE_CACHE if leaf is inputs.cache else leaf, output, is_leaf=_is_cache)
        return Captured(graph, tensors, output)


def _is_cache(value: Any) -> bool:
    return isinstance(value, Cache)


def _returned(cache: Cache, leaf: Any) -> Any:
    if leaf is THE_CACHE:
        return cache
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf  # the next replay writes to the same memory


def _cause(error: BaseException) -> str:
    while error.__context__ is not None:  # the capture's own errors come after the one that broke it off
        error = error.__context__
    return str(error).split("\n")[0]


def _facts(module: nn.Module) -> tuple[Any, ...]:
    """What a module does, as far as its attributes say it."""
    forward, hooks = id(vars(module).get("forward")), (*module._forward_hooks, *module._forward_pre_hooks)
    return id(module), type(module), forward, hooks, _flags(module)


def _library(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _flags(thing: Any) -> dict[str, str]:
    return {name: str(value) for name, value in vars(thing).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else [value]
    return all(isinstance(part, PLAIN) for part in inner)


def _counted(cache: Cache) -> list[dict[str, Any]]:
    """What a cache keeps in Python. A replayed step does not change it."""
    return [
        {name: value for name, value in vars(part).items() if isinstance(value, PLAIN)}
        for part in [cache, *cache.layers]
    ]


def _places(cache: Cache) -> tuple[int, ...]:
    """Where a cache's tensors are. Beams get new ones at each step."""
    values = (value for layer in cache.layers for value in vars(layer).values())
    return tuple(value.data_ptr() for value in values if isinstance(value, torch.Tensor))
