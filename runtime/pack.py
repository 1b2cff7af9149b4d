"""Packs a model's experts into a file, one layer at a time. So the whole model is never in memory.

Transformers' own code reads the checkpoint, whatever form it has. When it gives a stacked expert parameter to its module, a
hook takes the parameter and puts one without memory (on the meta device) in its place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..predictors.architecture import skeleton
from ..predictors.discovery import find_layers
from ..predictors.experts import expert_modules, is_experts
from ..predictors.loading import load_model
from ..predictors.provenance import versions
from ..predictors.weights import checkpoint_fingerprint, local_folder
from .packwriter import FullDiskError, PackWriter
from .quantization import Quantization, quantization
from .shipped import form_and_options

ASYNC_OFF = "HF_DEACTIVATE_ASYNC_LOAD"
Take = Callable[[nn.Module, str, torch.Tensor], None]
"""Takes one stacked parameter of an experts module: `(module, name, values [num_experts, ...])`."""


def pack(
    name: str | Path,
    out: str | Path,
    dtype: torch.dtype | str = "auto",
    quantize: Quantization | str | None = None,
    gguf: str | Path | None = None,
) -> Path:
    """Packs the experts of a model folder or Hub repository into the file `out`, in `dtype` (`auto`: the checkpoint's).

    `quantize` is what the experts are quantised to; by default they are packed as they are, also those that are shipped in a
    quantised form. `gguf` is a GGUF file that has the model's weights. In memory are only the other weights
    and two to three times the experts of one layer. If an attempt was killed, or the disk was full, the same call goes on with it. Raises
    `StoreError`, `LoadingError` or `UnsupportedModelError`, and then leaves no other file behind.
    """
    return load_and_pack(name, out, dtype, quantize=quantization(quantize), **given(gguf))[1]


def load_and_pack(
    source: str | Path | PretrainedConfig,
    out: str | Path,
    dtype: torch.dtype | str,
    seed: int = 0,
    quantize: Quantization | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, Path]:
    """Returns the model with its experts on the meta device, and the file that they were packed into.

    A checkpoint is loaded with the `options` of `load_model`.
    """
    form, options = form_and_options(source, quantize, options)
    checkpoint = fingerprint(source, options)
    writer = PackWriter(out, form, _key(source, checkpoint, dtype, seed, form))
    try:
        model = load_without_experts(source, writer.take, dtype, seed, **options)
        name = f"random {source.model_type}" if isinstance(source, PretrainedConfig) else str(source)
        checkpoint = checkpoint or fingerprint(source, options)  # it may have been downloaded since
        return model, writer.finish(model, find_layers(model).layers, name, checkpoint)
    except FullDiskError:
        raise
    except Exception:
        writer.abort()
        raise
    finally:  # after Ctrl-C or SIGTERM, and on a full disk, a later call goes on
        writer.interrupt()


def given(gguf: str | Path | None) -> dict[str, Any]:
    """The option of `form_and_options` that names a GGUF file, if there is one."""
    return {} if gguf is None else {"gguf": Path(gguf)}


def fingerprint(source: str | Path | PretrainedConfig, options: dict[str, Any]) -> str | None:
    """The fingerprint of a checkpoint that is on this machine, loaded with the `options` of `load_model`; else None."""
    if isinstance(source, PretrainedConfig):
        return None
    file = options.get("gguf_file")
    return checkpoint_fingerprint(local_folder(source, options.get("revision")) if file is None else Path(file))


def _key(source: str | Path | PretrainedConfig, checkpoint: str | None, *how: Any) -> str | None:
    """A hash of what is packed, how, and by which releases. None for a checkpoint that is not on this machine yet."""
    what = source.to_json_string() if isinstance(source, PretrainedConfig) else checkpoint
    return None if what is None else xxhash.xxh3_64_hexdigest(f"{what} {how} {versions()}".encode())


def load_without_experts(
    source: str | Path | PretrainedConfig, take: Take, dtype: torch.dtype | str, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """A model in host memory with its experts on the meta device. `take` gets the experts, layer by layer.

    `source` is a checkpoint, which is loaded with the `options` of `load_model`, or the config of a model with random weights.
    """
    if not isinstance(source, PretrainedConfig):
        with experts_taken(take):
            return load_model(source, torch.device("cpu"), dtype, **options)
    model = random_without_experts(source, dtype, seed)
    draw_experts(model, take, seed)
    return model


def pack_random(
    config: PretrainedConfig,
    out: str | Path,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
    quantize: Quantization | str | None = None,
) -> Path:
    """Packs random experts for a model of `config`, layer by layer, in `dtype` (`auto`: the config's), quantised as by `pack`.

    `load_offloaded(config, pack=out, dtype=dtype, seed=seed)` makes the model to which they belong.
    """
    return load_and_pack(config, out, dtype, seed, quantization(quantize))[1]


@contextmanager
def experts_taken(take: Take) -> Iterator[None]:
    """Within it, `take` gets the experts of a model that this thread loads. In the model they stay on the meta device."""
    owner = threading.get_ident()

    def divert(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != owner or parameter is None or parameter.is_meta or not is_experts(module):
            return None
        # By this transformers marks what it has read. If experts are missing, `load_model` says which.
        if getattr(parameter, "_is_hf_initialized", False):
            take(module, name, parameter.data)
        absent: Any = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        absent._is_hf_initialized = True
        return absent

    with ExitStack() as stack:
        # Else transformers' loading threads read ahead, up to the whole model.
        if ASYNC_OFF in os.environ:
            stack.callback(os.environ.__setitem__, ASYNC_OFF, os.environ[ASYNC_OFF])
        stack.callback(os.environ.pop, ASYNC_OFF)  # at the end this comes first
        os.environ[ASYNC_OFF] = "1"
        stack.callback(_hook_parameters(divert).remove)
        yield


@contextmanager
def experts_ignored() -> Iterator[None]:
    """Within it, a model that this thread loads has its experts on the meta device. They are not even read.

    Hooks remove the experts from the model's state dict, so transformers does not know that it has any.
    """
    owner = threading.get_ident()

    def hide(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if is_experts(module):
            for name, _parameter in module.named_parameters(recurse=False):
                state.pop(prefix + name, None)

    with ExitStack() as stack:
        hooked: set[nn.Module] = set()

        def watch(module: nn.Module, _: str, parameter: nn.Parameter) -> None:
            # `is_experts` can't tell before the module has all its parameters, so `hide` asks later.
            is_new = parameter is not None and parameter.ndim == 3 and module not in hooked
            if threading.get_ident() == owner and is_new:
                hooked.add(module)
                stack.callback(module.register_state_dict_post_hook(hide).remove)

        # Transformers would warn that weights are missing.
        stack.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        stack.callback(_hook_parameters(watch).remove)
        yield


def random_without_experts(config: PretrainedConfig, dtype: torch.dtype | str, seed: int) -> PreTrainedModel:
    """A model of `config` with random weights on the CPU, and its experts on the meta device."""
    kind: Any = type(skeleton(config))
    if dtype == "auto":
        dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
    with experts_ignored(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind.from_pretrained(None, config=config, state_dict={}, dtype=dtype)
    return model.eval()


def draw_experts(model: PreTrainedModel, take: Take, seed: int) -> None:
    """Draws random weights for a model's experts, one parameter at a time, and gives them to `take`."""
    generator = torch.Generator().manual_seed(seed)
    spread = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    for module in expert_modules(model).values():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            values.normal_(0.0, spread, generator=generator)
            take(module, name, values)


# Torch's documentation lets such a hook return another parameter; its annotation does not.
_hook_parameters: Callable[[Callable[[nn.Module, str, nn.Parameter], nn.Parameter | None]], Any]
_hook_parameters = register_module_parameter_registration_hook  # type: ignore[assignment]
