"""The arithmetic of routed experts, one expert at a time, for any model whose experts transformers can dispatch.

`use_experts_implementation` of transformers marks each experts module with how its weights lie (gated or not, with
biases or not, transposed or not) and how its gate is applied. Nothing else is needed, so there is no code per model.
The result equals that of transformers' `grouped_mm`, its default, bit for bit: the same products, biases and sums are rounded
at the same places. Each expert's weights are read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from .architecture import UnsupportedModelError


class Groups(NamedTuple):
    """The (token, choice) pairs of a batch, sorted by the expert they go to."""

    order: torch.Tensor
    """`[tokens * top_k]`: the pairs' positions in the flattened `ids`, those of one expert side by side."""
    experts: list[int]
    """The distinct experts, in rising order."""
    sizes: list[int]
    """How many pairs go to each of these experts; `order.split(sizes)` gives each expert's pairs."""
    choices: int
    """How many experts each token goes to; `order // choices` gives the tokens."""


OnOutputs = Callable[[Groups, torch.Tensor], None]
"""Takes the experts' unweighted outputs `[tokens * top_k, hidden]` of one layer, sorted by expert as in the groups."""


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that transformers dispatches experts through, by name."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def is_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches experts through this module: then it says how its weights lie."""
    return all(hasattr(module, mark) for mark in ("has_gate", "has_bias", "is_transposed"))


def expert_parameters(experts: nn.Module) -> list[str]:
    """The names of the stacked parameters of `experts`, `[num_experts, ...]` each, that `expert_output` needs.

    Raises `UnsupportedModelError` if the module does not say how its weights lie, holds other weights too, or has a forward that
    is not transformers'.
    """
    kind = type(experts).__name__
    if not is_experts(experts):
        raise UnsupportedModelError(
            f"{kind} does not say how its weights lie (it lacks use_experts_implementation), so its experts can't be run one by one"
        )
    forward = type(experts).forward
    if (
        forward is not nn.Module.forward
        and getattr(forward, "__globals__", None) is not use_experts_implementation.__globals__
    ):
        raise UnsupportedModelError(
            f"the forward of {kind} is not the one that transformers gives it, and would not be called; don't replace it"
        )
    names = ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]
    if experts.has_bias:
        names += [f"{name}_bias" for name in names]
    found = {name for name, _ in experts.named_parameters(recurse=False)}
    if found != set(names):
        raise UnsupportedModelError(
            f"{kind} holds the weights {sorted(found)} where {sorted(names)} are expected, so its experts can't be run one by one"
        )
    return names


Linear = Callable[[nn.Module, dict[str, torch.Tensor], str, torch.Tensor], torch.Tensor]
"""One linear layer of an expert, `(experts, weights, name, x)`: `[n, outputs]` for rows `[n, inputs]`, bias included."""


def expert_linear(experts: nn.Module, weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """The linear layer `name` of an expert whose weights are as the model has them; see `Linear`."""
    weight, bias = weights[name], weights.get(f"{name}_bias")
    output = F.linear(x.to(weight.dtype), weight.mT if experts.is_transposed else weight)
    # The product is rounded before the bias is added, as in transformers. F.linear would round once.
    return output if bias is None else output.add_(bias)


def expert_output(
    experts: nn.Module, weights: dict[str, torch.Tensor], x: torch.Tensor, linear: Linear = expert_linear
) -> torch.Tensor:
    """One expert's unweighted output `[n, hidden]` for its inputs `x` `[n, hidden]`, in the dtype of `x`.

    `weights` maps each name of `expert_parameters(experts)` to this expert's slice of that parameter; `experts` gives
    only the layout and the gate, so its own weights may lie on another device. `linear` computes other forms of weights.
    """
    hidden = linear(experts, weights, "gate_up_proj" if experts.has_gate else "up_proj", x)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)  # type: ignore[operator]
    output = linear(experts, weights, "down_proj", hidden)
    # Older releases of transformers have neither this mark nor experts with such a norm.
    return experts.post_expert_norm(output) if getattr(experts, "has_post_expert_norm", False) else output  # type: ignore[operator]


def group_by_expert(ids: torch.Tensor, num_experts: int) -> Groups:
    """Sorts the pairs of `ids` `[tokens, top_k]` by expert. It waits for the device once."""
    flat = ids.flatten()
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    present = [expert for expert, count in enumerate(counts) if count]
    # Not the stable sort, since transformers takes this one: the rounding of a product may depend on its row.
    return Groups(flat.argsort(), present, [counts[expert] for expert in present], ids.shape[-1])


def combine(outputs: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The experts' weighted sum `[tokens, hidden]` in `dtype`, from `outputs` `[tokens * top_k, hidden]` in the order of `ids`.

    `weights` is `[tokens, top_k]`. Each product is taken in the wider of both dtypes and rounded, and then they are summed in
    the order of `ids`, as in transformers. So the result does not depend on the order in which the experts were computed.
    """
    weighted = outputs * weights.reshape(-1, 1)
    return weighted.view(*weights.shape, outputs.shape[-1]).sum(1).to(dtype)


def run_experts(
    experts: nn.Module,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    on_outputs: OnOutputs | None = None,
) -> torch.Tensor:
    """The result of `experts(x, ids, weights)`, `[tokens, hidden]`, computed expert by expert on resident weights.

    `x` is `[tokens, hidden]`; `ids` and `weights` are `[tokens, top_k]`. Raises `UnsupportedModelError` as
    `expert_parameters` does.
    """
    stacked = {name: getattr(experts, name) for name in expert_parameters(experts)}
    groups = group_by_expert(ids, stacked["down_proj"].shape[0])
    sorted_x = x[groups.order // groups.choices]
    outputs = [x.new_empty(0, x.shape[-1])]  # for the case of no tokens
    for expert, inputs in zip(groups.experts, sorted_x.split(groups.sizes), strict=True):
        outputs.append(expert_output(experts, {name: p[expert] for name, p in stacked.items()}, inputs))
    grouped = torch.cat(outputs)  # not written in place: autograd refuses that for views made without it
    if on_outputs is not None:
        on_outputs(groups, grouped)
    # Gathering by the inverse order is several times as fast as scattering by the order.
    return combine(grouped.index_select(0, groups.order.argsort()), weights, x.dtype)
