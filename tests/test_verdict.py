"""What `plan` advises, on machines that are described and on this one."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from predict_train.predictors.errors import UserError
from predict_train.runtime.measure.machine import Machine, measured_bandwidth, measured_disk
from predict_train.runtime.measure.plan import read_shape
from predict_train.runtime.measure.verdict import PROCESS, Place, place_of
from predict_train.runtime.room import cache_bytes
from transformers import AutoConfig

from predict_train import cli

MODEL = Path(__file__).parent.parent / "benchmarks" / "models" / "moe-1b.json"
GPU = {
    "--device-memory": "2GiB",
    "--link": "10GB/s",
    "--memory-bandwidth": "200GB/s",
    "--tokens": 12,
    "--dtype": "bfloat16",
}


def plan(out: Path, options: dict[str, object], *flags: object) -> dict[str, Any]:
    given = [part for option in options.items() for part in option]
    cli.app(["plan", str(MODEL), *(str(a) for a in (*given, *flags)), "--json", str(out)], standalone_mode=False)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_verdict_for_a_gpu(tmp_path, capsys):
    found = plan(tmp_path / "plan.json", GPU | {"--ram": "8GiB", "--disk": "3GB/s"})
    verdict, told = found["verdict"], " ".join(capsys.readouterr().out.split())
    rows = {row["policy"]: row for row in found["results"] if row["gating"] in (None, "true")}
    best = min(rows[name]["time_per_output_token_ms"] for name in ("on_demand", "prefetch"))
    assert (verdict["place"], verdict["milliseconds"]) == ("host", best)
    assert "all are in host memory" in told
    assert f"about {best:.1f} ms" in told
    # Fewer bytes are copied faster, and a faster link never makes it slower.
    assert verdict["others"]["int4"] < verdict["others"]["int8"] < 1
    assert all(share <= 1.02 for share in verdict["helped"].values())
    least = min(verdict["helped"], key=verdict["helped"].get)
    assert f"What would help most is {least}" in told or verdict["helped"][least] > 0.97
    # What is needed is there, and the experts are in host memory.
    assert verdict["device_memory"] <= 2 << 30
    assert 768 * found["expert_bytes"] < verdict["ram"] <= 8 << 30


def test_the_command_is_one_that_exists(tmp_path, capsys):
    verdict = plan(tmp_path / "plan.json", GPU | {"--ram": "2GiB", "--disk": "3GB/s"})["verdict"]
    assert verdict["place"] == "file"
    name, command, *words = shlex.split(verdict["command"])
    assert name == "predict-train"
    assert verdict["command"] in capsys.readouterr().out
    group = cli.typer.main.get_command(cli.app)
    with click.Context(group) as context:
        parsed = group.commands[command].make_context(command, words, parent=context).params
    assert (parsed["slots"], parsed["policy"]) == (str(verdict["slots"]), verdict["policy"])
    assert parsed["model"] == "YOUR_MODEL"  # the plan is of a config file
    assert "YOUR_MODEL.experts" in parsed["pack"]


def test_what_does_not_fit_is_planned_in_fewer_bits(tmp_path, capsys):
    """Unless a form is asked for."""
    shape = read_shape(AutoConfig.from_pretrained(MODEL), torch.bfloat16)
    kept = cache_bytes(AutoConfig.from_pretrained(MODEL), 1, torch.bfloat16) + 1000
    just = shape.resident_bytes + kept + 4 * shape.expert_bytes - 1  # a byte less than a layer's choice
    small = GPU | {"--device-memory": f"{just}B", "--reserve": "1kB", "--context": 1, "--slots": 4}
    verdict = plan(tmp_path / "plan.json", small)["verdict"]
    assert (verdict["asked"], verdict["form"]) == ("unquantized", "int8")
    assert "does not fit with experts as they are asked for" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="larger device"):
        plan(tmp_path / "never.json", small | {"--device-memory": "20MB"}, "--quantize", "int4")
    assert not (tmp_path / "never.json").exists()


def test_where_experts_stay():
    shape = read_shape(AutoConfig.from_pretrained(MODEL), torch.bfloat16)
    total = 768 * shape.expert_bytes
    gpu = Machine(True, 1 << 30, 1e11, 1e10, ram=total + PROCESS)
    assert place_of(shape, 768, gpu) is Place.NOWHERE
    assert place_of(shape, 767, gpu) is Place.HOST
    assert place_of(shape, 767, replace(gpu, ram=total + PROCESS - 1)) is Place.FILE
    assert place_of(shape, 767, replace(gpu, ram=None)) is Place.HOST
    assert place_of(shape, 767, replace(gpu, is_cuda=False)) is Place.FILE


def test_this_machine_is_read_where_nothing_is_said(tmp_path):
    found = plan(tmp_path / "plan.json", {"--tokens": 8, "--dtype": "bfloat16"}, "--no-cuda")
    machine = found["machine"]
    assert 1e8 < machine["device_memory"] < 1e13
    assert 1e8 < machine["memory_bandwidth"] < 1e13
    assert 1e6 < machine["link"] < 1e12
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    assert measured_bandwidth(torch.device("cpu")) > 1e8
    with pytest.raises(UserError, match="can't be measured"):
        measured_disk(tmp_path / "missing")
    if not torch.cuda.is_available():
        with pytest.raises(
            UserError, match="no GPU to measure; give --link of the one that is planned for, or --no-cuda"
        ):
            plan(tmp_path / "never.json", {"--device-memory": "2GiB"})
