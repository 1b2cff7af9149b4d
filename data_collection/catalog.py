"""Every mixture-of-experts model type of the installed transformers, each tried on a tiny random model.

There is no list of supported types. A small model of each type is built, and each ability is tried: whether its experts can be
taken one by one, whether its routers can be recorded, and whether experts can be predicted. The last two hold only if the record
is what the model did, and the model is the same afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..predictors.architecture import ExpertLayer, MoELayer, UnsupportedModelError, first_tensor
from ..predictors.discovery import find_layers
from ..predictors.experts import expert_parameters, marks_of
from ..predictors.routing import read_routing
from .hooks import LayerRecord, Recorder

LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 257, "unpadded_vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "shared_experts_intermediate_size": 16, "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 16,
    "num_hidden_layers": LAYERS, "num_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "n_group": 2, "num_expert_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "attn_layer_period": 2,
    "attn_layer_offset": 0, "num_dense_layers": 1,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_num_heads": 4, "mamba_head_dim": 8,
    "ssm_state_size": 8, "linear_head_dim": 8, "linear_num_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "n_groups": 2,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "o_groups": 2, "o_lora_rank": 8,
    "vocab_size_per_layer_input": 257, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "is_moe": True,
    "zero_expert_num": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
"""Values that make a config small; each is used if the config has a field of that name."""

SMALL_SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 8,
    "sliding_window_size": 64,
    "rel_extent": 64,
}

PECULIAR: dict[str, dict[str, Any]] = {
    # Fields that a default config leaves unset, or whose values must agree with each other.
    "dots3_note": {"layer_types": ["indexed_attention"] * LAYERS, "per_layer_config": {}, "head_dim": 16,
                   "vision_config": {"adapter_out_dim": 32}, "audio_config": {"adapter_out_dim": 32}},
    "dots3_note_text": {"layer_types": ["indexed_attention"] * LAYERS, "per_layer_config": {}, "head_dim": 16},
    "gemma4": {"per_layer_config": {}},
    "gemma4_text": {"per_layer_config": {}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    # Their sliding layers are as wide as a large model's by default, and look as far back.
    "inkling_text": SMALL_SLIDING,
    "inkling2_text": SMALL_SLIDING,
    # By default it runs layers again that a small model does not have.
    "inkling2_loop_text": {**SMALL_SLIDING, "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1,
                           "loop_layer_index_end": 3, "loop_gate_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "mimo_v2_flash": {"num_key_value_heads": 2},  # doubled in its sliding layers
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "moe_latent_size": 16},
    "qwen4_exp": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                  "indexer_compress_ratio": 2, "ple_layer_ids": []},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 2, "ple_layer_ids": []},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Support:
    """What can be done with a model type. Each reason is one sentence, or None where the ability is there."""

    model_type: str
    offload: str | None
    """Why its experts can't be taken one by one."""
    record: str | None
    """Why its routers can't be recorded."""
    predict: str | None
    """Why its experts can't be predicted."""
    direct: str | None = None
    """Why they can only be predicted by direct predictors; None if also without any."""
    remarks: tuple[str, ...] = ()
    """What is special about its MoE layers."""

    @property
    def reason(self) -> str | None:
        """The first reason why not all can be done, or None."""
        return self.offload or self.record or self.predict


def moe_types() -> list[str]:
    """The model types of transformers' causal language models whose configs speak of experts."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _has_experts(name))


def _has_experts(model_type: str) -> bool:
    try:
        fields = CONFIG_MAPPING[model_type]().get_text_config().to_dict()
    except Exception:  # a config without defaults, or with several texts: none of these has experts
        return False
    return any("expert" in field for field in fields)


def tiny_config(model_type: str) -> PretrainedConfig:
    """A config of the type with 4 layers, 8 experts, hidden size 32 and 257 tokens, if its fields are known."""
    kind = CONFIG_MAPPING[model_type]
    text = (getattr(kind, "sub_configs", None) or {}).get("text_config")
    default = (text or kind)().to_dict()
    fields = {name: value for name, value in SIZES.items() if name in default}
    for name, value in default.items():
        # A list with one entry a layer is cut; at least one entry of every kind in it is kept.
        if isinstance(value, list) and len(value) == default.get("num_hidden_layers") and name not in fields:
            missing = [kind for kind in dict.fromkeys(value) if kind not in value[:LAYERS]]
            fields[name] = value[: LAYERS - len(missing)] + missing
    fields |= PECULIAR.get(model_type, {})
    others = {name: fields.pop(name) for name in list(fields) if text and name in kind.sub_configs}
    if text:
        fields = {"text_config": fields, **others}
    return kind(**fields)


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model of `tiny_config`, in evaluation mode, whose routing is spread over the experts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tiny_config(model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > 1 << 23:
            raise UnsupportedModelError(f"its small config still makes a model of {size:,} parameters")
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or "bias" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
        for module in model.modules():
            table = getattr(module, "tid2eid", None)
            if isinstance(
                table, torch.Tensor
            ):  # a router that looks its experts up by the token, which only checkpoints fill
                drawn = torch.rand(len(table), model.config.num_local_experts, generator=generator)
                table.copy_(drawn.topk(table.shape[1]).indices)
    return model


def examine(model_type: str) -> Support:
    """Builds a model, tries each ability and compares; an unsupported type does not raise."""
    try:
        model = tiny_model(model_type)
        found = find_layers(model)
        for layer in found.layers:
            expert_parameters(layer.experts)
        remarks = _remarks(found.layers)
        wrong = found.unrecorded or check(model, found.moe_layers)
        return Support(model_type, None, wrong, wrong, found.unfollowed, remarks)
    except UnsupportedModelError as error:
        return Support(model_type, *(str(error),) * 3)
    except Exception as error:
        reason = f"its small config can't be run ({type(error).__name__}: {str(error).splitlines()[0]})"
        return Support(model_type, *(reason,) * 3)


@torch.no_grad()
def check(model: PreTrainedModel, layers: list[MoELayer]) -> str | None:
    """What is wrong with a recording of `model`, in one sentence, or None.

    Plain hooks give the expected values. Compared are the model's logits, the routing, the model's logits after the
    recorder has gone, and the layer's output with the residual plus the experts' sum, joined as the layer does.
    """
    text = model.config.get_text_config()
    tokens = torch.randint(1, text.vocab_size, (2, 11), generator=torch.Generator().manual_seed(1))
    with _Watch(layers) as plain:
        expected = model(input_ids=tokens, use_cache=False).logits
    with Recorder(layers, [layer.index for layer in layers]) as recorder:
        recorded = model(input_ids=tokens, use_cache=False).logits
        records = recorder.take()
    if not torch.allclose(recorded, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        return "its logits change when its experts are run one by one"
    if not all(rate == 1.0 for rate in recorder.control_hit_rates().values()):
        return "its routers, given their recorded input again, choose other experts"
    for layer in layers:
        if not all(
            torch.allclose(mine.float(), own.float(), rtol=1e-3, atol=1e-3)
            for mine, own in zip(records[layer.index].routing, plain.routings[layer.index], strict=True)
        ):
            return f"what is recorded of the router of layer {layer.index} is not what it returned"
        if layer.unfollowed is None and layer.index in recorder.sources.values():
            whole = _whole_output(layer, records[layer.index], plain.expert_sums[layer.index])
            output = plain.outputs[layer.index].flatten(0, -2)
            if not torch.allclose(whole, output, rtol=1e-3, atol=1e-3 * float(output.abs().max())):
                return f"the residual of layer {layer.index} is not all of its output but the routed experts"
    if not torch.equal(model(input_ids=tokens, use_cache=False).logits, expected):
        return "the model is not the same after the recorder has gone"
    return None


def _whole_output(layer: MoELayer, record: LayerRecord, expert_sum: torch.Tensor) -> torch.Tensor:
    added = layer.join.in_stream(expert_sum.flatten(0, -2))
    if layer.join.post_norm is not None:
        inner = added if record.inner is None else record.inner + added
        added = layer.join.post_scale * layer.join.post_norm(inner)
    return record.residual + added


class _Watch(ExitStack):
    """Plain hooks on the MoE layers: they keep the outputs of routers, experts and layers."""

    def __init__(self, layers: list[MoELayer]):
        super().__init__()
        self.routings: dict[int, tuple[torch.Tensor, ...]] = {}
        self.expert_sums: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        for layer in layers:
            self._watch(layer.router, self.routings, layer.index, partial(read_routing, layer=layer))
            self._watch(layer.experts, self.expert_sums, layer.index, first_tensor)
            self._watch(layer.decoder, self.outputs, layer.index, first_tensor)

    def _watch(self, module: nn.Module, seen: dict[int, Any], index: int, part: Callable[[Any], Any]) -> None:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            seen[index] = part(output)

        self.callback(module.register_forward_hook(keep).remove)


def _remarks(layers: Sequence[ExpertLayer]) -> tuple[str, ...]:
    first, moe = layers[0], [layer for layer in layers if isinstance(layer, MoELayer)]
    joins = [layer.join for layer in moe]
    facts = {
        "shared expert": any(j.shared is not None and j.shared_gate is None for j in joins),
        "gated shared expert": any(j.shared_gate is not None for j in joins),
        "norm after the experts": any(j.post_norm is not None for j in joins),
        "no norm before the router": bool(moe) and isinstance(moe[0].norm, nn.Identity),
        "attention beside the experts": any(j.beside for j in joins),
        "experts in a space of their own": any(j.project is not None for j in joins),
        "scaled residual": any(j.base_scale != 1.0 or j.base_is_normed for j in joins),
        "several residual streams": first.input_size > first.hidden_size,
        "dense layers between": len(layers) < LAYERS,
        "bias-corrected selection": any(_is_bias_corrected(layer) for layer in moe[:1]),
        "transposed experts": bool(marks_of(first.experts).is_transposed),
        "experts that return their input": first.identities > 0,
        "direct predictors only": any(layer.unfollowed is not None for layer in moe),
    }
    return tuple(name for name, holds in facts.items() if holds)


def _is_bias_corrected(layer: MoELayer) -> bool:
    held = [*layer.router.named_parameters(), *layer.router.named_buffers()]
    return bool(layer.router_arguments) or any("bias" in name for name, _ in held)


def counted(supports: list[Support]) -> str:
    """In one sentence, of how many types what can be done."""
    names = ("offload", "record", "predict")
    offload, record, predict = (sum(getattr(support, name) is None for support in supports) for name in names)
    direct = sum(support.predict is None and support.direct is not None for support in supports)
    return (
        f"Of the {len(supports)} mixture-of-experts types of transformers {transformers.__version__}, the experts of {offload} can "
        f"be offloaded, the routers of {record} recorded, and the experts of {predict} predicted, of {direct} by direct predictors only"
    )


def abilities(support: Support) -> list[str]:
    """Whether the type's experts can be offloaded, recorded and predicted, for a table."""
    found = ["no" if reason else "yes" for reason in (support.offload, support.record, support.predict)]
    return [*found[:2], "direct" if found[2] == "yes" and support.direct else found[2]]


def markdown(supports: list[Support]) -> str:
    """The README's tables: of the types that everything can be done with, and of the others."""
    whole = [support for support in supports if support.reason is None and support.direct is None]
    rows = [f"| `{s.model_type}` | {', '.join(s.remarks)} |" for s in whole]
    others = [
        f"| `{s.model_type}` | {' | '.join(abilities(s))} | {s.reason or s.direct} |"
        for s in supports
        if s not in whole
    ]
    return "\n".join(
        [
            f"{counted(supports)}. Everything can be done with these:",
            "",
            *("| model type | what is special about its MoE layers |", "| --- | --- |", *rows),
            "",
            "The others. Where it says `direct`, experts are fetched on demand until direct predictors are trained. What can't be done is "
            "refused before any work.",
            "",
            *("| model type | offload | record | predict | reason |", "| --- | --- | --- | --- | --- |", *others),
        ]
    )
