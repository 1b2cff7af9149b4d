"""Direct predictors on trained models: small ones of types whose residual can't be followed, taken through the whole loop.

    python -m benchmarks.direct SCRATCH

Each is a random model of a few million parameters that first learns to write Python for some minutes, on the embedded corpus with the
embedded model's tokenizer. Then `collect`, `fit`, `export` and `evaluate`. What is in the folder
SCRATCH already is not made again. Prints hit rates on held-out text by layer, and writes them to one file for each type.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from predict_train.data_collection.corpus import read_documents, sequences
from predict_train.data_collection.statistics import trace_statistics
from predict_train.data_collection.trace import Trace
from predict_train.predictors.checkpoint import load_predictors
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.loading import load_tokenizer
from predict_train.predictors.provenance import hardware, versions
from predict_train.predictors.routing import Routing, read_routing
from predict_train.runtime.measure.evaluate import evaluate
from predict_train.train.export import export
from predict_train.train.fit import fit
from predict_train.train.settings import ExportConfig, FitConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from predict_train.collecting import collect
from predict_train.running import batches_of, load_to_evaluate
from predict_train.settings import CollectingConfig, EvaluateConfig

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = str(ROOT / "checkpoints" / "tiny-moe")
RESULTS = Path(__file__).parent / "results"
SEQUENCES, LENGTH = 8, 256
"""Of a step of training."""
BALANCE = 0.01
"""Weight of the loss that keeps all experts in use, as in `checkpoints.make_tiny_moe`."""

SIZE: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 64, "num_experts": 32, "moe_intermediate_size": 64, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    # All layers have linear attention: transformers chooses the tokens that its other layers attend to in a Python loop over all
    # tokens, which takes most of a step. With no such layer its cache can't generate.
    "qwen4_exp_text": {
        "num_experts_per_tok": 4, "shared_expert_intermediate_size": 64, "hc_lowrank": 32, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "ple_layer_ids": [],
        "layer_types": ["linear_attention"] * 6,
    },
}  # fmt: skip


def imbalance(routing: Routing) -> torch.Tensor:
    """How unevenly a router uses its experts: the Switch loss, which is `top_k` where all are used alike."""
    scores = routing.logits.float()
    is_chance = bool((scores.detach() >= 0).all())  # some routers return chances in the place of logits
    chance = (scores if is_chance else scores.softmax(-1)).mean(0)
    load = torch.zeros_like(chance).scatter_add_(0, routing.ids.flatten(), torch.ones(routing.ids.numel()))
    return len(chance) * (chance * load / len(routing.ids)).sum()


def train(model_type: str, out: Path, steps: int) -> None:
    """Trains a random model of the type and writes it, with its tokenizer, its loss in `training.json`."""
    torch.manual_seed(0)
    tokenizer, refuse = load_tokenizer(TOKENIZER), lambda *_: None
    rows = sequences(
        read_documents(split="train", refuse=refuse), tokenizer, LENGTH, SEQUENCES * LENGTH * (steps + 100)
    )
    text = torch.stack([row for row in rows if len(row) == LENGTH][: SEQUENCES * steps]).split(SEQUENCES)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZE | TYPES[model_type]))
    said: list[Routing] = []
    for layer in find_moe_layers(model):
        layer.router.register_forward_hook(lambda _m, _args, output, own=layer: said.append(read_routing(output, own)))
    model.set_experts_implementation("grouped_mm")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
    )
    begun, losses = time.perf_counter(), []
    for step, tokens in enumerate(text):
        said.clear()
        logits = model(input_ids=tokens, use_cache=False).logits
        entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        (entropy + BALANCE * torch.stack(list(map(imbalance, said))).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(entropy.item())
        if step % 25 == 0:
            print(f"step {step}: {losses[-1]:.3f} nats, {time.perf_counter() - begun:.0f} s", flush=True)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": len(text) * SEQUENCES * LENGTH,
        "seconds": time.perf_counter() - begun,
        "loss": statistics.fmean(losses[-20:]),
    }
    (out / "training.json").write_text(json.dumps(facts))


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
        train(model_type, model, given.steps)
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
        table = Table("guess", "mean", *map(str, range(len(result["predictor"]))), title=model_type)
        for name in ("training_free", "previous_token", "predictor"):
            table.add_row(name, *(f"{rate:.3f}" for rate in (statistics.fmean(result[name]), *result[name])))
        Console().print(table)
        settings = {name: getattr(given, name) for name in ("steps", "tokens", "epochs", "held_out")}
        facts: dict[str, Any] = {"settings": settings, "versions": versions(), "hardware": hardware()}
        facts["command"] = f"python -m benchmarks.direct SCRATCH --types {model_type}"
        file = RESULTS / f"direct-{model_type.replace('_', '-')}.json"
        file.write_text(json.dumps(result | facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
