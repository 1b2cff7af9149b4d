"""The guard of a model with offloaded experts: what would give a wrong result without a word ends in an `OffloadError`.

The runtime holds copies of weights: of experts, in slots, and of norms and routers, folded into guesses. It computes the
experts without gradients, with their weights alone. So these weights must stay as they are, and what is put around them is
either called or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..predictors.architecture import ExpertLayer, MoELayer
from ..predictors.experts import expert_modules
from ..predictors.override import Replacement, refuse_copy
from .errors import OffloadError

PACKAGES = {"torch", "transformers", "transformers_modules"}
"""Modules of others around experts change what they give, as adapters do. The last one is where transformers puts a model's own code."""
DETACH = "detach it first: model.expert_offload.detach()"


class Away:
    """Is called in the place of what needs experts, while they are not in memory."""

    def __init__(self, where: str):
        """`where` says where they are instead, like `in FILE`."""
        self.where = where

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise OffloadError(
            f"the experts of this model are {self.where}; load them (load_experts), or offload it again to run it "
            "(offload_experts)"
        )


def refuse_unfit(model: nn.Module) -> None:
    """Raises `OffloadError` where the experts are offloaded already, or somebody else has a hand in the model.

    Accelerate takes weights away and replaces forwards, and peft replaces forwards. The runtime does not call those of experts.
    """
    away = (name for name, p in model.named_parameters() if p.is_meta)
    theirs = tuple(expert_modules(model))
    if (name := next((name for name in away if not name.startswith(theirs)), None)) is not None:
        raise OffloadError(f"{name} is not in memory, as with accelerate's hooks; load the model without device_map")
    for name, experts in expert_modules(model).items():
        around = type(model.get_submodule(name.rpartition(".")[0]))
        packages = {kind.__module__.split(".")[0] for kind in (type(model), type(experts))}
        if around.__module__.split(".")[0] not in packages | PACKAGES:
            raise OffloadError(
                f"{around.__name__} is put around the experts {name}, and would not be called; merge it into them or remove it"
            )
        own = vars(experts).get("forward")
        if isinstance(own, Replacement):
            raise OffloadError(f"the model's experts are offloaded already; {DETACH}")
        if own is not None and not isinstance(own, Away):
            raise OffloadError(
                f"the forward of {name} is replaced, as by accelerate's hooks, and would not be called; remove what replaces "
                "it, or load the model without device_map"
            )


class Watched(nn.Parameter):
    """A parameter that the runtime has copies of. Torch counts what is written to it; here also what is written to its `data`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copied: nn.Parameter = super().__deepcopy__(memo)
        copied.__class__ = nn.Parameter
        return copied

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, values)  # type: ignore[attr-defined]  # a descriptor, which torch annotates as a tensor


def _refuse_step(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    """Refuses steps on watched weights: fused ones are not counted, and take the memory of an expert for that of the next."""
    parameters = (parameter for group in optimiser.param_groups for parameter in group["params"])
    if any(isinstance(parameter, Watched) and parameter.grad is not None for parameter in parameters):
        raise OffloadError(f"weights can't be trained that the runtime has copies of; {DETACH}")


class Weights:
    """The parameters and buffers of some modules, and how they were: their addresses, and how often they had been written to."""

    def __init__(self, modules: Iterable[nn.Module]):
        places = [vars(module)[kind] for module in modules for kind in ("_parameters", "_buffers")]
        self._places = [
            (place, [(name, *_state(tensor)) for name, tensor in place.items()]) for place in places if place
        ]
        self.tensors = [tensor for _, held in self._places for _, tensor, *_ in held if tensor is not None]

    def have_changed(self) -> bool:
        # Every layer of a pass asks. A loop is faster here than comparisons of lists, since it touches less memory.
        for place, held in self._places:
            if len(place) != len(held):
                return True
            for name, tensor, address, count in held:
                if place.get(name) is not tensor:
                    return True
                if tensor is None:
                    continue
                if tensor.data_ptr() != address or (count is not None and tensor._version != count):
                    return True
        return False


def _state(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int | None]:
    if tensor is None:
        return None, 0, None
    try:
        return tensor, tensor.data_ptr(), tensor._version
    except RuntimeError:  # of what was made in inference mode, torch does not count it
        return tensor, tensor.data_ptr(), None


class Guard:
    """Watches the weights that the runtime has copies of, until `attached` is closed.

    Neither the model nor a part of it that has experts can be moved, converted or copied meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertLayer],
        folded: list[MoELayer],
        device: torch.device,
        attached: ExitStack,
    ):
        """`folded` are the layers whose norm and router are folded. `device` is the one that the model computes on."""
        self._experts = [layer.experts for layer in layers]
        self._device, self._dtype = device, next(self._experts[0].parameters()).dtype
        copied = [[*layer.experts.modules()] for layer in layers]
        self._what = ["the experts"] * len(layers)
        for number, layer in enumerate(layers):
            if isinstance(layer, MoELayer) and layer in folded:
                copied[number] += [*layer.norm.modules(), *layer.router.modules(), layer.block]
                self._what[number] = "the experts or their norm or router"
        self._weights, self._all = [*map(Weights, copied)], Weights(chain.from_iterable(copied))
        for tensor in self._all.tensors:
            if type(tensor) is nn.Parameter:
                tensor.__class__ = Watched
                attached.callback(setattr, tensor, "__class__", nn.Parameter)
        attached.callback(register_optimizer_step_pre_hook(_refuse_step).remove)
        for module in model.modules():
            if not set(self._experts).isdisjoint(module.modules()):
                vars(module).update(_apply=partial(self._apply, module), __reduce_ex__=refuse_copy)
                attached.callback(vars(module).pop, "_apply", None)
                attached.callback(vars(module).pop, "__reduce_ex__", None)

    def check(self, number: int) -> None:
        """Raises `OffloadError` where weights of layer `number` are not as they were."""
        if self._weights[number].have_changed():
            raise OffloadError(
                f"{self._what[number]} of MoE layer {number} have changed since the experts were offloaded, and the runtime has "
                "copies of the old ones; detach the model and offload it again: model.expert_offload.detach()"
            )

    def check_all(self) -> None:
        """Raises as `check` does, for any layer."""
        if self._all.have_changed():
            for number in range(len(self._weights)):
                self.check(number)

    def _apply(
        self, module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        """In the place of torch's own, through which modules are moved and converted. What leaves the experts alone may pass."""
        probe = torch.empty(1, dtype=self._dtype, device=self._device)
        address = probe.data_ptr()
        if function(probe) is not probe or probe.data_ptr() != address:
            raise OffloadError(f"a model can't be moved or converted while its experts are offloaded; {DETACH}")
        if module in self._experts:  # they stay where they are
            return module
        moved: nn.Module = type(module)._apply(module, function, recurse)
        return moved


def refuse_gradients(*_: Any) -> NoReturn:
    """In the place of the gradients of experts."""
    raise OffloadError(f"no gradients pass through offloaded experts; to train the model, {DETACH}")


class Barrier(torch.autograd.Function):
    """Lets values through, and no gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(*_: Any) -> None:
        pass

    @staticmethod
    def backward(*_: Any) -> NoReturn:
        refuse_gradients()

    @staticmethod
    def jvp(*_: Any) -> NoReturn:
        refuse_gradients()


def without_gradients(output: torch.Tensor, inputs: tuple[torch.Tensor, ...], experts: nn.Module) -> torch.Tensor:
    """`output`, which `experts` gave for `inputs` without gradients. Where it should have some, asking for them raises."""
    if torch.is_grad_enabled():
        needed = [tensor for tensor in (*inputs, *experts.parameters()) if tensor.requires_grad]
        if needed:
            return Barrier.apply(output, *needed)
    return output
