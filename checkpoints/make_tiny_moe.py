"""Trains the embedded model, `checkpoints/tiny-moe`: a small Qwen3-MoE that writes Python.

    MALLOC_TOP_PAD_=268435456 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
        python -m checkpoints.make_tiny_moe --processes 2

Everything is in this file: the tokenizer, the corpus (the embedded one, training split), the recipe. It keeps a
training state under `checkpoints/tiny-moe.state`, and the same command goes on from there after a kill.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import time
from pathlib import Path

import lightning
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from lightning.fabric import Fabric
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from data_collection.corpus import read_documents, sequences

OUT = Path(__file__).parent / "tiny-moe"
STATE = Path(__file__).parent / "tiny-moe.state"

VOCABULARY = 2048
SEQUENCE_LENGTH = 256
BATCH = 32  # sequences a step, over all processes
LEARNING_RATE = 3e-3
WARMUP = 100  # steps
WEIGHT_DECAY = 0.1
BALANCE = 0.01  # weight of the load-balancing loss, which is taken layer by layer
SEED = 0
HELD_OUT_SEQUENCES = 1000  # of the final loss


def model_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=12,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_experts=32, num_experts_per_tok=4,
        norm_topk_prob=True, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, dtype="float32",
    )  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the training files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(read_documents(split="train"), 1500), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def token_rows(split: str, tokenizer: PreTrainedTokenizerFast, tokens: int | None = None) -> torch.Tensor:
    """Whole sequences of one split: `[sequences, SEQUENCE_LENGTH]`, int16 (the vocabulary is small)."""
    rows = sequences(read_documents(split=split), tokenizer, SEQUENCE_LENGTH, tokens)  # type: ignore[arg-type]
    whole = [row.numpy().astype(np.int16) for row in rows if len(row) == SEQUENCE_LENGTH]
    return torch.from_numpy(np.stack(whole))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


class Objective(torch.nn.Module):
    """What is minimised: the next token's cross-entropy plus `BALANCE` times the routers' imbalance.

    transformers' own balancing loss pools the layers, which lets one layer's idle expert hide behind another's busy
    one; here it is taken layer by layer. Its least value is the number of chosen experts, 4.
    """

    def __init__(self, model: Qwen3MoeForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy in nats and mean imbalance, of `batch` `[sequences, length]`."""
        config = self.model.config
        output = self.model.model(input_ids=batch, output_router_logits=True, use_cache=False)
        logits = self.model.lm_head(output.last_hidden_state)
        entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        balance = [
            load_balancing_loss_func((x,), config.num_experts, config.num_experts_per_tok) for x in output.router_logits
        ]
        return entropy, torch.stack(balance).mean()


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Mean next-token cross-entropy, in nats, over `rows` `[sequences, length]`."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch, use_cache=False).loss.item() for batch in rows.long().split(16)]
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_480_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu")
    args = parser.parse_args()
    if args.accelerator == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.processes))

    fabric = Fabric(accelerator=args.accelerator, devices=args.processes)
    fabric.launch()
    fabric.seed_everything(SEED)
    STATE.mkdir(parents=True, exist_ok=True)
    with fabric.rank_zero_first():
        if not (STATE / "tokenizer.json").exists():
            tokenizer = make_tokenizer()
            torch.save({s: token_rows(s, tokenizer) for s in ("train", "held_out")}, STATE / "rows.pt")
            tokenizer.save_pretrained(STATE)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(STATE)
    rows = torch.load(STATE / "rows.pt")
    train, held_out = rows["train"], rows["held_out"]

    model = Qwen3MoeForCausalLM(model_config())
    model.set_experts_implementation("grouped_mm")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    objective, optimizer = fabric.setup(torch.compile(Objective(model)), optimizer)
    steps = args.tokens // (BATCH * SEQUENCE_LENGTH)
    state = {"model": objective, "optimizer": optimizer, "step": 0, "seconds": 0.0}
    if (STATE / "last.ckpt").exists():
        fabric.load(STATE / "last.ckpt", state)
    fabric.print(f"{train.numel():,} training tokens, {held_out.numel():,} held out, {steps} steps")

    def batch_at(step: int) -> torch.Tensor:
        """Rows `[share, length]` of one step for this process: each epoch is its own shuffle of all rows."""
        positions = torch.arange(step * BATCH, (step + 1) * BATCH)[fabric.global_rank :: fabric.world_size]
        epochs = positions // len(train)
        picked = [_order(int(e), len(train))[int(p) % len(train)] for p, e in zip(positions, epochs, strict=True)]
        return train[torch.stack(picked)].long()

    objective.train()
    bar = tqdm(total=steps, initial=state["step"], disable=not fabric.is_global_zero, mininterval=10)
    for step in range(state["step"], steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = fabric.to_device(batch_at(step))
        loss, balance = objective(batch)
        fabric.backward(loss + BALANCE * balance)
        fabric.clip_gradients(objective, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["seconds"] += time.perf_counter() - start
        state["step"] = step + 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", balance=f"{balance.item():.3f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            fabric.save(STATE / "last.ckpt.new", state)
            if fabric.is_global_zero:
                os.replace(STATE / "last.ckpt.new", STATE / "last.ckpt")
                print(f"\nstep {step + 1}: held-out loss {held_out_loss(model, held_out[:128]):.4f} nats", flush=True)
            fabric.barrier()
    if fabric.is_global_zero:
        save(model, tokenizer, held_out, {"tokens": steps * BATCH * SEQUENCE_LENGTH, "seconds": state["seconds"],
                                          "corpus_tokens": train.numel()})  # fmt: skip


_orders: dict[tuple[int, int], torch.Tensor] = {}


def _order(epoch: int, size: int) -> torch.Tensor:
    if (epoch, size) not in _orders:
        _orders[epoch, size] = torch.randperm(size, generator=torch.Generator().manual_seed(SEED + epoch))
    return _orders[epoch, size]


def save(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: torch.Tensor, facts: dict[str, float]
) -> None:
    """Writes the model in bf16 and the README's figures."""
    model = model.to(torch.bfloat16)
    loss = held_out_loss(
        model.float(), held_out[:HELD_OUT_SEQUENCES]
    )  # fp32 arithmetic on the bf16 weights that are shipped
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "lightning": lightning.__version__}  # fmt: skip
    facts |= {"held_out_loss": loss, "held_out_tokens": HELD_OUT_SEQUENCES * SEQUENCE_LENGTH}
    (OUT / "training.json").write_text(json.dumps(facts | {"versions": versions, "seed": SEED}, indent=2) + "\n")
    print(f"held-out loss {loss:.4f} nats per token over {facts['held_out_tokens']:,} tokens; written to {OUT}")


if __name__ == "__main__":
    main()
