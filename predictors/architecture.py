"""The MoE layers of a transformers model: for each its norm, router, experts, and how the experts' sum joins the layer.

`discovery` reads all of it from the model itself, so there is no table of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .errors import UserError, one_line


class UnsupportedModelError(UserError):
    """Speculation cannot work on this model; the message says why."""


@dataclass(frozen=True)
class Join:
    """How a layer's output `o` is made from the residual stream `h`, the block's input `x` and the experts' sum `y`.

        s = base_scale * (x if base_is_normed else h) + sum of beside_scale * beside      known before the experts run
        o = s + post_scale * (shared_scale * shared(x) + expert_scale * project(y))       without a post-norm
        o = s + post_scale * post_norm(shared_scale * shared(x) + expert_scale * project(y))

    Without a post-norm, the shared expert's term is part of `s`: the `residual` is the layer's whole output without its
    routed experts. With a post-norm, that term goes through the norm together with the experts, and is called `inner`.
    """

    base_is_normed: bool = False
    base_scale: float = 1.0
    beside: tuple[tuple[nn.Module, float], ...] = ()
    """Modules that run before the block and are added to the stream with it (parallel attention), with their factors."""
    shared: nn.Module | None = None
    """The shared expert, computed for every token, or None."""
    shared_gate: nn.Module | None = None
    """A `[1, hidden]` linear layer whose sigmoid scales the shared expert, or None."""
    shared_scale: float = 1.0
    project: nn.Module | None = None
    """A linear layer from the experts' space back to the stream's, or None if both are the same."""
    expert_scale: float = 1.0
    post_norm: nn.Module | None = None
    post_scale: float = 1.0

    @property
    def has_inner(self) -> bool:
        return self.post_norm is not None and self.shared is not None

    def shared_term(self, x: torch.Tensor) -> torch.Tensor | None:
        """`shared_scale * shared(x)` for the block's input `x` `[tokens, hidden]`, or None without a shared expert."""
        if self.shared is None:
            return None
        return self.scaled(self.shared(x), None if self.shared_gate is None else self.shared_gate(x))

    def scaled(self, shared: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """The shared term from the outputs of the shared expert `[tokens, hidden]` and of its gate `[tokens, 1]`."""
        output = shared if gate is None else torch.sigmoid(gate) * shared
        return output if self.shared_scale == 1.0 else self.shared_scale * output

    def residual(
        self, h: torch.Tensor, x: torch.Tensor, beside: list[torch.Tensor], shared_term: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual `s`, and `inner` or None, each `[tokens, hidden]`. `beside` is in the order of the field."""
        s = x if self.base_is_normed else h
        if self.base_scale != 1.0:
            s = self.base_scale * s
        for output, (_, scale) in zip(beside, self.beside, strict=True):
            s = s + (output if scale == 1.0 else scale * output)
        if shared_term is None or self.post_norm is not None:
            return s, shared_term
        return s + (shared_term if self.post_scale == 1.0 else self.post_scale * shared_term), None

    def in_stream(self, outputs: torch.Tensor) -> torch.Tensor:
        """The term that experts' outputs `[n, experts' width]` add to `inner` or `s`, `[n, hidden]`; default vectors hold it.

        It is linear, so it can be applied to a mean of outputs.
        """
        if self.project is not None:
            outputs = outputs @ self.project.weight.to(outputs).T  # type: ignore[operator]
        scale = self.expert_scale * (self.post_scale if self.post_norm is None else 1.0)
        return outputs if scale == 1.0 else scale * outputs


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """A layer with routed experts: all that is needed to take them one by one. The modules are the model's own, not copies."""

    index: int
    """Number of the decoder layer, counted from 0."""
    decoder: nn.Module
    """The decoder layer; its input is the residual stream."""
    experts: nn.Module
    """All routed experts, called as `experts(x, ids, weights)`; its parameters are stacked along dimension 0."""
    num_experts: int
    """Among how many a router chooses."""
    identities: int = 0
    """How many of these, the last ones, return their input and have no weights."""
    top_k: int
    hidden_size: int
    input_size: int
    """Values a token of the decoder layer's input: `hidden_size`, or a multiple of it where there are several streams."""
    dtype: torch.dtype
    """Of what the experts' block reads."""
    attends: bool = True
    """Whether a module (attention) runs between the layer's input and the norm."""

    @property
    def stored(self) -> int:
        """How many of its experts have weights."""
        return self.num_experts - self.identities

    def own_input(self, x: torch.Tensor) -> torch.Tensor:
        """The decoder layer's input `x` as `[tokens, hidden]`. Of several residual streams it is the first."""
        return x.reshape(-1, self.input_size)[:, : self.hidden_size]


@dataclass(frozen=True, kw_only=True)
class MoELayer(ExpertLayer):
    """A layer whose router is seen too: experts can be guessed from it and for it."""

    block: nn.Module
    """The module that calls the router and the experts."""
    names: dict[str, Any]
    """Dotted names in the model: `norm`, `router`, `post_norm` ("" if none), and the list `router_arguments`."""
    norm: nn.Module
    """The norm whose output the router reads; its input is the stream after attention. `Identity` if there is none."""
    router: nn.Module
    """`router(x, *router_arguments)` returns `(logits, weights, ids)`: `[tokens, experts]`, `[tokens, top_k]` twice."""
    router_arguments: tuple[torch.Tensor, ...]
    """Parameters or buffers of the block that its router is called with (score-correction biases)."""
    router_ndim: int
    """2 if the router is called with `[tokens, hidden]`, 3 if with `[sequences, length, hidden]`."""
    join: Join
    """Of a layer that is not followed, it says nothing."""
    unfollowed: str | None = None
    """Why the residual can't be followed, in one sentence; None if it can. If not, a guess reads the router's input instead."""

    @property
    def entry(self) -> nn.Module:
        """The module whose input is the residual stream that the norm reads."""
        return self.block if isinstance(self.norm, nn.Identity) else self.norm


def first_tensor(values: Any) -> torch.Tensor:
    """The first tensor among a module's arguments or results: by convention the hidden states."""
    if isinstance(values, torch.Tensor):
        return values
    return next(x for x in values if isinstance(x, torch.Tensor))


def with_first_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments with `change` made to the `first_tensor` among them."""
    for place, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            return (*args[:place], change(value), *args[place + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
    return args, kwargs | {name: change(kwargs[name])}


def sources(layers: Sequence[ExpertLayer], horizon: int = 1) -> dict[int, int | None]:
    """The source layer of each target layer, by layer index.

    It is the layer before, if that is an MoE layer. A dense layer's whole output is known, so the target after it reads
    its own input (None), as the first MoE layer does. But if nothing runs between that input and the router, there is
    no time to copy: then the source is the MoE layer before.

    With a `horizon` of 2 it is the source of that source: the guess and its copies can begin one MoE layer earlier. A
    target whose source has no source keeps its own.
    """
    nearest: dict[int, int | None] = {layer.index: None for layer in layers}
    for before, layer in pairwise(layers):
        if before.index == layer.index - 1 or not layer.attends:
            nearest[layer.index] = before.index
    return farther(nearest, horizon)


def farther(nearest: dict[int, int | None], horizon: int) -> dict[int, int | None]:
    """The source of each target `horizon` MoE layers before it, or as far as the chain of `nearest` sources reaches."""
    found = dict(nearest)
    for _ in range(horizon - 1):
        for target, source in found.items():
            beyond = None if source is None else nearest.get(source)
            found[target] = source if beyond is None else beyond
    return found


def moe_shape(config: PretrainedConfig, layers: Sequence[ExpertLayer]) -> dict[str, Any]:
    """The facts that predictors depend on, as plain JSON values, with a fingerprint (sha256) of them all."""
    text = config.get_text_config()
    shape = {
        "model_type": config.model_type,
        "hidden_size": layers[0].hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "moe_layers": [layer.index for layer in layers],
        "num_experts": layers[0].num_experts,
        "top_k": layers[0].top_k,
    }
    return shape | {"fingerprint": fingerprint(shape)}


FACTS = ("model_type", "hidden_size", "num_hidden_layers", "moe_layers", "num_experts", "top_k")


def fingerprint(shape: dict[str, Any]) -> str:
    """sha256 of the facts in a `moe_shape`: models with the same one can share predictors."""
    facts = {name: shape[name] for name in FACTS}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def describe_shape(shape: dict[str, Any]) -> str:
    """One phrase for an error message: `qwen3_moe with 12 layers, 32 experts, top 4, hidden size 128`."""
    return "{model_type} with {num_hidden_layers} layers, {num_experts} experts, top {top_k}, hidden size {hidden_size}".format(
        **shape
    )


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: it has all modules and takes no memory.

    Raises `UnsupportedModelError` for a config of which transformers can make none.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises whatever a wrong value leads to
        raise UnsupportedModelError(
            f"transformers can't make a {config.model_type} of this config ({one_line(error)}); correct the config"
        ) from error
