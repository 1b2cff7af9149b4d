"""One MoE layer under control: what is kept of it for its own guess, and for those of the layers whose source it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from ..predictors.architecture import MoELayer, first_tensor
from ..predictors.override import override_forward
from ..predictors.routing import Routing, flat_routing, read_routing
from ..predictors.speculation import Router
from .guess import Guess, Guesser
from .hits import HitCount
from .operations import is_traced
from .targets import Target


@torch.no_grad()
def form_of(layer: MoELayer) -> Routing:
    """A routing as the router of `layer` makes it, `[2, columns]`, for what its columns and dtypes are."""
    weight = next(layer.router.parameters())
    return Router.of(layer)(torch.zeros(2, layer.hidden_size, dtype=layer.dtype, device=weight.device))


def _are_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are one, or views of all of it."""
    if not is_traced():
        return a.data_ptr() == b.data_ptr()
    # A compiler knows no addresses, and of each view whose it is.
    return (a if a._base is None else a._base) is (b if b._base is None else b._base)


class LayerControl:
    """One MoE layer under control: the guess for it as a target, and the residual for guesses that it is the source of."""

    def __init__(self, target: Target, guesser: Guesser, count: HitCount):
        self.target, self.guesser, self.count = target, guesser, count
        self.targets: list[LayerControl] = []
        """The layers whose source it is, the nearest first."""
        self.told: Callable[[Guess, torch.Tensor], None] | None = None
        """Is called with each guess and the router's own choice; see `gating.Decided.own`."""
        self.known = False
        """`known` of its last decision; see `engine.Decision`."""
        self.traced: Guess | None = None
        """Its guess, if that belongs to the graph that is being traced (`compiled`)."""
        self.is_guessing = False
        """Whether its guess is being made. Meanwhile it is the speculation that calls its router."""
        self.own: Callable[..., Any]
        """The router's own forward."""
        self.read = flat_routing if target.routed.unfollowed is None else partial(read_routing, layer=target.layer)
        """What its router's output says."""
        self.form: Routing
        """A routing of its router, for what the columns and dtypes of all its routings are."""
        self._stream: torch.Tensor | None = None
        self._beside: dict[int, torch.Tensor] = {}
        self._shared: tuple[torch.Tensor, torch.Tensor] | None = None
        """The input of the shared expert and its output, where it is kept for a second call."""

    def watch_residual(self, attached: ExitStack) -> None:
        """Hooks the parts of the residual and keeps them for `residual`."""
        layer = self.target.routed
        if layer.unfollowed is not None:  # the router's input is all that is read
            return

        def keep_stream(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stream = first_tensor((*args, *kwargs.values())).reshape(-1, layer.hidden_size)
            self._shared = None

        attached.callback(layer.entry.register_forward_pre_hook(keep_stream, with_kwargs=True).remove)
        for number, (module, _) in enumerate(layer.join.beside):

            def keep_beside(_: Any, __: Any, output: Any, number: int = number) -> None:
                self._beside[number] = first_tensor(output).reshape(-1, layer.hidden_size)

            attached.callback(module.register_forward_hook(keep_beside).remove)
        if layer.join.shared is not None:
            # The shared expert belongs to the residual. Its block and the guess both call it, in either order. The first call
            # computes the output and keeps it, the second takes it.
            def shared(x: torch.Tensor) -> torch.Tensor:
                kept, self._shared = self._shared, None
                if kept is None or not _are_same(kept[0], x):  # what calls it may have been wrapped
                    kept = self._shared = x, original(x)
                return kept[1].view(*x.shape[:-1], -1)

            original = attached.enter_context(override_forward(layer.join.shared, shared))

    def residual(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual of this pass and `inner`, from the router's input `x` `[tokens, hidden]`; see `Join.residual`.

        Without rows where it is not known, since the router or its block was called by itself.
        """
        if self.target.routed.unfollowed is not None:
            return x, None
        join, stream = self.target.routed.join, self._stream
        if stream is None or len(stream) != len(x) or len(self._beside) != len(join.beside):
            return x[:0], None
        beside = [self._beside[number] for number in range(len(join.beside))]
        # What a graph leaves in attributes, it would have to return.
        self._stream = None
        self._beside.clear()
        return join.residual(stream, x, beside, join.shared_term(x))


class Reading(NamedTuple):
    """What a guess is made from; see `Guesser.guess`."""

    residual: torch.Tensor
    source: Routing | None
    inner: torch.Tensor | None
