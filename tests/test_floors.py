"""What pyproject.toml declares is true: the main job and exact tokens on the oldest and the newest releases it admits.

Each runs in an environment that lies over the present one and holds little but the releases in question. It is kept in
pytest's cache folder, so that a second run downloads nothing. torch is always the present one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import skip_if_lacking
from packaging.requirements import Requirement
from packaging.version import Version
from predict_train.data_collection.catalog import tiny_model
from predict_train.predictors.architecture import MoELayer, UnsupportedModelError
from predict_train.predictors.discovery import find_moe_layers
from transformers import PreTrainedModel

ROOT = Path(__file__).parents[1]
DECLARED = [
    requirement
    for requirement in map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    if requirement.name != "torch"
]
FILES = ("tests/test_cli.py", "tests/test_exactness.py")
LOOP = ("what_a_token_costs", "evaluate_writes_its_figures")
"""Tests that collect, fit, export, and then generate or evaluate, all by the command line."""
TYPES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "nemotron_h")
"""Types that both exact policies are compared with the resident model on. One that a release lacks is left out."""
RUN = """
import sys, pytest
from importlib.metadata import version
from packaging.version import Version
for wanted in sys.argv[1].split():
    name, release = wanted.split("==")
    assert Version(version(name)) == Version(release), f"{name} is {version(name)} where {release} is tested"
sys.exit(pytest.main(sys.argv[2:]))
"""


def pip(*arguments: object) -> str:
    """What pip prints. Skips the test where the registry can't be reached, or has no wheel for this Python."""
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check", "--retries", "1")
    command = [sys.executable, "-m", "pip", *quiet, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found" in done.stderr or "No module named pip" in done.stderr:
        pytest.skip(f"pip can't get the releases: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(folder: Path, wanted: list[str]) -> Path:
    """The Python of an environment in `folder`, with the `wanted` releases over what is installed here."""
    contents = "\n".join([sys.prefix, sys.version, version("torch"), *wanted])
    made, python = folder / "contents.txt", folder / "bin" / "python"
    if not made.exists() or made.read_text() != contents:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, symlinks=True)
        packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
        below = sysconfig.get_path("purelib")
        Path(packages, "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
        # Little of it is imported here, so compiling it all would take longer than the test.
        pip(
            "--python",
            python,
            "install",
            "--no-compile",
            "--only-binary",
            ":all:",
            f"torch=={version('torch')}",
            *wanted,
        )
        made.write_text(contents)
    return python


def oldest() -> list[str]:
    """The lowest release that is declared of everything but torch."""
    floors = {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in DECLARED}
    return [f"{name}=={floor}" for name, floor in floors.items()]


def newest() -> list[str]:
    """The highest release of transformers that is declared and that the registry has. Skips where it is the present one."""
    declared = next(r for r in DECLARED if r.name == "transformers")
    report = pip("install", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", declared)
    release = json.loads(report)["install"][0]["metadata"]["version"]
    if Version(release) == Version(version("transformers")):
        pytest.skip(f"transformers {release} is the newest, and the whole suite runs on it")
    return [f"transformers=={release}"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("choose", [oldest, newest])
def test_the_main_job_and_exact_tokens(pytestconfig: pytest.Config, choose: Callable[[], list[str]]) -> None:
    wanted = choose()
    python = environment(Path(pytestconfig.cache.mkdir("floors")) / choose.__name__, wanted)
    chosen = " or ".join([*LOOP, *(f"plain_transformers[{name}]" for name in TYPES)])
    command = [python, "-c", RUN, " ".join(wanted), "-q", "-p", "no:cacheprovider", *FILES, "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= len(LOOP) + 3, done.stdout


def unnamed(monkeypatch: pytest.MonkeyPatch, model_type: str) -> PreTrainedModel:
    """A model of a type whose release of transformers does not name its routers."""
    model = tiny_model(model_type)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            monkeypatch.setattr(type(module), "_can_record_outputs", {})
    return model


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "afmoe", "minimax_m2", "nemotron_h"])
def test_routers_that_are_not_named_are_found(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    def facts(layers: list[MoELayer]) -> list[object]:
        return [(layer.names, layer.num_experts, layer.top_k, layer.router_ndim) for layer in layers]

    skip_if_lacking(model_type)
    expected = facts(find_moe_layers(tiny_model(model_type)))
    assert facts(find_moe_layers(unnamed(monkeypatch, model_type))) == expected


def test_what_is_no_router_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unnamed(monkeypatch, "qwen3_moe")
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):  # as older releases have granitemoe's
            module.register_forward_hook(lambda _, __, output: output[::-1])
    with pytest.raises(UnsupportedModelError, match="is no module that could be watched"):
        find_moe_layers(model)
