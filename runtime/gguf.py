"""Loads models from GGUF files, with their experts in the file's types. Transformers widens all other weights.

The config is that of the model's folder: what a GGUF file says of a model is less. Transformers' own code names and converts the
weights; only the experts are put together here, so that their blocks are not touched.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers import __version__ as release
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from ..predictors.experts import expert_modules
from .errors import StoreError
from .formats.gguf import HEAD, GgufFormat, Part, head_of
from .formats.shipped import expect, forget

try:
    from transformers.integrations.gguf.dequant import dequantize
    from transformers.integrations.gguf.reader import GgufHeader, LazyGgufTensor, TensorInfo, load_gguf_state_dict
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
    from transformers.utils.quantization_config import GgufConfig
except ImportError as error:  # older releases read GGUF otherwise
    raise StoreError(
        f"transformers {release} can't keep the experts of a GGUF file as they are; install 5.23 or later"
    ) from error

METHOD = "predict_train_gguf"
ARCHITECTURES = {
    "qwen2moe": ("qwen2_moe",),
    "qwen3moe": ("qwen3_moe",),
    "qwen35moe": ("qwen3_5_moe", "qwen3_5_moe_text"),
    "minimax-m2": ("minimax_m2",),
}
"""The types of transformers' models by llama.cpp's names of them."""
EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""The parameters of experts, and the tensors of a file that they are put together from."""


@dataclass(frozen=True)
class Experts:
    """The experts in a GGUF file."""

    found: dict[tuple[int, str], TensorInfo]
    """Tensors by their block's number and their kind: `gate`, `up` or `down`."""

    @property
    def rooms(self) -> dict[str, int]:
        """The most bytes that an expert's weights have in any layer, by name."""
        layers = {number for number, _ in self.found}
        return {
            name: max(sum(_bytes(self.found[number, kind]) for kind in kinds) for number in layers)
            for name, kinds in PARTS.items()
        }


def _bytes(info: TensorInfo) -> int:
    return info.nbytes // info.shape[0]


def find(model: str | Path, file: Path) -> Path:
    """The GGUF file that is meant: `file` itself, or so named in the folder `model`. Raises `StoreError` where there is none."""
    for place in (file, Path(model) / file):
        if place.is_file():
            return place.absolute()
    raise StoreError(f"there is no file {file}; give a GGUF file, or its name in the folder {model}")


def read_header(file: Path, config: PretrainedConfig) -> GgufHeader:
    """What a GGUF file says of its tensors. Raises `StoreError` unless it has the experts of a model of this `config`, and is whole."""
    with file.open("rb") as data:
        if data.read(4) != b"GGUF":
            raise StoreError(f"{file} is no GGUF file; give one that llama.cpp's converter wrote")
    try:
        header = GgufHeader.from_file(str(file))
    except Exception as error:  # whatever numbers that are wrong lead to, in a file that ends too early too
        raise StoreError(
            f"{file} can't be read as a GGUF file ({_line(error)}); it may be cut short, so get it again"
        ) from error
    known = ARCHITECTURES.get(header.architecture)
    if known is None:
        raise StoreError(
            f"{file} is a model of architecture {header.architecture}, and only {', '.join(ARCHITECTURES)} are read; give another one"
        )
    if config.model_type not in known:
        raise StoreError(
            f"{file} is a model of architecture {header.architecture}, and the config is that of a {config.model_type}; give the "
            "folder of the model that the file was made from"
        )
    end = max((info.offset + info.nbytes for info in header.tensors), default=0)
    if header.data_start + end > os.path.getsize(file):
        raise StoreError(f"{file} is cut short; get it again")
    found = experts_of(header).found
    if flat := [info.name for info in found.values() if len(info.shape) != 3]:
        raise StoreError(f"{file} has {flat[0]} in another shape than [experts, outputs, inputs]; give another one")
    layers = {number for number, _ in found}
    lacking = {(number, kind) for number in layers for kinds in PARTS.values() for kind in kinds} - found.keys()
    if lacking or not layers:
        number, kind = min(lacking, default=(0, "gate"))
        raise StoreError(f"{file} lacks the experts blk.{number}.ffn_{kind}_exps; give a GGUF file of the whole model")
    return header


def experts_of(header: GgufHeader) -> Experts:
    """The experts among the tensors of a file."""
    named = ((EXPERTS.fullmatch(info.name), info) for info in header.tensors)
    return Experts({(int(match[1]), match[2]): info for match, info in named if match is not None})


def options_of(file: Path) -> dict[str, Any]:
    """The options with which transformers loads a GGUF file with its experts as they are."""
    return {"gguf_file": str(file), "quantization_config": KeptGgufConfig()}


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class LazyExperts:
    """A parameter of the experts of one layer. Transformers reads it, as `GgufFormat` loads it, when it comes to it."""

    def __init__(self, tensors: list[LazyGgufTensor], infos: list[TensorInfo], room: int, in_dtype: bool):
        self._tensors, self._room = tensors, room
        self._parts = [Part(i.ggml_type, i.shape[1], i.shape[2], _bytes(i), int(in_dtype)) for i in infos]

    def __getitem__(self, _: Any) -> torch.Tensor:
        count = self._tensors[0].shape[0]
        values = torch.zeros(count, 4 * HEAD + self._room, dtype=torch.uint8)
        values[:, : 4 * HEAD] = head_of(self._parts).view(torch.uint8)
        begin = 4 * HEAD
        for tensor, part in zip(self._tensors, self._parts, strict=True):
            values[:, begin : begin + part.bytes] = torch.from_numpy(np.array(tensor.data)).view(count, part.bytes)
            begin += part.bytes
        return values


@register_quantization_config(METHOD)
class KeptGgufConfig(GgufConfig):
    """Says that the experts of a GGUF file are kept."""

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        vars(self)["quant_method"] = METHOD


@register_quantizer(METHOD)
class KeptGguf(GgufHfQuantizer):
    """Loads a GGUF file with its experts as they are."""

    def __init__(self, config: GgufConfig, **options: Any):
        super().__init__(GgufConfig(gguf_file=config.gguf_file, dequantize=True), **options)

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """All that is not kept is widened, which every machine can."""

    def read_header(self, gguf_file: str) -> None:
        super().read_header(gguf_file)
        self.header = GgufHeader.from_file(gguf_file)
        self.experts = experts_of(self.header)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, **options)
        for path, experts in expert_modules(model).items():
            for name in PARTS:
                self.quantized.pop(f"{path}.{name}", None)  # transformers' newer code widens what is in it
            expect(experts, partial(GgufFormat.of, rooms=self.experts.rooms))

    def get_state_dict(self, _: str, model: PreTrainedModel) -> dict[str, Any]:
        tensors = load_gguf_state_dict(self.header)
        experts = {name: tensors.pop(info.name) for name, info in self.experts.found.items()}
        state: dict[str, Any] = tensors if self.supported else self._widened(tensors, model)
        for path in expert_modules(model):
            number = int(re.findall(r"\.(\d+)\.", path)[-1])
            for name, kinds in PARTS.items():
                if all((number, kind) in experts for kind in kinds):
                    state[f"{path}.{name}"] = LazyExperts(
                        [experts[number, kind] for kind in kinds],
                        [self.experts.found[number, kind] for kind in kinds],
                        self.experts.rooms[name],
                        self.supported,
                    )
        return state

    def _widened(self, tensors: dict[str, LazyGgufTensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """All tensors but the experts by transformers' names, for an architecture that it has no newer code for."""
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        processor = TENSOR_PROCESSORS.get(self.header.architecture, TensorProcessor)(config=model.config.to_dict())
        try:
            names = get_gguf_hf_weights_map(model, processor)
        except ImportError as error:
            raise StoreError(
                f"GGUF files of architecture {self.header.architecture} need the package gguf, which is not installed; "
                "pip install 'predict-train[gguf]'"
            ) from error
        state = {}
        for name, tensor in tensors.items():
            values = tensor[...]
            if values.dtype == torch.uint8:
                shape = next(info.shape for info in self.header.tensors if info.name == name)
                values = dequantize(values, tensor.ggml_type).view(shape)
            done = processor.process(weights=values.float().numpy(), name=name)
            if done.name in names:
                state[names[done.name]] = torch.from_numpy(np.array(done.weights)).to(self.dtype)
        return state

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return None if isinstance(param, LazyExperts) else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for experts in expert_modules(model).values():
            forget(experts)
        vars(model)["_weight_conversions"] = None
        return model
