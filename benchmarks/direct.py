"""Direct predictors on trained models: small ones of types whose residual can't be followed, taken through the whole loop.

    python -m benchmarks.direct SCRATCH

Each is a random model of a few million parameters that first learns to write Python for some minutes, on the embedded corpus with the
embedded model's tokenizer. Then `collect`, `fit`, `export` and `evaluate`. What is in the folder
SCRATCH already is not made again. Prints hit rates on held-out text by layer, and writes them to one file for each type.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from predict_train.data_collection.statistics import trace_statistics
from predict_train.data_collection.trace import Trace
from predict_train.predictors.checkpoint import load_predictors
from predict_train.predictors.loading import load_tokenizer
from predict_train.predictors.provenance import hardware, versions
from predict_train.predictors.tables import figure_table
from predict_train.runtime.measure.evaluate import evaluate
from predict_train.train.export import export
from predict_train.train.fit import fit
from predict_train.train.settings import ExportConfig, FitConfig
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.small_models import LENGTH, SEQUENCES, TOKENIZER, train
from predict_train.collecting import collect
from predict_train.running import batches_of, load_to_evaluate
from predict_train.settings import CollectingConfig, EvaluateConfig

RESULTS = Path(__file__).parent / "results"
SIZE: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 64, "num_experts": 32, "moe_intermediate_size": 64, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    # All layers have linear attention: transformers chooses the tokens that its other layers attend to in a Python loop over all
    # tokens, which takes most of a step. With no such layer it can't generate with a cache.
    "qwen4_exp_text": {
        "num_experts_per_tok": 4, "shared_expert_intermediate_size": 64, "hc_lowrank": 32, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "ple_layer_ids": [],
        "layer_types": ["linear_attention"] * 6,
    },
    # As in the 26B-A4B: a dense MLP beside the experts, five layers with a sliding window to one without, no embeddings by layer.
    "gemma4_text": {
        "top_k_experts": 4, "intermediate_size": 96, "enable_moe_block": True, "sliding_window": 128, "global_head_dim": 64,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 2048, "initializer_range": 0.06,
    },
    # All layers attend to a window only, which is quicker than their compressed attention, and no router looks its experts up by the token.
    "deepseek_v4": {
        "num_experts_per_tok": 4, "n_routed_experts": 32, "q_lora_rank": 64, "o_lora_rank": 32, "o_groups": 2,
        "qk_rope_head_dim": 16, "sliding_window": 128, "layer_types": ["sliding_attention"] * 6, "mlp_layer_types": ["moe"] * 6,
    },
}  # fmt: skip


def predict(model: Path, scratch: Path, tokens: int, epochs: int, console: Console) -> tuple[Path, Path]:
    """The trace of a model and its exported predictors."""
    trace, run, out = (scratch / name for name in ("trace", "run", "predictors"))
    if not out.exists():
        collect(CollectingConfig(model=str(model), out=trace, tokens=tokens, resume=True, device="cpu"), console)
        fit(FitConfig(trace=trace, out=run, epochs=epochs, reuse=False, resume=run.exists(), device="cpu"), console)
        export(ExportConfig(run=run, out=out), console)
    return trace, out


def measure(model_type: str, scratch: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The whole loop of one type."""
    model, console = scratch / "model", Console()
    if not (model / "training.json").exists():
        torch.manual_seed(0)
        random = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZE | TYPES[model_type]))
        train(random, model, given.steps)
    trace, predictors = predict(model, scratch, given.tokens, given.epochs, console)
    config = EvaluateConfig(model=str(model), tokens=given.held_out, device="cpu")
    loaded = load_to_evaluate(config)
    batches = batches_of(load_tokenizer(TOKENIZER), config, lambda *_: None)
    found = evaluate(loaded, batches, load_predictors(predictors, loaded))
    previous = [layer["hit_rate"]["previous_token"] for layer in trace_statistics(Trace.open(trace))["layers"]]
    rates = {name: [layer[name] for layer in found["layers"]] for name in ("training_free", "predictor", "control")}
    return {
        "type": model_type,
        "training": json.loads((model / "training.json").read_text()),
        "previous_token": previous,
        **rates,
        "cross_entropy": found["cross_entropy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--steps", type=int, default=250, help=f"of training, of {SEQUENCES * LENGTH:,} tokens each")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of the trace")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=3_000, help="tokens of the evaluation")
    given = parser.parse_args()
    for model_type in given.types.split(","):
        folder = given.scratch / model_type
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(model_type, folder, given)
        guesses = [result[name] for name in ("training_free", "previous_token", "predictor")]
        table = figure_table("layer", "training-free", "previous token", "predictor", title=model_type)
        for layer, *row in zip(range(len(guesses[0])), *guesses, strict=True):
            table.add_row(str(layer), *(f"{rate:.3f}" for rate in row))
        table.add_row("mean", *(f"{statistics.fmean(rates):.3f}" for rates in guesses))
        Console().print(table)
        settings = {name: getattr(given, name) for name in ("steps", "tokens", "epochs", "held_out")}
        facts: dict[str, Any] = {"settings": settings, "versions": versions(), "hardware": hardware()}
        facts["command"] = f"python -m benchmarks.direct SCRATCH --types {model_type} --steps {given.steps}"
        file = RESULTS / f"direct-{model_type.replace('_', '-')}.json"
        file.write_text(json.dumps(result | facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
