"""The job `plan`: what a model would take on some machine, and in words whether it fits, how, and what would help most."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from .measuring import routing_of
from .predictors.checkpoint import Predictors, as_predictors
from .predictors.errors import UserError
from .predictors.loading import read_model_config, resolve_dtype
from .predictors.provenance import command, versions
from .runtime.engines import check_eviction
from .runtime.errors import StoreError
from .runtime.host.cache import Eviction
from .runtime.measure import plan as planning
from .runtime.measure.machine import Machine, free_ram, measured_bandwidth, measured_disk, measured_link
from .runtime.measure.routing import ReplayedRouting
from .runtime.measure.settings import PlanConfig
from .runtime.measure.verdict import Place, Verdict, place_of
from .runtime.policy import Policy
from .runtime.quantization import Quantization, Shipped
from .runtime.room import cache_bytes, free_memory, reserve_of
from .runtime.shipped import refuse_quantizing, rooms_of, shipped_form

Form = Quantization | Shipped | None
SHORT = 24
"""Tokens that count where a time is only compared with another one."""
DOUBLED = {
    "link": "a link twice as fast",
    "device_memory": "twice the memory of the device",
    "memory_bandwidth": "memory of the device that is twice as fast",
    "ram": "twice the memory of the host",
    "disk": "a disk twice as fast",
}
"""By field of `Machine`, what it is called where it is doubled."""


class Case(NamedTuple):
    """A model with its experts in one form on one machine."""

    shape: planning.Shape
    machine: Machine
    hardware: planning.Hardware
    fitting: int
    """The most slots that fit."""
    slots: int
    place: Place


class Model:
    """What is planned, on whatever machine and in whatever form."""

    def __init__(
        self, config: PlanConfig, pretrained: PretrainedConfig, dtype: torch.dtype | None, predictors: Predictors | None
    ):
        self.config, self.pretrained, self.dtype, self.predictors = config, pretrained, dtype, predictors
        self._counted: planning.Counted | None = None
        self._shapes: dict[Form, planning.Shape] = {}
        self._cached: int | None = None
        self._routings: dict[int, ReplayedRouting] = {}
        """By the tokens that count. The same in every form and on every machine."""

    def shape(self, form: Form) -> planning.Shape:
        """Raises what `read_shape` raises."""
        if form not in self._shapes:
            rooms = None
            if form is Shipped.GGUF and self.config.gguf is not None:
                rooms = rooms_of(self.config.model, self.pretrained, self.config.gguf)
            self._counted = self._counted or planning.Counted.of(self.pretrained)
            self._shapes[form] = planning.read_shape(self._counted, self.dtype, form, rooms)
        return self._shapes[form]

    def case(self, machine: Machine, form: Form) -> Case:
        """Raises `PlanError` where it does not fit, and `StoreError` where the experts can't have the form."""
        config, shape = self.config, self.shape(form)
        fitting = planning.slots_that_fit(shape, machine.device_memory, self.kept(machine, shape.dtype))
        slots = fitting if config.slots is None else config.slots
        if config.expert_memory is not None:
            slots = min(config.expert_memory // shape.expert_bytes, shape.layers * shape.num_experts)
        if not shape.top_k <= slots <= fitting:
            raise UserError(f"{slots} slots are asked for; from {shape.top_k} (the top k) to {fitting} fit this device")
        place = place_of(shape, slots, machine)
        hardware = planning.Hardware(
            memory_bandwidth=machine.memory_bandwidth,
            link=machine.disk if place is Place.FILE and machine.is_cuda and machine.disk else machine.link,
            latency=None if config.latency is None else 1e-6 * config.latency,
            launch=None if config.launch is None else 1e-6 * config.launch,
            is_cuda=machine.is_cuda,
            decides=machine.is_cuda
            and place is not Place.FILE
            and form is not Shipped.GGUF
            and slots >= shape.layers * shape.top_k,
        )
        return Case(shape, machine, hardware, fitting, slots, place)

    def kept(self, machine: Machine, dtype: torch.dtype) -> int:
        """Bytes of the device for keys and values, and in reserve."""
        if self._cached is None:
            self._cached = cache_bytes(self.pretrained, self.config.context, dtype)
        return self._cached + reserve_of(self.config, machine.device_memory)

    def rows(self, case: Case, tokens: int, policies: tuple[Policy, ...] = tuple(Policy)) -> list[dict[str, Any]]:
        """What each of some policies takes, measured over so many tokens; see `planning.plan`."""
        config, shape = self.config, case.shape
        routing = self.routing(case, tokens)
        sources = planning.sources_of(shape, self.predictors, config.horizon)
        mlps = 0 if self.predictors is None else sum(entry.nbytes for entry in self.predictors.layers)
        costs = planning.costs_of(shape, case.hardware, mlps // shape.layers)
        settled = config.model_copy(update={"slots": case.slots, "expert_memory": None})
        return planning.plan(costs, routing, shape, settled, case.machine.is_cuda, sources, policies)

    def routing(self, case: Case, tokens: int) -> ReplayedRouting:
        """The routing of twice so many tokens: the first half fills the slots."""
        config, shape = self.config, case.shape
        if tokens in self._routings:
            return self._routings[tokens]
        m = max(config.candidates or min(shape.top_k + 2, shape.num_experts), shape.top_k)
        sizes = {name: getattr(shape, name) for name in ("layers", "num_experts", "top_k")} | {"candidates": m}
        self._routings[tokens] = routing_of(config.routing, config, 2 * tokens, self.predictors, sizes)
        return self._routings[tokens]

    def milliseconds(self, machine: Machine, form: Form, policy: Policy) -> float | None:
        """About what a token takes. None where the model does not fit."""
        try:
            [row] = self.rows(self.case(machine, form), min(SHORT, self.config.tokens), (policy,))
        except (UserError, StoreError):
            return None
        return float(row["time_per_output_token_ms"])


def plan(config: PlanConfig) -> dict[str, Any]:
    """Computes a model's time and memory on some machine, from its config alone."""
    dtype = resolve_dtype(config.dtype, torch.device("cuda"))  # on CUDA, auto leaves it to the config
    pretrained = read_model_config(config.model)
    shipped = shipped_form(pretrained) if config.gguf is None else Shipped.GGUF
    if shipped is not None:
        refuse_quantizing(config.gguf or config.model, shipped, config.quantize)
    asked: Form = shipped or config.quantize
    planned = Model(
        config, pretrained, dtype if isinstance(dtype, torch.dtype) else None, as_predictors(config.predictors)
    )
    planned.shape(asked)  # what can't be planned is told before the machine is measured
    machine = machine_of(config)
    forms: tuple[Form, ...] = (None, *Quantization) if shipped is None else (shipped,)
    form, case = _first_that_fits(
        planned, machine, [asked, *(other for other in forms if other != asked and config.quantize is None)]
    )
    rows = planned.rows(case, config.tokens)
    result = {
        "results": rows,
        "model": config.model,
        "shape": asdict(case.shape) | {"dtype": str(case.shape.dtype).removeprefix("torch.")},
        "machine": asdict(machine),
        "hardware": asdict(case.hardware),
        "slots": case.slots,
        "experts": case.shape.layers * case.shape.num_experts,
        "expert_bytes": case.shape.expert_bytes,
        "formats": {name_of(other): _fitting(planned, machine, other) for other in forms},
        "resident_bytes": case.shape.resident_bytes,
        "routing": planned.routing(case, config.tokens).source,
        "versions": versions(),
        "command": command(),
    }
    return result | {"verdict": asdict(_verdict(planned, case, form, asked, rows, forms))}


def machine_of(config: PlanConfig) -> Machine:
    """The machine that `config` describes. What it leaves out is read off this one.

    Raises `UserError` where a GPU would have to be measured and there is none, and `OffloadError` for an eviction that the machine
    can't have, before anything is measured.
    """
    has_gpu = torch.cuda.is_available()
    is_cuda = (config.device_memory is not None or has_gpu) if config.cuda is None else config.cuda
    missing = [name for name in ("device_memory", "link", "memory_bandwidth") if getattr(config, name) is None]
    if is_cuda and missing and not has_gpu:
        raise UserError(
            f"this machine has no GPU to measure; give --{missing[0].replace('_', '-')} of the one that is planned for, or --no-cuda"
        )
    check_eviction(Eviction(config.eviction), not is_cuda)
    device, here = torch.device("cuda" if is_cuda and has_gpu else "cpu"), Path.cwd()
    ram = free_ram() if config.ram is None and config.device_memory is None and is_cuda else config.ram
    disk = measured_disk(here) if config.disk is None and ram is not None and is_cuda else config.disk
    return Machine(
        is_cuda=is_cuda,
        device_memory=free_memory(device) if config.device_memory is None else config.device_memory,
        memory_bandwidth=config.memory_bandwidth or measured_bandwidth(device),
        link=config.link or (measured_link(device) if is_cuda else measured_disk(here)),
        ram=ram,
        disk=disk,
    )


def _first_that_fits(planned: Model, machine: Machine, forms: list[Form]) -> tuple[Form, Case]:
    """The first form in which the model fits. Raises what the first one raises where there is none."""
    error: Exception | None = None
    for form in forms:
        try:
            return form, planned.case(machine, form)
        except (planning.PlanError, StoreError) as found:
            error = error or found
    assert error is not None
    raise error


def _fitting(planned: Model, machine: Machine, form: Form) -> dict[str, int] | None:
    """The bytes of an expert, and how many fit on the device. None where the experts can't have the form."""
    try:
        shape = planned.shape(form)
        slots = planning.slots_that_fit(shape, machine.device_memory, planned.kept(machine, shape.dtype))
        return {"expert_bytes": shape.expert_bytes, "slots": slots}
    except StoreError:
        return None
    except planning.PlanError:
        return {"expert_bytes": shape.expert_bytes, "slots": 0}


def name_of(form: Form) -> str:
    return "unquantized" if form is None else str(form)


def _verdict(
    planned: Model, case: Case, form: Form, asked: Form, rows: list[dict[str, Any]], forms: tuple[Form, ...]
) -> Verdict:
    """What to do with a model, from the `rows` of its case."""
    exact = [row for row in rows if row["policy"] in (Policy.ON_DEMAND, Policy.PREFETCH)]
    best = min(exact, key=lambda row: row["time_per_output_token_ms"])
    policy = Policy(best["policy"])
    own = planned.milliseconds(case.machine, form, policy)
    assert own is not None, "it is the case that was planned"
    others = {name_of(other): planned.milliseconds(case.machine, other, policy) for other in forms if other != form}
    helped: dict[str, float] = {}
    for field, name in DOUBLED.items():
        value = getattr(case.machine, field)
        time = (
            None if value is None else planned.milliseconds(replace(case.machine, **{field: 2 * value}), form, policy)
        )
        if time is not None:
            helped[name] = time / own
    kept = planned.kept(case.machine, case.shape.dtype)
    return replace(
        Verdict.of(case.shape, case.place, case.slots, kept, best, rows),
        form=name_of(form),
        asked=name_of(asked),
        others={name: time / own for name, time in others.items() if time is not None},
        helped=helped,
        command=_command(planned.config, case, form, policy),
    )


def _command(config: PlanConfig, case: Case, form: Form, policy: Policy) -> str:
    """The command that runs the model so."""
    # A config alone is no model that could be run.
    model = "YOUR_MODEL" if Path(config.model).is_file() else config.model
    words = ["predict-train", "generate", model]
    words += [] if config.predictors is None else ["--predictors", str(config.predictors)]
    words += ["--quantize", str(form)] if isinstance(form, Quantization) else []
    words += [] if config.gguf is None else ["--gguf", str(config.gguf)]
    if case.place is Place.FILE:
        name = f"{Path(model).name or 'model'}.experts"
        words += ["--pack", f"{name}.{form}" if form else name]
    return shlex.join([*words, "--slots", str(case.slots), "--policy", str(policy), "--prompt", "..."])
