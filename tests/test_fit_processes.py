"""Training in several processes, and training that is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import alone
import pytest
import torch
from conftest import write_own_files
from predict_train.data_collection.trace import Trace
from predict_train.train.data import TraceBlocks, TraceData, TraceLoader

from predict_train import cli

ROOT = Path(__file__).resolve().parent.parent


def arguments(trace: Path, out: Path, *more: object) -> list[str]:
    return [*map(str, ["fit", trace, "--out", out, "--width", 32, "--batch-size", 128, "--device", "cpu", *more])]


def run(*given: Any) -> None:
    """A training in this process, which has the libraries already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["predict-train", *arguments(*given)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code


def run_alone(given: list[str], log: Path) -> None:
    """The job of a process of its own: a training by the command line."""
    sys.stdout = sys.stderr = log.open("w")
    sys.argv = ["predict-train", *given]
    cli.main()


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_each_step_and_see_each_row_once(collected, world):
    trace = Trace.open(collected)
    data = TraceData(trace, trace.sources, 128, 0.1, 0, 0)
    plan = data.train_dataloader().dataset.plan
    every = TraceLoader(TraceBlocks(trace, plan, data.names), batch_size=None)
    shares = [TraceLoader(TraceBlocks(trace, plan, data.names, rank, world), batch_size=None) for rank in range(world)]
    rows = 0
    for whole, *parts in zip(every, *shares, strict=True):
        assert {part.in_all for part in parts} == {whole.in_all} == {len(whole.columns["layers.0.expert_ids"])}
        sizes = [len(part.columns["layers.0.expert_ids"]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        joined = torch.cat([part.columns["layers.1.router_logits"] for part in parts]).float()
        expected = whole.columns["layers.1.router_logits"].float()
        assert torch.equal(joined.sum(1).sort().values, expected.sum(1).sort().values)
        rows += whole.in_all
    assert rows == sum(map(len, data.train_rows))


def test_two_gloo_processes_reach_what_one_does(collected, tmp_path, forkserver):
    """In a folder with files of the user that have the names of the rooms. The second is a new Python, begun by the first."""
    write_own_files(tmp_path)
    settings = ("--epochs", 2, "--precision", "32-true", "--no-reuse", "--batch-size", 512)
    run(collected, tmp_path / "one", *settings)
    shared = arguments(collected, tmp_path / "two", *settings, "--devices", 2, "--strategy", "ddp")
    environment, log = os.environ | {"PYTHONPATH": str(ROOT), "ONLY_OURS": "1"}, tmp_path / "log"
    begun = ("predict_train", shared, str(tmp_path), environment, str(log))
    assert alone.exit_code(forkserver, alone.module, *begun, within=250) == 0, log.read_text()
    assert log.read_text().count("mean hit rate") == 1
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert one["mean"]["predictor"] > one["mean"]["training_free"]
    assert two["mean"]["training_free"] == pytest.approx(one["mean"]["training_free"], abs=1e-9)
    for mine, both in zip(one["layers"], two["layers"], strict=True):
        assert both["predictor"]["recall@k"] == pytest.approx(mine["predictor"]["recall@k"], abs=0.02)


def test_a_killed_training_is_resumed_to_what_it_would_have_become(collected, tmp_path, forkserver):
    settings = ("--epochs", 2)
    out = tmp_path / "killed"
    run(collected, tmp_path / "first", *settings)
    log = tmp_path / "log"
    process = forkserver.Process(target=run_alone, args=(arguments(collected, out, *settings), log))
    process.start()
    last = out / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert last.exists()
    assert not (out / "result.json").exists()
    run(collected, out, *settings, "--resume")
    resumed, whole = result(out), result(tmp_path / "first")
    assert resumed["mean"] == pytest.approx(whole["mean"], abs=1e-9)
    assert resumed["layers"] == whole["layers"]
