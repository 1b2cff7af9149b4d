from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.data_collection.collect import CollectConfig, collect
from predict_train.data_collection.examples import make_batch
from predict_train.data_collection.manifest import TraceError
from predict_train.data_collection.trace import Trace
from predict_train.predictors.errors import UserError
from predict_train.train import fit as job
from predict_train.train.data import (
    BLOCK_BYTES,
    RUN,
    FitError,
    Rows,
    TraceBlocks,
    TraceData,
    TraceLoader,
    held_out_sequences,
    places_of,
    plan_blocks,
)
from predict_train.train.fit import FitConfig, fit
from predict_train.train.module import PredictorTraining
from predict_train.train.targets import Target
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def config(collected: Path, tmp_path: Path) -> Callable[..., FitConfig]:
    """`config(**changes)`: settings that train the tiny model's predictors in a second or two."""

    def make(**changes: object) -> FitConfig:
        small = {
            "trace": collected,
            "out": tmp_path / "run",
            "width": 16,
            "epochs": 2,
            "batch_size": 512,
            "reuse": False,
            "device": "cpu",
        }
        return FitConfig(**(small | changes))  # type: ignore[arg-type]

    return make


def quiet() -> Console:
    return Console(quiet=True)


def training(trace: Trace, width: int, loss: str = "kl", memory: int = 0) -> PredictorTraining:
    targets = [Target(layer, source, width) for layer, source in trace.sources.items()]
    return PredictorTraining(trace, targets, loss, learning_rate=1e-3, weight_decay=0.0, memory=memory)


def curves(run: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_fit_improves_every_layer_and_logs_each_curve(fitted):
    result = json.loads((fitted / "result.json").read_text())
    logged = curves(fitted)
    assert [entry["layer"] for entry in result["layers"]] == [0, 1, 2, 3]
    for entry in result["layers"]:
        before, after = entry["training_free"]["recall@k"], entry["predictor"]["recall@k"]
        if before < 0.95:
            assert after > before + 0.02
        for measure in ("recall@2k", "exact"):
            assert 0 <= entry["predictor"][measure] <= 1
        assert entry["predictor"]["recall@2k"] >= after >= entry["predictor"]["exact"]
        layer = f"layer_{entry['layer']:02d}"
        assert max(logged[f"hit_rate/{layer}"]) == pytest.approx(after, abs=0.05)
        assert len(set(logged[f"training_free/{layer}"])) == 1  # a line to compare with
        assert logged[f"training_free/{layer}"][0] == pytest.approx(before, abs=1e-6)
        assert len(logged[f"hit_rate/{layer}"]) == 3
    assert logged["loss/validation"][-1] < logged["loss/validation"][0]
    assert logged["loss/train"]
    # The figures are those of the epoch that is kept, and that is the best one.
    assert result["mean"]["predictor"] == pytest.approx(max(logged["hit_rate/mean"]), abs=1e-6)
    assert (fitted / result["checkpoint"]).exists()


def test_an_interrupted_run_is_resumed_to_its_end(config, monkeypatch):
    class PowerCutError(Exception):
        pass

    def cut(module: PredictorTraining) -> None:
        if module.current_epoch == 1:
            raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(PredictorTraining, "on_train_epoch_start", cut)
        with pytest.raises(PowerCutError):
            fit(config(epochs=3), quiet())
    run = config().out
    assert not (run / "result.json").exists()
    with pytest.raises(UserError, match="give --resume"):
        fit(config(epochs=3), quiet())
    with pytest.raises(FitError, match="was started with epochs 3, not 4"):
        fit(config(epochs=4, resume=True), quiet())
    epochs: list[int] = []
    monkeypatch.setattr(PredictorTraining, "on_train_epoch_start", lambda module: epochs.append(module.current_epoch))
    fit(config(epochs=3, resume=True), quiet())
    assert epochs == [1, 2]
    resumed = json.loads((run / "result.json").read_text())
    whole = json.loads((fit(config(epochs=3, out=run.with_name("whole")), quiet()) / "result.json").read_text())
    assert resumed["mean"] == pytest.approx(whole["mean"], abs=1e-6)
    assert len(curves(run)["hit_rate/mean"]) == 3


def test_resuming_a_run_cut_before_its_first_epoch_or_after_its_last(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(job.TensorBoardLogger, "log_hyperparams", lambda *_, **__: (_ for _ in ()).throw(KeyError))
        with pytest.raises(KeyError):
            fit(config(), quiet())
    first = json.loads((fit(config(resume=True), quiet()) / "result.json").read_text())
    again = json.loads((fit(config(resume=True), quiet()) / "result.json").read_text())
    assert first == again


def test_a_broken_trace_is_refused_before_anything_is_written(collected, config, tmp_path):
    trace = shutil.copytree(collected, tmp_path / "trace")
    content = bytearray((trace / "shard-00002.safetensors").read_bytes())
    content[-5] ^= 1
    (trace / "shard-00002.safetensors").write_bytes(content)
    with pytest.raises(TraceError, match=r"shard-00002\.safetensors is broken"):
        fit(config(trace=trace), quiet())
    (trace / "shard-00002.safetensors").write_bytes(content[:-5])
    with pytest.raises(TraceError, match=r"shard-00002\.safetensors is broken"):
        fit(config(trace=trace), quiet())
    with pytest.raises(TraceError, match="there is no trace"):
        fit(config(trace=tmp_path / "nowhere"), quiet())
    with pytest.raises(FitError, match="holds no run"):
        fit(config(resume=True), quiet())
    assert not config().out.exists()


def test_a_fixed_seed_gives_the_same_predictors(config):
    results = [
        json.loads((fit(config(out=config().out.with_name(name), epochs=1), quiet()) / "result.json").read_text())
        for name in ("a", "b")
    ]
    assert results[0]["layers"] == results[1]["layers"]


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_validation_sequences_are_some_and_never_all(count, share, seed):
    mask = held_out_sequences(count, share, seed)
    assert 1 <= mask.sum() <= count - 1
    assert torch.equal(mask, held_out_sequences(count, share, seed))


def test_a_single_sequence_can_not_be_split():
    with pytest.raises(FitError, match="single sequence"):
        held_out_sequences(1, 0.1, 0)


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=9),
    batch_size=st.integers(1, 60),
    row_bytes=st.integers(1, 1 << 20),
    shuffled=st.booleans(),
    run=st.integers(1, 9),
)
def test_a_plan_holds_each_row_once(sizes, batch_size, row_bytes, shuffled, run):
    rows = [torch.arange(0, 2 * size, 2) for size in sizes]
    plan = plan_blocks(rows, batch_size, row_bytes, torch.Generator().manual_seed(0) if shuffled else None, run)
    planned = sorted((shard, row) for block in plan for shard, piece in block.pieces for row in piece.tolist())
    assert planned == sorted((shard, row) for shard, given in enumerate(rows) for row in given.tolist())
    for block in plan:
        count = sum(len(piece) for _, piece in block.pieces)
        assert 1 <= block.batches <= count <= block.batches * (2 * batch_size + run * len(sizes))
        assert len(block.runs) == count
        # No run is cut, and each batch has one.
        assert block.runs.bincount().min() >= 1
        assert block.runs.bincount().max() <= run
        assert set((block.runs % block.batches).tolist()) == set(range(block.batches))
        assert block.batches == 1 or block.batches * batch_size * row_bytes <= BLOCK_BYTES


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=20, unique=True), st.integers(1, 5))
def test_a_place_is_counted_from_where_tokens_begin_to_follow_one_another(places, run):
    token = torch.tensor(sorted((sequence << 32) + position for sequence, position in places), dtype=torch.long)
    expected: list[int] = []
    for number, (now, before) in enumerate(zip(token.tolist(), [-2, *token.tolist()], strict=False)):
        expected.append(expected[-1] + 1 if number and now == before + 1 else 0)
    found = places_of(token)
    assert found.tolist() == expected
    rows = torch.arange(len(token))
    for generator in (None, torch.Generator().manual_seed(0)):
        for block in plan_blocks([rows], 20, 1, generator, run, [found]):
            [(_, own)] = block.pieces
            for number in block.runs.unique():
                assert (token[own[block.runs == number]].diff() == 1).all()  # no run holds two stretches


def test_a_batch_remembers_what_a_pass_over_the_text_would(collected):
    """In validation each row does, whatever its batch. In training the first rows of runs remember less."""
    trace = Trace.open(collected)
    module, data = training(trace, width=8, memory=2), TraceData(trace, trace.sources, 128, 0.1, 0, 0, memory=2)
    expected: dict[tuple[int, int], torch.Tensor] = {}
    for shard, entry in enumerate(trace.manifest.shards):
        columns = trace.read(shard, torch.arange(entry.rows), data.names)
        known = remembered_by(module, Rows(columns, entry.rows))
        expected |= dict(list(known.items())[2:])  # a sequence may have begun in the shard before
    for row, memory in remembered_by(module, *data.val_dataloader()).items():
        assert row not in expected or torch.allclose(memory, expected[row], atol=1e-4)
    whole, rows = 0, 0
    for row, memory in remembered_by(module, *data.train_dataloader()).items():
        if row in expected and row[1] > 1:
            tokens = memory.chunk(2, -1)
            knows = [bool(token.any()) for token in tokens]
            assert knows in ([True, True], [True, False], [False, False])
            for token, right, known in zip(tokens, expected[row].chunk(2, -1), knows, strict=True):
                assert not known or torch.allclose(token, right, atol=1e-4)
            whole, rows = whole + all(knows), rows + 1
    assert whole / rows == pytest.approx(1 - 1 / RUN, abs=0.05)  # of two tokens


def test_where_no_token_follows_another_nothing_is_learned_of_a_memory(collected):
    """As in a small sample: then what the predictors do does not depend on what there is to remember."""
    trace = Trace.open(collected)
    module = training(trace, width=8, memory=1)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    module.log = lambda *_, **__: None
    for first in range(3):
        rows = torch.arange(first, 100, 2)
        module.training_step(Rows(trace.read(0, rows, trace.columns_for(trace.sources, 1)), len(rows)), 0).backward()
        optimizer.step()
    assert module.mlps.w2.any()
    assert not module.mlps.u.any()


def remembered_by(module: PredictorTraining, *batches: Rows) -> dict[tuple[int, int], torch.Tensor]:
    """What each row of the batches remembers, by sequence and position."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for rows in batches:
        memory = module.batch(rows).memory
        assert memory is not None
        places = zip(rows.columns["sequence"].tolist(), rows.columns["position"].tolist(), strict=True)
        found |= dict(zip(places, memory.unbind(1), strict=True))
    return found


@given(
    rows=st.integers(1, 300),
    batch_size=st.integers(1, 200),
    world=st.integers(1, 4),
    shuffled=st.booleans(),
    run=st.integers(1, 9),
)
def test_batches_are_each_row_once_whatever_their_size(collected, rows, batch_size, world, shuffled, run):
    trace = Trace.open(collected)
    chosen = [torch.arange(shard.rows)[:rows] for shard in trace.manifest.shards]
    names = ["token_ids", "sequence", "position"]
    plan = plan_blocks(chosen, batch_size, 12, torch.Generator().manual_seed(1) if shuffled else None, run)
    found = []
    for rank in range(world):
        loader = TraceLoader(TraceBlocks(trace, plan, names, rank, world), batch_size=None)
        batches = list(loader)
        assert len(batches) == len(loader)
        found += [
            row for batch in batches for row in zip(*(batch.columns[name].tolist() for name in names), strict=True)
        ]
    whole = trace.gather(list(enumerate(chosen)), names)
    assert sorted(found) == sorted(zip(*(whole[name].tolist() for name in names), strict=True))


def test_validation_is_by_whole_sequences_and_training_is_mixed(collected):
    trace = Trace.open(collected)
    data = TraceData(trace, trace.sources, batch_size=500, validation=0.1, seed=0, workers=0)

    def sequences(rows: list[torch.Tensor]) -> set[int]:
        return {i for shard, r in enumerate(rows) for i in trace.column(shard, "sequence")[r].tolist()}

    train, validation = sequences(data.train_rows), sequences(data.validation_rows)
    assert not train & validation
    assert (len(train), len(validation)) == (72, 8)
    loader = data.train_dataloader()
    loader.dataset.names = ["sequence"]
    batches = list(loader)
    assert all(len(set(batch.columns["sequence"].tolist())) > 30 for batch in batches)
    assert sum(batch.in_all for batch in batches) == sum(len(batch.columns["sequence"]) for batch in batches) == 7200


def test_reading_in_processes_gives_the_same_batches(collected):
    alone, shared = (
        TraceData(trace, trace.sources, batch_size=2000, validation=0.1, seed=0, workers=workers)
        for trace, workers in ((Trace.open(collected), 0), (Trace.open(collected), 2))
    )
    pairs = list(zip(alone.train_dataloader(), shared.train_dataloader(), strict=True))
    assert len(pairs) > 2
    for a, b in pairs:
        assert a.in_all == b.in_all
        assert a.columns.keys() == b.columns.keys()
        assert all(torch.equal(a.columns[name], b.columns[name]) for name in a.columns)


def test_the_loss_is_the_divergence_from_the_true_routing(collected):
    trace = Trace.open(collected)
    module = training(trace, width=8)
    batch = make_batch(trace.read(0, torch.arange(50)), trace.sources, module.speculators)
    routers = [wiring.router for wiring in trace.wirings().values()]
    speculated = torch.stack([router(state).logits for router, state in zip(routers, batch.quasi, strict=True)])
    expected = sum(
        (logits.softmax(-1) * (logits.log_softmax(-1) - own.log_softmax(-1))).sum(-1).mean()
        for logits, own in zip(batch.logits, speculated, strict=True)
    )
    torch.testing.assert_close(module.loss(batch, speculated, 50), expected, rtol=1e-4, atol=1e-5)
    module.loss(batch, module.mlps.logits(module.guessed(batch), module.speculators), 50).backward()
    for layer in range(4):
        assert module.mlps.w2.grad is not None
        assert module.mlps.w2.grad[layer].abs().sum() > 0
    learned = {"mlps.w1", "mlps.v", "mlps.b1", "mlps.w2", "mlps.b2"}
    assert {name for name, _ in module.named_parameters()} == set(module.state_dict()) == learned
    remembering = training(trace, width=8, memory=1)
    assert {name for name, _ in remembering.named_parameters()} == learned | {"mlps.u"}
    assert set(remembering.state_dict()) == learned | {"mlps.u", "mlps.scale"}


def test_a_single_layer_is_fitted_too(tiny_moe_folder, text_corpus, config, tmp_path):
    collected = CollectConfig(
        model=str(tiny_moe_folder), out=tmp_path / "t", corpus=str(text_corpus), tokens=600, layers=[2], device="cpu"
    )
    run = fit(config(trace=collect(collected, quiet()), epochs=1), quiet())
    assert [entry["layer"] for entry in json.loads((run / "result.json").read_text())["layers"]] == [2]


def test_nothing_of_lightning_is_printed(config, capfd):
    fit(config(epochs=1))
    captured = capfd.readouterr()
    assert "gap closed" in captured.out
    for noise in ("GPU available", "TPU", "does not have many workers", "Tip", "litlogger", "sanity"):
        assert noise not in captured.out + captured.err


def test_the_run_says_what_it_was_made_from(fitted, collected):
    written = json.loads((fitted / "config.json").read_text())
    assert written["settings"]["trace"] == os.fspath(collected)
    assert written["trace"]["model"]["fingerprint"] == Trace.open(collected).manifest.model.fingerprint
    assert written["versions"]["torch"]
