"""Finds the layers with routed experts of a transformers model, without a table of models.

Three things are asked of a model, and refused separately:

    offload   its experts can be taken one by one
    record    what its routers read and decide can be seen
    predict   its experts can be guessed: without training, if what a layer adds to the residual stream can be followed, and
              else by direct predictors, which need nothing more than a record

Experts are the modules that transformers dispatches, and the few in `experts.UNMARKED`. A router is a module beside them, of the
class that the model's own `_can_record_outputs` names, or else one that returns `(logits, weights, ids)`. All else is seen in one
tiny forward pass; see `probe`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .architecture import ExpertLayer, MoELayer, UnsupportedModelError
from .experts import expert_modules
from .override import override_forward
from .probe import PROBE_TOKENS, Probe, is_routing


class Found(NamedTuple):
    """The layers of a model with routed experts, in forward order, and what can be done with them."""

    layers: Sequence[ExpertLayer]
    """`MoELayer`s if routers can be recorded."""
    unrecorded: str | None
    """Why its routers can't be recorded, in one sentence. None if they can."""

    @property
    def unfollowed(self) -> str | None:
        """Why experts can only be guessed by trained, direct predictors, in one sentence. None if without any too."""
        first = self.layers[0]
        return first.unfollowed if isinstance(first, MoELayer) else self.unrecorded

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The layers, to be recorded and predicted. Raises `UnsupportedModelError` where that is impossible."""
        if self.unrecorded:
            raise UnsupportedModelError(self.unrecorded)
        return [layer for layer in self.layers if isinstance(layer, MoELayer)]


def find_moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The MoE layers of a causal language model, in forward order, to be recorded and predicted.

    Raises `UnsupportedModelError` for a dense model, and if routers or experts don't have the form described in
    `MoELayer`.
    """
    return find_layers(model).moe_layers


def find_layers(model: PreTrainedModel) -> Found:
    """The layers with routed experts of a causal language model, and what can be done with them.

    Raises `UnsupportedModelError` where experts can't even be taken one by one: for a dense model, and for experts that are not
    stacked in one module or differ in shape.
    """
    kind, experts = model.config.model_type, expert_modules(model)
    if not experts:
        raise UnsupportedModelError(_why_no_experts(model))
    names = {module: name for name, module in model.named_modules()}
    routers = _routers(model, experts)
    probes = [Probe(model, name, routers.get(name), names) for name in experts]
    with ExitStack() as stack, torch.no_grad():
        order: list[int] = []
        for number, probe in enumerate(probes):
            stack.enter_context(probe.watching())
            handle = probe.experts.register_forward_pre_hook(lambda *_, number=number: order.append(number))
            stack.callback(handle.remove)
        _tiny_pass(model)
    ran = [probes[number] for number in dict.fromkeys(order)]
    layers: list[ExpertLayer] = [probe.expert_layer() for probe in ran]
    if not layers:
        raise UnsupportedModelError(f"no experts of {kind} run for a text; speculating experts needs some")
    if len({(layer.num_experts, layer.top_k, layer.hidden_size) for layer in layers}) > 1:
        raise UnsupportedModelError(f"the MoE layers of {kind} differ in shape; one that is the same in all is needed")
    ((number, most),) = Counter(order).most_common(1)
    if most > 1:  # which run a record or a guess is of would have to be known everywhere
        where = f"layer {probes[number].index} of {kind}"
        return Found(layers, f"{where} runs {most} times in a forward pass; a record holds one run of a layer")
    try:
        return Found([probe.moe_layer() for probe in ran], None)
    except UnsupportedModelError as error:
        why = str(error)
    try:
        return Found([probe.seen_layer(why) for probe in ran], None)
    except UnsupportedModelError as error:
        return Found(layers, str(error))


def _why_no_experts(model: PreTrainedModel) -> str:
    """Why a model has no experts that can be taken one by one."""
    classes = _router_classes(model)
    named = [name for name, module in model.named_modules() if classes and isinstance(module, classes)]
    if named:
        return f"{named[0]} has no experts beside it that are stacked in one module; they can't be addressed one by one"
    return (
        f"{model.config.model_type} is not a mixture-of-experts model that transformers {transformers.__version__} knows the "
        "routers of; speculating experts needs one"
    )


def _tiny_pass(model: PreTrainedModel) -> None:
    """Runs a few tokens in evaluation mode, without a cache."""
    was_training = model.training
    embedding = model.get_input_embeddings()
    vocabulary = min(PROBE_TOKENS + 3, model.config.get_text_config().vocab_size)
    device = next(embedding.parameters()).device
    token_ids = torch.arange(vocabulary - PROBE_TOKENS, vocabulary, device=device).unsqueeze(0)
    try:
        model.eval()
        model(input_ids=token_ids, use_cache=False)
    finally:
        model.train(was_training)


def _routers(model: PreTrainedModel, experts: dict[str, nn.Module]) -> dict[str, str]:
    """The names of the model's routers, by the names of the `experts` beside them. Some may lack one."""
    classes, found = _router_classes(model), {}
    blocks = {name: name.rpartition(".")[0] for name in experts}
    for name, block in blocks.items():
        for child, module in model.get_submodule(block).named_children():
            if classes and isinstance(module, classes):
                found[name] = f"{block}.{child}"
    if len(found) == len(experts):
        return found

    def keep(name: str, router: str, output: Any) -> None:
        if is_routing(output):
            found[name] = router

    with ExitStack() as stack, torch.no_grad():
        for name, block in blocks.items():
            if name in found:
                continue
            stack.enter_context(
                override_forward(experts[name], lambda hidden_states, *_, **__: torch.zeros_like(hidden_states))
            )
            for part, module in model.get_submodule(block).named_children():
                router = f"{block}.{part}"
                handle = module.register_forward_hook(
                    lambda _, __, output, name=name, router=router: keep(name, router, output)
                )
                stack.callback(handle.remove)
        _tiny_pass(model)
    return found


def _router_classes(model: nn.Module) -> tuple[type, ...]:
    classes: list[type] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorders: Any = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
            for recorder in recorders if isinstance(recorders, list) else [recorders]:
                classes.append(getattr(recorder, "target_class", None) or recorder)
    return tuple(classes)
