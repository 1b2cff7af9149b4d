"""What `generate` of an offloaded model is asked for: which cache it uses for it, and what it refuses as it begins.

Heads that predict several tokens are a model of their own, which transformers loads from the same checkpoint whenever `generate` is
called with `use_mtp`. Its experts are not offloaded. What it drafts is checked by the model, so it changes no token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, modeling_layers

from ..predictors.errors import one_line
from ..predictors.generation import CACHES
from ..predictors.weights import dtypes_of, local_folder
from .device.graphs import StepGraphs
from .errors import OffloadError

DRAFTS = "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"
"""Arguments of `generate` for ways to draft tokens. Those that turn out to be wrong are cut off the cache, which must not be static."""
WIDE = {"F32", "F16", "BF16", "F64"}
"""What safetensors call numbers that need no scale."""


def watch_generate(model: PreTrainedModel, graphs: StepGraphs | None, attached: ExitStack) -> None:
    """Has `model.generate` refuse what can't work, until `attached` is closed, and raise `OffloadError` then.

    With `graphs`, steps are captured over a static cache only, so it uses one where nothing speaks against it.
    """
    original: Any = model.generate
    is_static = graphs is not None and getattr(model, "_can_compile_fullgraph", False)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        asked = asked_of(args, kwargs, getattr(model, "generation_config", None))
        if (
            vars(model).get("expert_offload") is None
        ):  # somebody has wrapped this, and calls it after the model was detached
            return original(*args, **kwargs)
        if asked("use_mtp"):
            check_heads(model)
        if is_static and wants_static_cache(args, kwargs, model.generation_config):
            kwargs["cache_implementation"] = "static"
        if graphs is not None:
            graphs.look_at(model)
        return original(*args, **kwargs)

    def end() -> None:
        if vars(model).get("generate") is generate:
            del vars(model)["generate"]

    vars(model)["generate"] = generate
    attached.callback(end)


def asked_of(args: tuple[Any, ...], kwargs: dict[str, Any], own: GenerationConfig | None) -> Callable[[str], Any]:
    """What `generate` with these arguments is asked for, by name, as it finds it out: an argument, or the given config, or the
    model's `own`."""
    given = next((value for value in (*args, *kwargs.values()) if isinstance(value, GenerationConfig)), None)

    def asked(name: str) -> Any:
        value = getattr(given, name, None)
        return kwargs[name] if name in kwargs else getattr(own, name, None) if value is None else value

    return asked


def wants_static_cache(args: tuple[Any, ...], kwargs: dict[str, Any], own: GenerationConfig) -> bool:
    """Whether `generate` with these arguments may use a static cache, which has the memory of its longest text at once.

    `own` is the model's generation config. Not where another cache is asked for, or a mode that can't use one, or where nobody
    says how long the text can be.
    """
    if any(kwargs.get(name) is not None for name in (*CACHES, "assistant_model", "custom_generate")):
        return False
    asked = asked_of(args, kwargs, own)
    if asked("use_cache") is False or asked("max_new_tokens") is None:
        return False
    return not any(map(asked, ("cache_implementation", *DRAFTS, "penalty_alpha", "dola_layers")))


def check_heads(model: PreTrainedModel) -> None:
    """Raises `OffloadError` unless transformers can load the heads of `model`, which predict several tokens, from its checkpoint.

    It would raise errors of its own for some, and read heads in fp8 without their scales, of whose drafts nearly none is right.
    """
    heads: Any = getattr(modeling_layers, "MtpModel", None)
    if heads is None:  # this release of transformers has another way
        return
    kind, name = model.config.model_type, model.config.name_or_path
    if not getattr(model.config.get_text_config(), "num_mtp_layers", None):
        raise OffloadError(
            f"the config of this {kind} has no heads that predict several tokens (num_mtp_layers); leave use_mtp out"
        )
    try:
        model.config.get_mtp_config()
        names = heads.get_mtp_weights_regex(model)
    except Exception as error:  # transformers raises whatever a type leads to that it has not prepared
        raise OffloadError(
            f"transformers can't make the heads of a {kind} ({one_line(error)}); leave use_mtp out"
        ) from error
    folder = local_folder(name) if name else None
    dtypes = {} if folder is None else dtypes_of(folder)
    found = {weight: dtype for weight, dtype in dtypes.items() if names.search(weight)}
    if not found:
        where = "this model has none on this machine" if folder is None else f"{name} has no weights of theirs"
        raise OffloadError(
            f"the heads of a {kind} are read from a checkpoint's safetensors files, and {where}; load the model from a checkpoint "
            "that has them, or leave use_mtp out"
        )
    if small := sorted(weight for weight, dtype in found.items() if dtype not in WIDE and "scale" not in weight):
        raise OffloadError(
            f"transformers reads the heads of {name} without their scales ({small[0]} is in {found[small[0]]}), so that nearly no "
            "draft would be right; leave use_mtp out"
        )
