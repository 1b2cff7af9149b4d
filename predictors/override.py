"""A module's forward, replaced for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from .errors import UserError


class Replacement:
    """Is called in the place of a module's forward, until `end`. From then on it calls that forward itself.

    Other libraries may wrap it meanwhile, and go on calling it. It has the signature of what it replaces, which transformers
    looks at. It can't be copied: the copy of a module would call what belongs to the module itself.

    It hides the forward of the module's class. If somebody replaces that one meanwhile, it raises `UserError`.
    """

    def __init__(self, original: Any, forward: Callable[..., Any], kind: type[nn.Module]):
        """`kind` is the class of the module."""
        functools.update_wrapper(self, original)
        self._original, self._forward = original, forward
        self._kind, self._hidden = kind, kind.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._kind.forward is not self._hidden and self._forward is not self._original:
            raise UserError(
                f"the forward of {self._kind.__name__} was replaced while the experts are offloaded or the layers are recorded, and "
                "would not be called; detach the model first: model.expert_offload.detach()"
            )
        return self._forward(*args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """It as a method's function: accelerate wraps this, and binds it to the module again."""
        return self._unbound

    @property
    def __code__(self) -> Any:
        """`torch.export` looks at it."""
        return self._original.__code__

    def _unbound(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    def end(self) -> None:
        self._forward = self._original

    def __reduce_ex__(self, _: Any) -> NoReturn:
        refuse_copy()


def refuse_copy(*_: Any) -> NoReturn:
    """In the place of `__reduce_ex__`, which `copy` and `pickle` call."""
    raise UserError(
        "a model can't be copied or pickled while its experts are offloaded or its layers are recorded; detach it first: "
        "model.expert_offload.detach()"
    )


@contextmanager
def override_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[Any]:
    """Replaces `module.forward` by `forward` and yields the original. At the end the module is exactly as before.

    If somebody has wrapped the replacement, the wrapper stays, and what it calls is the original again.
    """
    had_own = "forward" in vars(module)
    original = module.forward
    replacement = Replacement(original, forward, type(module))
    module.forward = replacement
    try:
        yield original
    finally:
        replacement.end()
        if vars(module).get("forward") is replacement:
            if had_own:
                module.forward = original
            else:
                del module.forward
