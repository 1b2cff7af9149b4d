"""What a checkpoint's generation_config.json asks for, and what a job takes over of it when it has the model generate.

whatever changes the scores of the next token    taken over (penalties, top k, bad words, a watermark ...)
how the results are given, and what is cached    replaced, since it changes no token: `REPLACED`
temperature, sampling, the most tokens           replaced by the job's own
anything but one token a step                    refused: beams, contrastive search, DoLa ...
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from .errors import UserError, one_line
from .loading import LoadingError, read_model_config

CACHES = "cache", "past_key_values"
"""What transformers calls the cache, as an argument and in outputs: the first from 5.24 on, where the second is deprecated."""
CACHE = next(name for name in CACHES if name in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)})
"""What the installed transformers calls it."""
REPLACED: dict[str, Any] = {
    **dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), False),
    "return_dict_in_generate": False,
    "num_return_sequences": 1,
    "use_cache": True,
    "prefill_chunk_size": None,
    "compile_config": None,
    # Where keys and values are does not matter. Tokens that are drafted are checked, so that they are the model's own.
    **dict.fromkeys(("cache_implementation", "max_cache_len"), None),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"), None),
}
WHERE = f"change the model's {GENERATION_CONFIG_NAME}, or call its generate in Python"


def taken_over(config: GenerationConfig, **own: Any) -> dict[str, Any]:
    """The arguments of a model's `generate` with which it draws one token of each sequence a step, as `config` asks.

    `config` is the model's. `own` are the arguments of the job; they beat what `config` says. Raises `UserError` where `config`
    asks for another way to generate.
    """
    arguments = {name: value for name, value in REPLACED.items() if getattr(config, name, None) is not None} | own
    asked = copy.deepcopy(config)
    asked.update(**arguments)
    mode = asked.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise refused(str(mode.value).replace("_", " "))
    if config.cache_implementation == "quantized":
        raise refused("a quantized cache")
    if config.token_healing:
        raise refused("token healing")
    return arguments


def refused(what: str) -> UserError:
    """The error where a generation config asks for `what`."""
    return UserError(f"the model's generation config asks for {what}, which this command can't do; {WHERE}")


def check_generation(
    name: str | Path, tokenizer: PreTrainedTokenizerBase, arguments_of: Callable[[GenerationConfig], dict[str, Any]]
) -> None:
    """Checks before the model `name` is loaded that it can generate as its config asks.

    `arguments_of` returns the arguments that a job would give to `generate`, as `taken_over` does. They are tried on a tiny model
    of the same vocabulary, since only `generate` knows which values it takes. Raises `UserError`.
    """
    model_config = read_model_config(name)
    _check_cache(name, model_config)
    size, config = model_config.get_text_config().vocab_size, read_generation_config(name)
    tiny: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.random.fork_rng():
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=size, **tiny)).eval()
        model.generation_config, ids = config, torch.zeros(1, 3, dtype=torch.long)
        try:
            arguments = arguments_of(config) | {"max_new_tokens": 2, "pad_token_id": 0}
            model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer, **arguments)
        except UserError:
            raise
        except Exception as error:  # transformers raises whatever a wrong value leads to
            raise _unusable(name, error) from error


def _check_cache(name: str | Path, config: PretrainedConfig) -> None:
    """Raises `UserError` for a model that transformers can't generate with: one whose cache has no layer that counts tokens."""
    try:
        cache = DynamicCache(config=config.get_text_config(decoder=True))
    except Exception:  # transformers makes it another one
        return
    try:
        cache.get_seq_length()
    except ValueError as error:
        raise UserError(
            f"transformers can't generate with {name}, since no layer of it has attention that counts the tokens in its cache; call "
            "its generate in Python with use_cache=False"
        ) from error


def read_generation_config(name: str | Path) -> GenerationConfig:
    """The generation config that the model of a folder or Hub repository will have. Raises `LoadingError` if it is broken."""
    try:
        file = cached_file(str(name), GENERATION_CONFIG_NAME)
    except OSError:  # there is none
        return GenerationConfig.from_model_config(read_model_config(name))
    try:
        # Of a file that it can't read, transformers would not say a word when it loads a model.
        config: GenerationConfig = GenerationConfig.from_pretrained(Path(str(file)).parent)
    except Exception as error:  # whatever a wrong value leads to
        raise _unusable(name, error) from error
    return config


def _unusable(name: str | Path, error: Exception) -> LoadingError:
    return LoadingError(
        f"{name} can't generate as its {GENERATION_CONFIG_NAME} asks ({one_line(error)}); correct that file"
    )
