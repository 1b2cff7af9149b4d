"""speculation.safetensors of a trace: the wiring of its speculators, which needs no model weights.

default_vectors.<source>                                              of every source layer, also of other targets
layers.<target>.norm.<name>, .router.<name>, .router_arguments.<n>    the target's
layers.<target>.router.prior                                          of a direct target; it has nothing else
layers.<target>.post_norm.<name>                                      its nearest source's, if it has one
"""

from __future__ import annotations

import torch
from torch import nn

from ..predictors.direct import PriorRouter, UnitNorm
from ..predictors.forms import Form
from ..predictors.speculation import Router, Wiring
from .columns import Columns
from .manifest import LayerEntry


def vectors_name(source: int | str) -> str:
    """The name of a source layer's default vectors."""
    return f"default_vectors.{source}"


def vectors_in(state: Columns) -> dict[int, torch.Tensor]:
    """The default vectors by source layer, `[experts, hidden]`, fp32."""
    prefix = vectors_name("")
    return {int(name.removeprefix(prefix)): part for name, part in state.items() if name.startswith(prefix)}


def wiring_state(wirings: dict[int, Wiring], default_vectors: dict[int, torch.Tensor]) -> Columns:
    """CPU copies, by name, of the tensors in the wiring of a trace's targets, and of the default vectors of all sources."""
    state: Columns = {vectors_name(source): vectors for source, vectors in default_vectors.items()}
    for target, wiring in wirings.items():
        parts = {"norm": wiring.norm, "router": wiring.router.router, "post_norm": wiring.post_norm}
        for part, module in parts.items():
            held = [] if module is None else [*module.named_parameters(), *module.named_buffers()]
            state |= {f"layers.{target}.{part}.{name}": tensor for name, tensor in held}
        arguments = enumerate(wiring.router.arguments)
        state |= {f"layers.{target}.router_arguments.{number}": tensor for number, tensor in arguments}
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def rebuilt_wirings(
    bones: nn.Module, entries: list[LayerEntry], state: Columns, sources: dict[int, int | None], top_k: int
) -> dict[int, Wiring]:
    """The wiring of each target in `sources`, in fp32 and frozen, from the `state` of `wiring_state`.

    `bones` is the model without memory; its modules are filled and used. Raises `KeyError`, `AttributeError` or
    `RuntimeError` if names or shapes don't match.
    """

    def rebuilt(name: str, stored: str) -> nn.Module:
        module = bones.get_submodule(name) if name else nn.Identity()
        module.to_empty(device="cpu")
        for part, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.data = state[f"{stored}.{part}"]
        return module.float().requires_grad_(False).eval()

    by_layer = {entry.layer: entry for entry in entries}
    # How a source's experts join its output is recorded with the target that it is the nearest source of.
    by_source = {entry.source: entry for entry in entries if entry.source is not None}
    wirings = {}
    for target, source in sources.items():
        entry = by_layer[target]
        if entry.form is Form.DIRECT:
            prior = state[f"layers.{target}.router.prior"]
            wirings[target] = Wiring(UnitNorm(), Router(PriorRouter(prior.float(), top_k)))
            continue
        names = [f"layers.{target}.router_arguments.{number}" for number in range(len(entry.router_arguments))]
        arguments = tuple(state[name].float() for name in names)
        joined = None if source is None else by_source[source]
        wirings[target] = Wiring(
            rebuilt(entry.norm, f"layers.{target}.norm"),
            Router(rebuilt(entry.router, f"layers.{target}.router"), arguments, entry.router_ndim),
            None if source is None else state[vectors_name(source)],
            rebuilt(joined.post_norm, f"layers.{joined.layer}.post_norm") if joined and joined.post_norm else None,
            joined.post_scale if joined else 1.0,
        )
    return wirings
