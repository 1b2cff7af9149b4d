"""The command line: the loop, and one sentence with exit code 2 for whatever is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from predict_train import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["predict-train", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    code = exit_info.value.code
    assert code is None or isinstance(code, int)
    return code or 0


@pytest.fixture(scope="module")
def loop(tiny_moe_folder: Path, text_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trace, a run and predictors of the tiny model, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("loop")
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "collect", tiny_moe_folder, "--corpus", text_corpus, "--tokens", 3000, "--sequence-length", 64,
                   "--out", folder / "trace") == 0  # fmt: skip
        assert run(patch, "fit", folder / "trace", "--out", folder / "run", "--epochs", 2, "--width", 16,
                   "--batch-size", 256) == 0  # fmt: skip
        assert run(patch, "export", folder / "run", "--out", folder / "predictors") == 0
    return folder


def test_generate_says_what_a_token_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loop: Path, tiny_moe_folder: Path
) -> None:
    for policy in ("on_demand", "prefetch", "speculative"):
        code = run(monkeypatch, "generate", tiny_moe_folder, "--predictors", loop / "predictors", "--prompt", "The stone",
                   "--policy", policy, "--max-new-tokens", 8)  # fmt: skip
        assert code == 0
        told = capsys.readouterr().err
        for figure in ("time to first token", "time per output token", "hit rate", "copied per token"):
            assert figure in told
        assert ("hit rate: none" in told) == (policy == "on_demand")


def test_evaluate_writes_its_figures(
    monkeypatch: pytest.MonkeyPatch, loop: Path, tiny_moe_folder: Path, text_corpus: Path, tmp_path: Path
) -> None:
    file = tmp_path / "evaluation.json"
    code = run(monkeypatch, "evaluate", tiny_moe_folder, "--predictors", loop / "predictors", "--corpus", text_corpus,
               "--tokens", 300, "--sequence-length", 64, "--json", file)  # fmt: skip
    assert code == 0
    result = json.loads(file.read_text())
    assert [row["layer"] for row in result["layers"]] == [0, 1, 2, 3]
    assert {"full", "on_demand", "prefetch", "speculative/true"} <= result["cross_entropy"].keys()
    assert result["cross_entropy"].keys() == result["training_free_cross_entropy"].keys()
    assert result["model"] == str(tiny_moe_folder)
    assert result["versions"]["torch"] == torch.__version__
    assert result["tokens"] == 300 - 5


@pytest.fixture(scope="module")
def farther(loop: Path) -> Path:
    """Predictors that read two layers back."""
    folder = loop / "farther"
    with pytest.MonkeyPatch.context() as patch:
        assert (
            run(patch, "fit", loop / "trace", "--out", loop / "far-run", "--epochs", 1, "--width", 8, "--horizon", 2)
            == 0
        )
        assert run(patch, "export", loop / "far-run", "--out", folder) == 0
    return folder


def test_horizon_and_candidates_reach_every_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_moe_folder: Path,
    text_corpus: Path,
    farther: Path,
    tmp_path: Path,
) -> None:
    """With predictors of that horizon, which go without the flag as well, and without any."""
    file, guessed = tmp_path / "figures.json", []
    for known in (["--predictors", farther], []):
        both = [*known, "--horizon", 2, "--candidates", "auto"]
        texts = set()
        capsys.readouterr()
        for policy in (["on_demand"], ["prefetch", *both], ["auto", *both]):
            code = run(monkeypatch, "generate", tiny_moe_folder, "--prompt", "The stone", "--max-new-tokens", 4,
                       "--slots", 9, "--policy", *policy)  # fmt: skip
            assert code == 0
            texts.add(capsys.readouterr().out)
        assert len(texts) == 1, "exact policies give one text, however far is guessed"

        code = run(monkeypatch, "bench", tiny_moe_folder, *both, "--policies", "prefetch,speculative/resident",
                   "--tokens", 4, "--rounds", 1, "--slots", 9, "--json", file)  # fmt: skip
        assert code == 0
        result = json.loads(file.read_text())
        assert (result["settings"]["horizon"], result["settings"]["candidates"]) == (2, "auto")
        assert all(0 < row["hit_rate"] <= 1 for row in result["results"])

        code = run(monkeypatch, "evaluate", tiny_moe_folder, *both, "--corpus", text_corpus, "--tokens", 200,
                   "--sequence-length", 64, "--json", file)  # fmt: skip
        assert code == 0
        guessed.append([row["training_free"] for row in json.loads(file.read_text())["layers"]])
    code = run(monkeypatch, "evaluate", tiny_moe_folder, "--corpus", text_corpus, "--tokens", 200, "--sequence-length", 64,
               "--json", file)  # fmt: skip
    assert code == 0
    nearest = [row["training_free"] for row in json.loads(file.read_text())["layers"]]
    for farther_rates in guessed:
        assert nearest[0] == farther_rates[0], "the first layer reads its own input either way"
        assert nearest[2:] != farther_rates[2:]


def test_plan_looks_as_far_ahead_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tiny_moe_folder: Path, tmp_path: Path
) -> None:
    found = []
    for horizon in (1, 2):
        file = tmp_path / f"{horizon}.json"
        code = run(monkeypatch, "plan", tiny_moe_folder, "--device-memory", "2MB", "--reserve", "1MB", "--context", "64", "--link", "10MB/s",
                   "--memory-bandwidth", "9GB/s", "--slots", 9, "--horizon", horizon, "--json", file)  # fmt: skip
        assert code == 0
        found.append({row["policy"]: row["stall_ms_per_token"] for row in json.loads(file.read_text())["results"]})
    assert found[0]["on_demand"] == found[1]["on_demand"], "it guesses nothing"
    assert found[0]["prefetch"] != found[1]["prefetch"]


def test_flags_beat_the_file_and_the_file_beats_defaults(
    monkeypatch: pytest.MonkeyPatch, tiny_moe_folder: Path, text_corpus: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"model: {tiny_moe_folder}\ncorpus: {text_corpus}\ntokens: 999\nlayers: [1, 2]\nsequence_length: 32\n"
    )
    assert run(monkeypatch, "collect", "--config", settings, "--tokens", 64, "--out", tmp_path / "trace") == 0
    manifest = json.loads((tmp_path / "trace" / "manifest.json").read_text())
    assert (manifest["tokens"], manifest["sequence_length"]) == (64, 32)
    assert [layer["layer"] for layer in manifest["layers"]] == [1, 2]


WRONG = {
    "a missing model": (["collect", "{tmp}/nothing", "--out", "{out}"], "no model at"),
    "a dense model": (["collect", "{dense}", "--out", "{out}"], "mixture-of-experts"),
    "a layer that is not there": (["collect", "{moe}", "--corpus", "{text}", "--layers", "99", "--out", "{out}"], "0 to 3"),
    "layers that are no numbers": (["collect", "{moe}", "--layers", "first", "--out", "{out}"], "--layers"),
    "an empty corpus": (["collect", "{moe}", "--corpus", "{empty}", "--out", "{out}"], "no text"),
    "a missing corpus": (["collect", "{moe}", "--corpus", "{tmp}/nothing", "--out", "{out}"], "no corpus at"),
    "an unknown setting": (["collect", "{moe}", "--config", "{typo}", "--out", "{out}"], "did you mean tokens"),
    "no out folder": (["collect", "{moe}"], "out is missing"),
    "a folder that is taken": (["collect", "{moe}", "--out", "{loop}/trace"], "exists already"),
    "no trace": (["fit", "{tmp}/nothing", "--out", "{out}"], "nothing"),
    "a truncated shard": (["fit", "{cut}", "--out", "{out}"], "shard-00000"),
    "a run that is taken": (["fit", "{loop}/trace", "--out", "{loop}/run"], "--resume"),
    "no run": (["export", "{tmp}/nothing", "--out", "{out}"], "nothing"),
    "a trace of another model": (["export", "{loop}/run", "--trace", "{other}/trace", "--out", "{out}"], "is not the trace"),
    "predictors of another model": (
        ["generate", "{moe}", "--predictors", "{other}/predictors", "--prompt", "x"], "these predictors belong to",
    ),
    "no predictors": (["generate", "{moe}", "--predictors", "{tmp}", "--prompt", "x"], "no predictors"),
    "an empty prompt": (["generate", "{moe}", "--prompt", ""], "prompt is empty"),
    "more slots than experts": (["generate", "{moe}", "--prompt", "x", "--slots", "33"], "to 32"),
    "an unknown policy": (["generate", "{moe}", "--prompt", "x", "--policy", "magic"], "policies are"),
    "a horizon too far": (["generate", "{moe}", "--prompt", "x", "--horizon", "3"], "guess 1 or 2 layers ahead"),
    "a horizon too far to measure": (["bench", "{moe}", "--horizon", "3"], "guess 1 or 2 layers ahead"),
    "a horizon too far to evaluate": (["evaluate", "{moe}", "--horizon", "0"], "guess 1 or 2 layers ahead"),
    "a horizon too far to plan": (
        ["plan", "{moe}", "--device-memory", "2GB", "--link", "1GB/s", "--memory-bandwidth", "9GB/s", "--horizon", "3"],
        "1 or 2 layers ahead",
    ),
    "a horizon that nobody was trained for": (
        ["generate", "{moe}", "--predictors", "{loop}/predictors", "--prompt", "x", "--horizon", "2"],
        "trained to read other layers",
    ),
    "the same to evaluate": (
        ["evaluate", "{moe}", "--predictors", "{loop}/predictors", "--horizon", "2"], "trained to read other layers",
    ),
    "candidates that are no number": (["generate", "{moe}", "--prompt", "x", "--candidates", "many"], "can't be many"),
    "no candidates to measure": (["bench", "{moe}", "--candidates", "0"], "--candidates can't be 0"),
    "fewer candidates than the top k": (["bench", "{moe}", "--candidates", "1"], "from 2 to 8, or auto"),
    "more candidates than experts": (["evaluate", "{moe}", "--candidates", "9"], "from 2 to 8, or auto"),
    "CUDA where there is none": (["generate", "{moe}", "--prompt", "x", "--device", "cuda"], "no CUDA device"),
    "CUDA for a collection": (["collect", "{moe}", "--device", "cuda", "--out", "{out}"], "no CUDA device"),
    "more width than memory": (["fit", "{loop}/trace", "--width", "1e12", "--out", "{out}"], "no room in memory for"),
    "nowhere to write figures": (["evaluate", "{moe}", "--json", "{tmp}/no/where.json"], "no folder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def other(text_corpus: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: object) -> Path:
    """The loop of a model of another shape."""
    from conftest import build_model, save_model

    folder = tmp_path_factory.mktemp("other")
    model = save_model(build_model("qwen3_moe", num_hidden_layers=3), tokenizer, folder / "model")  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "collect", model, "--corpus", text_corpus, "--tokens", 600, "--sequence-length", 32,
                   "--out", folder / "trace") == 0  # fmt: skip
        assert run(patch, "fit", folder / "trace", "--out", folder / "run", "--epochs", 1, "--width", 8) == 0
        assert run(patch, "export", folder / "run", "--out", folder / "predictors") == 0
    return folder


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_ends_in_one_sentence(
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_moe_folder: Path,
    dense_folder: Path,
    text_corpus: Path,
    loop: Path,
    other: Path,
) -> None:
    arguments, words = WRONG[what]
    if "CUDA" in what and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "typo.yaml").write_text("tokns: 5\n")
    shutil.copytree(loop / "trace", tmp_path / "cut")
    shard = tmp_path / "cut" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    places = {"tmp": tmp_path, "out": tmp_path / "out", "moe": tiny_moe_folder, "dense": dense_folder, "loop": loop,
              "text": text_corpus, "empty": tmp_path / "empty.txt", "typo": tmp_path / "typo.yaml",
              "cut": tmp_path / "cut", "other": other}  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    code = run(monkeypatch, *(argument.format(**places) for argument in arguments))
    told = capsys.readouterr().err
    assert code == 2
    assert words in told
    assert "Traceback" not in told
    sentences = [line for line in re.split(r"[\r\n]+", told) if line.strip() and "Loading weights" not in line]
    assert len(sentences) == 1, told
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_a_demo_that_is_stopped_does_not_tell_of_a_flag_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from predict_train import demo

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt("stopped; give --resume to go on")

    monkeypatch.setattr(demo, "collect", stopped)
    assert run(monkeypatch, "demo", "--out", tmp_path / "demo") == 130
    assert capsys.readouterr().err == "predict-train: stopped; the next demo begins anew\n"


def test_the_console_script_is_installed() -> None:
    done = subprocess.run([Path(sys.executable).parent / "predict-train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("collect", "fit", "export", "generate", "evaluate", "demo"):
        assert command in done.stdout
