"""In a folder whose own files have the names of the rooms, everything works, and those files stay what they are.

Seen twice: from the checkout, and from a wheel that is built here and installed beside the libraries of this environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, cast

import alone
import pytest
from conftest import ROOMS, write_own_files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "predict_train"
EMBEDDED = ("checkpoints/tiny-moe", "checkpoints/tiny-moe-predictors")
COMMANDS = (
    "collect", "fit", "export", "inspect", "models", "generate", "chat", "serve", "evaluate", "demo", "bench", "plan", "pack",
)  # fmt: skip

# The user's own program: it has the user's files and ours side by side, and runs every command, all in one process.
OWN_PROGRAM = """
import importlib
import json
import sys

import data_collection, predictors, runtime, train

from predict_train import load_offloaded, load_predictors, offload_experts

ROOMS = ("predictors", "data_collection", "train", "runtime")
commands, model, found = json.load(open("commands.json")), sys.argv[1], {}


def run(*arguments):
    from predict_train import cli

    sys.argv = ["predict-train", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0


found["codes"] = {name: run(name, *arguments) for name, arguments in commands.items()}
found["help"] = {name: run(name, "--help") for name in [*commands, "models", "demo", "serve"]}

import torch
from transformers import AutoModelForCausalLM

plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
ids = torch.tensor([[72, 101, 108, 108, 111]])
expected = plain.generate(ids, max_new_tokens=4, do_sample=False)
known = load_predictors("predictors", plain)
offload_experts(plain, known, policy="prefetch", slots=9, device="cpu")
loaded = load_offloaded(model, known, policy="on_demand", slots=9, device="cpu")
found["same tokens"] = [torch.equal(m.generate(ids, max_new_tokens=4, do_sample=False), expected) for m in (plain, loaded)]

import predict_train
import predict_train.data_collection.collect as job


class Reached(Exception):
    pass


def stop(config, *_, **__):
    raise Reached(config.model)


job.collect = stop
try:
    run("demo")
except Reached as reached:
    found["the demo's model"] = str(reached)
found["generate with it"] = run("generate", found["the demo's model"], "--prompt", "def", "--max-new-tokens", "2")

found["ours"] = {name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "predict_train"}
found["owners"] = [sys.modules[name].OWNER for name in ROOMS]
for name in ROOMS:  # and the other way round: ours are there first
    del sys.modules[name]
found["owners"] += [importlib.import_module(name).OWNER for name in ROOMS]
json.dump(found, open("found.json", "w"))
"""

# Imports the libraries, and nothing of ours, for the programs of both places: that takes longer than all that they do. Each
# program then runs in a child, where modules are found as Python would find them for it: beside the program, then in `home`.
LIBRARIES = """
import importlib
import json
import os
import runpy
import sys

for name in ("torch", "transformers", "lightning.pytorch", "datasets", "torchmetrics", "typer", "pydantic"):
    importlib.import_module(name)
assert not any(name.split(".")[0] == "predict_train" for name in sys.modules)
print(flush=True)
for line in sys.stdin:
    home, folder, log, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(folder)
        # What is installed editably in this environment is not what is tested.
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
        sys.path[:1] = [folder, home]
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Place:
    """Where predict_train is imported from."""

    home: Path
    """The folder that holds `predict_train/`."""
    python: Path
    environment: dict[str, str]

    def run(self, folder: Path, *arguments: object, **variables: str) -> str:
        """Runs Python with these arguments in `folder`, which has to succeed; returns what it printed."""
        done = subprocess.run(
            [*map(str, [self.python, *arguments])],
            cwd=folder,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout. It is built from a copy, so that no old build gets into it and none is left behind."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("there is no pip here to build a wheel with")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for part in (PACKAGE, *ROOMS, *EMBEDDED):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    flags = ["--no-deps", "--wheel-dir", folder, "--quiet", "--disable-pip-version-check", "--retries", 0]
    flags += ["--no-build-isolation"] if setuptools_release() >= 77 else []
    command = [sys.executable, "-m", "pip", "wheel", *flags, folder]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if "satisfies the requirement setuptools" in done.stderr:
        pytest.skip("setuptools is older than 77 here, and the registry can't be reached for a newer one")
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


def setuptools_release() -> int:
    try:
        return int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return 0


@pytest.fixture(scope="module", params=["checkout", "wheel"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if request.param == "checkout":
        python = Path(sys.executable)
        return Place(ROOT, python, environment | {"PYTHONPATH": str(ROOT)})
    file: Path = request.getfixturevalue("wheel")
    # An environment of its own, with the libraries of this one but not what is installed editably in this one.
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    (home,) = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (home / "libraries.pth").write_text("\n".join(libraries))
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*map(str, pip), "--no-deps", "--no-index", str(file)], check=True)
    return Place(home, python, environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, place: Place) -> Path:  # noqa: ARG001 - one for each place
    """The user's folder."""
    made = tmp_path_factory.mktemp("user")
    write_own_files(made)
    (made / "program.py").write_text(OWN_PROGRAM)
    return made


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """Runs a program in a process that has the libraries already: `home`, folder, log file, program and its arguments."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    elsewhere, pipes = tmp_path_factory.mktemp("elsewhere"), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", LIBRARIES], cwd=elsewhere, env=environment, text=True, **pipes
    ) as server:
        stdin, stdout = cast(IO[str], server.stdin), cast(IO[str], server.stdout)
        assert stdout.readline() == "\n"

        def run(*given: object) -> int:
            stdin.write(json.dumps([*map(str, given)]) + "\n")
            stdin.flush()
            return int(stdout.readline())

        yield run
        stdin.close()


@pytest.fixture(scope="module")
def found(
    place: Place, folder: Path, tiny_moe_folder: Path, text_corpus: Path, libraries: Callable[..., int]
) -> dict[str, Any]:
    """What the user's program says: exit codes, tokens, and where the modules came from."""
    text = ["--corpus", text_corpus, "--sequence-length", 32]
    quick = ["--tokens", 4, "--slots", 9]
    machine = ["--device-memory", "8MB", "--reserve", "1MB", "--link", "1GB/s", "--memory-bandwidth", "9GB/s"]
    commands = {
        "collect": [tiny_moe_folder, *text, "--tokens", 600, "--out", "trace"],
        "fit": ["trace", "--epochs", 1, "--width", 8, "--batch-size", 128, "--out", "run"],
        "export": ["run", "--out", "predictors"],
        "inspect": ["trace"],
        "evaluate": [tiny_moe_folder, "--predictors", "predictors", *text, "--tokens", 100],
        "chat": [tiny_moe_folder, "--predictors", "predictors"],
        "generate": [tiny_moe_folder, "--predictors", "predictors", "--prompt", "The", "--max-new-tokens", 4],
        "pack": [tiny_moe_folder, "--out", "experts.pack"],
        "bench": [tiny_moe_folder, *quick, "--pack", "experts.pack", "--policies", "prefetch", "--rounds", 1],
        "plan": [tiny_moe_folder, *machine, *quick],
    }
    (folder / "commands.json").write_text(json.dumps({name: [*map(str, a)] for name, a in commands.items()}))
    log = folder / "said"
    assert libraries(place.home, folder, log, "program.py", tiny_moe_folder) == 0, log.read_text()
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result


def test_every_command_works_beside_the_users_files(found):
    assert found["codes"] == dict.fromkeys(set(COMMANDS) - {"models", "demo", "serve"}, 0)
    assert found["help"] == dict.fromkeys(COMMANDS, 0)


def test_what_is_imported_by_name_works_beside_the_users_files(found):
    assert found["same tokens"] == [True, True]


def test_the_users_files_stay_what_they_are(found):
    assert found["owners"] == ["the user"] * 2 * len(ROOMS)


def test_ours_come_from_where_they_should(found, place):
    assert {f"{PACKAGE}.{room}" for room in ROOMS} <= found["ours"].keys()
    homes = {name: Path(file) for name, file in found["ours"].items()}
    assert [name for name, file in homes.items() if not file.is_relative_to(place.home)] == []


def test_the_demos_model_comes_along(found, place):
    assert Path(found["the demo's model"]).is_relative_to(place.home)
    assert found["generate with it"] == 0


def test_the_package_is_run_as_a_module(place, folder):
    told = place.run(folder, "-m", PACKAGE, "--help", ONLY_OURS="1")
    listed = re.findall(r"^\W{1,3}(\w+)  ", told.split("Commands")[1], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS), "a new command belongs into this file too"


@pytest.mark.parametrize("place", ["wheel"], indirect=True)
def test_processes_of_torchrun_collect(place, folder, tiny_moe_folder, text_corpus, forkserver):
    arguments = ["collect", tiny_moe_folder, "--corpus", text_corpus, "--tokens", 600, "--sequence-length", 32]
    given = [*map(str, ["--standalone", "--nproc-per-node", 2, "-m", PACKAGE, *arguments, "--out", "shared"])]
    # torchrun itself needs no new Python. Its processes are the place's.
    environment, log = place.environment | {"ONLY_OURS": "1", "PYTHON_EXEC": str(place.python)}, folder / "torchrun"
    torchrun = ("torch.distributed.run", given, str(folder), environment, str(log))
    assert alone.exit_code(forkserver, alone.module, *torchrun, within=240) == 0, log.read_text()
    assert json.loads((folder / "shared" / "manifest.json").read_text())["processes"] == 2


def test_the_wheel_holds_all_of_the_rooms_and_takes_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {PACKAGE}
    places = {ROOT / PACKAGE: PACKAGE} | {ROOT / room: f"{PACKAGE}/{room}" for room in ROOMS}
    modules = {f"{name}/{file.relative_to(folder)}" for folder, name in places.items() for file in folder.rglob("*.py")}
    assert modules <= set(names)
    for file in (file for part in EMBEDDED for file in (ROOT / part).iterdir()):
        assert zipfile.ZipFile(wheel).read(f"{PACKAGE}/{file.relative_to(ROOT)}") == file.read_bytes()
