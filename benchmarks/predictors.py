"""What a predictor should read, how wide it should be and what it should minimise: variants trained side by side.

    python -m benchmarks.predictors TRACE HELD_OUT_TRACE --layers 6,7,10 --rows 400000 --out benchmarks/results/predictors.json

Every variant is a residual MLP with one hidden layer on the quasi-hidden state, trained by the optimiser and schedule of
`fit`, on the same rows in the same order. Widths are chosen so that variants of one group have the same number of
parameters. Prints and writes, for each: recall@k and recall@2k on held-out rows, the share of the gap that it closes,
parameters and seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from predict_train.data_collection.examples import Batch, make_batch
from predict_train.data_collection.trace import Trace
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.predictors.tables import figure_table
from predict_train.train.module import one_cycle
from rich.console import Console
from torch import nn
from tqdm import tqdm

CHUNK = 20_000


class Variant(NamedTuple):
    reads: str
    """Letters of q (quasi-hidden state), a (normed residual), m (mixture)."""
    width: int | None
    """None: as wide as `q` and `a` at width 256 are in parameters."""
    loss: str


VARIANTS = [
    Variant("q", None, "kl"),
    Variant("qa", None, "kl"),
    Variant("a", None, "kl"),
    Variant("qm", None, "kl"),
    Variant("qam", None, "kl"),
    Variant("am", None, "kl"),
    Variant("am", None, "bce"),
    Variant("am", None, "mse"),
    Variant("am", 160, "kl"),
    Variant("am", 320, "kl"),
    Variant("am", 1024, "kl"),
]


class Reader(nn.Module):
    """The MLPs of all layers, reading any of the inputs: `q + W2 silu(W1 x + b1) + b2`."""

    def __init__(self, layers: int, hidden: int, experts: int, variant: Variant):
        super().__init__()
        self.reads = variant.reads
        inputs = sum({"q": hidden, "a": hidden, "m": experts}[letter] for letter in variant.reads)
        width = variant.width or 256 * 3 * hidden // (inputs + hidden)
        self.w1 = nn.Parameter(torch.randn(layers, inputs, width) * inputs**-0.5)
        self.b1 = nn.Parameter(torch.zeros(layers, 1, width))
        self.w2 = nn.Parameter(torch.zeros(layers, width, hidden))
        self.b2 = nn.Parameter(torch.zeros(layers, 1, hidden))

    def forward(self, batch: Batch) -> torch.Tensor:
        parts = {"q": batch.quasi, "a": batch.normed, "m": batch.mixture}
        x = torch.cat([parts[letter] for letter in self.reads], dim=-1)
        return batch.quasi + torch.baddbmm(self.b2, F.silu(torch.baddbmm(self.b1, x, self.w1)), self.w2)


def loss_of(kind: str, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Summed over layers, mean over rows; `logits` `[layers, rows, experts]`."""
    if kind == "kl":
        speculated, true = logits.log_softmax(-1), batch.logits.log_softmax(-1)
        return F.kl_div(speculated, true, log_target=True, reduction="none").sum(-1).mean(1).sum()
    if kind == "mse":
        difference = logits - batch.logits
        return (difference - difference.mean(-1, keepdim=True)).square().mean((1, 2)).sum()
    chosen = torch.zeros_like(logits).scatter_(-1, batch.ids, 1.0)
    # Relative to the border between the last expert that is chosen and the first that is not.
    border = logits.topk(batch.ids.shape[-1] + 1, dim=-1).values[..., -2:].mean(-1, keepdim=True).detach()
    return F.binary_cross_entropy_with_logits(logits - border, chosen, reduction="none").sum(-1).mean(1).sum()


def recall(logits: torch.Tensor, ids: torch.Tensor, m: int) -> torch.Tensor:
    found = logits.topk(m, dim=-1).indices
    return (ids.unsqueeze(-1) == found.unsqueeze(-2)).any(-1).float().mean((1, 2))


def load(path: Path, layers: list[int], rows: int) -> tuple[Batch, torch.Tensor]:
    """The first `rows` rows as one batch in memory, and the routers' weights `[layers, experts, hidden]`."""
    trace = Trace.open(path)
    sources = {layer: trace.sources[layer] for layer in layers}
    stacked = trace.stacked(sources)
    parts: list[Batch] = []
    for shard, entry in enumerate(trace.manifest.shards):
        for start in range(0, entry.rows, CHUNK):
            if sum(part.ids.shape[1] for part in parts) < rows:
                chosen = torch.arange(start, min(entry.rows, start + CHUNK))
                parts.append(make_batch(trace.read(shard, chosen), sources, stacked))
    routers = torch.stack([dict(w.router.router.named_parameters())["weight"] for w in stacked.wirings])
    return Batch(*(torch.cat(columns, dim=1) for columns in zip(*(part[:5] for part in parts), strict=True))), routers


def train(variant: Variant, batch: Batch, routers: torch.Tensor, args: argparse.Namespace) -> Reader:
    torch.manual_seed(0)
    layers, rows, hidden = batch.quasi.shape
    model = Reader(layers, hidden, batch.mixture.shape[-1], variant)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.01)
    count = rows // args.batch_size
    schedule = one_cycle(optimizer, args.epochs * count)
    for _ in tqdm(range(args.epochs), desc=" ".join(map(str, variant)), leave=False):
        order = torch.randperm(rows)
        for number in range(count):
            picked = order[number * args.batch_size : (number + 1) * args.batch_size].sort().values
            some = Batch(*(tensor[:, picked] for tensor in batch[:5]))
            loss = loss_of(variant.loss, torch.bmm(model(some), routers.mT), some)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--layers", default="6,7,10")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    layers = [int(layer) for layer in args.layers.split(",")]
    batch, routers = load(args.trace, layers, args.rows)
    held_out, _ = load(args.held_out, layers, 60_000)
    top_k = batch.ids.shape[-1]
    with torch.no_grad():
        free = recall(torch.bmm(held_out.quasi, routers.mT), held_out.ids, top_k)
    results = []
    for variant in VARIANTS:
        started = time.perf_counter()
        model = train(variant, batch, routers, args)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            logits = torch.bmm(model(held_out), routers.mT)
            at_k, at_2k = recall(logits, held_out.ids, top_k), recall(logits, held_out.ids, 2 * top_k)
        results.append(
            variant._asdict()
            | {
                "width": model.b1.shape[-1],
                "parameters_per_layer": sum(p.numel() for p in model.parameters()) // len(layers),
                "recall_at_k": at_k.tolist(),
                "recall_at_2k": at_2k.tolist(),
                "gap_closed": ((at_k - free) / (1 - free)).tolist(),
                "seconds": seconds,
            }
        )
    table = figure_table("reads", "width", "loss", "parameters", "recall@k", "recall@2k", "gap closed", "s")
    for row in results:
        means = [sum(row[name]) / len(layers) for name in ("recall_at_k", "recall_at_2k", "gap_closed")]
        table.add_row(
            " ".join(row["reads"]), str(row["width"]), row["loss"], f"{row['parameters_per_layer']:,}",
            f"{means[0]:.4f}", f"{means[1]:.4f}", f"{means[2]:.1%}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console().print(table, f"training-free: {[round(x, 4) for x in free.tolist()]} on layers {layers}")
    if args.out is not None:
        facts = {"layers": layers, "training_free": free.tolist(), "results": results, "command": command(),
                 "versions": versions(), "hardware": hardware()}  # fmt: skip
        args.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
