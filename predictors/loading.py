"""Models and tokenizers from a folder or the Hub; one sentence if that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadingError(UserError):
    """A model, device or dtype that is not available; the message says which and what to do."""


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA if there is a CUDA device, else the CPU. Raises `LoadingError` if the device is not available."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise LoadingError(f"there is no kind of device called {device}; give auto, cpu or cuda") from error
    if resolved.type not in ("cpu", "cuda"):
        raise LoadingError(f"{device} is a device that this project has no code for; give auto, cpu or cuda")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise LoadingError(f"{device} was asked for, but this machine has no CUDA device; give cpu or auto")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise LoadingError(f"{device} was asked for, but this machine has {torch.cuda.device_count()} CUDA devices")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """`auto` is the checkpoint's dtype on CUDA and float32 on a CPU: many CPUs are very slow in bfloat16."""
    if dtype == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise LoadingError(f"dtype can't be {dtype}; give auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def read_model_config(name: str | Path) -> PretrainedConfig:
    """The config of a model: a .json file, a folder or a Hub repository. Raises `LoadingError` if there is none."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise LoadingError(
            f"no config can be read from {name} ({_first_line(error)}); give a .json file, a folder or a Hub name"
        ) from error


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub repository. Raises `LoadingError` if there is none."""
    _check_name(name)
    try:
        return AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadingError(f"no tokenizer can be loaded from {name} ({_first_line(error)})") from error


def load_model(
    name: str | Path, device: torch.device, dtype: torch.dtype | str, device_map: str | None = None
) -> PreTrainedModel:
    """The causal language model of a folder or Hub repository, in evaluation mode.

    It is whole on `device`; with a `device_map` (`auto`) accelerate spreads it over all GPUs. Raises `LoadingError` if
    it can't be found or read, or does not fit.
    """
    _check_name(name)
    # Loading straight to the GPU needs less host memory.
    placement: dict[str, Any] = {"device_map": {"": device}} if device.type == "cuda" else {}
    if device_map is not None:
        placement = {"device_map": device_map}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype, **placement)
    except UserError:  # raised by code that watches the loading
        raise
    except torch.OutOfMemoryError as error:
        raise LoadingError(
            f"{name} does not fit into the memory of {device}; give a smaller --dtype or --device cpu"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise LoadingError(f"no causal language model can be loaded from {name} ({_first_line(error)})") from error
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    if device.type == "cuda" and any(str(part) in ("cpu", "disk") for part in places.values()):
        raise LoadingError(f"{name} does not fit into the memory of the GPUs; give a smaller --dtype or --device cpu")
    return model.eval()


def _check_name(name: str | Path) -> None:
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise LoadingError(f"{name} is a file; give the model's folder or Hub name")
    if path.is_dir() and not (path / "config.json").exists():
        raise LoadingError(f"{name} holds no model (no config.json); give the folder of a transformers model")
    looks_local = path.is_absolute() or str(name).startswith(".") or len(path.parts) > 2
    if looks_local and not path.exists():
        raise LoadingError(f"there is no model at {name}; give the folder of a transformers model or a Hub name")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
