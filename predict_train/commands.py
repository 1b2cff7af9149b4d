"""The commands that tell how fast a model runs or would run: bench, plan, and pack, which bench can measure from."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .predictors.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from .predictors.checkpoint import Predictors
    from .runtime.measure.routing import ReplayedRouting, Statistics

PROMPT = "def mean(values):\n    total = 0.0\n    for value in values:\n        total +="

Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu or cuda.")]
Json = Annotated[Path | None, typer.Option("--json", help="Writes all figures to this file.")]
PredictorsOption = Annotated[
    str | None,
    typer.Option("--predictors", help="Folder or Hub name of predictors; without them speculation is training-free."),
]
Candidates = Annotated[
    str | None,
    typer.Option(
        help="Experts fetched for each layer: a number, or auto, from the recall of the predictors "
        "[default: top k, and 2 more under resident]."
    ),
]
Horizon = Annotated[
    int | None,
    typer.Option(help="MoE layers ahead that are guessed, 1 or 2 [default: what the predictors read, or else 1]."),
]
Eviction = Annotated[str, typer.Option(help="least_stale or lru.")]
Preset = Annotated[
    str, typer.Option(help="Statistics of a synthetic routing: qwen3-30b-a3b (0.43 kept, hit rate 0.89) or moe-1b.")
]
Kept = Annotated[float | None, typer.Option(help="Share of experts kept from the previous token, over the preset's.")]
HitRate = Annotated[float | None, typer.Option(help="Hit rate of the speculation, over the preset's.")]
Skew = Annotated[float | None, typer.Option(help="Zipf exponent of how popular experts are [default: 0].")]
Seed = Annotated[int, typer.Option(help="Of whatever is drawn.")]


def bench(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub name of a mixture-of-experts model.")] = None,
    predictors: PredictorsOption = None,
    random_weights: Annotated[
        str | None,
        typer.Option(help="Instead of MODEL: config (.json file, folder or Hub name) of a model to make up."),
    ] = None,
    pack_file: Annotated[
        Path | None,
        typer.Option("--pack", help="Keeps the experts in this packed file; it is made where there is none."),
    ] = None,
    policies: Annotated[
        str,
        typer.Option(help="Of resident, on_demand, prefetch, auto, speculative (or speculative/true ...), accelerate."),
    ] = "resident,on_demand,prefetch,speculative",
    routing: Annotated[
        str | None,
        typer.Option(
            help="model (its own), synthetic, or the folder of a trace to replay "
            "[default: model; synthetic with --random-weights]."
        ),
    ] = None,
    preset: Preset = "qwen3-30b-a3b",
    kept: Kept = None,
    hit_rate: HitRate = None,
    skew: Skew = None,
    slots: Annotated[int | None, typer.Option(help="Experts on the device [default: a quarter of them].")] = None,
    candidates: Candidates = None,
    horizon: Horizon = None,
    eviction: Eviction = "least_stale",
    readers: Annotated[int, typer.Option(min=1, help="Threads that copy on the CPU or read a file.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are counted in each round.")] = 64,
    warmup: Annotated[int, typer.Option(min=0, help="Tokens before them.")] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    prompt: Annotated[
        str, typer.Option(help="Text to go on from; a model that is made up has random tokens.")
    ] = PROMPT,
    seed: Seed = 0,
    json_file: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draws the times to this .png, .pdf or .svg.")] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(help="Writes a trace of a few tokens of each policy, for Perfetto, to this .json file."),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's or the file's own), float32, bfloat16 or float16.")
    ] = "auto",
) -> None:
    """Measures every way to run MODEL with its experts offloaded, in turn, and how close each is to its limit."""
    from rich.console import Console

    from .predictors.checkpoint import load_predictors
    from .predictors.discovery import find_moe_layers
    from .predictors.loading import resolve_device
    from .predictors.provenance import command, hardware, versions
    from .runtime.measure.accelerated import accelerated
    from .runtime.measure.bench import Settings, parse_ways, results
    from .runtime.measure.bench import bench as job
    from .runtime.measure.figures import draw_bench, print_bench

    _check_outputs(plot, json_file, timeline)
    if (model is None) == (random_weights is None):
        raise UserError("give a MODEL, or --random-weights with the config of one to make up, and not both")
    ways, where = parse_ways(policies), resolve_device(device)
    loaded, token_ids = _load(model, random_weights, pack_file, dtype, prompt, seed)
    known = None if predictors is None else load_predictors(predictors, loaded)
    layers = find_moe_layers(loaded)
    top_k = layers[0].top_k
    fetched = parse_candidates(candidates)
    m = fetched if isinstance(fetched, int) else min((2 if fetched else 1) * top_k + 2, layers[0].num_experts)
    shape = {"layers": len(layers), "num_experts": layers[0].num_experts, "top_k": top_k, "candidates": max(m, top_k)}
    routing = routing or ("model" if random_weights is None else "synthetic")
    replayed = None
    if routing != "model":
        chosen = _statistics(preset, kept, hit_rate, skew)
        replayed = _routing(routing, chosen, warmup + tokens, seed, known, horizon, shape)
    settings = Settings(
        token_ids,
        where,
        tokens,
        warmup,
        rounds,
        slots,
        fetched,
        {"eviction": eviction, "readers": readers, "horizon": horizon},
        timeline,
    )
    console = Console()
    packed = pack_file is not None
    reference = None if packed and model is None else partial(accelerated, loaded, model, where)
    measured = job(
        loaded,
        ways,
        settings,
        known,
        replayed,
        reference,
        on_round=lambda way, r: console.print(f"{way}: {1000 * r.seconds_per_token:.2f} ms per token", style="dim"),
    )
    result = {
        "results": results(measured),
        "skipped": {str(way): why for way, why in measured.skipped.items()},
        "model": model or f"random weights of {random_weights}",
        "predictors": predictors,
        "routing": {"routing": "the model's own"} if replayed is None else replayed.source,
        "settings": {
            "slots": measured.slots,
            "experts": shape["layers"] * shape["num_experts"],
            "candidates": fetched,
            "horizon": horizon,
            "eviction": eviction,
            "readers": readers,
            "tokens": tokens,
            "warmup": warmup,
            "rounds": rounds,
            "prompt_tokens": token_ids.shape[-1],
            "store": "packed file" if packed else "host memory",
            "device": str(where),
            "dtype": str(loaded.dtype).removeprefix("torch."),
        },
        "expert_bytes": measured.expert_bytes,
        "link_bytes_per_second": measured.link,
        "hardware": hardware(),
        "versions": versions(),
        "command": command(),
    }
    print_bench(console, result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    if plot is not None:
        draw_bench(result, plot)


def plan(
    model: Annotated[
        str, typer.Argument(help="Config (.json file, folder or Hub name) of a mixture-of-experts model.")
    ],
    device_memory: Annotated[str, typer.Option(help="Of the device, like 24GiB.")],
    link: Annotated[str, typer.Option(help="From host memory (or the file) to the device, like 25GB/s.")],
    memory_bandwidth: Annotated[str, typer.Option(help="Of the device's own memory, like 768GB/s.")],
    reserve: Annotated[str, typer.Option(help="Device memory for activations and the keys and values.")] = "1GiB",
    launch: Annotated[float, typer.Option(min=0, help="Microseconds that starting one operation takes.")] = 10.0,
    latency: Annotated[float, typer.Option(min=0, help="Microseconds of one copy beside its bytes.")] = 10.0,
    slots: Annotated[int | None, typer.Option(help="Experts on the device [default: as many as fit].")] = None,
    routing: Annotated[str, typer.Option(help="synthetic, or the folder of a trace to replay.")] = "synthetic",
    predictors: PredictorsOption = None,
    preset: Preset = "qwen3-30b-a3b",
    kept: Kept = None,
    hit_rate: HitRate = None,
    skew: Skew = None,
    candidates: Annotated[
        int | None,
        typer.Option(min=1, help="Experts fetched for each layer [default: top k, and 2 more under resident]."),
    ] = None,
    horizon: Horizon = None,
    eviction: Eviction = "least_stale",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that count, behind as many that fill the slots.")] = 100,
    cuda: Annotated[bool, typer.Option(help="Whether copies go through a CUDA stream, or threads read them.")] = True,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="auto (the config's own), float32, bfloat16 or float16.")] = "auto",
    json_file: Json = None,
) -> None:
    """Tells what MODEL would take per token on some hardware under each policy, and what bounds it, without running it."""
    from dataclasses import asdict

    import torch
    from rich.console import Console

    from .predictors.checkpoint import load_predictors
    from .predictors.loading import resolve_dtype
    from .predictors.provenance import command, versions
    from .runtime.measure.figures import print_plan
    from .runtime.measure.plan import Hardware, costs_of, read_shape, slots_that_fit, sources_of
    from .runtime.measure.plan import plan as job

    _check_outputs(None, json_file, None)
    chosen = resolve_dtype(dtype, torch.device("cuda"))
    shape = read_shape(_config(model), chosen if isinstance(chosen, torch.dtype) else None)
    hardware = Hardware(
        memory_bandwidth=_bytes(memory_bandwidth, "--memory-bandwidth"),
        link=_bytes(link, "--link"),
        latency=1e-6 * latency,
        launch=1e-6 * launch,
        is_cuda=cuda,
    )
    fitting = slots_that_fit(shape, _bytes(device_memory, "--device-memory"), _bytes(reserve, "--reserve"))
    count = fitting if slots is None else slots
    if not shape.top_k <= count <= fitting:
        raise UserError(f"{count} slots are asked for; from {shape.top_k} (the top k) to {fitting} fit this device")
    m = candidates or min(shape.top_k + 2, shape.num_experts)
    sizes = {
        "layers": shape.layers,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "candidates": max(m, shape.top_k),
    }
    known = None if predictors is None else load_predictors(predictors)
    sources = sources_of(shape, known, horizon)
    replayed = _routing(routing, _statistics(preset, kept, hit_rate, skew), 2 * tokens, seed, known, horizon, sizes)
    mlps = 0 if known is None else sum(entry.nbytes for entry in known.layers)
    costs = costs_of(shape, hardware, mlps // shape.layers)
    result = {
        "results": job(
            costs, replayed, shape, count, is_cuda=cuda, candidates=candidates, sources=sources, eviction=eviction
        ),
        "model": model,
        "shape": asdict(shape),
        "hardware": asdict(hardware),
        "costs_seconds": asdict(costs),
        "slots": count,
        "experts": shape.layers * shape.num_experts,
        "expert_bytes": shape.expert_bytes,
        "resident_bytes": shape.resident_bytes,
        "routing": replayed.source,
        "versions": versions(),
        "command": command(),
    }
    print_plan(Console(), result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def pack(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub name of a mixture-of-experts model.")] = None,
    out: Annotated[Path | None, typer.Option(help="The packed file; it must be new.")] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(help="Instead of MODEL: config (.json file, folder or Hub name) of a model to make up."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto",
    seed: Seed = 0,
) -> None:
    """Packs MODEL's experts into one file, from which the runtime reads them as they are needed."""
    import torch

    from .predictors.loading import resolve_dtype
    from .runtime.pack import pack as job
    from .runtime.pack import pack_random

    if out is None:
        raise UserError("name the packed file to write with --out")
    if (model is None) == (random_weights is None):
        raise UserError("give a MODEL, or --random-weights with the config of one to make up, and not both")
    kind = resolve_dtype(dtype, torch.device("cuda"))  # which leaves auto to the checkpoint
    file = job(model, out, kind) if model is not None else pack_random(_config(str(random_weights)), out, kind, seed)
    print(f"{file}: {file.stat().st_size:,} bytes")


def _load(
    model: str | None, random_weights: str | None, pack_file: Path | None, dtype: str, prompt: str, seed: int
) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model, not offloaded, and the token ids `[1, length]` of its prompt."""
    import torch

    from .predictors.loading import load_tokenizer, resolve_dtype
    from .runtime.load import load_offloaded

    kind = resolve_dtype(dtype, torch.device("cuda"))  # which leaves auto to the checkpoint
    source: Any = model if random_weights is None else _config(random_weights)
    loaded = load_offloaded(source, device="cpu", dtype=kind, pack=pack_file, seed=seed)
    offload: Any = loaded.expert_offload
    offload.detach()
    if model is None:
        size = loaded.config.get_text_config().vocab_size
        return loaded, torch.randint(size, (1, 32), generator=torch.Generator().manual_seed(seed))
    token_ids: torch.Tensor = load_tokenizer(model)(prompt, return_tensors="pt")["input_ids"]
    if token_ids.shape[-1] == 0:
        raise UserError("the prompt is empty; give --prompt some text to go on from")
    return loaded, token_ids


def _config(name: str) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no config can be read from {name} ({line}); give a .json file, a folder or a Hub name"
        ) from error
    return config


def _statistics(preset: str, kept: float | None, hit_rate: float | None, skew: float | None) -> Statistics:
    from dataclasses import replace

    from .runtime.measure.routing import PRESETS

    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset}; give {' or '.join(PRESETS)}")
    given = {"kept": kept, "hit_rate": hit_rate, "skew": skew}
    return replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})


def _routing(
    kind: str,
    statistics: Statistics,
    steps: int,
    seed: int,
    predictors: Predictors | None,
    horizon: int | None,
    shape: dict[str, int],
) -> ReplayedRouting:
    """A drawn routing, or that of the trace in the folder `kind`."""
    from .runtime.measure.routing import draw_routing

    if kind == "synthetic":
        return draw_routing(statistics, steps=steps, seed=seed, **shape)
    from .data_collection.trace import Trace  # only here: `import runtime` loads no training library
    from .runtime.measure.replay import replay

    return replay(Trace.open(kind), steps, shape["candidates"], predictors, horizon)


def parse_candidates(text: str | None) -> int | str | None:
    """A number, `auto`, or None. Raises `UserError` for anything else."""
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--candidates can't be {text}; give a number or auto")
    return int(text)


def _bytes(text: str, option: str) -> int:
    """Bytes, or bytes per second, from text like 24GiB or 25GB/s."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text.removesuffix("/s")))
    except ValidationError as error:
        raise UserError(f"{option} can't be {text}; give bytes like 24GiB or 25GB/s") from error
    if size <= 0:
        raise UserError(f"{option} can't be {text}; give more than nothing")
    return size


def _check_outputs(plot: Path | None, json_file: Path | None, timeline: Path | None) -> None:
    for file in (plot, json_file, timeline):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"there is no folder {file.parent} to write {file.name} to; make it first")
    if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot can't be {plot}; give a file that ends in .png, .pdf or .svg")
