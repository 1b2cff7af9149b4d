"""The layers that a run trains, their sources, and the widths of their predictors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from transformers import AutoConfig

from ..data_collection.columns import Column
from ..data_collection.statistics import SAMPLE_ROWS, hit_rates
from ..data_collection.trace import Trace
from ..predictors.architecture import farther, skeleton
from ..predictors.direct import KINDS
from ..predictors.experts import expert_modules
from ..predictors.forms import Form
from ..predictors.settings import parse_bytes
from .data import FitError
from .settings import FitConfig, Source

WIDTH_STEP = 16
"""Widths are multiples of it, like those of vector units and matrix tiles."""
BYTES_OF_A_PARAMETER = 2
"""In bfloat16, as `export --dtype bfloat16` writes them."""

LOSS_ROWS = 2048
"""Rows of a trace that say how its routers choose."""


class Target(NamedTuple):
    """A layer whose routing is guessed."""

    layer: int
    source: int | None
    """The layer whose residual and routing the guess reads; None for the target's own input."""
    width: int
    """Of its predictor."""


def sources_in(trace: Trace, source: Source, horizon: int) -> dict[int, int | None]:
    """The source of each target of the trace, by layer. Raises `FitError` if the trace does not hold it."""
    if source == "layer_input":
        if horizon != 1:
            raise FitError("a layer's own input is known at its beginning only; leave --horizon out, or --source")
        own = dict.fromkeys(trace.sources, None)
        lacking = trace.lacks_input(own)
        if lacking is not None:
            raise FitError(f"{trace.path} lacks the input of layer {lacking}; collect it again with --inputs")
        return own
    found = farther(trace.sources, horizon)
    first, recorded = trace.manifest.model.moe_layers[0], set(trace.sources)
    for target, nearest in trace.sources.items():
        if horizon > 1 and nearest is not None and nearest != first and nearest not in recorded:
            raise FitError(
                f"{trace.path} lacks what layer {target} would read at horizon {horizon}; collect it with --layers all"
            )
    return found


def choose_targets(trace: Trace, config: FitConfig) -> list[Target]:
    """The targets of a run with the settings `config`.

    Raises `FitError` if there are none, or the budget is too small.
    """
    layers, budget, model = config.layers, config.budget, trace.manifest.model
    if model.top_k >= model.num_experts:
        raise FitError(
            f"the routers of {model.name} choose all {model.top_k} experts for every token; nothing is to be guessed"
        )
    sources = sources_in(trace, config.source, config.horizon)
    named = sources.keys() if isinstance(layers, str) else set(layers)
    if unknown := sorted(named - sources.keys()):
        raise FitError(f"layer {unknown[0]} is no target of {trace.path}; it has {', '.join(map(str, sources))}")
    sources = {target: sources[target] for target in sources if target in named}
    if not sources:
        raise FitError("no layer is named; give --layers all, auto, or layer numbers like 0,1,5")
    rates = hit_rates_of(trace, sources) if layers == "auto" or budget is not None else {}
    if layers == "auto":
        below = {target: source for target, source in sources.items() if rates[target] < config.threshold}
        if not below:
            raise FitError(
                f"no layer's training-free hit rate is below the threshold of {config.threshold} (the lowest is "
                f"{min(rates.values()):.3f}); raise --threshold or give --layers all"
            )
        sources = below
    widths = dict.fromkeys(sources, config.width)
    if budget is not None:
        widths = share_out(
            trace, {target: 1 - rates[target] for target in sources}, budget, config.memory, form_of(trace, config)
        )
    return [Target(target, source, widths[target]) for target, source in sources.items()]


def form_of(trace: Trace, config: FitConfig) -> Form:
    """The form of a run's predictors. Raises `FitError` if the trace does not hold what it needs."""
    recorded = trace.manifest.form
    if recorded is Form.DIRECT and config.form == "correcting":
        raise FitError(
            f"the residual of {trace.manifest.model.name} can't be followed, so there is nothing to correct; leave --form out"
        )
    return recorded if config.form is None else Form(config.form)


def loss_of(trace: Trace, form: Form, layers: Iterable[int]) -> str:
    """The name of the loss that is best by default for predictors of a `form` of these target layers; see `losses`."""
    return "kl" if form is Form.CORRECTING or all(_chooses_by_logits(trace, layer) for layer in layers) else "choice"


def _chooses_by_logits(trace: Trace, layer: int) -> bool:
    """Whether a router chooses the largest of what it returns as its logits, and these are no probabilities, on a sample of rows."""
    names = [Column.EXPERT_IDS.of(layer), Column.ROUTER_LOGITS.of(layer)]
    ids, logits = trace.read(0, torch.arange(min(LOSS_ROWS, trace.manifest.shards[0].rows)), names).values()
    # Rounding to bfloat16 makes some logits equal, and changes no order. Of a softmax no value is below 0.
    chosen = logits.gather(-1, ids.long()).sort(descending=True).values
    return torch.equal(chosen, logits.topk(ids.shape[-1]).values) and bool((logits < 0).any())


def hit_rates_of(trace: Trace, sources: dict[int, int | None]) -> dict[int, float]:
    """Training-free hit rate of each target with these `sources`, on a sample of the trace."""
    recorded = {(entry.layer, entry.source): entry.training_free for entry in trace.manifest.layers}
    if recorded.keys() >= sources.items():  # measured by `collect`, on the same sample
        return {target: recorded[target, source] for target, source in sources.items()}
    parts = trace.sample(SAMPLE_ROWS, trace.columns_for(sources))
    [rates] = hit_rates(parts, sources, trace.stacked(sources), [trace.manifest.model.top_k])
    return rates


def share_out(
    trace: Trace, gaps: dict[int, float], budget: str, memory: int, form: Form = Form.CORRECTING
) -> dict[int, int]:
    """The width of each target's predictor of a `form` that remembers `memory` tokens, so that all take at most `budget` in bfloat16.

    The share of a layer's gap to 1 that its predictor closes grows about with the logarithm of its width
    (docs/predictors.md). So one more unit of width is worth the gap over the width, and the best widths follow the
    gaps.
    """
    model = trace.manifest.model
    fixed, one = (KINDS[form].count(model.hidden_size, model.num_experts, width, memory) for width in (0, 1))
    steps = (parameters_in(trace, budget) - fixed * len(gaps)) // (WIDTH_STEP * (one - fixed))
    if steps < len(gaps):
        least = (fixed + WIDTH_STEP * (one - fixed)) * len(gaps) * BYTES_OF_A_PARAMETER
        raise FitError(
            f"a budget of {budget} is too small for {len(gaps)} predictors, which take {least:,} bytes at the least; give "
            "a larger --budget or fewer --layers"
        )
    shares = dict.fromkeys(gaps, 1)
    for _ in range(steps - len(gaps)):  # each step goes where it is worth most
        best = max(gaps, key=lambda target: gaps[target] / shares[target])
        shares[best] += 1
    return {target: WIDTH_STEP * share for target, share in shares.items()}


def parameters_in(trace: Trace, budget: str) -> int:
    """How many parameters a budget allows. Raises `FitError` if it is neither bytes nor a share."""
    text = budget.strip()
    try:
        if not text.endswith("%"):
            # A run of an older release may have recorded bytes without their unit.
            return (int(text) if text.isdecimal() else parse_bytes(text)) // BYTES_OF_A_PARAMETER
        share = float(text[:-1]) / 100
    except ValueError as error:
        raise FitError(f"a budget can't be {budget}; give bytes like 2MB, or a share like 1%") from error
    if not 0 < share <= 1:
        raise FitError(f"a budget can't be {budget}; give a share between 0 and 100%")
    return int(share * parameters_beside_experts(trace))


def parameters_beside_experts(trace: Trace) -> int:
    """Parameters of the recorded model without its routed experts, counted on its config."""
    model = skeleton(AutoConfig.from_pretrained(trace.path))
    experts = {id(p) for module in expert_modules(model).values() for p in module.parameters(recurse=False)}
    return sum(p.numel() for p in model.parameters() if id(p) not in experts)
