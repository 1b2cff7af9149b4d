from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from predict_train.data_collection.batches import read_batches, sample_mask
from predict_train.data_collection.collect import CollectConfig, collect
from predict_train.data_collection.columns import column_shapes
from predict_train.data_collection.hooks import Recorder
from predict_train.data_collection.manifest import FORMAT_VERSION
from predict_train.data_collection.trace import Trace
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.settings import SettingsError, load_config
from rich.console import Console
from transformers import GenerationConfig

from predict_train import cli

MOE = ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral", "olmoe"]


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(seed))


def quiet() -> Console:
    return Console(quiet=True)


@pytest.mark.parametrize("architecture", MOE)
@torch.no_grad()
def test_the_record_is_what_the_model_did(build_moe, architecture):
    """Everything recorded is compared with what a second, unhooked look at the model sees."""
    model = build_moe(architecture)
    model.set_experts_implementation("eager")
    layers = find_moe_layers(model)
    expected = model(input_ids=tokens()).logits
    routers = [layer.router for layer in layers]
    outputs, decoder_outputs, expert_outputs = {}, {}, {}
    handles = []
    for layer in layers:
        handles.append(layer.router.register_forward_hook(lambda m, _, out: outputs.__setitem__(m, out)))
        handles.append(layer.experts.register_forward_hook(lambda m, _, out: expert_outputs.__setitem__(m, out)))
        handles.append(layer.decoder.register_forward_hook(lambda m, _, out: decoder_outputs.__setitem__(m, out)))
    with Recorder(layers, [layer.index for layer in layers]) as recorder:
        recorded_logits = model(input_ids=tokens()).logits
        records = recorder.take()
    torch.testing.assert_close(recorded_logits, expected, rtol=1e-4, atol=1e-4)
    for layer in layers:
        record, used = records[layer.index], outputs[layer.router]
        assert all(torch.equal(a, b.flatten(0, -2)) for a, b in zip(record.routing, used, strict=True))
        if layer is not layers[-1]:  # the last layer is no source
            # The residual is all of the layer's output but the routed experts.
            whole = decoder_outputs[layer.decoder].flatten(0, -2)
            torch.testing.assert_close(record.residual + expert_outputs[layer.experts], whole, rtol=1e-4, atol=1e-4)
    first = records[layers[0].index].input
    assert first is not None
    if layers[0].index == 0:
        assert torch.equal(first, model.get_input_embeddings()(tokens()).flatten(0, 1))
    assert all(rate == 1.0 for rate in recorder.control_hit_rates().values())
    assert len(recorder.control_hit_rates()) == len(routers)
    # Detached, the model is what it was.
    for handle in handles:
        handle.remove()
    assert torch.equal(model(input_ids=tokens()).logits, expected)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


@torch.no_grad()
def test_the_control_sees_a_wrong_recording(tiny_moe):
    layers = find_moe_layers(tiny_moe)
    with Recorder(layers, [1, 2]) as recorder:
        tiny_moe(input_ids=tokens())
        recorder._taps[2].seen["norm_input"] = torch.randn(3, 20, 32)
        recorder.take()
    rates = recorder.control_hit_rates()
    assert rates[1] == 1.0
    assert rates[2] < 0.9


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_default_vectors_are_mean_outputs(build_moe, architecture):
    model = build_moe(architecture)
    layers = find_moe_layers(model)
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = layers[1].experts.register_forward_pre_hook(lambda _, args: inputs.append(args[:2]))
    with Recorder(layers, [2]) as recorder:
        for seed in (0, 1):
            model(input_ids=tokens(seed))
            assert set(recorder.take()) == {1, 2}
    handle.remove()
    x, ids = (torch.cat(parts) for parts in zip(*inputs, strict=True))
    means = torch.zeros(8, 32)
    for expert in range(8):
        routed = x[(ids == expert).any(-1)]
        if len(routed):
            # One expert alone, at weight 1: its own output.
            alone = torch.full((len(routed), 1), expert)
            means[expert] = layers[1].experts(routed, alone, torch.ones(len(routed), 1)).mean(0)
    assert means.abs().sum() > 0
    torch.testing.assert_close(recorder.default_vectors()[1], means, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_expert_without_tokens_has_a_zero_row(tiny_moe):
    layers = find_moe_layers(tiny_moe)
    with Recorder(layers, [1]) as recorder:
        tiny_moe(input_ids=tokens()[:1, :1])
        ids = set(recorder.take()[0].routing.ids.flatten().tolist())
    rows = recorder.default_vectors()[0].abs().sum(-1)
    assert {expert for expert in range(8) if rows[expert] > 0} == ids


def test_collect_reports_and_records(collected, capsys, tiny_moe_folder, text_corpus, tmp_path):
    manifest = Trace.open(collected).manifest
    assert [entry.control for entry in manifest.layers] == [1.0] * 4
    assert all(0.2 < entry.training_free < 1 for entry in manifest.layers)
    assert manifest.model.name == str(tiny_moe_folder)
    assert manifest.phase == "prefill"
    assert {"torch", "transformers", "python"} <= manifest.versions.keys()
    out = tmp_path / "trace"
    collect(CollectConfig(model=str(tiny_moe_folder), out=out, corpus=str(text_corpus), tokens=333, device="cpu"))
    printed = capsys.readouterr().out
    assert "training-free" in printed
    assert "tokens/s" in printed
    assert Trace.open(out).rows == 333


def test_what_is_left_out_of_the_corpus_is_counted(tiny_moe_folder, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "A short text."}\n{"text": null}\n{"messages": []}\nnothing\n{"messages": []}\n')
    out = collect(CollectConfig(model=str(tiny_moe_folder), out=tmp_path / "t", corpus=str(file), device="cpu"))
    told = capsys.readouterr().out
    assert "rows and files left out of the corpus: 4" in told
    assert f"  2 like row 3 of {file}, which is a chat, and the model's tokenizer has no chat template" in told
    assert f"  1 like row 4 of {file}, which is not JSON" in told
    assert Trace.open(out).rows == len("A short text.")


def test_more_tokens_than_the_corpus_has_are_fewer(tiny_moe_folder, tmp_path):
    (tmp_path / "short.txt").write_text("A short text.")
    config = CollectConfig(
        model=str(tiny_moe_folder), out=tmp_path / "t", corpus=str(tmp_path / "short.txt"), device="cpu"
    )
    assert Trace.open(collect(config, quiet())).rows == len("A short text.")


def test_the_trace_is_the_models_run(collected, tiny_moe, text_corpus):
    """Token by token: the recorded ids are those of a plain run of the model on the recorded tokens."""
    trace = Trace.open(collected)
    token_ids = trace.column(0, "token_ids")[:100].long().unsqueeze(0)
    layers = find_moe_layers(tiny_moe)
    seen = {}
    for layer in layers:
        layer.router.register_forward_hook(lambda m, _, out: seen.__setitem__(m, out))
    with torch.no_grad():
        tiny_moe(input_ids=token_ids)
    assert bytes(text_corpus.joinpath("rivers.txt").read_bytes()[:3]) == b"The"
    for layer in layers:
        assert torch.equal(trace.column(0, f"layers.{layer.index}.expert_ids")[:100].long(), seen[layer.router][2])


def collect_rows(out: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """All rows of a new trace."""
    trace = Trace.open(collect(CollectConfig(out=out, device="cpu", **settings), quiet()))
    trace.verify()
    shards = range(len(trace.manifest.shards))
    return {name: torch.cat([trace.column(i, name) for i in shards]) for name in column_shapes(trace.manifest)}


@torch.inference_mode()
def test_decode_records_what_the_model_generates(tiny_moe_folder, tiny_moe, text_corpus, tokenizer, tmp_path):
    lines = tmp_path / "lines.jsonl"
    texts = [line for file in text_corpus.iterdir() for line in file.read_text().splitlines()][:9]
    lines.write_text("".join(json.dumps({"text": text[: 12 + 4 * i]}) + "\n" for i, text in enumerate(texts)))
    model, ends, lengths = tmp_path / "model", set(range(16)), []
    shutil.copytree(tiny_moe_folder, model)
    GenerationConfig(eos_token_id=sorted(ends)).save_pretrained(model)
    settings = {"model": str(model), "corpus": str(lines), "tokens": 9 * 14, "sequence_length": 30,
                "batch_size": 4, "phase": "decode", "max_new_tokens": 14, "seed": 5}  # fmt: skip
    found = collect_rows(tmp_path / "trace", **settings)
    assert Trace.open(tmp_path / "trace").manifest.phase == "decode"
    config = CollectConfig(out=tmp_path, **settings)
    layers = find_moe_layers(tiny_moe)
    for batch in read_batches(config, tokenizer, config.tokens):
        for number, prompt in enumerate(batch.token_ids, batch.first):
            rows = found["sequence"] == number
            generated = found["token_ids"][rows].long()
            assert found["position"][rows].tolist() == list(range(len(prompt), len(prompt) + len(generated)))
            # It ends after so many tokens, or before a token that ends the text, which the model never reads.
            assert not ends & set(generated.tolist())
            lengths.append(len(generated))
            # Read at once, the same tokens are routed the same way.
            with Recorder(layers, [0, 1, 2, 3]) as recorder:
                tiny_moe(input_ids=torch.cat([prompt, generated]).unsqueeze(0))
                records = recorder.take()
            for layer in range(4):
                routing = records[layer].routing
                assert torch.equal(found[f"layers.{layer}.expert_ids"][rows], routing.ids[len(prompt) :].short())
                expected = routing.logits[len(prompt) :].bfloat16()
                torch.testing.assert_close(found[f"layers.{layer}.router_logits"][rows], expected, rtol=0.02, atol=0.02)
    assert len(lengths) == 9
    assert max(lengths) == 14
    assert min(lengths) < 14
    # What is drawn depends on the seed alone.
    again = collect_rows(tmp_path / "again", **settings)
    other = collect_rows(tmp_path / "other", **(settings | {"seed": 6}))
    assert all(torch.equal(again[name], found[name]) for name in found)
    assert not torch.equal(other["token_ids"], found["token_ids"])


def test_a_sample_thins_the_rows_and_changes_none(tiny_moe_folder, text_corpus, tmp_path):
    settings = {"model": str(tiny_moe_folder), "corpus": str(text_corpus), "tokens": 3000, "sequence_length": 50}
    whole = collect_rows(tmp_path / "whole", **settings)
    some = collect_rows(tmp_path / "some", **settings, sample=0.3, batch_size=3)
    expected = sample_mask(0, whole["sequence"], whole["position"], 0.3)
    assert 700 < int(expected.sum()) < 1100
    for name in whole:
        torch.testing.assert_close(some[name], whole[name][expected], rtol=0.02, atol=0.02)
    assert Trace.open(tmp_path / "some").manifest.tokens == int(expected.sum())
    assert [entry.control for entry in Trace.open(tmp_path / "some").manifest.layers] == [1.0] * 4


def test_max_bytes_bounds_the_whole_trace(tiny_moe_folder, text_corpus, tmp_path, capsys):
    config = CollectConfig(model=str(tiny_moe_folder), corpus=str(text_corpus), tokens=8000, sequence_length=50,
                           batch_size=4, device="cpu", out=tmp_path / "t", max_bytes="500kB", shard_bytes="100kB")  # fmt: skip
    collect(config)
    size = sum(file.stat().st_size for file in config.out.iterdir())
    assert 0.85 * 500_000 < size <= 500_000
    assert Trace.open(config.out).rows % 200 == 0
    assert "within max_bytes 500,000" in capsys.readouterr().out
    small = config.model_copy(update={"out": tmp_path / "small", "max_bytes": 40_000})
    with pytest.raises(UserError, match="not even one batch fits"):
        collect(small, quiet())
    assert not small.out.exists()


def test_the_estimate_is_what_comes_out(tiny_moe_folder, text_corpus, tmp_path, capsys):
    config = CollectConfig(model=str(tiny_moe_folder), corpus=str(text_corpus), tokens=4000, device="cpu",
                           layers=[1, 3], out=tmp_path / "t")  # fmt: skip
    collect(config)
    size = sum(file.stat().st_size for file in config.out.iterdir())
    estimate = float(re.search(r"2 target layers: at most ([\d.]+) MB, about \d+ s", capsys.readouterr().out)[1])
    assert size / 1e6 <= estimate + 0.05
    assert estimate <= 1.05 * size / 1e6 + 0.05


def test_a_trace_costs_its_payload(collected):
    # The first layer's input, three sources' residuals, four layers' logits, ids and weights, three numbers a row.
    rows = 8000 * (4 * 32 * 2 + 4 * (8 * 2 + 2 * 2 + 2 * 2) + 3 * 4)
    # Default vectors of three sources; norm and router of four targets.
    speculation = 3 * 8 * 32 * 4 + 4 * (32 + 8 * 32) * 4
    assert sum(file.stat().st_size for file in collected.iterdir()) <= 1.05 * (rows + speculation)


def test_a_model_may_be_spread_over_devices(tiny_moe_folder, text_corpus, tmp_path):
    settings = {"model": str(tiny_moe_folder), "corpus": str(text_corpus), "tokens": 500}
    plain = collect_rows(tmp_path / "plain", **settings)
    spread = collect_rows(tmp_path / "spread", **settings, device_map="auto", layers="auto", threshold=1.0)
    assert all(torch.equal(spread[name], plain[name]) for name in spread)


def test_the_command_mixes_corpora_as_the_file_does(tiny_moe_folder, text_corpus, tmp_path, monkeypatch):
    stones, rivers = (f"{text_corpus / name}.txt" for name in ("stones", "rivers"))
    arguments = ["collect", tiny_moe_folder, "--corpus", stones, "--corpus", f"{rivers}@3", "--tokens", 20_000, "--out",
                 tmp_path / "t", "--max-bytes", "1GB", "--sample", 0.05, "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["predict-train", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"corpus:\n- {stones}\n- {rivers}@3\ntokens: 20000\nmax_bytes: 1GB\nsample: 0.05\n")
    flags = {"model": str(tiny_moe_folder), "out": tmp_path / "u", "device": "cpu"}
    collect(load_config(CollectConfig, settings, flags), quiet())
    mine, other = (Trace.open(tmp_path / name).manifest for name in "tu")
    assert [shard.xxh3 for shard in mine.shards] == [shard.xxh3 for shard in other.shards]
    assert mine.corpus == f"{stones}, {rivers}@3"
    assert mine.settings == other.settings


def test_packed_documents_share_sequences(tiny_moe_folder, text_corpus, tmp_path):
    rows = collect_rows(
        tmp_path / "t", model=str(tiny_moe_folder), corpus=str(text_corpus), tokens=15_000, concatenate=True
    )
    assert len(rows["token_ids"]) == 15_000
    assert rows["position"].max() == 255
    ends = (rows["token_ids"] == 0).nonzero().flatten()
    assert len(ends) == 1
    assert rows["position"][ends[0] + 1] == rows["position"][ends[0]] + 1


def test_auto_takes_the_layers_below_the_threshold(collected, tiny_moe_folder, text_corpus, tmp_path):
    rates = {entry.layer: entry.training_free for entry in Trace.open(collected).manifest.layers}
    ordered = sorted(rates.values())
    threshold = (ordered[1] + ordered[2]) / 2
    common = {
        "model": str(tiny_moe_folder),
        "corpus": str(text_corpus),
        "tokens": 4000,
        "device": "cpu",
        "layers": "auto",
    }
    out = collect(CollectConfig(**common, out=tmp_path / "auto", threshold=threshold), quiet())
    expected = {layer for layer, rate in rates.items() if rate < threshold}
    assert {entry.layer for entry in Trace.open(out).manifest.layers} == expected
    with pytest.raises(UserError, match="no layer's training-free hit rate is below"):
        collect(CollectConfig(**common, out=tmp_path / "none", threshold=0.01), quiet())
    assert not (tmp_path / "none").exists()
    # At inference all layers are guessed, so the default vectors of all sources are there.
    every = collect(CollectConfig(**(common | {"layers": "all"}), out=tmp_path / "all"), quiet())
    found, whole = (Trace.open(path).default_vectors() for path in (out, every))
    assert list(found) == list(whole) == [0, 1, 2]
    assert all(torch.equal(found[source], whole[source]) for source in whole)


def test_a_list_of_layers_records_them_and_their_sources(tiny_moe_folder, text_corpus, tmp_path):
    config = CollectConfig(
        model=str(tiny_moe_folder), out=tmp_path / "t", corpus=str(text_corpus), tokens=300, layers=[2], device="cpu"
    )
    trace = Trace.open(collect(config, quiet()))
    assert trace.sources == {2: 1}
    assert set(trace.read(0, torch.tensor([0]))) == {
        "layers.1.residual",
        "layers.1.expert_ids",
        "layers.1.expert_weights",
        "layers.2.expert_ids",
        "layers.2.expert_weights",
        "layers.2.router_logits",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/model"}, "there is no model at /no/such/model"),
        ({"model": "DENSE"}, "qwen3 is not a mixture-of-experts model"),
        ({"corpus": "/no/such/corpus"}, "there is no corpus at /no/such/corpus"),
        ({"corpus": "EMPTY"}, "holds no text"),
        ({"layers": [99]}, r"layer 99 is not an MoE layer; the MoE layers of .* are 0 to 3"),
        ({"layers": []}, "no layer is named"),
        ({"device": "cuda:7"}, "cuda:7 was asked for, but"),
        ({"device": "toaster"}, "no kind of device called toaster"),
        ({"dtype": "float7"}, "dtype can't be float7"),
        ({"sequence_length": 1 << 24}, "sequence_length 16777216 is beyond"),
        ({"tokens": 1 << 50}, "GB left"),
        ({"phase": "decode", "max_new_tokens": 256}, "leaves no room for a prompt"),
    ],
)
def test_wrong_input_is_refused_with_nothing_written(
    tiny_moe_folder, dense_folder, text_corpus, tmp_path, changes, message
):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    replaced = {"DENSE": str(dense_folder), "EMPTY": str(empty)}
    changes = {key: replaced.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    settings = {"model": str(tiny_moe_folder), "corpus": str(text_corpus), "tokens": 200, "device": "cpu"} | changes
    with pytest.raises(UserError, match=message) as raised:
        collect(CollectConfig(out=tmp_path / "trace", **settings), quiet())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "trace").exists()


def test_an_existing_trace_is_not_touched(collected, tiny_moe_folder):
    before = sorted((file.name, file.stat().st_mtime_ns) for file in collected.iterdir())
    with pytest.raises(UserError, match="exists already"):
        collect(CollectConfig(model=str(tiny_moe_folder), out=collected), quiet())
    assert sorted((file.name, file.stat().st_mtime_ns) for file in collected.iterdir()) == before


def test_flags_beat_the_file_and_the_file_beats_defaults(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("model: m\nout: o\ntokens: 7\nthreshold: 0.5\n")
    config = load_config(CollectConfig, file, {"tokens": 9, "threshold": None})
    assert (config.tokens, config.threshold, config.sequence_length) == (9, 0.5, 256)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sequence_lenght: 3", "there is no setting sequence_lenght .*did you mean sequence_length"),
        ("out: o\ntokens: lots", "tokens: .* it is 'lots'"),
        ("out: o\ntokens: 0", "tokens: .*greater than 0"),
        ("out: o\nlayers: some", "layers: "),
        ("- a\n- b", "holds no settings"),
        ("a: [", "is not YAML"),
        ("tokens: 3", "out is missing"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message) as raised:
        load_config(CollectConfig, file, {"model": "m"})
    assert "\n" not in str(raised.value)


def test_the_manifest_is_plain_json(collected):
    manifest = json.loads(Path(collected, "manifest.json").read_text())
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["layers"][0] == manifest["layers"][0] | {"layer": 0, "source": None, "control": 1.0}
