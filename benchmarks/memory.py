"""What a predictor should remember of the tokens before, and what it is worth: variants trained side by side.

    predict-train collect checkpoints/tiny-moe --tokens 300000 --out trace
    predict-train collect checkpoints/tiny-moe --split held_out --tokens 60000 --out held-out
    python -m benchmarks.memory trace held-out --json benchmarks/results/memory.json

Every variant is the predictor of `fit` with another memory, as wide as its bytes allow: all have as many parameters as one of
width 320 without a memory. They are trained by the optimiser and schedule of `fit`, on runs of consecutive tokens, and measured on
the held-out trace in the order of its text, with their memory and without. What is remembered is scaled to a spread of 1 by layer.
Prints and writes hit rates by layer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from predict_train.data_collection.examples import Batch, make_batch
from predict_train.data_collection.trace import Trace
from predict_train.predictors.memory import follows, remembered
from predict_train.predictors.mlp import ResidualMLP, StackedResidualMLPs
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.predictors.tables import figure_table
from predict_train.train.module import one_cycle
from rich.console import Console

CHUNK = 4096
WIDTH = 320

FORMS = ("logits", "error", "logits, error", "probabilities, error", "experts, error")


class Variant(NamedTuple):
    form: str
    tokens: int = 1
    """How many are remembered."""
    run: int = 4
    """Tokens of a run in training: the first of each remembers nothing."""


VARIANTS = [
    Variant("none", 0),
    *(Variant(form) for form in FORMS),
    Variant("logits, error", 1, 8),
    Variant("logits, error", 2, 8),
]


class Data(NamedTuple):
    """The rows of a trace in memory, in the order of their tokens."""

    batch: Batch
    guess: torch.Tensor
    """The training-free logits, `[layers, rows, experts]`."""
    follows: torch.Tensor
    """Whether a row is the token after the row before it, `[rows]`."""


def load(path: Path, layers: list[int] | None, rows: int) -> tuple[Data, torch.Tensor]:
    """At most `rows` rows, and the routers' weights `[layers, experts, hidden]`."""
    trace = Trace.open(path)
    sources = {layer: trace.sources[layer] for layer in layers or trace.sources}
    stacked = trace.stacked(sources)
    parts: list[tuple[torch.Tensor, ...]] = []
    order: list[torch.Tensor] = []
    for shard in range(len(trace.manifest.shards)):
        for chosen in trace.by_token(shard)[1].split(CHUNK):
            if sum(len(some) for some in order) < rows:
                parts.append(make_batch(trace.read(shard, chosen), sources, stacked)[:5])
                order.append(torch.stack([place[chosen] for place in trace.places(shard)], 1))
    batch = Batch(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)))
    routers = torch.stack([dict(w.router.router.named_parameters())["weight"] for w in stacked.wirings])
    guess = torch.cat([stacked.logits(some) for some in batch.quasi.split(CHUNK, 1)], 1)
    return Data(batch, guess, follows(*torch.cat(order).unbind(1))), routers


def parts_of(form: str, data: Data) -> list[torch.Tensor]:
    """What each row leaves, in parts of `[layers, rows, experts]`."""
    logits, guess, ids = data.batch.logits, data.guess, data.batch.ids
    if form == "experts, error":
        chosen, guessed = (
            torch.zeros_like(logits).scatter_(-1, some, 1.0) for some in (ids, guess.topk(ids.shape[-1]).indices)
        )
        return [chosen, chosen - guessed]
    if form == "probabilities, error":
        logits, guess = logits.softmax(-1), guess.softmax(-1)
    parts = {"logits": [logits], "error": [logits - guess], "none": []}
    return parts.get(form, [logits, logits - guess])


def left_by(variant: Variant, data: Data, spread: list[torch.Tensor]) -> torch.Tensor | None:
    """What each row leaves, `[layers, rows, columns]`, in units of `spread`, which is measured if it is empty."""
    parts = parts_of(variant.form, data)
    if not spread:
        spread += [part.std((1, 2), keepdim=True) for part in parts]
    return torch.cat([part / size for part, size in zip(parts, spread, strict=True)], -1) if parts else None


def some_of(data: Data, left: torch.Tensor | None, rows: torch.Tensor, tokens: int) -> Batch:
    """The given rows. They remember one another, if they follow one another."""
    batch = Batch(*(column[:, rows] for column in data.batch[:5]))
    if left is None:
        return batch
    joined = torch.zeros(len(rows), dtype=torch.bool)
    joined[1:] = (rows.diff() == 1) & data.follows[rows[1:]]
    return batch._replace(memory=remembered(left[:, rows], joined, tokens))


def make(variant: Variant, data: Data, left: torch.Tensor | None) -> StackedResidualMLPs:
    layers, _, hidden = data.batch.quasi.shape
    experts = data.batch.mixture.shape[-1]
    columns = 0 if left is None else left.shape[-1] * variant.tokens
    fixed, one = (ResidualMLP.count(hidden, experts, width) for width in (0, 1))
    stack = StackedResidualMLPs([round(WIDTH * (one - fixed) / (one - fixed + columns))] * layers, hidden, experts)
    if columns:
        stack.memory, stack.scale = variant.tokens, torch.ones(())
        stack.u = torch.nn.Parameter(torch.zeros(layers, stack.b1.shape[1], columns))
    return stack


def train(variant: Variant, data: Data, routers: torch.Tensor, seed: int, steps: int) -> tuple[Any, list[torch.Tensor]]:
    """The trained predictors and the spread of what they remember."""
    torch.manual_seed(seed)
    spread: list[torch.Tensor] = []
    left = left_by(variant, data, spread)
    stack, rows, run = make(variant, data, left), data.follows.shape[0], variant.run if left is not None else 1
    optimizer = torch.optim.AdamW(stack.parameters(), 5e-3, weight_decay=0.01, fused=True)
    schedule, starts = one_cycle(optimizer, steps), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        count = 1024 // run
        if len(starts) < count:
            starts = torch.randperm(rows // run - 1) * run + int(torch.randint(run, ()))
        own, starts = starts[:count].sort().values, starts[count:]
        batch = some_of(data, left, (own[:, None] + torch.arange(run)).flatten(), variant.tokens)
        with torch.autocast("cpu", torch.bfloat16):
            states = stack(batch.quasi, batch.normed, batch.mixture, batch.memory)
        true = batch.logits.log_softmax(-1)
        loss = (true.exp() * (true - torch.bmm(states.float(), routers.mT).log_softmax(-1))).sum(-1).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return stack, spread


@torch.no_grad()
def hit_rates(
    variant: Variant, stack: Any, data: Data, routers: torch.Tensor, left: torch.Tensor | None
) -> list[float]:
    """By layer, in the order of the text."""
    top_k, hits = data.batch.ids.shape[-1], torch.zeros(len(routers))
    for rows in torch.arange(len(data.follows)).split(CHUNK):
        batch = some_of(data, left, rows, variant.tokens)
        states = stack(batch.quasi, batch.normed, batch.mixture, batch.memory)
        found = torch.bmm(states, routers.mT).topk(top_k).indices
        hits += (batch.ids.unsqueeze(-1) == found.unsqueeze(-2)).any(-1).sum((1, 2))
    return (hits / (len(data.follows) * top_k)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--layers", help="numbers like 0,1,4; by default all")
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--steps", type=int, default=1500, help="of 1,024 rows")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--variants", help="numbers of the variants, like 0,3; by default all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    layers = [int(layer) for layer in args.layers.split(",")] if args.layers else None
    (data, routers), (held_out, _) = load(args.trace, layers, args.rows), load(args.held_out, layers, 60_000)
    chosen = [VARIANTS[int(number)] for number in args.variants.split(",")] if args.variants else VARIANTS
    results = []
    table = figure_table("remembers", "tokens", "run", "width", "seed", "mean", "weakest", "without", "weakest", "s")
    for variant in chosen:
        for seed in range(args.seeds):
            begun = time.perf_counter()
            stack, spread = train(variant, data, routers, seed, args.steps)
            seconds = time.perf_counter() - begun
            rates = [
                hit_rates(variant, stack, held_out, routers, left)
                for left in (left_by(variant, held_out, spread), None)
            ]
            row = {**variant._asdict(), "width": stack.b1.shape[1], "seed": seed, "seconds": seconds}
            results.append(row | {"hit_rate": rates[0], "without_memory": rates[1]})
            figures = [f"{figure:.4f}" for some in rates for figure in (math.fsum(some) / len(some), min(some))]
            names = ("form", "tokens", "run", "width", "seed")
            table.add_row(*(str(row[name]) for name in names), *figures, f"{seconds:.0f}")
            print(json.dumps(results[-1]), flush=True)
    Console().print(table)
    if args.json is not None:
        facts = {
            "layers": layers,
            "steps": args.steps,
            "results": results,
            "command": command(),
            "versions": versions(),
        }
        args.json.write_text(json.dumps(facts | {"hardware": hardware()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
