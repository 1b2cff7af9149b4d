"""A quantised model with all its experts in the memory of its device. It runs without slots, store or offload."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.experts import combine, group_by_expert
from predict_train.runtime.formats import ExpertFormat
from predict_train.runtime.guard import Away
from predict_train.runtime.load import load_to_host
from predict_train.runtime.settings import Loading
from predict_train.runtime.store import QuantizedExperts, empty_blocks
from predict_train.runtime.stores import open_store
from torch import nn
from transformers import PreTrainedModel

CPU = torch.device("cpu")


def load_resident(name: str | Path, config: Loading, device: torch.device) -> PreTrainedModel:
    """Loads a model whose experts `config` quantises, or has in a quantised file, with everything on `device`.

    Its experts compute what offloaded ones do. It can be offloaded, and is resident again after `detach`. Raises what
    `load_to_host` raises.
    """
    model = load_to_host(name, config)
    layers = find_moe_layers(model)
    if "expert_blocks" not in vars(model):
        with ExitStack() as opened:
            store = open_store(opened, model, layers, None, CPU)
            held = [empty_blocks(layer.num_experts, store.format.bytes, CPU) for layer in layers]
            for number, blocks in enumerate(held):
                for expert, block in enumerate(blocks):
                    store.read(number, expert, block.numpy())
            vars(model)["expert_blocks"] = QuantizedExperts(store.format, held)
        del vars(model)["expert_pack"]
    quantized: QuantizedExperts = vars(model)["expert_blocks"]
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    for layer, blocks in zip(layers, quantized.blocks, strict=True):
        layer.experts.forward = ResidentExperts(layer.experts, quantized.format, blocks.to(device))
    return model


class ResidentExperts(Away):
    """Computes a module's experts in blocks `[experts, bytes]`, uint8, of one format."""

    def __init__(self, experts: nn.Module, form: ExpertFormat, blocks: torch.Tensor):
        super().__init__("quantised")
        self._experts, self._format, self._blocks = experts, form, blocks

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The forward of the module. `x` is `[tokens, hidden]`, the others are `[tokens, top_k]`."""
        views, groups = self._format.views(self._blocks), group_by_expert(ids, len(self._blocks))
        rows = x[groups.order // ids.shape[-1]].split(groups.sizes)
        found = [x.new_empty(0, x.shape[-1])]
        for expert, inputs in zip(groups.experts, rows, strict=True):
            tensors = {name: view[expert] for name, view in views.items()}
            found.append(self._format.outputs(self._experts, [tensors], [inputs]))
        outputs = torch.cat(found).index_select(0, groups.order.argsort())
        return combine(outputs, weights, x.dtype)
