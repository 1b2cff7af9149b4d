"""The arithmetic of routed experts, one expert at a time, for any model whose experts transformers can dispatch.

`use_experts_implementation` of transformers marks each experts module with how its weights lie (gated or not, with
biases or not, transposed or not) and how its gate is applied. Nothing else is needed, so there is no code per model.
The result equals that of transformers' `grouped_mm`, its default, bit for bit: the same products, biases and sums are rounded
at the same places. Each expert's weights are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from .architecture import UnsupportedModelError


@dataclass(frozen=True)
class Unmarked:
    """What `use_experts_implementation` would say of an experts module that lacks it, and how its own forward differs."""

    why: str
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    identities: str = ""
    """The attribute with the number of experts that return their input. They have the last ids, and no weights."""
    sums_in_turn: bool = False
    """Whether an expert's weighted output is rounded and added to those of the experts before it, in the order of their numbers."""
    is_dense: bool = False
    """Whether it is called with rows for every expert, `[experts * tokens, hidden]`, zeros where the expert was not chosen."""

    def _apply_gate(self, gate_up: torch.Tensor, act_fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act_fn(gate) * up


UNMARKED = {
    "LongcatFlashExperts": Unmarked(
        "some of its experts return their input, and transformers' ways to compute experts know no such",
        identities="zero_expert_num",
        sums_in_turn=True,
    ),
    "Llama4TextExperts": Unmarked(
        "it is called with every expert's rows, already weighted, and not with ids", is_transposed=True, is_dense=True
    ),
}
"""The experts modules of transformers that are not marked, by the name of their class, and why. No rule can tell how a forward sums."""


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
    """Whether it is known how the weights of this module lie: transformers dispatches experts through it, or it is in `UNMARKED`."""
    return type(module).__name__ in UNMARKED or all(
        hasattr(module, mark) for mark in ("has_gate", "has_bias", "is_transposed")
    )


def marks_of(experts: nn.Module) -> Any:
    """What says `has_gate`, `has_bias` and `is_transposed` of an experts module: itself, or its entry in `UNMARKED`."""
    return UNMARKED.get(type(experts).__name__, experts)


def unmarked(experts: nn.Module) -> Unmarked | None:
    """The module's entry in `UNMARKED`, or None if transformers marks it."""
    return UNMARKED.get(type(experts).__name__)


def identities_of(experts: nn.Module) -> int:
    """How many of the experts that a router chooses among only return their input. They come last."""
    marks = unmarked(experts)
    return int(getattr(experts, marks.identities) or 0) if marks is not None and marks.identities else 0


def count_of(experts: nn.Module) -> int:
    """How many experts of the module have weights."""
    weights = dict(experts.named_parameters(recurse=False)).get("down_proj")
    if weights is None:
        raise UnsupportedModelError(
            f"{type(experts).__name__} has no parameter down_proj, so its experts can't be run one by one"
        )
    return len(weights)


def expert_parameters(experts: nn.Module) -> list[str]:
    """The names of the stacked parameters of `experts`, `[num_experts, ...]` each, that `expert_outputs` needs.

    Raises `UnsupportedModelError` if the module does not say how its weights lie, holds other weights too, or has a forward that
    is not transformers'.
    """
    kind = type(experts).__name__
    if not is_experts(experts):
        raise UnsupportedModelError(
            f"{kind} does not say how its weights lie (it lacks use_experts_implementation), so its experts can't be run one by one"
        )
    forward, marks = type(experts).forward, marks_of(experts)
    if unmarked(experts) is not None:
        is_own = getattr(forward, "__module__", None) == type(experts).__module__
    else:
        is_own = getattr(forward, "__globals__", None) is use_experts_implementation.__globals__
    if forward is not nn.Module.forward and not is_own:
        raise UnsupportedModelError(
            f"the forward of {kind} is not the one that transformers gives it, and would not be called; don't replace it"
        )
    names = ["gate_up_proj" if marks.has_gate else "up_proj", "down_proj"]
    if marks.has_bias:
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
    marks = marks_of(experts)
    output = F.linear(x.to(weight.dtype), weight.mT if marks.is_transposed else weight)
    # The product is rounded before the bias is added, as in transformers. F.linear would round once.
    return output if bias is None else output.add_(bias)


def expert_outputs(
    experts: nn.Module,
    weights: Sequence[dict[str, torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    linear: Linear = expert_linear,
) -> torch.Tensor:
    """The unweighted outputs `[rows, hidden]` of some experts for the `inputs` of each, `[n, hidden]`, in their dtype.

    The rows of the first expert come first. `weights` has for each expert a map from each name of `expert_parameters(experts)` to
    its slice of that parameter; `experts` gives only the layout and the gate, so its own weights may lie on another device.
    `linear` computes other forms of weights. What is no product is computed for all experts at once: where a token goes to a few
    experts, starting operations takes longer than the operations.
    """
    marks: Any = marks_of(experts)
    name = "gate_up_proj" if marks.has_gate else "up_proj"
    hidden = _joined([linear(experts, own, name, x) for own, x in zip(weights, inputs, strict=True)])
    if isinstance(marks, Unmarked):
        hidden = marks._apply_gate(hidden, experts.act_fn)  # type: ignore[arg-type]
    else:
        hidden = marks._apply_gate(hidden) if marks.has_gate else marks.act_fn(hidden)
    rows = hidden.split_with_sizes([len(x) for x in inputs])
    output = _joined([linear(experts, own, "down_proj", x) for own, x in zip(weights, rows, strict=True)])
    # Older releases of transformers have neither this mark nor experts with such a norm.
    return experts.post_expert_norm(output) if getattr(experts, "has_post_expert_norm", False) else output  # type: ignore[operator]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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


def weighted_sum(
    experts: nn.Module, outputs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What `combine` returns, or for experts that are summed in turn the sum as their own forward rounds it.

    `ids` is `[tokens, top_k]`. There each product is rounded to `dtype`, and so is the sum after each expert.
    """
    marks = unmarked(experts)
    if marks is None or not marks.sums_in_turn:
        return combine(outputs, weights, dtype)
    weighted = (outputs * weights.reshape(-1, 1)).to(dtype).view(*ids.shape, outputs.shape[-1])
    total = weighted.new_zeros(len(ids), outputs.shape[-1])
    for place in ids.argsort(-1).unbind(-1):
        total += weighted[torch.arange(len(ids), device=ids.device), place]
    return total


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
        outputs.append(expert_outputs(experts, [{name: p[expert] for name, p in stacked.items()}], [inputs]))
    grouped = torch.cat(outputs)  # not written in place: autograd refuses that for views made without it
    if on_outputs is not None:
        on_outputs(groups, grouped)
    # Gathering by the inverse order is several times as fast as scattering by the order.
    return combine(grouped.index_select(0, groups.order.argsort()), weights, x.dtype)
