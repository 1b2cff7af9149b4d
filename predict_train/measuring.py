"""The job `bench`: a model, a routing, and all figures as plain JSON values."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from .data_collection.trace import Trace
from .predictors.checkpoint import Predictors, load_predictors
from .predictors.discovery import find_moe_layers
from .predictors.errors import UserError
from .predictors.loading import check_tokens, load_tokenizer, read_model_config, resolve_device
from .predictors.provenance import command, hardware, versions
from .running import quantization_asked
from .runtime.host.cache import Eviction
from .runtime.load import load_to_host
from .runtime.measure.accelerated import accelerated
from .runtime.measure.bench import Round, Way, parse_ways, results
from .runtime.measure.bench import bench as measure
from .runtime.measure.replay import replay
from .runtime.measure.routing import PRESETS, ReplayedRouting, draw_routing
from .runtime.measure.settings import BenchConfig, PlanConfig


def bench(config: BenchConfig, console: Console) -> dict[str, Any]:
    """Measures every way to run a model; prints each round on `console`."""
    parse_ways(config.policies)
    device = resolve_device(config.device)
    model, token_ids = _load(config)
    predictors = None if config.predictors is None else load_predictors(config.predictors, model)
    layers = find_moe_layers(model)
    top_k, experts, fetched = layers[0].top_k, layers[0].num_experts, config.candidates
    m = fetched if isinstance(fetched, int) else min((2 if fetched else 1) * top_k + 2, experts)
    sizes = {"layers": len(layers), "num_experts": experts, "top_k": top_k, "candidates": max(m, top_k)}
    kind = config.routing or ("model" if config.random_weights is None else "synthetic")
    routing = None
    if kind != "model" and config.eviction is Eviction.LEARNED:
        raise UserError(
            "eviction learned reads what the model's own routers say, so it can't be measured with another routing; leave out "
            "routing, or see what plan says"
        )
    if kind != "model":
        routing = routing_of(kind, config, config.warmup + config.tokens, predictors, sizes)
    packed = config.pack is not None
    # Accelerate loads no GGUF file. A random model can be saved if its experts are in it.
    saved = config.gguf is None and (config.model is not None or not (packed or config.quantize))
    reference = partial(accelerated, model, config.model, device) if saved else None

    def tell(way: Way, r: Round) -> None:
        console.print(f"{way}: {1000 * r.seconds_per_token:.2f} ms per token", style="dim")

    measured = measure(model, token_ids, config, predictors, routing, reference, tell)
    return {
        "results": results(measured),
        "skipped": {str(way): why for way, why in measured.skipped.items()},
        "model": config.model or f"random weights of {config.random_weights}",
        "predictors": config.predictors,
        "routing": {"routing": "the model's own"} if routing is None else routing.source,
        "settings": {
            "slots": measured.slots,
            "experts": len(layers) * experts,
            **{name: getattr(config, name) for name in ("candidates", "horizon", "eviction", "readers")},
            **{name: getattr(config, name) for name in ("tokens", "warmup", "rounds")},
            "prompt_tokens": token_ids.shape[-1],
            "store": "packed file" if packed else "host memory",
            "quantized": quantization_asked(config),
            "device": str(device),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "expert_bytes": measured.expert_bytes,
        "link_bytes_per_second": measured.link,
        "hardware": hardware(),
        "versions": versions(),
        "command": command(),
    }


def _load(config: BenchConfig) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model, not offloaded, and the token ids `[1, length]` of its prompt."""
    source: Any = config.model if config.random_weights is None else read_model_config(config.random_weights)
    model = load_to_host(source, config)
    if config.model is None:
        size = model.config.get_text_config().vocab_size
        return model, torch.randint(size, (1, 32), generator=torch.Generator().manual_seed(config.seed))
    token_ids: torch.Tensor = load_tokenizer(config.model)(config.prompt, return_tensors="pt")["input_ids"]
    if token_ids.shape[-1] == 0:
        raise UserError("the prompt is empty; give --prompt some text to go on from")
    check_tokens(token_ids, model)
    return model, token_ids


def routing_of(
    kind: str, config: BenchConfig | PlanConfig, steps: int, predictors: Predictors | None, sizes: dict[str, int]
) -> ReplayedRouting:
    """A drawn routing (`synthetic`), or the routing of the trace in the folder `kind`."""
    if kind == "synthetic":
        if config.preset not in PRESETS:
            raise UserError(f"there is no preset {config.preset}; give {' or '.join(PRESETS)}")
        given = {name: getattr(config, name) for name in ("kept", "hit_rate", "skew")}
        given = {name: value for name, value in given.items() if value is not None}
        given |= {} if config.kept is None else {"curve": None}
        return draw_routing(replace(PRESETS[config.preset], **given), steps=steps, seed=config.seed, **sizes)
    return replay(Trace.open(kind), steps, sizes["candidates"], predictors, config.horizon)
