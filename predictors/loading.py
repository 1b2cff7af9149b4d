"""Models and tokenizers from a folder or the Hub; one sentence if that fails."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterable
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

from .errors import UserError, one_line
from .weights import local_folder, what_is_wrong, why_missing, without_scales

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


def read_model_config(name: str | Path, **options: Any) -> PretrainedConfig:
    """The config of a model: a .json file, a folder or a Hub repository. Raises `LoadingError` if there is none.

    `options` are passed on to transformers: `revision`, `token`, `trust_remote_code`.
    """
    try:
        if missing := why_missing(name, options.get("revision")):
            raise FileNotFoundError(missing)
        return AutoConfig.from_pretrained(str(name), **{"trust_remote_code": False} | options)
    except Exception as error:  # transformers raises whatever a wrong value leads to
        raise LoadingError(
            f"no config can be read from {name} ({_reason(error)}); give a .json file, a folder or a Hub name"
        ) from error


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub repository. Raises `LoadingError` if there is none."""
    _check_name(name)
    try:
        # By default transformers would ask whether it may run a repository's code.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
        learned = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens)
    except Exception as error:
        raise LoadingError(f"no tokenizer can be loaded from {name} ({_explained(name, error)})") from error
    if not learned:  # for some types transformers makes an empty one, which loses all text
        raise LoadingError(f"{name} holds no tokenizer; put its tokenizer.json and tokenizer_config.json there")
    return tokenizer


def load_model(
    name: str | Path,
    device: torch.device,
    dtype: torch.dtype | str,
    device_map: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The causal language model of a folder or Hub repository, in evaluation mode.

    It is whole on `device`; with a `device_map` (`auto`) accelerate spreads it over all GPUs. `options` are passed on to
    transformers: `revision`, `token`, `trust_remote_code`, `attn_implementation`. Raises `LoadingError` if the model can't
    be found or read, if weights are missing, or if it does not fit.
    """
    _check_name(name, options.get("revision"))
    # By default transformers would ask whether it may run a repository's code.
    arguments: dict[str, Any] = {"trust_remote_code": False, **options, "dtype": dtype}
    if device_map is not None:
        arguments["device_map"] = device_map
    elif device.type == "cuda":  # loading straight to the GPU needs less host memory
        arguments["device_map"] = {"": device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(name), output_loading_info=True, **arguments)
    except UserError:  # raised by code that watches the loading
        raise
    except torch.OutOfMemoryError as error:
        raise LoadingError(
            f"{name} does not fit into the memory of {device}; give a smaller --dtype or --device cpu"
        ) from error
    except Exception as error:  # whatever files, weights and the libraries of other formats raise
        _check_weights(name, _loading_info(error))
        raise LoadingError(f"no causal language model can be loaded from {name} ({_explained(name, error)})") from error
    model: PreTrainedModel
    model, info = loaded
    _check_weights(name, info)
    _check_quantisation(name, model, local_folder(name, options.get("revision")))
    _tell_unused(name, model, info)
    _convert_left_over(model)
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    if device.type == "cuda" and any(str(part) in ("cpu", "disk") for part in places.values()):
        raise LoadingError(f"{name} does not fit into the memory of the GPUs; give a smaller --dtype or --device cpu")
    return model.eval()


def check_tokens(token_ids: torch.Tensor, model: PreTrainedModel) -> None:
    """Raises `LoadingError` if the model's embedding has no row for one of the `token_ids`, which may have any shape."""
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    highest = int(token_ids.max()) if token_ids.numel() else 0
    if highest >= rows:
        raise LoadingError(
            f"the tokenizer gives the token {highest}, and the model's embedding has only {rows} rows; give the model its "
            "own tokenizer"
        )


def _check_weights(name: str | Path, info: dict[str, Any]) -> None:
    """Raises `LoadingError` if the report of a loading names weights that were not loaded: they would be random.

    Transformers' report leaves out tied weights and what the model does not need.
    """
    mismatched = {key for key, *_ in info.get("mismatched_keys", ())}
    if absent := {*info.get("missing_keys", ()), *info.get("conversion_errors", ())} - mismatched:
        raise LoadingError(f"the checkpoint {name} lacks {_few(absent)}; give a whole one")
    if mismatched:
        raise LoadingError(
            f"the checkpoint {name} has other shapes or fewer experts than its config says for {_few(mismatched)}; give "
            "a whole one with its own config"
        )


def _loading_info(error: Exception) -> dict[str, Any]:
    """The report of the loading that `error` ended. Transformers does not return it then, so it is taken from there."""
    frames = (frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__))
    return next(
        (vars(found["loading_info"]) for found in frames if hasattr(found.get("loading_info"), "missing_keys")), {}
    )


def _check_quantisation(name: str | Path, model: PreTrainedModel, folder: Path | None) -> None:
    """Raises `LoadingError` if the weights are quantised and nothing will undo it.

    Transformers ignores a method that it does not know, and leaves weights whose scales are missing as they are, or converts
    them as if they were none.
    """
    if folder is not None and (lacking := without_scales(folder)):
        raise LoadingError(f"the checkpoint {name} lacks the scales of {_few(lacking)}; give a whole one")
    if getattr(model, "hf_quantizer", None) is not None:
        return
    if config := getattr(model.config, "quantization_config", None):
        method = config.get("quant_method") if isinstance(config, dict) else config
        raise LoadingError(f"{name} is quantised by {method}, which transformers does not know; give it unquantised")
    if small := {key for key, p in model.named_parameters() if p.is_floating_point() and p.dtype.itemsize < 2}:
        raise LoadingError(f"the checkpoint {name} lacks the scales of {_few(small)}; give a whole one")


def _convert_left_over(model: PreTrainedModel) -> None:
    """Converts weights to the model's dtype that transformers has left in the checkpoint's, as it does where it widens others."""
    if vars(model).get("is_quantized") is not False:  # it is False where all were widened, and else absent or true
        return
    dtype: Any = model.config.get_text_config().dtype
    plan = model._get_dtype_plan(dtype)  # parts of the names of what stays in float32
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and parameter.is_floating_point() and not any(part in name for part in plan):
            parameter.data = parameter.data.to(dtype)


def _tell_unused(name: str | Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Warns of weights that the model has no place for; its config may be another model's."""
    # Experts that stay in a packed file are not loaded, and transformers takes them and their scales for unknown.
    absent = {key.rpartition(".")[0] for key, parameter in model.named_parameters() if parameter.is_meta}
    unused = {key for key in info["unexpected_keys"] if key.rpartition(".")[0] not in absent}
    if unused:
        warnings.warn(f"the checkpoint {name} has weights that the model leaves out: {_few(unused)}", stacklevel=3)


def _few(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first


def _check_name(name: str | Path, revision: str | None = None) -> None:
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise LoadingError(f"{name} is a file; give the model's folder or Hub name")
    if path.is_dir() and not (path / "config.json").exists():
        raise LoadingError(f"{name} holds no model (no config.json); give the folder of a transformers model")
    if missing := why_missing(name, revision):
        raise LoadingError(
            f"there is no model at {name} ({missing}); give the folder of a transformers model or a Hub name"
        )


def _explained(name: str | Path, error: Exception) -> str:
    """Why a checkpoint can't be loaded: the file that is wrong, or else what `error` says."""
    folder = local_folder(name)
    reason = (folder and what_is_wrong(folder)) or _reason(error)
    return reason if folder else f"there is no such folder, and as a Hub name: {reason}"


def _reason(error: Exception) -> str:
    text = one_line(error)
    return text if len(text) <= 300 else f"{text[:297]}..."
