"""Small models for benchmarks, which learn to write Python for some minutes: on the embedded corpus, with the embedded model's tokenizer."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from predict_train.data_collection.corpus import read_documents, sequences
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.loading import load_tokenizer
from predict_train.predictors.routing import Routing, read_routing
from transformers import PreTrainedModel

TOKENIZER = str(Path(__file__).resolve().parents[1] / "checkpoints" / "tiny-moe")
SEQUENCES, LENGTH = 8, 256
"""Of a step of training, by default."""
BALANCE = 0.01
"""Weight of the loss that keeps all experts in use, as in `checkpoints.make_tiny_moe`."""


def imbalance(routing: Routing) -> torch.Tensor:
    """How unevenly a router uses its experts: the Switch loss, which is `top_k` where all are used alike."""
    scores = routing.logits.float()
    is_chance = bool((scores.detach() >= 0).all())  # some routers return chances in the place of logits
    chance = (scores if is_chance else scores.softmax(-1)).mean(0)
    load = torch.zeros_like(chance).scatter_add_(0, routing.ids.flatten(), torch.ones(routing.ids.numel()))
    return len(chance) * (chance * load / len(routing.ids)).sum()


@torch.no_grad()
def calm(model: PreTrainedModel) -> None:
    """Has attention without a scale of its own begin with the usual one. Gemma's learns it in the norms of queries and keys, and a
    random one attends to single tokens, so that nothing else is learned."""
    for module in model.modules():
        owner: Any = module
        if getattr(module, "scaling", None) == 1.0 and hasattr(module, "q_norm"):
            for norm in (owner.q_norm, owner.k_norm):
                norm.weight.fill_(owner.head_dim**-0.25)


def train(
    model: PreTrainedModel, out: Path, steps: int, has_experts: bool = True, rows: int = SEQUENCES, rate: float = 3e-3
) -> None:
    """Trains a random `model` and writes it to the folder `out` with its tokenizer, and its loss to `training.json` there.

    A step reads `rows` sequences of `LENGTH` tokens; `rate` is the highest learning rate.
    """
    tokenizer, refuse = load_tokenizer(TOKENIZER), lambda *_: None
    texts = sequences(read_documents(split="train", refuse=refuse), tokenizer, LENGTH, 2 * rows * LENGTH * steps)
    text = torch.stack([row for row in texts if len(row) == LENGTH][: rows * steps]).split(rows)
    calm(model)
    said: list[Routing] = []
    for layer in find_moe_layers(model) if has_experts else ():
        layer.router.register_forward_hook(lambda _m, _args, output, own=layer: said.append(read_routing(output, own)))
    if has_experts:
        model.set_experts_implementation("grouped_mm")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
    )
    begun, losses = time.perf_counter(), []
    for step, tokens in enumerate(text):
        said.clear()
        logits = model(input_ids=tokens, use_cache=False).logits
        entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        unevenness = torch.stack(list(map(imbalance, said))).mean() if said else 0.0
        (entropy + BALANCE * unevenness).backward()
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
        "tokens": len(text) * rows * LENGTH,
        "seconds": time.perf_counter() - begun,
        "loss": statistics.fmean(losses[-20:]),
    }
    (out / "training.json").write_text(json.dumps(facts))
