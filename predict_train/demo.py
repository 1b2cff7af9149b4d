"""The demo: the whole loop on the embedded model."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import __path__
from .data_collection.collect import collect
from .data_collection.refusals import Refusals
from .data_collection.settings import CollectConfig
from .predictors.checkpoint import Predictors, load_predictors
from .predictors.errors import UserError
from .predictors.loading import load_tokenizer
from .running import batches_of, load_to_evaluate
from .runtime import Gating, Policy, offloaded
from .runtime.generate import generate
from .runtime.measure.evaluate import evaluate
from .runtime.measure.report import print_hit_rates, print_losses
from .runtime.settings import Sampling
from .settings import DemoConfig, EvaluateConfig
from .train.export import export
from .train.fit import fit
from .train.settings import ExportConfig, FitConfig

EMBEDDED_MODEL = next(path for place in __path__ if (path := Path(place) / "checkpoints" / "tiny-moe").exists())
PROMPT = 'import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path, mode="r"):'


def demo(config: DemoConfig) -> None:
    """Collects, fits, exports, evaluates, and generates under every policy. Raises what these raise."""
    try:
        _demo(config)
    except KeyboardInterrupt as stop:
        raise type(stop)("stopped; the next demo begins anew") from stop


def _demo(config: DemoConfig) -> None:
    console, out, model = Console(), config.out, str(EMBEDDED_MODEL)
    if out.exists() and not (out / "trace").exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and holds something else than a demo; name another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    console.rule("1. collect: a full run of the model, with hooks on it")
    trace = collect(CollectConfig(model=model, out=out / "trace", tokens=config.tokens), console)
    console.rule("2. fit: a small predictor for every layer")
    run = fit(FitConfig(trace=trace, out=out / "run"), console)
    console.rule("3. export: a folder that the runtime loads")
    folder = export(ExportConfig(run=run, out=out / "predictors"), console)
    console.rule("4. evaluate and generate, on text that neither the model nor the predictors have seen")
    settings = EvaluateConfig(model=model, tokens=10_000, device="cpu")
    tokenizer, loaded, refusals = load_tokenizer(model), load_to_evaluate(settings), Refusals()
    predictors = load_predictors(folder, loaded)
    result = evaluate(loaded, batches_of(tokenizer, settings, refusals.add), predictors, progress=True)
    times, text = _time_policies(loaded, tokenizer, predictors)
    console.print(text, style="dim", markup=False, highlight=False)
    print_hit_rates(console, result)
    print_losses(console, result, times)
    refusals.report(console)
    console.print(
        "The embedded model is so small that its copies take no time: what a policy gains is seen on real sizes.\n\n"
        "Go on with:\n"
        f"  tensorboard --logdir {run}\n"
        f"  predict-train generate {model} --predictors {folder} --prompt 'def main():'\n"
        f"  predict-train evaluate {model} --predictors {folder} --json evaluation.json\n"
        "  predict-train collect YOUR_MODEL --out trace   (then fit and export, as above)",
        highlight=False,
        soft_wrap=True,
    )


def _time_policies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, predictors: Predictors
) -> tuple[dict[str, float], str]:
    """Milliseconds per output token by policy and gating, and the text that was generated under the last of them."""
    ways = [(p, Gating.TRUE) for p in (Policy.ON_DEMAND, Policy.PREFETCH)] + [(Policy.SPECULATIVE, g) for g in Gating]
    milliseconds, text = {}, ""
    for policy, gating in ways:
        with offloaded(model, predictors, policy=policy, gating=gating, device=model.device):
            result = generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=64, temperature=0.8), seed=2)
        name = f"{policy}/{gating}" if policy is Policy.SPECULATIVE else str(policy)
        milliseconds[name] = 1000 * (result.seconds_per_output_token or 0.0)
        text = PROMPT + result.text
    return milliseconds, text
