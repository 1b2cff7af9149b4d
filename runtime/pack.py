"""Packing: a model's experts go into a file one layer at a time, so that the model is never whole in memory.

Transformers' own loading code reads the checkpoint, whatever form it has. While it runs, each stacked expert parameter is
taken over at the moment at which it is given to its module, and a parameter without memory (on the meta device) put in
its place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..predictors.architecture import skeleton
from ..predictors.discovery import find_moe_layers
from ..predictors.experts import expert_modules, is_experts
from ..predictors.loading import load_model
from .errors import StoreError
from .packfile import PackWriter

Take = Callable[[nn.Module, str, torch.Tensor], None]
"""Takes over one stacked parameter of an experts module: `(module, name, values [num_experts, ...])`."""


def pack(name: str | Path, out: str | Path, dtype: torch.dtype | str = "auto") -> Path:
    """Packs the experts of a model folder or Hub repository into the file `out`, in `dtype` (`auto`: its own).

    In memory at a time are what is not an expert and two to three times the experts of one layer. Raises `StoreError`,
    `LoadingError` or `UnsupportedModelError`, and then leaves nothing behind.
    """
    return load_and_pack(name, out, dtype)[1]


def load_and_pack(
    source: str | Path | PretrainedConfig, out: str | Path, dtype: torch.dtype | str, seed: int = 0
) -> tuple[PreTrainedModel, Path]:
    """The model with its experts on the meta device, and the file that they were packed into."""
    writer = PackWriter(out)
    try:
        if isinstance(source, PretrainedConfig):
            model = random_without_experts(source, dtype, seed)
            draw_experts(model, writer.take, seed)
            name = f"random {source.model_type}"
        else:
            with experts_taken(writer.take):
                model = load_model(source, torch.device("cpu"), dtype)
            name = str(source)
        return model, writer.finish(model, find_moe_layers(model), name)
    finally:
        writer.abort()


def pack_random(config: PretrainedConfig, out: str | Path, dtype: torch.dtype | str = "auto", seed: int = 0) -> Path:
    """Packs experts with random weights of a model of `config`, layer by layer, in `dtype` (`auto`: the config's).

    `load_offloaded(config, pack=out, dtype=dtype, seed=seed)` makes the model that they belong to.
    """
    return load_and_pack(config, out, dtype, seed)[1]


@contextmanager
def experts_taken(take: Take) -> Iterator[None]:
    """Within it, a model that this thread loads keeps no experts: `take` gets them, and they stay on the meta device.

    Raises `StoreError` where a checkpoint lacks experts.
    """
    owner = threading.get_ident()

    def divert(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != owner or parameter is None or parameter.is_meta or not is_experts(module):
            return None
        if not getattr(parameter, "_is_hf_initialized", False):  # transformers marks so what it has read
            raise StoreError(f"the checkpoint lacks experts' weights ({name}); give a whole one")
        take(module, name, parameter.data)
        absent: Any = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        absent._is_hf_initialized = True
        return absent

    with ExitStack() as stack:
        # Else transformers' loading threads read ahead of the conversion, up to the whole model.
        stack.enter_context(_environment("HF_DEACTIVATE_ASYNC_LOAD", "1"))
        stack.callback(_hook_parameters(divert).remove)
        yield


@contextmanager
def experts_ignored() -> Iterator[None]:
    """Within it, a model that this thread loads has its experts on the meta device, and they are not even read.

    A state dict without them is what transformers sees of the model while it loads.
    """
    owner = threading.get_ident()

    def hide(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if is_experts(module):
            for name, _parameter in module.named_parameters(recurse=False):
                state.pop(prefix + name, None)

    with ExitStack() as stack:
        hooked: set[nn.Module] = set()

        def watch(module: nn.Module, _: str, parameter: nn.Parameter) -> None:
            # What makes a module one of experts is set when all its parameters are, so that is asked later.
            is_new = parameter is not None and parameter.ndim == 3 and module not in hooked
            if threading.get_ident() == owner and is_new:
                hooked.add(module)
                stack.callback(module.register_state_dict_post_hook(hide).remove)

        # Transformers reports what it did not load, or what it made up, as a fault.
        stack.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        stack.callback(_hook_parameters(watch).remove)
        yield


def random_without_experts(config: PretrainedConfig, dtype: torch.dtype | str, seed: int) -> PreTrainedModel:
    """A model of `config` with random weights, on the CPU, and experts on the meta device."""
    kind: Any = type(skeleton(config))
    if dtype == "auto":
        dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
    with experts_ignored(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind.from_pretrained(None, config=config, state_dict={}, dtype=dtype)
    return model.eval()


def draw_experts(model: PreTrainedModel, take: Take, seed: int) -> None:
    """Draws the weights of a model's experts, one parameter at a time."""
    generator = torch.Generator().manual_seed(seed)
    spread = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    for module in expert_modules(model).values():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(0.0, spread, generator=generator)
            take(module, name, values)


# Torch documents that such a hook may return another parameter, and annotates that it returns None.
_hook_parameters: Callable[[Callable[[nn.Module, str, nn.Parameter], nn.Parameter | None]], Any]
_hook_parameters = register_module_parameter_registration_hook  # type: ignore[assignment]


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
