"""Finds the MoE layers of a transformers model: for each its norm, router, experts and shared expert.

There is no table of models. The class of the routers stands in the model's own `_can_record_outputs`; the block that
holds a router holds its experts; and which norm feeds the block is read off one tiny forward pass, in which the
experts are left out, so that it costs next to nothing even where they lie in host memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from predictors.errors import UserError


class UnsupportedModelError(UserError):
    """The model is not one that speculation can work on; the message says why."""


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model. The modules are the model's own, not copies."""

    index: int
    """Number of the decoder layer, counted from 0."""
    decoder: nn.Module
    """The decoder layer; its input is the residual stream."""
    names: dict[str, str]
    """Where `norm` and `router` stand in the model, as dotted names."""
    norm: nn.Module
    """The norm whose output the router and the experts read; its input is the residual stream after attention."""
    router: nn.Module
    """`router(x)` returns `(logits, weights, ids)`, of shapes `[tokens, experts]`, `[tokens, top_k]` twice."""
    experts: nn.Module
    """All routed experts, called as `experts(x, ids, weights)`; its parameters are stacked along dimension 0."""
    shared: nn.Module | None
    """The shared expert, computed for every token, or None."""
    shared_gate: nn.Module | None
    """A `[1, hidden]` linear layer whose sigmoid scales the shared expert, or None."""
    num_experts: int
    top_k: int
    hidden_size: int

    def shared_output(self, x: torch.Tensor) -> torch.Tensor | None:
        """What the shared expert adds for the block's input `x` `[tokens, hidden]`, or None where there is none."""
        if self.shared is None:
            return None
        output: torch.Tensor = self.shared(x)
        return output if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * output


@contextmanager
def override_forward(module: nn.Module, forward: Any) -> Iterator[Any]:
    """Puts `forward` in the place of `module.forward` and yields the original; the module is restored exactly."""
    had_own = "forward" in vars(module)
    original = module.forward
    module.forward = forward
    try:
        yield original
    finally:
        if had_own:
            module.forward = original
        else:
            del module.forward


def _router_classes(model: nn.Module) -> tuple[type, ...]:
    classes: list[type] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorders: Any = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
            for recorder in recorders if isinstance(recorders, list) else [recorders]:
                classes.append(getattr(recorder, "target_class", None) or recorder)
    return tuple(classes)


def _is_experts(module: nn.Module) -> bool:
    return any(p.ndim == 3 for p in module.parameters(recurse=False))


def find_moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The MoE layers of a causal language model, in forward order.

    Raises `UnsupportedModelError` for a dense model and for one whose routers
    or experts don't have the form described in `MoELayer`.
    """
    kind = model.config.model_type
    classes = _router_classes(model)
    routers = [name for name, m in model.named_modules() if classes and isinstance(m, classes)]
    if not routers:
        raise UnsupportedModelError(
            f"{kind} is not a mixture-of-experts model that transformers knows the routers of; "
            "speculating experts needs one"
        )
    layers = [_MoEProbe(model, name) for name in routers]
    with ExitStack() as stack, torch.no_grad():
        for probe in layers:
            stack.enter_context(probe.watching())
        order: list[int] = []
        for number, probe in enumerate(layers):
            handle = probe.block.register_forward_pre_hook(lambda *_, number=number: order.append(number))
            stack.callback(handle.remove)
        was_training = model.training
        model.eval()
        model(
            input_ids=torch.zeros(
                1, 2, dtype=torch.long, device=next(model.get_input_embeddings().parameters()).device
            ),
            use_cache=False,
        )
        model.train(was_training)
    return [layers[number].result() for number in dict.fromkeys(order)]


class _MoEProbe:
    """Watches one MoE block through the tiny forward pass and says what it saw."""

    def __init__(self, model: nn.Module, router_name: str):
        self.router_name, self.router = router_name, model.get_submodule(router_name)
        parents = router_name.split(".")[:-1]
        self.block = model.get_submodule(".".join(parents))
        experts = [m for m in self.block.children() if _is_experts(m)]
        if len(experts) != 1:
            raise UnsupportedModelError(
                f"{router_name} has no experts beside it that are stacked in one module; they can't be addressed one by one"
            )
        self.experts = experts[0]
        position = next((i for i, part in enumerate(parents) if re.fullmatch(r"\d+", part)), None)
        if position is None:
            raise UnsupportedModelError(f"{router_name} is in no numbered decoder layer")
        self.index = int(parents[position])
        self.decoder = model.get_submodule(".".join(parents[: position + 1]))
        self.names = {module: name for name, module in model.named_modules()}
        self.norm: nn.Module | None = None
        self.routing: tuple[torch.Tensor, ...] | None = None
        self.hidden_size = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        outputs: list[tuple[nn.Module, torch.Tensor]] = []
        inside = set(self.block.modules())

        def keep_output(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs.append((module, output))

        def match_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            self.norm = next((m for m, out in outputs if entered and out is entered[0]), None)
            self.hidden_size = entered[0].shape[-1] if entered else 0
            outputs.clear()

        def keep_routing(_: nn.Module, __: Any, output: Any) -> None:
            self.routing = output

        def no_experts(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.zeros_like(hidden_states)

        with ExitStack() as stack:
            for module in self.decoder.modules():
                if module not in inside and not list(module.children()):
                    stack.callback(module.register_forward_hook(keep_output).remove)
            stack.callback(self.block.register_forward_pre_hook(match_input, with_kwargs=True).remove)
            stack.callback(self.router.register_forward_hook(keep_routing).remove)
            stack.enter_context(override_forward(self.experts, no_experts))
            yield

    def result(self) -> MoELayer:
        if self.norm is None:
            raise UnsupportedModelError(
                f"the input of {self.router_name} is not the output of a norm of its decoder layer"
            )
        r = self.routing
        if not (
            isinstance(r, tuple)
            and len(r) == 3
            and r[2].dtype in (torch.int32, torch.int64)
            and r[1].shape == r[2].shape
        ):
            raise UnsupportedModelError(f"{self.router_name} does not return (logits, weights, ids) for each token")
        others = [
            m
            for m in self.block.children()
            if m not in (self.router, self.experts) and any(True for _ in m.parameters())
        ]
        gates = [m for m in others if isinstance(m, nn.Linear) and m.out_features == 1]
        shared = [m for m in others if m not in gates]
        if len(shared) > 1 or len(gates) > len(shared):
            raise UnsupportedModelError(
                f"the block of {self.router_name} holds modules beside router, experts and a shared expert"
            )
        return MoELayer(
            index=self.index,
            decoder=self.decoder,
            names={"norm": self.names[self.norm], "router": self.router_name},
            norm=self.norm,
            router=self.router,
            experts=self.experts,
            shared=shared[0] if shared else None,
            shared_gate=gates[0] if gates else None,
            num_experts=r[0].shape[-1],
            top_k=r[2].shape[-1],
            hidden_size=self.hidden_size,
        )


def sources(layers: list[MoELayer]) -> dict[int, int | None]:
    """The source layer of each target layer, by layer index: the MoE layer before it, None for the first."""
    indices = [layer.index for layer in layers]
    return dict(zip(indices, [None, *indices[:-1]], strict=True))


def moe_shape(config: PretrainedConfig, layers: list[MoELayer]) -> dict[str, Any]:
    """The facts that predictors depend on, as plain JSON values, with a fingerprint (sha256) of them all."""
    text = config.get_text_config()
    shape: dict[str, Any] = {
        "model_type": config.model_type,
        "hidden_size": layers[0].hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "moe_layers": [layer.index for layer in layers],
        "num_experts": layers[0].num_experts,
        "top_k": layers[0].top_k,
    }
    shape["fingerprint"] = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
    return shape


def describe_shape(shape: dict[str, Any]) -> str:
    """One phrase for an error message: `qwen3_moe with 12 layers, 32 experts, top 4, hidden size 128`."""
    return "{model_type} with {num_hidden_layers} layers, {num_experts} experts, top {top_k}, hidden size {hidden_size}".format(
        **shape
    )


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: all modules, no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
