"""What a checkpoint's generation_config.json asks for: it works, or is refused before the model is loaded."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IS_OLDER_RELEASE
from predict_train.data_collection import collect as collect_module
from predict_train.data_collection.batches import TokenBatch
from predict_train.data_collection.catalog import LAYERS, PECULIAR, tiny_model
from predict_train.data_collection.columns import POSITION, SEQUENCE, TOKEN_IDS
from predict_train.data_collection.hooks import Recorder
from predict_train.data_collection.passes import run_batch
from predict_train.data_collection.settings import CollectConfig
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.generation import REPLACED, check_generation, read_generation_config
from predict_train.runtime import offloaded
from predict_train.runtime.asked import wants_static_cache
from predict_train.runtime.generate import generate
from predict_train.runtime.settings import Sampling
from test_offload import prompt
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from predict_train import cli, generating

# Values that change tokens, and that both commands take over.
SCORES: dict[str, Any] = {
    "top_k": 3, "top_p": 0.7, "min_p": 0.2, "top_h": 0.5, "typical_p": 0.6, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01,
    "repetition_penalty": 1.5, "encoder_repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[7], [8, 9]], "renormalize_logits": True, "forced_bos_token_id": 5, "forced_eos_token_id": 9,
    "remove_invalid_values": True, "exponential_decay_length_penalty": (2, 1.5), "suppress_tokens": [10, 11],
    "begin_suppress_tokens": [12], "sequence_bias": [[[7], 9.0]], "min_length": 30, "min_new_tokens": 6,
    "watermarking_config": {"bias": 4.0, "seeding_scheme": "lefthash"}, "eos_token_id": list(range(60)), "max_length": 20,
}  # fmt: skip
ANSWER = {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True, "output_logits": True}
# Values that change no token, and those that the jobs have their own for.
HARMLESS: list[dict[str, Any]] = [
    {}, {"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "offloaded"},
    {"prefill_chunk_size": 4}, {"prefill_chunk_size": 4, "use_cache": False}, {"prompt_lookup_num_tokens": 3},
    {"assistant_early_exit": 2}, {"use_mtp": True}, {"num_return_sequences": 3, "do_sample": True}, ANSWER,
    {"max_new_tokens": 2}, {"pad_token_id": 3},
]  # fmt: skip
# Fields that do nothing by themselves, and names of tokens.
IDLE = {
    "early_stopping", "length_penalty", "cache_config", "max_cache_len", "bos_token_id", "decoder_start_token_id",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    "compile_config", "disable_compile", "continuous_batching_config", "low_memory", "diversity_penalty",
    "transformers_version",
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam"),
    "no beams": ({"num_beams": 0}, "beam"),
    "DoLa": ({"dola_layers": "high"}, "dola generation"),
    "groups of beams": ({"num_beams": 4, "num_beam_groups": 2}, "group beam search"),
    "constraints": ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained beam search"),
    "a quantized cache": ({"cache_implementation": "quantized"}, "quantized cache"),
    "token healing": ({"token_healing": True}, "token healing"),
    "a wrong number": ({"repetition_penalty": -1.0}, "strictly positive"),
    "a wrong type": ({"bad_words_ids": [7]}, "list of lists"),
    "a token that is none": ({"sequence_bias": [[[9999], -5.0]]}, "9999"),
    "an unknown cache": ({"cache_implementation": "magic"}, "magic"),
}
REFUSED_BY = {
    "generate": {"contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search")},
    "collect": {
        "stop strings": ({"stop_strings": ["e"]}, "stop strings"),
        "guidance": ({"guidance_scale": 1.5}, "guidance"),
        "a temperature below 0": ({"temperature": -1.0}, "strictly positive"),
        "a top k below 0": ({"top_k": -1}, "strictly positive"),
    },
}
BROKEN = {"cut": "{", "empty": "", "a list": "[1]", "null": "null", "no text": b"\xff\xfe{"}
DECODE = "max_time", "temperature", "do_sample"


def test_every_field_has_been_looked_at() -> None:
    if IS_OLDER_RELEASE:
        pytest.skip("it is held to the newest release")
    refused = [fields for cases in (REFUSED, *REFUSED_BY.values()) for fields, _ in cases.values()]
    known = {*SCORES, *REPLACED, *IDLE, *DECODE, "constraints"}.union(*refused, *HARMLESS)
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - known == set()


def test_what_changes_tokens_is_taken_over(tiny_moe: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Against plain transformers with the same generation config and the same draws."""
    ids = tokenizer("The stone number 12 is", return_tensors="pt")["input_ids"]
    sampling = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8, "pad_token_id": 0, "tokenizer": tokenizer}
    values = {"stop_strings": ["e", "k"], "guidance_scale": 1.5, "max_time": 1e-9} | SCORES
    configs = {name: GenerationConfig(**{"eos_token_id": 256, name: value}) for name, value in values.items()}
    expected = {}
    for name, tiny_moe.generation_config in configs.items():
        torch.manual_seed(3)
        expected[name] = tiny_moe.generate(ids, attention_mask=torch.ones_like(ids), **sampling)[0, ids.shape[1] :]
    with offloaded(tiny_moe, policy="prefetch", slots=5, device="cpu"):
        for name, tiny_moe.generation_config in configs.items():
            result = generate(
                tiny_moe, tokenizer, "The stone number 12 is", Sampling(max_new_tokens=8, temperature=2.0), seed=3
            )
            assert result.token_ids == expected[name].tolist(), name


def test_what_changes_no_token_is_replaced(tiny_moe: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    found = []
    with offloaded(tiny_moe, policy="prefetch", slots=5, device="cpu"):
        for values in HARMLESS:
            tiny_moe.generation_config = GenerationConfig(**{"eos_token_id": 256, **values})
            result = generate(tiny_moe, tokenizer, "The stone", Sampling(max_new_tokens=9, temperature=2.0))
            found.append((values, result.token_ids, result.counters.tokens))
    assert [other for other in found if other[1:] != found[0][1:]] == []


def decoded(model: PreTrainedModel, **values: Any) -> dict[str, torch.Tensor]:
    """What decode records of three prompts of a model with this generation config."""
    model.generation_config = GenerationConfig(**{"eos_token_id": [10, 11, 12], **values})
    config = CollectConfig(model="tiny", out=Path("trace"), phase="decode", max_new_tokens=6)
    batch = TokenBatch(0, 0, prompt(3, 7), torch.tensor([7, 7, 7]))
    with torch.inference_mode(), Recorder(find_moe_layers(model), [0, 1, 2, 3]) as recorder:
        return run_batch(model, recorder, batch, config)


def test_decode_records_the_same_whatever_changes_no_token(tiny_moe: PreTrainedModel) -> None:
    expected = decoded(tiny_moe)
    for values in [*HARMLESS, {"max_time": 1e-9}]:
        found = decoded(tiny_moe, **values)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found), values


def test_decode_takes_over_what_changes_tokens(tiny_moe: PreTrainedModel) -> None:
    """At temperature 0 a model writes its likeliest text; at others the same draws give what plain transformers gives."""
    ids, banned = prompt(3, 7), list(range(100))
    for values in ({"temperature": 0.0}, {"suppress_tokens": banned, "eos_token_id": None, "temperature": 3.0}):
        found = decoded(tiny_moe, **values)
        torch.manual_seed(hash((0, 0)) & 0x7FFF_FFFF_FFFF_FFFF)
        sampling = {"do_sample": False, "temperature": None} if values["temperature"] == 0 else {"do_sample": True}
        whole = tiny_moe.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, pad_token_id=0, **sampling
        )
        assert len(found[TOKEN_IDS]) > 6
        assert torch.equal(found[TOKEN_IDS].long(), whole[found[SEQUENCE].long(), found[POSITION].long()])
        assert values["temperature"] == 0 or not set(banned) & set(found[TOKEN_IDS].tolist())


@pytest.mark.parametrize("command", ["generate", "collect"])
def test_the_rest_is_refused_before_the_model_is_loaded(
    command: str,
    tiny_moe_folder: Path,
    text_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(generating, "load_offloaded", load)
    monkeypatch.setattr(collect_module, "load_model", load)
    model, out = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(tiny_moe_folder, model)
    decode = ["--out", out, "--corpus", text_corpus, "--phase", "decode", "--max-new-tokens", 8]
    arguments = {"generate": ["--prompt", "The"], "collect": decode}[command]
    texts = {name: (json.dumps(fields), words) for name, (fields, words) in (REFUSED | REFUSED_BY[command]).items()}
    for name, (text, words) in (texts | {name: (text, "correct that file") for name, text in BROKEN.items()}).items():
        (model / "generation_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setattr(sys, "argv", ["predict-train", command, *map(str, [model, "--device", "cpu", *arguments])])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert ended.value.code == 2, (name, said)
        assert len(said.err.strip().splitlines()) == 1, (name, said)
        assert words in said.err, name
        assert not said.out
        assert not out.exists() or {path.name for path in out.iterdir()} <= {".lock"}, name


def test_a_model_in_memory_is_refused_too(tiny_moe: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_moe.generation_config = GenerationConfig(num_beams=3)
    with pytest.raises(UserError, match="beam search"):
        generate(tiny_moe, tokenizer, "The stone")


def test_without_a_file_the_models_config_counts(tiny_moe_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_moe_folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    assert read_generation_config(tmp_path / "model").eos_token_id == 0


def test_a_static_cache_is_used_where_nothing_speaks_against_it() -> None:
    """Wherever it is said: by an argument, a given config (by place or by name), or the model's own."""
    most, ids = {"max_new_tokens": 4}, prompt(1, 3)
    for values in (most, {"num_beams": 2} | most, {"use_cache": True, "do_sample": True} | most):
        config = GenerationConfig(**values)
        assert wants_static_cache((ids,), values, GenerationConfig())
        assert wants_static_cache((ids, config), {}, GenerationConfig(max_length=9))
        assert wants_static_cache((ids,), {"generation_config": config}, GenerationConfig())
        assert wants_static_cache((ids,), {}, config)
    against: list[dict[str, Any]] = [
        {"use_cache": False}, {"cache_implementation": "offloaded"}, {"prompt_lookup_num_tokens": 3}, {"use_mtp": True},
        {"assistant_early_exit": 2}, {"penalty_alpha": 0.5, "top_k": 4}, {"dola_layers": "high"}, {"max_new_tokens": None},
    ]  # fmt: skip
    for values in against:
        config = GenerationConfig(**(most | values))
        assert not wants_static_cache((ids,), most | values, GenerationConfig())
        assert not wants_static_cache((ids, config), {}, GenerationConfig())
        assert not wants_static_cache((ids,), {"generation_config": config}, GenerationConfig())
        assert not wants_static_cache((ids,), {}, config)
    for own in against[:-1]:  # what a given config does not say is the model's
        assert not wants_static_cache((ids, GenerationConfig(**most)), {}, GenerationConfig(**own))
        assert wants_static_cache((ids,), most | dict.fromkeys(own) | {"use_cache": True}, GenerationConfig(**own))
    for name in ("cache", "past_key_values", "assistant_model", "custom_generate"):
        assert not wants_static_cache((ids,), most | {name: object()}, GenerationConfig())


@pytest.mark.skipif(IS_OLDER_RELEASE, reason="older releases count the tokens in another way")
def test_a_model_of_linear_attention_only_generates_without_a_cache(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in plain transformers, whose cache counts tokens in other layers. The commands use one, so they refuse such a model first."""
    monkeypatch.setitem(PECULIAR, "qwen3_next", {"layer_types": ["linear_attention"] * LAYERS})
    model, arguments = tiny_model("qwen3_next"), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt(1, 5), use_cache=False, **arguments)
    with pytest.raises(ValueError, match="get_seq_length"):
        model.generate(prompt(1, 5), **arguments)
    with offloaded(model, slots=5, device="cpu"):
        assert torch.equal(model.generate(prompt(1, 5), use_cache=False, **arguments), expected)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError,
        match=r"no layer of it has attention .* in its cache; call its generate in Python with use_cache=False",
    ):
        check_generation(tmp_path, tokenizer, lambda _: {})
