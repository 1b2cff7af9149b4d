"""The job `export`: the best epoch of a run as a predictors folder, shaped like a Hub repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from data_collection.trace import Trace
from predictors.checkpoint import Predictors, save_predictors
from predictors.loading import DTYPES
from predictors.mlp import StackedResidualMLPs
from predictors.provenance import command, versions
from train.data import FitError
from train.fit import RESULT, read_run


def export(run: Path, out: Path, dtype: Literal["float32", "bfloat16"] = "float32", trace: Path | None = None) -> Path:
    """Writes the predictors of the best epoch of `run` to the new folder `out` and returns it.

    `dtype` is that of the predictors' weights in the file; default vectors are fp32. `trace` says where the trace is,
    if it was moved since. Raises a `UserError` for a run that is not finished or was changed, and where `out` exists.
    """
    settings = read_run(run)
    try:
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FitError(f"the run in {run} is not finished (no {RESULT}); go on with it by fit --resume") from error
    source = Trace.open(trace or settings["trace"]["path"])
    model = source.manifest.model
    if [shard.xxh3 for shard in source.manifest.shards] != settings["trace"]["shards"]:
        raise FitError(f"{source.path} is not the trace that {run} was trained on; name that one with --trace")
    widths = [entry["width"] for entry in result["layers"]]
    stack = StackedResidualMLPs(widths, model.hidden_size, model.num_experts)
    stack.load_state_dict(_learned(run / result["checkpoint"]))
    targets = [entry["layer"] for entry in result["layers"]]
    predictors = Predictors(
        model=model.identity(),
        mlps={target: stack.layer(number).to(DTYPES[dtype]) for number, target in enumerate(targets)},
        sources={entry["layer"]: entry["source"] for entry in result["layers"]},
        default_vectors=source.default_vectors(),
        hit_rates={
            entry["layer"]: {kind: entry[kind]["recall@k"] for kind in ("training_free", "predictor")}
            for entry in result["layers"]
        },
        recall={entry["layer"]: entry["predictor"]["recall"] for entry in result["layers"]},
        provenance={
            "commands": {
                "collect": source.manifest.command,
                "fit": settings["command"],
                "export": command(),
            },
            "versions": versions(),
            "trace": {name: settings["trace"][name] for name in ("corpus", "split", "tokens")},
            "settings": {name: value for name, value in settings["settings"].items() if name not in ("trace", "out")},
        },
    )
    return save_predictors(out, predictors, model_card(predictors, result))


def _learned(checkpoint: Path) -> dict[str, torch.Tensor]:
    try:
        # weights_only: whatever a checkpoint holds, none of it is run.
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # torch.load raises what it meets: zip, pickle, key and file errors
        raise FitError(f"{checkpoint} is missing or broken; train the run again") from error
    return {name.removeprefix("mlps."): tensor for name, tensor in state.items() if name.startswith("mlps.")}


def model_card(predictors: Predictors, result: dict[str, Any]) -> str:
    """README.md of an export: front matter for the Hub, hit rates before and after, and how it was made."""
    rows = []
    for entry in result["layers"]:
        before, after = entry["training_free"], entry["predictor"]
        reads = "its own input" if entry["source"] is None else f"layer {entry['source']}"
        rows.append(
            f"| {entry['layer']} | {reads} | {before['recall@k']:.3f} | {after['recall@k']:.3f} | {after['recall@2k']:.3f} "
            f"| {after['exact']:.3f} |"
        )
    name, commands = predictors.model["name"], predictors.provenance["commands"]
    lines = [
        "---",
        "library_name: predict-train",
        # The Hub takes a repository's name here and refuses a path.
        *([] if Path(name).exists() else [f"base_model: {json.dumps(name)}"]),
        "tags:",
        "- mixture-of-experts",
        "- expert-speculation",
        "---",
        "",
        f"# Expert predictors for {name}",
        "",
        "They guess which experts the next mixture-of-experts layer will use, one layer ahead, so that the experts can be",
        "copied while the current layer computes. Load them with predict-train:",
        "",
        "```python",
        "from predictors.checkpoint import load_predictors",
        "",
        "predictors = load_predictors(PATH_OR_HUB_NAME, model)",
        "```",
        "",
        "## Hit rates",
        "",
        f"On validation sequences: the share of the router's true {predictors.model['top_k']} experts that are among as many",
        "guesses (at 2k: among twice as many; exact: all of them).",
        "",
        "| layer | reads | training-free | predictor | at 2k | exact |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        "## How it was made",
        "",
        "```",
        *commands.values(),
        "```",
        "",
        f"Trace: {predictors.provenance['trace']['tokens']:,} tokens of the corpus {predictors.provenance['trace']['corpus']}"
        f" ({predictors.provenance['trace']['split']}).",
        "Versions: " + ", ".join(f"{package} {version}" for package, version in versions().items()) + ".",
    ]
    return "\n".join(lines) + "\n"
