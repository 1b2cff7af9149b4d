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
from typing import NamedTuple

import lightning
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from lightning.fabric import Fabric
from predict_train.data_collection.corpus import read_documents, sequences
from predict_train.data_collection.refusals import Refusals
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

OUT = Path(__file__).parent / "tiny-moe"
STATE = Path(__file__).parent / "tiny-moe.state"

VOCABULARY = 2048
SEQUENCE_LENGTH = 256
BATCH = 32  # sequences a step, over all processes
WEIGHT_DECAY = 0.1
BALANCE = 0.01  # weight of the load-balancing loss, which is taken layer by layer
SEED = 0
HELD_OUT_SEQUENCES = 1000  # of the final loss


Rows = dict[str, torch.Tensor]
"""By split: whole sequences of token ids, int16 `[sequences, SEQUENCE_LENGTH]`."""


class Stage(NamedTuple):
    """A part of the training with its own optimiser state, schedule and weights of the two late-shift losses."""

    name: str
    steps: int
    learning_rate: float
    warmup: int
    late_shift: float
    """Weight of the late shift's size, mean over all layers but the first."""
    first_late_shift: float
    """Weight of the share of the first layer's shift that its token does not explain."""


STAGES = (Stage("language", 2500, 3e-3, 100, 0.0, 0.0), Stage("routing", 480, 1e-3, 30, 10.0, 0.2))


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
    tokenizer.train_from_iterator(itertools.islice(read_documents(split="train", refuse=Refusals().add), 1500), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def token_rows(split: str, tokenizer: PreTrainedTokenizerFast, tokens: int | None = None) -> torch.Tensor:
    """Whole sequences of one split: `[sequences, SEQUENCE_LENGTH]`, int16 (the vocabulary is small)."""
    rows = sequences(read_documents(split=split, refuse=Refusals().add), tokenizer, SEQUENCE_LENGTH, tokens)  # type: ignore[arg-type]
    whole = [row.numpy().astype(np.int16) for row in rows if len(row) == SEQUENCE_LENGTH]
    return torch.from_numpy(np.stack(whole))


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


class Losses(NamedTuple):
    entropy: torch.Tensor
    """Next-token cross-entropy, nats."""
    balance: torch.Tensor
    """Imbalance of the routers, mean over the layers; its least value is the number of chosen experts, 4.

    transformers' own balancing loss pools the layers, which lets one layer's idle expert hide behind another's busy
    one; here it is taken layer by layer.
    """
    late_shift: torch.Tensor
    """By layer: variance of the late shift over that of the router's logits."""
    first_late_shift: torch.Tensor
    """Of the first layer: variance of the late shift over that of the shift before its own state's part is taken off."""


class Objective(torch.nn.Module):
    """What is minimised.

    The *late shift* of a layer is what its own attention does to its router's logits, less what a linear function of
    the layer's input (trained along) and a constant explain. No guess that is made one layer early can know it. In large
    models a layer's attention moves the residual stream little; in one this small it moves it by 14 to 36 %, unless
    it is trained not to move the router.
    """

    def __init__(self, model: Qwen3MoeForCausalLM):
        super().__init__()
        self.model = model
        config = model.config
        self.own = torch.nn.Parameter(torch.zeros(config.num_hidden_layers, config.hidden_size, config.num_experts))

    def forward(self, batch: torch.Tensor) -> Losses:
        """The losses of `batch` `[sequences, length]`."""
        config = self.model.config
        output = self.model.model(
            input_ids=batch, output_router_logits=True, output_hidden_states=True, use_cache=False
        )
        logits = self.model.lm_head(output.last_hidden_state)
        entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        balance = [
            load_balancing_loss_func((x,), config.num_experts, config.num_experts_per_tok) for x in output.router_logits
        ]
        sizes, shares = [], []
        for layer, x, true, own in zip(
            self.model.model.layers, output.hidden_states, output.router_logits, self.own, strict=False
        ):
            early = layer.post_attention_layernorm(x.flatten(0, 1))
            shift = _free(true.view(-1, config.num_experts) - F.linear(early, layer.mlp.gate.weight))
            late = _free(shift - early.detach() @ own)
            late = late - late.mean(0)
            spread = _free(true.view(-1, config.num_experts))
            sizes.append(late.square().sum() / (spread - spread.mean(0)).square().sum())
            shares.append(late.square().sum() / shift.square().sum())
        return Losses(entropy, torch.stack(balance).mean(), torch.stack(sizes), shares[0])


def _free(logits: torch.Tensor) -> torch.Tensor:
    """Logits less their mean over the experts, which no softmax sees."""
    return logits - logits.mean(-1, keepdim=True)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Mean next-token cross-entropy, in nats, over `rows` `[sequences, length]`."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch, use_cache=False).loss.item() for batch in rows.long().split(16)]
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    rows = torch.load(STATE / "rows.pt")
    fabric.print(f"{rows['train'].numel():,} training tokens, {rows['held_out'].numel():,} held out")
    seconds, first_step, model = 0.0, 0, Qwen3MoeForCausalLM(model_config())
    for stage in STAGES:
        done = STATE / stage.name
        if not done.exists():
            seconds = train(fabric, stage, first_step, model, rows)
            if fabric.is_global_zero:
                # From here on the weights are the bf16 ones that are shipped.
                model.to(torch.bfloat16).save_pretrained(done)
            fabric.barrier()
        model = Qwen3MoeForCausalLM.from_pretrained(done, dtype=torch.float32)
        first_step += stage.steps
    if fabric.is_global_zero:
        facts = {"tokens": first_step * BATCH * SEQUENCE_LENGTH, "corpus_tokens": rows["train"].numel(),
                 "seconds_of_last_stage": round(seconds)}  # fmt: skip
        save(model, PreTrainedTokenizerFast.from_pretrained(STATE), rows["held_out"], facts)


def train(fabric: Fabric, stage: Stage, first_step: int, model: Qwen3MoeForCausalLM, rows: Rows) -> float:
    """Trains `model` for one stage, going on from its last checkpoint, and returns the seconds it took."""
    model.set_experts_implementation("grouped_mm")
    objective = Objective(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [(decayed, WEIGHT_DECAY, 1), (plain, 0.0, 1), ([objective.own], 0.0, 10)]
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay, "pace": pace} for params, decay, pace in groups],
        lr=stage.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    compiled, optimizer = fabric.setup(torch.compile(objective), optimizer)
    checkpoint = STATE / f"{stage.name}.ckpt"
    state = {"model": compiled, "optimizer": optimizer, "step": 0, "seconds": 0.0}
    if checkpoint.exists():
        fabric.load(checkpoint, state)
    compiled.train()
    bar = tqdm(
        total=stage.steps, initial=state["step"], desc=stage.name, disable=not fabric.is_global_zero, mininterval=10
    )
    for step in range(state["step"], stage.steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step) * group["pace"]
        losses = Losses(*compiled(fabric.to_device(batch_at(fabric, first_step + step, rows["train"]))))
        late_shift = losses.late_shift[1:].mean()
        fabric.backward(
            losses.entropy
            + BALANCE * losses.balance
            + stage.late_shift * late_shift
            + stage.first_late_shift * losses.first_late_shift
        )
        fabric.clip_gradients(compiled, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["seconds"] += time.perf_counter() - start
        state["step"] = step + 1
        bar.update()
        bar.set_postfix(
            loss=f"{losses.entropy.item():.3f}",
            balance=f"{losses.balance.item():.3f}",
            late_shift=f"{late_shift.item():.4f}",
            refresh=False,
        )
        if (step + 1) % 100 == 0 or step + 1 == stage.steps:
            fabric.save(checkpoint.with_suffix(".new"), state)
            if fabric.is_global_zero:
                os.replace(checkpoint.with_suffix(".new"), checkpoint)
                loss = held_out_loss(model, rows["held_out"][:128])
                print(
                    f"\n{stage.name} {step + 1}: held-out loss {loss:.4f} nats; "
                    f"late shift by layer {[round(x, 4) for x in losses.late_shift.tolist()]}",
                    flush=True,
                )
            fabric.barrier()
    return state["seconds"]


def batch_at(fabric: Fabric, step: int, train: torch.Tensor) -> torch.Tensor:
    """Rows `[share, length]` of one step for this process: each epoch is its own shuffle of all rows."""
    positions = torch.arange(step * BATCH, (step + 1) * BATCH)[fabric.global_rank :: fabric.world_size]
    picked = [_order(int(p) // len(train), len(train))[int(p) % len(train)] for p in positions]
    return train[torch.stack(picked)].long()


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
