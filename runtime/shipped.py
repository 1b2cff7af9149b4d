"""Loads checkpoints that are shipped with quantised experts. Transformers widens all weights of them but the experts.

Transformers reads the experts, splits and stacks them as in any checkpoint, but gives them to their modules as they are, with
their scales. For this it has quantisers under names of ours. They expect other parameters in the experts while these are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from ..predictors.experts import expert_modules
from ..predictors.loading import LoadingError, read_model_config
from .errors import StoreError
from .formats.fp8 import BLOCK, Fp8Format
from .formats.mxfp4 import Mxfp4Format
from .formats.quantized import SCALES
from .formats.shipped import ShippedFormat, expect, forget
from .quantization import Quantization, Shipped

PREFIX = "predict_train_"
"""Before the names of our quantisers."""
SCALE_SOURCE = "weight_scale_inv"


def shipped_form(config: PretrainedConfig) -> Shipped | None:
    """The form in which the experts of a checkpoint of this `config` are shipped; None if they are not quantised, or otherwise.

    Raises `StoreError` where it is one of ours with other blocks.
    """
    known = getattr(config, "quantization_config", None)
    method = known.get("quant_method") if isinstance(known, dict) else None
    if method == Shipped.MXFP4:
        return Shipped.MXFP4
    if not isinstance(known, dict) or method != Shipped.FP8 or known.get("expert_dtype") == "fp4":
        return None
    blocks = known.get("weight_block_size", [BLOCK, BLOCK])
    if blocks is None or list(blocks) != [BLOCK, BLOCK]:
        raise StoreError(
            f"the checkpoint is in fp8 with the blocks {blocks}, and only blocks of {BLOCK} by {BLOCK} are read; give another one"
        )
    return Shipped.FP8


def refuse_quantizing(source: Any, form: Shipped, quantize: Quantization | None) -> None:
    """Raises `StoreError` where experts that are shipped in `form` are to be quantised."""
    if quantize is not None:
        raise StoreError(
            f"the experts of {source} are shipped in {form}, so they can't be quantised to {quantize}; leave quantize out"
        )


def form_and_options(
    source: str | Path | PretrainedConfig, quantize: Quantization | None, options: dict[str, Any]
) -> tuple[Quantization | Shipped | None, dict[str, Any]]:
    """The form that the experts of `source` are kept in, and the `options` of `load_model` that have transformers give them so.

    The form is the one in which they are shipped, or else `quantize`. An option `gguf` names a GGUF file, which has the weights.
    Raises `StoreError` where both are given.
    """
    config = None if isinstance(source, PretrainedConfig) else _config_of(source, options)
    if options.get("gguf") is not None:
        return _in_gguf(source, config, quantize, options)
    form = None if config is None else shipped_form(config)
    if config is None or form is None:
        return quantize, options
    refuse_quantizing(source, form, quantize)
    config.quantization_config = {**config.quantization_config, "quant_method": PREFIX + form, "dequantize": True}
    return form, options | {"config": config}


def _in_gguf(
    source: str | Path | PretrainedConfig,
    config: PretrainedConfig | None,
    quantize: Quantization | None,
    options: dict[str, Any],
) -> tuple[Shipped, dict[str, Any]]:
    """The same for the weights of a GGUF file."""
    if isinstance(source, PretrainedConfig):
        raise StoreError(
            "a GGUF file has the weights of a checkpoint, and the model is a config; give its folder or Hub name"
        )
    options = dict(options)
    name = options.pop("gguf")
    if config is None:  # loading says why there is none
        return Shipped.GGUF, options
    from . import gguf  # older releases of transformers lack what it needs

    file = gguf.find(source, name)
    refuse_quantizing(file, Shipped.GGUF, quantize)
    gguf.read_header(file, config)
    vars(config).pop("quantization_config", None)  # that of the weights in the folder
    return Shipped.GGUF, options | {"config": config} | gguf.options_of(file)


def rooms_of(source: str | Path, config: PretrainedConfig, gguf: Path) -> dict[str, int]:
    """The bytes that a block has for each weight of an expert, with the experts of a GGUF file. Raises as `form_and_options`."""
    from . import gguf as reading

    return reading.experts_of(reading.read_header(reading.find(source, gguf), config)).rooms


def widening(source: str | Path, gguf: Path | None) -> dict[str, Any]:
    """The options of `load_model` that have transformers widen all weights of a GGUF file; none without a file."""
    if gguf is None:
        return {}
    _, options = form_and_options(source, None, {"gguf": gguf})
    from transformers.utils.quantization_config import GgufConfig  # older releases have none, as was said by now

    return options | {"quantization_config": GgufConfig(dequantize=True)}


def _config_of(source: str | Path, options: dict[str, Any]) -> PretrainedConfig | None:
    given = {name: options[name] for name in ("revision", "token", "trust_remote_code") if name in options}
    try:
        return read_model_config(source, **given)
    except LoadingError:  # loading raises it again and says what is wrong
        return None


class _Keeping:
    """What our quantisers have in common."""

    kind: type[ShippedFormat]

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """All that is not kept is widened, which every machine can."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *_: Any, **__: Any) -> None:
        for experts in expert_modules(model).values():
            expect(experts, self.kind.of)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for experts in expert_modules(model).values():
            forget(experts)
        return model


@register_quantization_config(PREFIX + Shipped.FP8)
class KeptFp8Config(FineGrainedFP8Config):
    """The `quantization_config` of a checkpoint in fp8, whose experts are kept."""


@register_quantizer(PREFIX + Shipped.FP8)
class KeptFp8(_Keeping, FineGrainedFP8HfQuantizer):
    """Loads a checkpoint in fp8 with experts as they are."""

    kind = Fp8Format

    def update_weight_conversions(self, conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """Of a converter that widens experts and stacks them it makes two: one stacks the weights, the other one the scales."""
        found = []
        for converter in super().update_weight_conversions(conversions, *model):
            sources: list[str] = list(converter._original_source_patterns)
            scales = [source for source in sources if SCALE_SOURCE in source]
            is_experts = any("experts" in source for source in scales)
            if not (is_experts and isinstance(converter, WeightConverter)):
                found.append(converter)
                continue
            weights = [source for source in sources if source.removesuffix("$").endswith(".weight")]
            for patterns, end in ((weights, ""), (scales, SCALES)):
                targets = [target + end for target in converter._original_target_patterns]
                # The first operation is the widening.
                copied = WeightConverter(patterns, targets, operations=list(converter.operations[1:]))
                for name in ("scope_prefix", "base_model_prefix"):
                    setattr(copied, name, getattr(converter, name, None))
                found.append(copied)
        return found


@register_quantization_config(PREFIX + Shipped.MXFP4)
class KeptMxfp4Config(Mxfp4Config):
    """The `quantization_config` of a checkpoint in MXFP4, whose experts are kept."""

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        vars(self)["quant_method"] = PREFIX + Shipped.MXFP4


@register_quantizer(PREFIX + Shipped.MXFP4)
class KeptMxfp4(_Keeping, Mxfp4HfQuantizer):
    """Loads a checkpoint in MXFP4 with experts as they are. No other weights are quantised in it."""

    kind = Mxfp4Format

    def update_weight_conversions(self, conversions: list[Any], *_: PreTrainedModel) -> list[Any]:
        """Packed weights get the names of the weights. Their scales have the right names already."""
        return [*conversions, *(WeightRenaming(f"{name}_blocks", name) for name in ("gate_up_proj", "down_proj"))]
