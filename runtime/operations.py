"""The operations that `torch.compile` sees in an offloaded model.

    begin(x) -> a copy of x                                 at the input of the first MoE layer
    enter(x) -> a copy of x                                 at the input of a layer that is guessed from it
    route(x, residual, inner) -> logits, weights, ids       in the place of a router
    tell(part, x, logits, weights, ids) -> a copy of part   behind a router that may return more, of which `part` is one
    entered(x, candidates) -> a copy of x                   after a guess that the graph has made from a layer's input
    decided(ids, own, candidates, guesses) -> ids           after a decision of the graph, and its guesses for later layers
    experts(x, ids, weights) -> their weighted sum          in the place of the experts

A compiler does not look into an operation. Each one reads what the one before it has returned, so none of them changes its place.
A graph knows its offload by a number. So no graph keeps an offload alive, and a graph of an offload that is gone says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..predictors.routing import Routing
from .errors import OffloadError
from .guard import refuse_gradients

T = TypeVar("T")


class Operated(Protocol):
    """An offload, as the operations call it. Layers are counted from 0 among the MoE layers, `x` is `[..., hidden]`."""

    device: torch.device

    @property
    def turn(self) -> AbstractContextManager[Any]:
        """Within it nothing else runs in the offload."""

    def begin(self, x: torch.Tensor) -> None:
        """Begins a forward pass over `x`."""

    def enter(self, layer: int, x: torch.Tensor) -> None:
        """Guesses a layer from its own input."""

    def route(self, layer: int, x: torch.Tensor, residual: torch.Tensor, inner: torch.Tensor | None) -> Routing:
        """Routes a layer, and guesses those whose source it is from `residual` and `inner`, if there are any."""

    def tell(self, layer: int, x: torch.Tensor, routing: Routing) -> None:
        """Says what a layer's router has decided for its input `x`, and guesses the layers whose source it is."""

    def entered(self, layer: int, candidates: torch.Tensor) -> None:
        """See `RoutingControl.entered`."""

    def decided(self, layer: int, own: torch.Tensor, candidates: torch.Tensor, guesses: list[torch.Tensor]) -> None:
        """See `RoutingControl.decided`."""

    def form(self, layer: int) -> Routing:
        """A routing of the layer, for its numbers of columns and its dtypes."""

    def experts(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Executes a layer's experts."""


_offloads: WeakValueDictionary[int, Operated] = WeakValueDictionary()
_numbers = itertools.count(1)


def register(offload: Operated) -> int:
    """Gives an offload the number by which graphs know it."""
    handle = next(_numbers)
    _offloads[handle] = offload
    return handle


def unregister(handle: int) -> None:
    """From now on, graphs of this offload raise `OffloadError`."""
    _offloads.pop(handle, None)


def is_traced() -> bool:
    """Whether this thread is tracing a graph, for `torch.compile` or `torch.export`.

    `torch.compiler.is_compiling` also says so in a thread that runs a model while another one compiles.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    # Without dynamo, `torch.export` traces under a mode, and modes belong to a thread.
    return torch.compiler.is_compiling() and _get_current_dispatch_mode() is not None


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, kernels that Triton starts run on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _in_turn(handle: int, call: Callable[[Operated], T]) -> T:
    """Calls an offload while nothing else runs in it. Raises `OffloadError` where it is detached."""
    offload = _offloads.get(handle)
    if offload is not None:
        with offload.turn, on_device(offload.device):
            if handle in _offloads:  # it may have been detached while this waited
                return call(offload)
    raise OffloadError(
        "this compiled forward pass is of an offload that is detached; compile the model's forward again"
    )


def _begin(x: torch.Tensor, handle: int) -> torch.Tensor:
    _in_turn(handle, lambda offload: offload.begin(x))
    return x.clone()


def _enter(x: torch.Tensor, handle: int, layer: int) -> torch.Tensor:
    _in_turn(handle, lambda offload: offload.enter(layer, x))
    return x.clone()


def _route(
    x: torch.Tensor, residual: torch.Tensor, inner: torch.Tensor | None, handle: int, layer: int
) -> tuple[torch.Tensor, ...]:
    routing, form = _in_turn(handle, lambda offload: (offload.route(layer, x, residual, inner), offload.form(layer)))
    # The graph may write to what it gets, so it gets copies.
    return tuple(
        part.to(its.dtype, copy=True, memory_format=torch.contiguous_format)
        for part, its in zip(routing, form, strict=True)
    )


def _tell(
    part: torch.Tensor,
    x: torch.Tensor,
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    handle: int,
    layer: int,
) -> torch.Tensor:
    _in_turn(handle, lambda offload: offload.tell(layer, x, Routing(logits, weights, ids)))
    return part.clone()


def _entered(x: torch.Tensor, candidates: torch.Tensor, handle: int, layer: int) -> torch.Tensor:
    _in_turn(handle, lambda offload: offload.entered(layer, candidates))
    return x.clone()


def _decided(
    ids: torch.Tensor,
    own: torch.Tensor,
    candidates: torch.Tensor,
    guesses: list[torch.Tensor],
    handle: int,
    layer: int,
) -> torch.Tensor:
    _in_turn(handle, lambda offload: offload.decided(layer, own, candidates, guesses))
    return ids.clone()


def _experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, handle: int, layer: int) -> torch.Tensor:
    return _in_turn(handle, lambda offload: offload.experts(layer, x, ids, weights))


def _as_x(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _as_routing(x: torch.Tensor, _: Any, __: Any, handle: int, layer: int) -> tuple[torch.Tensor, ...]:
    form = _in_turn(handle, lambda offload: offload.form(layer))
    return tuple(x.new_empty((prod(x.shape[:-1]), part.shape[-1]), dtype=part.dtype) for part in form)


def _as_sum(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


# Defined without `torch.library.custom_op`, whose operations take several times as long to call.
_LIBRARY = torch.library.Library("predict_train", "DEF")


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.cudagraph_unsafe,))  # what it does, it does on the host
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"predict_train::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.predict_train, name).default


begin = _define("begin(Tensor x, int handle) -> Tensor", _begin, _as_x)
enter = _define("enter(Tensor x, int handle, int layer) -> Tensor", _enter, _as_x)
route = _define(
    "route(Tensor x, Tensor residual, Tensor? inner, int handle, int layer) -> (Tensor, Tensor, Tensor)",
    _route,
    _as_routing,
)
tell = _define(
    "tell(Tensor part, Tensor x, Tensor logits, Tensor weights, Tensor ids, int handle, int layer) -> Tensor",
    _tell,
    _as_x,
)
entered = _define("entered(Tensor x, Tensor candidates, int handle, int layer) -> Tensor", _entered, _as_x)
decided = _define(
    "decided(Tensor ids, Tensor own, Tensor candidates, Tensor[] guesses, int handle, int layer) -> Tensor",
    _decided,
    _as_x,
)
experts = _define("experts(Tensor x, Tensor ids, Tensor weights, int handle, int layer) -> Tensor", _experts, _as_sum)
_refuse = _define("refuse(Tensor gradient) -> Tensor", refuse_gradients, _as_x)
torch.library.register_autograd(
    "predict_train::experts", lambda _, gradient: (_refuse(gradient), None, None, None, None), lib=_LIBRARY
)
# Gradients pass through a copy.
torch.library.register_autograd("predict_train::begin", lambda _, gradient: (gradient, None), lib=_LIBRARY)
torch.library.register_autograd(
    "predict_train::tell", lambda _, gradient: (gradient, None, None, None, None, None, None), lib=_LIBRARY
)
torch.library.register_autograd("predict_train::enter", lambda _, gradient: (gradient, None, None), lib=_LIBRARY)
torch.library.register_autograd(
    "predict_train::entered", lambda _, gradient: (gradient, None, None, None), lib=_LIBRARY
)
