"""Predicts how long a token takes on some hardware: from a model's shape, the cost of each step, and a simulation."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...predictors.architecture import UnsupportedModelError, skeleton
from ...predictors.checkpoint import Predictors
from ...predictors.errors import UserError
from ...predictors.experts import count_of, expert_modules, marks_of
from ..automatic import AUTO
from ..formats import laid_out
from ..formats.full import FullFormat
from ..formats.registry import QUANTIZED
from ..policy import Gating, Policy
from ..quantization import Quantization, Shipped
from ..room import ghost_pass
from ..settings import OffloadConfig, Slots
from ..targets import sources_read
from .routing import ReplayedRouting
from .simulation import Costs, nearest, simulate

KERNELS = {"layer": 30, "expert": 5, "speculation": 12, "rest": 10}
"""How many operations each of these starts in a decode step where the host decides, one by one, counted on Qwen3-MoE. A
speculation starts 9 without a predictor and 20 with one, which only some layers have. On CUDA an operation costs its `launch` if
it takes no longer by itself. On a CPU it always costs it, since a CPU does not start one operation while it computes another."""
DEVICE_KERNELS = {"layer": 75, "expert": 0.6, "speculation": 4, "rest": 10}
"""The same where the device decides and the step is replayed: kernels are smaller, all experts of a layer are computed by a few,
and the guess itself runs beside. A kernel costs its `launch` if it takes no longer by itself."""
LAUNCH, DEVICE_LAUNCH = 10e-6, 2.6e-6
LATENCY, DEVICE_LATENCY = 10e-6, 2e-6
"""Defaults of `Hardware`, in seconds."""
DEVICE_READS = 0.93
"""The share of the link's bandwidth that a kernel reaches which reads host memory. With it and the constants above, this module's
times are within 10% of the measured ones in all 25 cases of benchmarks/results/gpu.json."""


class PlanError(UserError):
    """A model can't be planned on this hardware. The message says why and what to do."""


@dataclass(frozen=True)
class Shape:
    """The facts of a model that decide its speed at batch size 1. Bytes are bytes of weights."""

    layers: int
    """MoE layers."""
    places: tuple[int, ...]
    """The numbers of the MoE layers among all layers."""
    num_experts: int
    top_k: int
    expert_bytes: int
    layer_bytes: int
    """Mean bytes of an MoE layer without its routed experts."""
    rest_bytes: int
    """Everything else that a token reads: dense layers, norm and head. Of an embedding it reads one row, which does not count."""
    resident_bytes: int
    """Everything but the routed experts."""
    router_bytes: int
    """One layer's router, which a speculation reads again."""
    dtype: torch.dtype
    """Of all weights but the experts."""


@dataclass(frozen=True)
class Hardware:
    """The speeds of a device, in bytes per second and seconds."""

    memory_bandwidth: float
    """Bandwidth of the device's memory. At batch size 1 a computation takes as long as reading its weights."""
    link: float
    """Bandwidth from the store of the experts to the device."""
    latency: float | None = None
    """Time of one copy in addition to its bytes."""
    launch: float | None = None
    """Time to start one operation: from Python through torch, or where the device decides within a graph."""
    is_cuda: bool = True
    """Whether copies are enqueued on a stream, and so can't be cancelled."""
    decides: bool = False
    """Whether it is a GPU that decides what is copied; see `runtime.device`."""


class Counted(NamedTuple):
    """A model without memory whose experts have been counted. One is enough for its shapes in all forms."""

    config: PretrainedConfig
    model: PreTrainedModel
    top_ks: dict[str, int]
    """By the names of its experts modules."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> Self:
        """Raises `UnsupportedModelError` for a model whose experts are not stacked in one module."""
        model = skeleton(config).eval()
        top_ks: dict[str, int] = {}
        if expert_modules(model):
            try:
                top_ks = ghost_pass(config, 8, lambda: model).top_ks
            except RuntimeError as error:
                raise UnsupportedModelError(
                    f"the experts of {config.model_type} can't be counted, since what it computes depends on values "
                    f"({str(error).splitlines()[0]}); bench can still measure it"
                ) from error
        if 0 in top_ks.values():
            raise UnsupportedModelError(
                f"by this config a router of {config.model_type} chooses no expert; correct the config"
            )
        if not top_ks:
            raise UnsupportedModelError(
                f"{config.model_type} is not a mixture-of-experts model whose experts are stacked in one module; only such can be planned"
            )
        return cls(config, model, top_ks)


def read_shape(
    config: PretrainedConfig | Counted,
    dtype: torch.dtype | None = None,
    quantize: Quantization | Shipped | None = None,
    rooms: Mapping[str, int] | None = None,
) -> Shape:
    """The shape of a mixture-of-experts model, from its config. It needs no memory for the weights.

    `dtype` is by default the config's own, or else bfloat16. `quantize` is the form of the experts alone; for `rooms` see
    `QuantizedFormat.of`. Raises what `Counted.of` raises, and `StoreError` where the experts can't be quantised so.
    """
    given, model, top_ks = config if isinstance(config, Counted) else Counted.of(config)
    text = given.get_text_config()
    dtype = dtype or getattr(text, "dtype", None) or torch.bfloat16
    modules = expert_modules(model)
    name = next(iter(top_ks))
    count = count_of(modules[name])
    sizes = {n: p.numel() * dtype.itemsize for n, p in model.named_parameters()}
    experts = sum(size for n, size in sizes.items() if n.rpartition(".")[0] in top_ks)
    decoders = {_decoder(name) for name in top_ks}
    layers = sum(size for n, size in sizes.items() if n.rpartition(".")[0] not in top_ks and _decoder(n) in decoders)
    resident = sum(sizes.values()) - experts
    embedding: Any = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    looked_up = 0 if tied else embedding.weight.numel() * dtype.itemsize
    expert_bytes = experts // (len(top_ks) * count)
    if quantize is not None:
        module = modules[name]
        tensors = {part: (dtype, p.shape[1:]) for part, p in module.named_parameters(recurse=False)}
        kind = QUANTIZED[quantize]
        expert_bytes = kind.of(FullFormat(*laid_out(tensors)), bool(marks_of(module).is_transposed), rooms).bytes
    return Shape(
        layers=len(top_ks),
        places=tuple(int(_decoder(name).rpartition(".")[2]) for name in top_ks),
        num_experts=count,
        top_k=top_ks[name],
        expert_bytes=expert_bytes,
        layer_bytes=layers // len(top_ks),
        rest_bytes=resident - layers - looked_up,
        resident_bytes=resident,
        router_bytes=count * text.hidden_size * dtype.itemsize,
        dtype=dtype,
    )


def _decoder(name: str) -> str:
    """The decoder layer that contains something of this dotted name: the name up to its first number, or an empty one."""
    found = re.match(r"(.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else ""


def costs_of(shape: Shape, hardware: Hardware, predictor_bytes: int = 0) -> Costs:
    """The costs of a decode step. `predictor_bytes` is the size of one layer's predictor."""

    decides = hardware.decides
    launch = hardware.launch if hardware.launch is not None else DEVICE_LAUNCH if decides else LAUNCH
    latency = hardware.latency if hardware.latency is not None else DEVICE_LATENCY if decides else LATENCY
    kernels = DEVICE_KERNELS if decides else KERNELS

    def reading(size: int, part: str) -> float:
        read, started = size / hardware.memory_bandwidth, kernels[part] * launch
        return max(read, started) if hardware.is_cuda else read + started

    return Costs(
        layer=reading(shape.layer_bytes, "layer"),
        expert=reading(shape.expert_bytes, "expert"),
        copy=latency + shape.expert_bytes / (hardware.link * (DEVICE_READS if decides else 1)),
        rest=reading(shape.rest_bytes, "rest"),
        speculation=reading(shape.router_bytes + predictor_bytes, "speculation"),
        # On a CPU a copy reads and writes a block in the memory of the weights. A GPU's memory is so fast that its link
        # does not matter.
        beside=0.0 if hardware.is_cuda else 2 * shape.expert_bytes / hardware.memory_bandwidth,
    )


def slots_that_fit(shape: Shape, memory: int, reserve: int) -> int:
    """How many experts fit on a device beside all other weights and `reserve` bytes (activations, keys and values).

    Raises `PlanError` where not even one layer's top k fit.
    """
    slots = min((memory - shape.resident_bytes - reserve) // shape.expert_bytes, shape.layers * shape.num_experts)
    if slots < shape.top_k:
        least = shape.resident_bytes + reserve + shape.top_k * shape.expert_bytes
        raise PlanError(
            f"the device holds {memory / 2**30:.1f} GiB, and this model needs {least / 2**30:.1f} GiB for everything but its "
            "experts and one layer's choice of them; take a larger device, a smaller dtype, fewer bits for the experts or a smaller "
            "reserve"
        )
    return slots


def sources_of(shape: Shape, predictors: Predictors | None, horizon: int | None) -> dict[int, int | None]:
    """The source of each MoE layer, both counted from 0 among the MoE layers; see `sources_read`.

    Raises `PlanError` where the predictors belong to a model of another shape, and what `sources_read` raises.
    """
    shown = list(shape.places), shape.num_experts, shape.top_k
    own = None if predictors is None else predictors.model
    if own is not None and (own["moe_layers"], own["num_experts"], own["top_k"]) != shown:
        raise PlanError(
            f"these predictors are of a model of {len(own['moe_layers'])} layers with {own['num_experts']} experts, top "
            f"{own['top_k']}, and this one has {shape.layers} with {shape.num_experts}, top {shape.top_k}; give predictors of "
            "this model"
        )
    number = {place: count for count, place in enumerate(shape.places)}
    found = sources_read(nearest(shape.places), predictors, horizon)
    return {number[target]: None if source is None else number[source] for target, source in found.items()}


def plan(
    costs: Costs,
    routing: ReplayedRouting,
    shape: Shape,
    config: Slots,
    is_cuda: bool = True,
    sources: Mapping[int, int | None] | None = None,
    policies: Collection[Policy] = tuple(Policy),
) -> list[dict[str, Any]]:
    """One row of plain values for each policy of `policies` and gating: how long a token takes, and what limits it.

    On a CPU there is one for `auto`, too, if all policies are asked for: there it prices its copies.

    `config` gives the slots, candidates and eviction. The first half of the steps of `routing` fill the slots and do not count.
    Raises `PlanError` for a routing of another model.
    """
    if routing.ids.shape[1:] != (shape.layers, shape.top_k):
        layers, top_k = routing.ids.shape[1:]
        raise PlanError(
            f"the routing has {layers} layers, top {top_k}, and this model {shape.layers}, top {shape.top_k}; give a trace of "
            "this model"
        )
    ways: list[tuple[str, Gating | None]] = [(Policy.ON_DEMAND, None), (Policy.PREFETCH, None)]
    ways += [(Policy.SPECULATIVE, gating) for gating in (Gating.TRUE, Gating.RESIDENT)]
    ways = [way for way in ways if way[0] in policies]
    if not is_cuda and {*Policy} <= {*policies}:  # on a GPU it is one of the others, whichever is faster there
        ways.insert(2, (AUTO, None))
    rows: list[dict[str, Any]] = []
    on_demand: float | None = None
    known = config.values_of(OffloadConfig)
    for policy, gating in ways:
        settled = OffloadConfig(**known | {"policy": policy, "gating": gating or Gating.TRUE})
        result = simulate(costs, routing, settled, sources, is_cuda, warmup=routing.steps // 2)
        on_demand = on_demand or result.seconds
        rows.append(
            {
                "policy": str(policy),
                "gating": None if gating is None else str(gating),
                "time_per_output_token_ms": 1000 * result.seconds,
                "limit_ms_per_token": 1000 * result.limit,
                "compute_ms_per_token": 1000 * result.computing,
                "copy_ms_per_token": 1000 * result.copying,
                "stall_ms_per_token": 1000 * result.stalled,
                "copies_share": result.copying / result.seconds,
                "bytes_per_token": result.copies * shape.expert_bytes,
                "cache_hit_rate": result.cache_hit_rate,
                "gain_over_on_demand": 1 - result.seconds / on_demand,
                "bound": result.bound,
            }
        )
    return rows
