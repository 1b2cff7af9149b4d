"""The system around a command: signals, a full disk, file systems without locks, environments, and terminals."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from alone import exit_code, inspect_from_a_notebook
from predict_train.data_collection.progress import LOCK, locked
from predict_train.data_collection.settings import CollectError
from predict_train.data_collection.trace import Trace
from predict_train.predictors import files
from predict_train.predictors.files import written_whole
from predict_train.runtime.measure.figures import print_bench, print_plan
from predict_train.runtime.policy import Gating, Policy
from predict_train.train import trainer
from predict_train.train.data import FitError, TraceData
from predict_train.train.fit import _report as report_fit
from predict_train.train.inspection import inspect, report
from predict_train.train.module import PredictorTraining
from rich.console import Console
from test_cli import run


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command line answers to SIGTERM, and it is called here in the process of the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fit(trace: Path, out: Path, *more: object) -> list[object]:
    return ["fit", trace, "--out", out, "--width", 16, "--epochs", 2, "--batch-size", 512, "--device", "cpu", *more]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_is_stopped_can_be_resumed(collected, tmp_path, monkeypatch, capsys, number, code):
    def stop(module: PredictorTraining) -> None:
        if module.current_epoch == 1:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(PredictorTraining, "on_train_epoch_start", stop)
        assert run(monkeypatch, *fit(collected, tmp_path / "run")) == code
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1] == f"predict-train: stopped; give --resume to go on with {tmp_path / 'run'}"
    assert not any("Traceback" in line for line in told)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(monkeypatch, *fit(collected, tmp_path / "run", "--resume")) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 2


def test_a_command_that_is_stopped_is_one_sentence(collected, monkeypatch, capsys):
    monkeypatch.setattr("predict_train.train.inspection.inspect", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert run(monkeypatch, "inspect", collected) == 143
    assert capsys.readouterr().err == "predict-train: stopped\n"


@contextmanager
def full(patch: pytest.MonkeyPatch, module: Any, after: int) -> Iterator[None]:
    """A disk that is full after so many of a module's writes."""
    writes = [0]

    @contextmanager
    def write(path: Path) -> Iterator[Path]:
        with written_whole(path) as aside:
            yield aside
            writes[0] += 1
            if writes[0] > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.context() as inner:
        inner.setattr(module, "written_whole", write)
        yield


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_ends_a_training_that_can_be_resumed(collected, tmp_path, monkeypatch, capsys):
    from predict_train.train import fit as job

    out = tmp_path / "run"
    with full(monkeypatch, job, after=0):
        assert run(monkeypatch, *fit(collected, out)) == 2
    assert "can't be written (No space left on device); make room: nothing is kept" in capsys.readouterr().err
    assert not out.exists()
    with full(monkeypatch, trainer, after=2):  # the best and the last of the first epoch
        assert run(monkeypatch, *fit(collected, out)) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.endswith(f"(No space left on device); make room: give --resume to go on with {out}")
    assert not list(out.rglob("*.partial"))
    assert run(monkeypatch, *fit(collected, out, "--resume")) == 0


@pytest.mark.parametrize("strategy", ["nonsense", "fsdp", "ddp_notebook", "ddp_spawn", "xla"])
def test_a_wrong_strategy_is_refused_before_anything_is_written(collected, tmp_path, monkeypatch, capsys, strategy):
    assert run(monkeypatch, *fit(collected, tmp_path / "run", "--strategy", strategy)) == 2
    told = capsys.readouterr().err
    assert strategy in told
    assert "give" in told
    assert "--strategy" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_sequences_without_rows_are_refused(collected):
    trace = Trace.open(collected)
    for share, what in ((0.5, "validation"), (0.5, "training")):
        rows = TraceData(trace, trace.sources, 500, share, 0, 0)
        kept = rows.train_rows if what == "validation" else rows.validation_rows
        # A sample may have left out whole sequences: those that are held out, or all others.
        sampled = Trace(collected, trace.manifest)
        for shard, own in enumerate(kept):
            sampled._columns[shard] = {"sequence": trace.column(shard, "sequence")[own]}
        sampled.unmap = lambda *_: None  # type: ignore[method-assign]
        with pytest.raises(
            FitError, match=f"the {what} sequences have no rows, .* give another --validation or --seed"
        ):
            TraceData(sampled, trace.sources, 500, share, 0, 0)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_has_soft_ones(tmp_path, monkeypatch, number):
    def lock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", lock)
    folder = tmp_path / "trace"
    with locked(folder):
        told = rf"another collect is writing .* on another machine, remove .*{LOCK}\)"
        with pytest.raises(CollectError, match=told), locked(folder):
            pass
        (folder / "kept").touch()
    assert [file.name for file in folder.iterdir()] == ["kept"]
    # A process that was killed leaves its lock, which the next one of the same machine takes over.
    child = os.fork()
    if not child:
        with locked(folder):
            os._exit(0)
    os.waitpid(child, 0)
    assert (folder / LOCK).exists()
    with locked(folder):
        pass
    assert not (folder / LOCK).exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_may_not_synchronise_folders(tmp_path, monkeypatch, number):
    synced = os.fsync

    def sync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        synced(handle)

    monkeypatch.setattr(files.os, "fsync", sync)
    broken = pytest.raises(OSError, match="Input/output error") if number == errno.EIO else nullcontext()
    with broken, written_whole(tmp_path / "folder") as aside:
        aside.mkdir()
        (aside / "file").write_text("whole")
    assert (tmp_path / "folder" / "file").exists() == (number != errno.EIO)
    assert not (tmp_path / "folder.partial").exists()


def test_figures_go_to_a_file_or_a_pipe_and_to_no_folder(collected, tmp_path, monkeypatch, capsys):
    command = ["inspect", collected, "--rows", 100, "--json"]
    (tmp_path / "folder").mkdir()
    assert run(monkeypatch, *command, tmp_path / "folder") == 2
    assert capsys.readouterr().err.strip().endswith("folder; it is a folder; name a file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run(monkeypatch, *command, tmp_path / "found.json") == 2
    assert "it can't be written; name another file" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "link.json").symlink_to(tmp_path / "found.json")
    assert run(monkeypatch, *command, tmp_path / "link.json") == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "found.json").read_text())["kind"] == "trace"
    assert run(monkeypatch, *command, "/dev/null") == 0
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "m", "--prompt", "caf\udce9"],
        ["collect", "m", "--out", "o", "--corpus", "a.txt", "--corpus", "caf\udce9"],
        ["inspect", "caf\udce9"],
    ],
)
def test_text_that_is_not_utf_8_is_refused(monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err
    assert r"caf\udce9; it can't be read as utf-8; give UTF-8" in told
    assert told.count("\n") == 1


def test_a_notebooks_environment_and_an_ascii_terminal_do_no_harm(exported, tmp_path, forkserver):
    predictors = shutil.copytree(exported, tmp_path / "predictors")
    config = json.loads((predictors / "config.json").read_text())
    config["model"]["name"] = "modèle"
    (predictors / "config.json").write_text(json.dumps(files.sealed(config)))
    told = tmp_path / "told"
    code = exit_code(forkserver, inspect_from_a_notebook, predictors, tmp_path / "figure.png", told)
    assert code == 0, told.read_bytes()
    assert rb"mod\xe8le" in told.read_bytes()
    assert b"hit rate by layer" in told.read_bytes()
    assert (tmp_path / "figure.png").stat().st_size > 1000


BENCHED = {
    "policy": Policy.SPECULATIVE, "gating": Gating.SPECULATED, "time_to_first_token_ms": 123456.0, "limit_ms_per_token": 12345.6,
    "time_per_output_token_ms": {"median": 12345.6, "min": 12345.0, "max": 23456.0}, "overlap_efficiency": 0.93,
    "hit_rate": 0.93, "cache_hit_rate": 0.93, "bytes_per_token": 1.2e11, "stall_ms_per_token": 12345.6, "peak_memory": None,
}  # fmt: skip
PLANNED = BENCHED | {
    "time_per_output_token_ms": 12345.6, "gain_over_on_demand": 1.234, "compute_ms_per_token": 12345.6,
    "copy_ms_per_token": 12345.6, "copies_share": 1.0, "bound": "launches",
}  # fmt: skip
REST = {
    "formats": {name: {"expert_bytes": 123_456_789, "slots": 120_000} for name in ("unquantized", "int8", "int4")},"slots": 12288, "experts": 12288, "expert_bytes": 123456789, "resident_bytes": 1 << 40, "skipped": {},
        "routing": {"routing": "synthetic"}, "settings": {"slots": 12288}, "link_bytes_per_second": 1e9}  # fmt: skip


def test_no_figure_is_cut_in_80_columns(collected, exported, capsys, monkeypatch):
    console = Console(width=80)
    monkeypatch.setattr("predict_train.runtime.measure.figures._peaks", lambda _: "")
    trace, predictors = inspect(collected), inspect(exported)
    predictors["model"] |= {"top_k": 16, "num_experts": 512}
    for entry in predictors["layers"]:
        entry |= {"layer": 101, "source": None, "width": 16384, "bytes": 123456789, "recall": [0.123] * 17}
    report(trace, console)
    report(predictors, console)
    print_bench(console, REST | {"results": [BENCHED]})
    print_plan(console, REST | {"results": [PLANNED]})
    rates = {"recall@k": 0.123, "recall@2k": 0.123, "exact": 0.123}
    report_fit([{"layer": 101, "source": None, "width": 16384, "training_free": rates, "predictor": rates}], console)
    told = capsys.readouterr().out
    assert "\u2026" not in told
    assert max(map(len, told.splitlines())) <= 80
    assert "123,456,789" in told
    for figure in ("12345.6", "23456", "123.4%", "120,000"):
        assert figure in told, figure
