"""What is resumed is the same collection or the same run: of the same weights, config, dtype and trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from predict_train.data_collection import collect as collecting
from predict_train.data_collection import progress
from predict_train.data_collection.collect import CollectConfig, collect
from predict_train.data_collection.manifest import read_manifest
from predict_train.data_collection.progress import common_origin, load_progress, save_progress
from predict_train.data_collection.trace import Trace
from predict_train.data_collection.writer import write_manifest
from predict_train.predictors import weights
from predict_train.predictors.errors import UserError
from predict_train.train.export import export
from predict_train.train.fit import FitConfig, fit
from predict_train.train.settings import ExportConfig
from rich.console import Console
from safetensors.torch import load_file, save_file

QUIET = Console(quiet=True)


def change_weights(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.experts.3.up_proj.weight"] += 1e-3
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model: Path) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert (model / "config.json").read_text() != text


@pytest.fixture
def model(tiny_moe_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, which a test may change."""
    return shutil.copytree(tiny_moe_folder, tmp_path / "model")


@pytest.fixture
def config(model: Path, text_corpus: Path, tmp_path: Path) -> CollectConfig:
    settings = {"tokens": 3000, "sequence_length": 50, "batch_size": 4, "shard_bytes": 200_000, "device": "cpu"}
    return CollectConfig(model=str(model), out=tmp_path / "trace", corpus=str(text_corpus), resume=True, **settings)


@pytest.fixture
def stopped(config: CollectConfig, monkeypatch: pytest.MonkeyPatch) -> CollectConfig:
    """A collection that was interrupted after a third of its batches."""
    run_batch, calls = collecting.run_batch, iter(range(6))

    def stop(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return run_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(collecting, "run_batch", stop)
        with pytest.raises(KeyboardInterrupt, match="give --resume"):
            collect(config, QUIET)
    assert list(config.out.glob("shard-*"))
    return config


@pytest.mark.parametrize(("change", "what"), [(change_weights, "weights"), (change_config, "config")])
def test_a_model_that_has_changed_is_not_mixed_into_a_trace(
    stopped: CollectConfig, model: Path, tiny_moe_folder: Path, change: Callable[[Path], None], what: str
) -> None:
    before = sorted(file.name for file in stopped.out.iterdir())
    change(model)
    with pytest.raises(UserError, match=f"was started with another {what} of .*model than it has now"):
        collect(stopped, QUIET)
    assert sorted(file.name for file in stopped.out.iterdir()) == before
    shutil.copytree(tiny_moe_folder, model, dirs_exist_ok=True)  # as it was, with other times
    collect(stopped, QUIET)
    whole = collect(stopped.model_copy(update={"out": stopped.out.with_name("whole")}), QUIET)
    mine, other = Trace.open(stopped.out).manifest, Trace.open(whole).manifest
    assert [shard.xxh3 for shard in mine.shards] == [shard.xxh3 for shard in other.shards]
    assert mine.origin == other.origin != {}
    # What is finished is not another model's either.
    collect(stopped, QUIET)
    change(model)
    with pytest.raises(UserError, match=f"another {what} of"):
        collect(stopped, QUIET)


def test_another_dtype_or_device_is_not_mixed_into_a_trace(
    stopped: CollectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--dtype auto` is float32 on a CPU and the checkpoint's own on CUDA, so the same command may mean another one."""
    with monkeypatch.context() as patch:
        patch.setattr(progress, "resolve_dtype", lambda *_: torch.bfloat16)
        with pytest.raises(UserError, match="was started on cpu in float32, not on cpu in bfloat16; resume it so"):
            collect(stopped, QUIET)
    collect(stopped, QUIET)
    # Once it is finished, it does not matter where it is asked for.
    monkeypatch.setattr(progress, "resolve_dtype", lambda *_: torch.bfloat16)
    collect(stopped, QUIET)


def test_processes_that_ran_different_models_make_no_trace(stopped: CollectConfig) -> None:
    part = load_progress(stopped.out, 0)
    assert part is not None
    first, same = part.progress, part.progress.model_copy(update={"batches": 1})
    assert common_origin([first, same]) == first.origin
    other = first.model_copy(update={"origin": first.origin | {"weights": "0"}})
    with pytest.raises(UserError, match="process 2 ran another model than the first"):
        common_origin([first, same, other])


def test_a_collection_that_an_older_release_began_is_resumed(stopped: CollectConfig) -> None:
    part = load_progress(stopped.out, 0)
    assert part is not None
    save_progress(stopped.out, 0, part._replace(progress=part.progress.model_copy(update={"origin": {}})))
    assert Trace.open(collect(stopped, QUIET)).manifest.origin == {}


def test_progress_that_rotted_is_not_gone_on_with(stopped: CollectConfig) -> None:
    file = stopped.out / "progress-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1  # a sum that a default vector comes from
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"progress-0000\.safetensors is broken"):
        collect(stopped, QUIET)


def test_a_checkpoint_that_rotted_is_not_gone_on_with(fitted: Path, collected: Path, tmp_path: Path) -> None:
    run = shutil.copytree(fitted, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())["settings"]
    last = run / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.ckpt is missing or broken"):
        fit(FitConfig(**settings | {"out": run, "trace": collected, "resume": True}), QUIET)


def test_a_snapshot_of_the_hub_is_named_by_its_commit(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    commit = "5f0f2f2f9a3f2a7c7b0d8b7cf0e4b8d7b7d2a1c3"
    snapshot = shutil.copytree(model, tmp_path / "models--some--moe" / "snapshots" / commit)
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda _, file, **__: str(snapshot / file))
    assert weights.commit_of(weights.local_folder("some/moe")) == commit
    assert weights.commit_of(model) is None
    assert weights.checkpoint_fingerprint(snapshot) == weights.checkpoint_fingerprint(model) is not None
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_, **__: None)
    assert weights.checkpoint_fingerprint(weights.local_folder("some/moe")) is None


def test_a_run_is_not_resumed_or_exported_on_another_trace(collected: Path, fitted: Path, tmp_path: Path) -> None:
    """One with other rows, and one with the same rows and other default vectors."""
    run = shutil.copytree(fitted, tmp_path / "run")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    settings = json.loads((run / "config.json").read_text())["settings"]
    for field in ("speculation_xxh3", "shards"):
        trace = shutil.copytree(collected, tmp_path / field)
        manifest = read_manifest(trace)
        changed = {"speculation_xxh3": "0" * 32, "shards": manifest.shards[1:]}[field]
        write_manifest(trace, manifest.model_copy(update={field: changed}))
        config = FitConfig(**settings | {"out": run, "trace": trace, "resume": True})
        with pytest.raises(UserError, match="was started on another trace"):
            fit(config, QUIET)
        with pytest.raises(UserError, match="is not the trace that"):
            export(ExportConfig(run=run, out=tmp_path / "out", trace=trace), QUIET)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
