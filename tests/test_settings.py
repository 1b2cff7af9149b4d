"""Settings are said once: a class, its YAML, its flags and their help agree, and what can't be is refused by name."""

from __future__ import annotations

import ast
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from predict_train.data_collection.settings import CollectConfig
from predict_train.data_collection.trace import Trace
from predict_train.predictors.checkpoint import as_predictors, load_predictors
from predict_train.predictors.settings import (
    Settings,
    SettingsError,
    load_config,
    make,
    parse_bytes,
    parse_count,
    parse_layers,
)
from predict_train.runtime import offload_experts, offloaded
from predict_train.runtime.measure.bench import bench
from predict_train.runtime.measure.evaluate import evaluate
from predict_train.runtime.measure.replay import replay
from predict_train.runtime.measure.settings import BenchConfig, Measuring, PlanConfig
from predict_train.runtime.settings import GenerateConfig, LoadConfig, OffloadConfig
from predict_train.train.settings import ExportConfig, FitConfig
from pydantic_core import PydanticUndefined
from test_cli import run
from transformers import PreTrainedModel

from predict_train import cli, generating
from predict_train.flags import bytes_text, count_text
from predict_train.settings import EvaluateConfig

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
KINDS: dict[str, type[Settings]] = {name: get_type_hints(getattr(cli, name))["config"] for name in COMMANDS}
REQUIRED = {
    "model": "m", "out": "o", "trace": "t", "run": "r", "path": "p", "prompt": "x", "device_memory": "24GiB",
    "link": "25GB/s", "memory_bandwidth": "768GB/s",
}  # fmt: skip


def needed(kind: type[Settings]) -> dict[str, str]:
    """Values of the fields that have no default, and of those of which one must be given."""
    return {name: REQUIRED[name] for name, f in kind.model_fields.items() if f.is_required() or name == kind.argument}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_flags_are_the_fields_of_its_class(name: str) -> None:
    kind, params = KINDS[name], COMMANDS[name].params
    flags = {param.name: param.opts + param.secondary_opts for param in params}
    assert flags.keys() - {"help"} == kind.model_fields.keys() | {"config"}
    for field, key in kind.keys().items():
        dashed = key.replace("_", "-")
        expected = [field] if key == kind.argument else [f"--{dashed}"]
        if kind.model_fields[field].annotation in (bool, bool | None):
            expected.append(f"--no-{dashed}")
        assert flags[field] == expected
    assert all(param.default is None for param in params), "what is not given is left to the file"
    assert flags["config"] == ["--config"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_tells_of_every_field_what_it_is_and_its_default(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "5000")
    assert run(monkeypatch, name, "--help") == 0
    rows = [line.strip("│ ") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    kind = KINDS[name]
    for field, entry in kind.model_fields.items():
        key = kind.keys()[field]
        title = key if key == kind.argument else f"--{key.replace('_', '-')}"
        (row,) = [row for row in rows if title in row.split()[:1] or title.upper() in row.split()[:1]]
        told = next(base.model_fields[field].description for base in kind.__mro__ if described(base, field))
        assert " ".join(told.replace("`", "").split()) in row
        if entry.is_required():
            assert row.endswith("(required)")
        elif isinstance(entry.default, bool):
            assert row.endswith(f"(default: {'' if entry.default else 'no-'}{key.replace('_', '-')})")
        elif entry.default is not None:  # what stands there can be given
            shown = row.removesuffix(")").rsplit("(default: ", 1)[1]
            text = ast.literal_eval(shown) if shown.startswith("'") else shown
            assert getattr(load_config(kind, None, needed(kind) | {key: text}), field) == entry.default


def described(base: type, field: str) -> bool:
    return issubclass(base, Settings) and field in base.model_fields and bool(base.model_fields[field].description)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_says_what_flags_say(name: str, tmp_path: Path) -> None:
    """Every field, with its default: as plain values of YAML, and sizes with their units."""
    kind, file = KINDS[name], tmp_path / "settings.yaml"
    values: dict[str, Any] = {}
    for field, key in kind.keys().items():
        default = kind.model_fields[field].default
        if default is PydanticUndefined or default is None:
            continue
        is_size = field in ("shard_bytes", "reserve", "max_request")
        plain = default if isinstance(default, bool | int | float) else str(default)
        values[key] = bytes_text(default) if is_size else plain
    file.write_text(yaml.safe_dump(values))
    assert load_config(kind, file, needed(kind)) == make(kind, **needed(kind))
    file.write_text("no_such_thing: 1\n")
    with pytest.raises(SettingsError, match=r"there is no setting no_such_thing \(in .*settings.yaml\)"):
        load_config(kind, file, {})


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_reads_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text("no_such_thing: 1\n")
    assert run(monkeypatch, name, "--config", tmp_path / "settings.yaml") == 2
    assert "there is no setting no_such_thing (in " in capsys.readouterr().err


def test_what_runs_a_model_has_every_option_of_loading_and_offloading() -> None:
    expected = LoadConfig.model_fields.keys() | {"predictors", "model"}
    assert KINDS["generate"].model_fields.keys() >= expected
    for name in ("evaluate", "bench"):  # they go through policies and gatings
        assert KINDS[name].model_fields.keys() >= expected - {"policy", "gating"}


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"predict-train {version('predict-train')}\n"


@pytest.mark.parametrize(
    ("text", "count"),
    [("400k", 400_000), ("1e5", 100_000), ("2M", 2_000_000), ("1.5k", 1500), ("7", 7), (" 3 ", 3), (5, 5), ("1.0", 1)],
)
def test_counts(text: Any, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["lots", "", "k", "0.5", "1e999999999", "nan", "inf", True, "1 000", "4kk"])
def test_what_is_no_count_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="like 5000, 400k, 1e5 or 2M"):
        parse_count(text)


@given(st.integers(0, 10**15))
def test_a_default_is_written_as_it_is_read(number: int) -> None:
    assert parse_count(count_text(number)) == number
    if number:
        assert parse_bytes(bytes_text(number)) == number


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0,1", [0, 1]), ("0-3", [0, 1, 2, 3]), ("0-1, 7", [0, 1, 7]), (3, [3]), ([0, 1], [0, 1]), ([0, "4-5"], [0, 4, 5]),
     ("all", "all"), ("auto", "auto"), ([], [])],
)  # fmt: skip
def test_layers(text: Any, layers: Any, tmp_path: Path) -> None:
    assert parse_layers(text) == layers
    file = tmp_path / "settings.yaml"
    spelled = text if isinstance(text, str) else json.dumps(text)
    file.write_text(f"model: m\nout: o\nlayers: {spelled}\n")
    assert load_config(CollectConfig, file, {}).layers == layers
    assert make(FitConfig, trace="t", out="o", layers=text).layers == layers


@pytest.mark.parametrize("text", ["first", "3-0", "0,,1", "", "-1", True, 1.5, "0-9999999", [None]])
def test_what_are_no_layers_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="give all, auto, or layer numbers like 0,1 or 0-3"):
        parse_layers(text)


@pytest.mark.parametrize(
    "text",
    ["seed: 2001-13-45", "seed: !!int abc", "seed: " + "7" * 5000, "seed: " + "[" * 3000, *(f"{name}: 0x" + "f" * 5000 for name in ("slots", "temperature", "expert_memory"))],
)  # fmt: skip
def test_values_that_can_not_be_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.yaml").write_text(text + "\n")
    with pytest.raises(SettingsError) as refused:
        load_config(GenerateConfig, tmp_path / "settings.yaml", {"model": "m", "prompt": "p"})
    assert len(str(refused.value)) < 400


def test_a_size_needs_its_unit_where_it_is_written(tmp_path: Path) -> None:
    file, needs = tmp_path / "settings.yaml", {"model": "m", "out": "o"}
    for spelled in ("20000", "'20000'", "2_000.5"):
        file.write_text(f"max_bytes: {spelled}\n")
        with pytest.raises(SettingsError, match="max_bytes: a size needs a unit"):
            load_config(CollectConfig, file, needs)
    with pytest.raises(SettingsError, match="--max-bytes can't be 20000; a size needs a unit"):
        load_config(CollectConfig, None, needs | {"max_bytes": "20000"})
    with pytest.raises(SettingsError, match="expert_memory: a size needs a unit"):
        make(OffloadConfig, expert_memory="20000")
    file.write_text("max_bytes: 20kB\n")
    assert load_config(CollectConfig, file, needs).max_bytes == 20_000
    assert make(CollectConfig, **needs, max_bytes=20_000).max_bytes == 20_000, "Python says bytes"


def test_a_budget_needs_its_unit_unless_it_was_recorded() -> None:
    with pytest.raises(SettingsError, match=r"--budget can't be 60000; a size needs a unit.* or a share like 1%"):
        load_config(FitConfig, None, {"trace": "t", "out": "o", "budget": "60000"})
    for budget in ("60kB", "1%"):
        assert load_config(FitConfig, None, {"trace": "t", "out": "o", "budget": budget}).budget == budget
    assert FitConfig(trace="t", out="o", budget="60000").budget == "60000", "an older run says so"


def test_the_users_home_is_found_wherever_a_path_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "settings.yaml"
    file.write_text("model: ~/m\nout: ~/o\ncorpus: [~/a@2, b]\n")
    config = load_config(CollectConfig, file, {})
    assert (config.model, config.out) == (f"{tmp_path}/m", tmp_path / "o")
    assert config.corpora == [f"{tmp_path}/a@2", "b"]
    file.write_text("pack: ~/experts\njson: ~/figures.json\npredictors: ~/p\n")
    measured = load_config(BenchConfig, file, {"model": "~/m"})
    assert (measured.pack, measured.json_file) == (tmp_path / "experts", tmp_path / "figures.json")
    assert (measured.model, measured.predictors) == (f"{tmp_path}/m", f"{tmp_path}/p")
    assert make(ExportConfig, run="~/r", out=Path("~/o")).out == tmp_path / "o"


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (OffloadConfig, {"policy": "magic"}, "policy: policies are on_demand, prefetch, speculative, auto, but"),
        (OffloadConfig, {"gating": "none"}, "gating: gatings are speculated, true, resident"),
        (OffloadConfig, {"eviction": "fifo"}, "eviction: evictions are lru, least_stale, frequency"),
        (OffloadConfig, {"readers": 0}, "readers: .*greater than 0"),
        (OffloadConfig, {"slots": 3, "expert_memory": "1GiB"}, "expert_memory and slots say the same"),
        (OffloadConfig, {"candidates": "many"}, "candidates: give a number or auto"),
        (OffloadConfig, {"horizon": 3}, "horizon: guess 1 or 2 layers ahead"),
        (OffloadConfig, {"slotz": 3}, "there is no setting slotz; did you mean slots"),
        (LoadConfig, {"store": "file"}, "give pack=PATH"),
        (LoadConfig, {"store": "host", "pack": "x"}, "give one of"),
        (GenerateConfig, {"model": "m", "prompt": ""}, "the prompt is empty"),
        (GenerateConfig, {"model": "m"}, "prompt is missing"),
        (PlanConfig, {"model": "m", "device_memory": 9, "link": "fast", "memory_bandwidth": 9}, "link: .*like 25GB/s"),
        (FitConfig, {"trace": "t", "out": "o", "devices": 10**5}, "devices: .*less than or equal to 64"),
        (FitConfig, {"trace": "t", "out": "o", "workers": 10**5}, "workers: .*less than or equal to 256"),
        (EvaluateConfig, {"model": "m", "json_file": "/nowhere/x.json"}, "json_file: there is no folder /nowhere"),
    ],
)
def test_an_error_names_the_field(kind: type[Settings], values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as raised:
        make(kind, **values)
    assert "\n" not in str(raised.value)


def test_an_error_names_the_flag_or_the_field_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("readers: none\n")
    with pytest.raises(SettingsError, match=r"readers: give a whole number .* but it is 'none'"):
        load_config(OffloadConfig, file, {})
    with pytest.raises(SettingsError, match="--readers can't be 0; it should be greater than 0"):
        load_config(OffloadConfig, file, {"readers": "0"})
    assert load_config(OffloadConfig, file, {"readers": "3"}).readers == 3
    with pytest.raises(SettingsError, match=r"--json can't be /nowhere/x\.json; there is no folder /nowhere"):
        load_config(EvaluateConfig, None, {"model": "m", "json": "/nowhere/x.json"})
    with pytest.raises(SettingsError, match="PATH can't be"):
        load_config(KINDS["inspect"], None, {"path": ["a", "b"]})


def test_python_gives_torchs_own_values() -> None:
    config = make(LoadConfig, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (config.device, config.dtype) == ("cpu", "bfloat16")
    assert make(LoadConfig, device=None).device == "auto"
    assert config.values_of(OffloadConfig).keys() == OffloadConfig.model_fields.keys()


def test_counts_and_layers_on_the_command_line(
    tiny_moe_folder: Path, text_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.yaml").write_text(f"corpus: {text_corpus}\nout: ~/trace\nresume: true\nshard_bytes: 1MiB\n")
    assert run(monkeypatch, "collect", tiny_moe_folder, "--config", "~/settings.yaml", "--tokens", "0.2k",
               "--layers", "0-1,3", "--no-resume") == 0  # fmt: skip
    trace = Trace.open(tmp_path / "trace")
    assert trace.rows == 200
    assert sorted(trace.sources) == [0, 1, 3]
    assert trace.manifest.settings["shard_bytes"] == 1 << 20


def test_generate_loads_and_offloads_as_it_is_told(
    tiny_moe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offloads = []

    def watched(*arguments: Any, **settings: Any) -> PreTrainedModel:
        model = plain(*arguments, **settings)
        offloads.append((vars(model)["expert_offload"], settings, model.dtype))
        return model

    plain = generating.load_offloaded
    monkeypatch.setattr(generating, "load_offloaded", watched)
    (tmp_path / "settings.yaml").write_text(
        f"model: {tiny_moe_folder}\nprompt: The stone\nmax_new_tokens: 6\npolicy: prefetch\nreaders: 1\n"
        "speculated_tokens: 4\neviction: lru\nexpert_memory: 60KiB\n"
    )
    texts = []
    pack = tmp_path / "experts"
    for extra in ([], ["--pack", pack], ["--pack", pack, "--readers", "3"], ["--policy", "on_demand"]):
        assert run(monkeypatch, "generate", "--config", tmp_path / "settings.yaml", *extra) == 0
        texts.append(capsys.readouterr().out)
    assert pack.exists()
    assert len(set(texts)) == 1, "exact policies, wherever the experts are"
    first, packed, last, other = offloads
    assert first[0].slots == 60 * 1024 // first[0].expert_bytes
    assert (first[0].policy, other[0].policy) == ("prefetch", "on_demand")
    assert (first[1]["readers"], last[1]["readers"]) == (1, 3)
    assert (first[1]["eviction"], first[1]["speculated_tokens"]) == ("lru", 4)
    assert packed[1]["pack"] == pack
    assert {dtype for _, _, dtype in offloads} == {torch.float32}
    assert run(monkeypatch, "generate", "--config", tmp_path / "settings.yaml", "--slots", "9") == 2
    assert "expert_memory and slots say the same" in capsys.readouterr().err


def test_generate_computes_in_the_dtype_of_the_pack_that_is_there(
    tiny_moe: PreTrainedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pack = tmp_path / "model", tmp_path / "experts"
    tiny_moe.save_pretrained(model)
    tokenizer.save_pretrained(model)
    assert run(monkeypatch, "pack", model, "--out", pack, "--dtype", "bfloat16") == 0
    for command in (
        ["generate", model, "--prompt", "The stone", "--max-new-tokens", 2],
        ["bench", model, "--rounds", 1],
    ):
        assert run(monkeypatch, *command, "--pack", pack) == 0


def test_evaluate_reads_the_experts_of_a_pack(
    tiny_moe_folder: Path, text_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    common = ["--corpus", text_corpus, "--tokens", "0.1k", "--sequence-length", 50, "--json", tmp_path / "figures.json"]
    for extra in ([], ["--pack", tmp_path / "experts"], ["--slots", 4, "--readers", 1, "--eviction", "lru"]):
        assert run(monkeypatch, "evaluate", tiny_moe_folder, *common, *extra) == 0
        found.append(json.loads((tmp_path / "figures.json").read_text()))
    assert (tmp_path / "experts").exists()
    assert found[0]["cross_entropy"] == found[1]["cross_entropy"]
    assert found[0]["layers"] == found[1]["layers"] == found[2]["layers"]
    assert found[0]["cross_entropy"]["full"] == pytest.approx(found[2]["cross_entropy"]["prefetch"], rel=1e-6)


def test_predictors_are_an_object_or_a_path(exported: Path, collected: Path, tiny_moe: PreTrainedModel) -> None:
    loaded, batches = load_predictors(exported), [torch.randint(1, 256, (2, 16))]
    assert as_predictors(None) is None
    assert as_predictors(loaded) is loaded
    prompt, config = torch.arange(1, 9).unsqueeze(0), Measuring(policies="speculative/true", tokens=3, rounds=1)
    hit_rates, traces, losses = [], [], []
    for given_as in (loaded, exported, str(exported)):
        losses.append(evaluate(tiny_moe, batches, given_as)["cross_entropy"])
        ((measured,),) = bench(tiny_moe, prompt, config, given_as).rounds.values()
        hit_rates.append(measured.hit_rate)
        traces.append(replay(Trace.open(collected), 50, 2, given_as).hit_rate)
        with offloaded(tiny_moe, given_as, policy="speculative", device="cpu") as offload:
            assert offload.counters.tokens == 0
    for figures in (losses, hit_rates, traces):
        assert figures[0] == figures[1] == figures[2]
    with pytest.raises(SettingsError, match="did you mean slots"):
        offload_experts(tiny_moe, exported, slot=3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack", "x", "--out", "x" * 300], "longer than the system allows"),
        (["collect", "x", "--out", "/".join(["x" * 200] * 30)], "longer than the system allows"),
        (["inspect", "x" * 300], "longer than the system allows"),
        (["generate", "x" * 300, "--prompt", "a"], "longer than the system allows"),
        (["fit", "a\0b"], "a character that no path can have"),
        (
            ["generate", "x", "--prompt", "a", "--seed", "4294967296"],
            "--seed can't be 4294967296; it should be less than",
        ),
        (
            ["generate", "x", "--prompt", "a", "--seed", "-1"],
            "--seed can't be -1; it should be greater than or equal to 0",
        ),
    ],
)
def test_paths_and_seeds_that_no_system_takes_are_refused(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())
