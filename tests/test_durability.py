"""Collections that are killed, that run out of disk, that meet each other, and that many processes share.

The processes are real ones: they come from a server that has imported the libraries once, and run the command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import exit_code
from predict_train.data_collection.collect import CollectConfig, collect
from predict_train.data_collection.columns import column_shapes
from predict_train.data_collection.manifest import TraceError
from predict_train.data_collection.progress import (
    LOCK,
    Plan,
    Progress,
    Snapshot,
    load_progress,
    progress_file,
    save_progress,
)
from predict_train.data_collection.trace import Trace
from predict_train.predictors.errors import UserError
from predict_train.train.settings import FitConfig
from rich.console import Console

KILLS = 5
SHARDS = 24


def logged(log: Path, job: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What a child does: the job, its output in `log`."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    job(*arguments)


def command_line(arguments: list[str], file_limit: int | None) -> None:
    """The job of a `collect`."""
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    # Children of a shell's background job ignore it, and so would this one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["predict-train", *arguments]
    from predict_train import cli

    cli.main()


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory, forkserver: ForkServerContext) -> Callable[..., BaseProcess]:
    """`begin(job, *arguments)` does a job in a process of its own; its `log` attribute is the file it prints to."""
    logs = tmp_path_factory.mktemp("logs")

    def process(job: Callable[..., None], *arguments: Any) -> BaseProcess:
        log = logs / f"{len(list(logs.iterdir()))}.txt"
        child = forkserver.Process(target=logged, args=(log, job, arguments), daemon=True)
        child.log = log
        child.start()
        return child

    return process


@pytest.fixture(scope="module")
def start(begin: Callable[..., BaseProcess]) -> Callable[..., BaseProcess]:
    """`start(config)` begins a `collect`."""
    return lambda config, file_limit=None: begin(command_line, flags(config), file_limit)


def flags(config: CollectConfig) -> list[str]:
    """The arguments of `predict-train` for `config`."""
    values = config.model_dump(mode="json", exclude_unset=True)
    arguments = ["collect", values.pop("model")]
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        unit = "B" if name.endswith("_bytes") else ""
        arguments += [flag] if value is True else [] if value is False else [flag, f"{value}{unit}"]
    return arguments


def test_a_start_imports_neither_datasets_nor_lightning(forkserver):
    # The server has imported the command line and the job, and nothing else.
    code = "import sys; sys.exit('datasets' in sys.modules or 'lightning' in sys.modules)"
    assert exit_code(forkserver, exec, code, within=60) == 0


@pytest.fixture(scope="module")
def settings(tiny_moe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a collection of some dozen small shards: documents of many lengths, one token in five left out."""
    corpus = tmp_path_factory.mktemp("many") / "texts.jsonl"
    chance = random.Random(1)
    with corpus.open("w") as lines:
        for number in range(400):
            text = f"Text {number}: " + "".join(chance.choices("abcdefghij klmnop", k=chance.randint(1, 120)))
            lines.write(json.dumps({"text": text}) + "\n")
    return {
        "model": str(tiny_moe_folder),
        "corpus": str(corpus),
        "tokens": 20_000,
        "sample": 0.8,
        "sequence_length": 64,
        "batch_size": 4,
        "shard_bytes": 20_000 * 8 * 364 // 10 // SHARDS,
        "device": "cpu",
        "seed": 3,
    }


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trace that was never interrupted."""
    return collect(CollectConfig(**settings, out=tmp_path_factory.mktemp("whole") / "trace"), Console(quiet=True))


def rows(folder: Path) -> dict[str, torch.Tensor]:
    """All columns of a trace, its shards one after another."""
    trace = Trace.open(folder)
    trace.verify()
    return {
        name: torch.cat([trace.column(shard, name) for shard in range(len(trace.manifest.shards))])
        for name in column_shapes(trace.manifest)
    }


def beside_the_rows(folder: Path) -> dict[str, Any]:
    """What a manifest says, but for the command and the time-independent names of files."""
    manifest = Trace.open(folder).manifest
    return manifest.model_dump(exclude={"command", "shards", "speculation_xxh3", "processes"})


def assert_same(folder: Path, whole: Path) -> None:
    """Row for row, and in all figures; nothing is left beside the trace."""
    expected, found = rows(whole), rows(folder)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert beside_the_rows(folder) == beside_the_rows(whole)
    for file in ("speculation.safetensors", "config.json"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()
    assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}


def wait_for(child: BaseProcess, met: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not met():
        assert child.is_alive(), child.log.read_text()
        assert time.monotonic() < until
        time.sleep(0.001)


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("shard-*.safetensors")))


def test_killed_at_random_moments_it_ends_as_if_never_interrupted(start, settings, whole, tmp_path):
    out = tmp_path / "trace"
    config = CollectConfig(**settings, out=out, resume=True)
    chance = random.Random(7)
    total = len(Trace.open(whole).manifest.shards)
    assert total >= 18
    # The first before there is a shard; the others spread over the trace, each at any moment of a shard's making.
    moments = [0, *sorted(chance.sample(range(1, 2 * total // 3), KILLS - 1))]
    reached = []
    for moment in moments:
        child = start(config)
        wait_for(child, lambda at=moment: out.exists() and shards_in(out) >= at)
        time.sleep(chance.uniform(0, 0.02))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, child.log.read_text()
        assert not (out / "manifest.json").exists()
        reached.append(shards_in(out))
    assert reached[-1] > reached[1]
    with pytest.raises(UserError, match="unfinished trace; give --resume"):
        collect(CollectConfig(**settings, out=out), Console(quiet=True))
    with pytest.raises(UserError, match=r"was started with sample 0\.8, not 0\.5"):
        collect(CollectConfig(**(settings | {"sample": 0.5}), out=out, resume=True), Console(quiet=True))
    with pytest.raises(TraceError, match="unfinished trace"):
        Trace.open(out)
    last = start(config)
    last.join(100)
    assert last.exitcode == 0, last.log.read_text()
    assert_same(out, whole)
    # Once more is no harm.
    before = sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir())
    collect(config, Console(quiet=True))
    assert sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir()) == before


def save_for_ever(folder: Path) -> None:
    """The job of a child: the progress written again and again, so large that a kill meets its writing."""
    plan = Plan(targets=[1], row_bytes=1, shard_overhead=1, fixed_bytes=1, state_bytes=1)
    snapshot = Snapshot(Progress(settings={}, processes=1, plan=plan), {"sums": torch.ones(16, 2**20)})
    while True:
        save_progress(folder, 0, snapshot)


def test_a_kill_while_progress_is_written_leaves_nothing_under_another_name(begin, tmp_path):
    file = progress_file(tmp_path, 0)
    for turn in range(5):
        file.unlink(missing_ok=True)
        child = begin(save_for_ever, tmp_path)
        wait_for(child, file.exists)
        time.sleep(0.013 * turn)
        child.kill()
        child.join()
        snapshot = load_progress(tmp_path, 0)
        assert snapshot is not None
        assert bool(snapshot.sums["sums"].eq(1).all())
        # What is left is what the next writing begins by overwriting.
        assert {name.removesuffix(".partial") for name in os.listdir(tmp_path)} == {file.name}


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of `size` bytes on `folder`, where this process may mount one; gives whether it is there."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_in_one_sentence_and_a_trace_to_resume(start, settings, whole, tmp_path):
    size = sum(file.stat().st_size for file in whole.iterdir())
    config = CollectConfig(**settings, out=tmp_path / "disk" / "trace", resume=True)
    with small_disk(tmp_path / "disk", 2 * size) as mounted:
        ballast = tmp_path / "disk" / "ballast"
        # Without a disk of its own, a limit on the size of files, which only a shard meets, stands for its end.
        child = start(config, None if mounted else settings["shard_bytes"] // 2)
        if mounted:
            wait_for(child, lambda: shards_in(config.out) >= 3)
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as out:
                while True:
                    out.write(bytes(1 << 14))
        child.join(60)
        said = child.log.read_text().strip().splitlines()[-1]
        assert child.exitcode == 2, said
        assert "can't be written" in said
        assert "--resume" in said
        assert "Traceback" not in child.log.read_text()
        assert not list(config.out.glob("*.partial"))
        if mounted:
            assert shards_in(config.out) >= 3
            with pytest.raises(UserError, match=r"(MB|GB) left"):
                collect(CollectConfig(**settings, out=tmp_path / "disk" / "other"), Console(quiet=True))
            assert not (tmp_path / "disk" / "other").exists()
            ballast.unlink()
        collect(config, Console(quiet=True))
        assert_same(config.out, whole)


def test_the_second_collect_into_a_folder_refuses(start, settings, tmp_path):
    config = CollectConfig(**settings, out=tmp_path / "trace")
    child = start(config)
    wait_for(child, lambda: (config.out / LOCK).exists() and bool(list(config.out.glob("progress-*.safetensors"))))
    os.kill(child.pid, signal.SIGSTOP)  # or it might be done too soon
    for resume in (False, True):
        with pytest.raises(UserError, match="another collect is writing to"):
            collect(config.model_copy(update={"resume": resume}), Console(quiet=True))
    child.kill()
    child.join()
    # The lock went with its holder, though the file is still there.
    with pytest.raises(UserError, match="unfinished trace"):
        collect(config, Console(quiet=True))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_says_how_to_go_on(start, settings, tmp_path, number, code):
    # In small batches it takes long enough not to be done before the signal comes.
    config = CollectConfig(**(settings | {"batch_size": 1}), out=tmp_path / "trace")
    child = start(config)
    wait_for(child, lambda: shards_in(config.out) >= 2)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == code
    assert "Traceback" not in child.log.read_text()
    assert child.log.read_text().strip().endswith(f"stopped; give --resume to go on with {config.out}")
    assert not (config.out / LOCK).exists()
    assert shards_in(config.out) >= 2


def test_a_corpus_that_was_changed_is_noticed(start, settings, tmp_path):
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text(Path(settings["corpus"]).read_text())
    config = CollectConfig(**(settings | {"corpus": str(corpus)}), out=tmp_path / "trace", resume=True)
    child = start(config)
    wait_for(child, lambda: shards_in(config.out) >= 2)
    child.kill()
    child.join()
    corpus.write_text(corpus.read_text().replace("Text 7:", "Text 8:"))
    with pytest.raises(UserError, match="is not what it was"):
        collect(config, Console(quiet=True))


def test_a_shard_that_went_bad_while_it_was_unfinished_is_named(start, settings, tmp_path):
    config = CollectConfig(**settings, out=tmp_path / "trace", resume=True)
    child = start(config)
    wait_for(child, lambda: shards_in(config.out) >= 3)
    child.kill()
    child.join()
    shard = config.out / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is broken or gone"):
        collect(config, Console(quiet=True))


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_fit_names_a_broken_shard_before_it_trains(whole, tmp_path, damage):
    from predict_train.train.fit import fit  # not above: the processes import this module, and need no Lightning

    trace = tmp_path / "trace"
    trace.mkdir()
    for file in whole.iterdir():
        (trace / file.name).write_bytes(file.read_bytes())
    content = bytearray((trace / "shard-00002.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (trace / "shard-00002.safetensors").write_bytes(content if damage == "flipped" else content[:-1])
    with pytest.raises(TraceError, match=r"shard-00002\.safetensors is broken"):
        fit(FitConfig(trace=trace, out=tmp_path / "run", device="cpu"), Console(quiet=True))
    assert not (tmp_path / "run").exists()


def by_token(folder: Path) -> dict[str, torch.Tensor]:
    """All columns, in the order of sequence and position."""
    columns = rows(folder)
    order = (columns["sequence"].long() * (1 << 20) + columns["position"]).argsort()
    return {name: column[order] for name, column in columns.items()}


def one_of_two(rank: int, port: int, arguments: list[str]) -> None:
    """The job of one process of a `collect` that a launcher has begun as two."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "NODE_RANK": "0"}
    os.environ |= world | {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    command_line(arguments, None)


def test_two_processes_make_the_same_trace_killed_and_resumed(begin, settings, whole, tmp_path):
    config = CollectConfig(**settings, out=tmp_path / "trace", resume=True)

    def begin_both() -> list[BaseProcess]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [begin(one_of_two, rank, port, flags(config)) for rank in (0, 1)]

    both = begin_both()
    until = time.monotonic() + 130
    while not all(len(list(config.out.glob(f"shard-000{rank}-*.safetensors"))) >= 2 for rank in (0, 1)):
        assert all(child.is_alive() for child in both), [child.log.read_text() for child in both]
        assert time.monotonic() < until
        time.sleep(0.005)
    for child in both:
        child.kill()
        child.join(60)
    assert not (config.out / "manifest.json").exists()
    with pytest.raises(UserError, match="was started by 2 processes, not 1"):
        collect(config, Console(quiet=True))
    for child in begin_both():
        child.join(130)
        assert child.exitcode == 0, child.log.read_text()
    expected, found = by_token(whole), by_token(config.out)
    for name in expected:
        # A batch is the same batch in whatever process, so even the rounding is.
        assert torch.equal(found[name], expected[name]), name
    manifest = Trace.open(config.out).manifest
    assert manifest.processes == 2
    assert {shard.file.split("-")[1] for shard in manifest.shards} == {"0000", "0001"}
    assert manifest.sequences == Trace.open(whole).manifest.sequences
    assert [entry.control for entry in manifest.layers] == [1.0] * 4
    vectors = Trace.open(whole).default_vectors()
    for source, other in Trace.open(config.out).default_vectors().items():
        torch.testing.assert_close(other, vectors[source], rtol=1e-4, atol=1e-6)
    assert {file.name for file in config.out.iterdir()} == {
        "manifest.json",
        "config.json",
        "speculation.safetensors",
        *(shard.file for shard in manifest.shards),
    }
