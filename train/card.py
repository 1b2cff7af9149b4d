"""The model card of an export, README.md: front matter for the Hub, hit rates by layer, provenance."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCardData

from ..predictors.checkpoint import Predictors, TargetLayer
from ..predictors.config import FORMAT_VERSION
from ..predictors.metrics import gap_closed
from ..predictors.reuse import Reuse


class Rounding(NamedTuple):
    """The cost of keeping the predictors in fewer bits."""

    dtype: str
    rows: int
    """Validation rows that it was measured on."""
    before: dict[int, float]
    """Hit rate by target layer, in fp32."""
    after: dict[int, float]
    """The same for the rounded predictors, computed in fp32."""


def layer_table(
    predictors: Predictors, entries: dict[int, Any], rounding: Rounding | None = None
) -> tuple[list[str], list[list[str]]]:
    """Headers, a row for each target layer, and a row of means.

    `entries` are the layers of a run's result, by target: `training_free`, `predictor` and, with a memory, `without_memory`,
    each with `recall@k`.
    """
    top_k, experts = predictors.model["top_k"], predictors.model["num_experts"]
    most = min(2 * top_k, experts)
    sizes = sorted({min(top_k + 2, most), most} - {top_k})
    remember = any("without_memory" in entry for entry in entries.values())
    headers = ["layer", "source", "width", "bytes", "training-free", *(["without memory"] if remember else [])]
    headers += ["predictor", "gap closed"]
    sure = any(own.confidence is not None for own in predictors.layers)
    headers += [f"top {size}" for size in sizes] + (["ECE"] if sure else []) + (["by rounding"] if rounding else [])
    rows, rates = [], []
    for target, entry in entries.items():
        own = predictors.of(target)
        source, mlp, curve = own.source, own.mlp, own.recall
        before, after = entry["training_free"]["recall@k"], entry["predictor"]["recall@k"]
        alone = entry["without_memory"]["recall@k"] if remember else after
        row = [
            str(target),
            "its input" if source is None else str(source),
            str(mlp.width if mlp else 0),
            f"{own.nbytes:,}",
            f"{before:.3f}",
            *([f"{alone:.3f}"] if remember else []),
            f"{after:.3f}" if mlp else f"{after:.3f}, dropped",
            f"{gap_closed(before, after):.0%}" if mlp else "",
            *(f"{curve[size - top_k]:.3f}" if curve else "" for size in sizes),
            *([calibration_error(own)] if sure else []),
        ]
        if rounding:
            row.append(f"{rounding.after[target] - rounding.before[target]:+.4f}" if mlp else "")
        rows.append(row)
        rates.append((before, alone, after) if mlp else (before, before, before))
    before, alone, after = (sum(values) / len(rates) for values in zip(*rates, strict=True))
    size = f"{sum(own.nbytes for own in predictors.layers):,}"
    means = ["all", "", "", size, f"{before:.3f}", *([f"{alone:.3f}"] if remember else [])]
    means += [f"{after:.3f}", f"{gap_closed(before, after):.0%}"]
    return headers, [*rows, means + [""] * (len(headers) - len(means))]


def calibration_error(own: TargetLayer) -> str:
    """The calibration error of a layer's probabilities, for a table; empty where there are none."""
    return "" if own.confidence is None or own.confidence.error is None else f"{own.confidence.error:.4f}"


def remarks(predictors: Predictors, rounding: Rounding | None = None) -> list[str]:
    """Sentences with facts that the table lacks."""
    vectors = sum(d.nbytes for d in predictors.default_vectors.values())
    found = [f"The default vectors take another {vectors:,} bytes."]
    if tokens := max((mlp.memory for mlp in predictors.mlps.values()), default=0):
        found.append(
            f"For each token the predictors read what the router decided for the last {'token' if tokens == 1 else 'two tokens'} of "
            "its sequence, and how wrong the guess was. Where there is none, as at its beginning, they find as many experts as the "
            "column without memory says."
        )
    dropped = [str(own.layer) for own in predictors.layers if own.mlp is None]
    if dropped:
        found.append(
            "Dropped, since training-free speculation finds as many of their experts on validation: the predictors of "
            f"layers {', '.join(dropped)}; there the speculation is training-free."
        )
    errors = [own.confidence.error for own in predictors.layers if own.confidence and own.confidence.error is not None]
    if errors:
        found.append(
            "ECE is the expected calibration error: how far the probabilities of candidates are from the share of them that are right, "
            f"on average over candidates; at most {max(errors):.4f}. config.json has the numbers that make a probability of a "
            "candidate's distance from the border of being chosen."
        )
    if rounding:
        before, after = (sum(rates.values()) / len(rates) for rates in (rounding.before, rounding.after))
        worst = min(rounding.before, key=lambda target: rounding.after[target] - rounding.before[target])
        found.append(
            f"Rounding to {rounding.dtype} takes the predictors' mean hit rate from {before:.5f} to {after:.5f} "
            f"({after - before:+.5f}), and that of layer {worst}, which loses the most, from {rounding.before[worst]:.5f} to "
            f"{rounding.after[worst]:.5f}, on {rounding.rows:,} validation rows."
        )
    return found


class _Quoted(str):
    """Text that YAML always puts in double quotes."""


yaml.add_representer(_Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _is_hub_name(name: str) -> bool:
    """Whether it names a repository, not a local folder: the Hub refuses any other base model."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None and not Path(name).exists()


def _markdown(headers: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headers, ["---"] * len(headers), *rows)]


def _what_to_keep(reuse: Reuse) -> list[str]:
    rows = [[rule, *(f"{rate:.3f}" for rate in rates)] for rule, rates in reuse.hit_rates.items()]
    return [
        "## What to keep",
        "",
        f"The reuse predictors ({sum(p.nbytes for p in reuse.predictors.parameters()):,} bytes) say which experts are used again",
        "soon, for eviction=learned. How often slots of a layer hit on validation sequences, by what they keep; each sequence begins",
        "with empty slots, and belady knows the future:",
        "",
        *_markdown(["eviction", *(f"{slots} slots" for slots in reuse.slots)], rows),
        "",
    ]


def model_card(predictors: Predictors, entries: dict[int, Any], rounding: Rounding | None = None) -> str:
    """README.md of an export; the arguments are those of `layer_table`."""
    name, provenance = predictors.model["name"], predictors.provenance
    top_k, trace = predictors.model["top_k"], provenance["trace"]
    quoted = json.dumps(name)
    front_matter = ModelCardData(
        library_name="predict-train",
        base_model=_Quoted(name) if _is_hub_name(name) else None,
        tags=["mixture-of-experts", "expert-speculation"],
    )
    lines = [
        "---",
        front_matter.to_yaml(original_order=["library_name", "base_model", "tags"]),
        "---",
        "",
        f"# Expert predictors for {name}",
        "",
        "They guess which experts a mixture-of-experts layer will use while an earlier one still computes, so that the experts",
        "are copied in time from host memory to the device. predict-train runs the model with them:",
        "",
        "```python",
        "from transformers import AutoTokenizer",
        "",
        "from predict_train import load_offloaded",
        "",
        f'model = load_offloaded({quoted}, "FOLDER_OR_HUB_NAME", policy="speculative", gating="true")',
        f"tokenizer = AutoTokenizer.from_pretrained({quoted})",
        "",
        'inputs = tokenizer("The three laws are", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
        "```",
        "",
        "## Hit rates",
        "",
        f"On validation sequences: the share of the router's true {top_k} experts that are among the top {top_k} of the",
        "speculation, training-free and with the predictor; and, of the speculation as it is here, among the top of more",
        "candidates. config.json has it for every number of candidates in between. Source is the layer whose residual and routing",
        "the speculation reads.",
        "",
        *_markdown(*layer_table(predictors, entries, rounding)),
        "",
        *(f"- {sentence}" for sentence in remarks(predictors, rounding)),
        "",
        *([] if predictors.reuse is None else _what_to_keep(predictors.reuse)),
        "## How it was made",
        "",
        "```",
        *provenance["commands"].values(),
        "```",
        "",
        f"Trace: {trace['tokens']:,} tokens of the corpus {trace['corpus']} ({trace['split']}). Format version {FORMAT_VERSION}.",
        "Versions: " + ", ".join(f"{package} {version}" for package, version in provenance["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"
