"""The form of the house: which room may import what, and how long a file and a list of parameters may be."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "predict_train"
BELOW = {  # the rooms that each may import from
    "predictors": {"predictors"},
    "data_collection": {"predictors", "data_collection"},
    "runtime": {"predictors", "runtime"},
    "train": {"predictors", "train"},
}
# Of data_collection, what train may import too: the trace, what reads it, and how a process keeps its memory.
READING = ("trace", "manifest", "columns", "wiring", "examples", "statistics", "keeping", "memory")
READING_SIDE = {f"{PACKAGE}.data_collection.{name}" for name in READING}
TRAINING_LIBRARIES = {"lightning", "datasets", "tensorboard"}
MOST_PARAMETERS = 8
MOST_LINES = 400


def name_of(file: Path) -> str:
    """The name that a file of the checkout is imported by."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for room in (*BELOW, PACKAGE) for file in sorted((ROOT / room).rglob("*.py"))}


def room_of(module: str) -> str:
    """`predictors` of `predict_train.predictors.mlp`; the package's own name for what is in no room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in BELOW else PACKAGE


def in_measure(module: str) -> bool:
    return f"{module}.".startswith(f"{PACKAGE}.runtime.measure.")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


class Import(NamedTuple):
    module: str
    """The one that imports."""
    target: str
    """What it imports: a module of ours, or a module or a name of a library's."""
    line: int
    lazy: bool
    """Whether it happens inside a function, when that is called, or only where types are checked."""

    def __str__(self) -> str:
        return f"{MODULES[self.module].relative_to(ROOT)}:{self.line} imports {self.target}"


@cache
def imports(module: str) -> list[Import]:
    """All imports of a module: at the top, inside functions, and for types only."""
    return [Import(module, *found) for found in _imports(tree(module), module, False)]


def _imports(node: ast.AST, module: str, lazy: bool) -> Iterator[tuple[str, int, bool]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno, lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if node.level:
            is_package = MODULES[module].name == "__init__.py"
            outer = module.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
            origin = ".".join([*outer, *([node.module] if node.module else [])])
        for alias in node.names:
            name = f"{origin}.{alias.name}"
            yield origin if origin in MODULES and name not in MODULES else name, node.lineno, lazy
    lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    lazy = lazy or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, module, lazy)


def of_room(*rooms: str) -> Iterator[Import]:
    return (found for module in MODULES if room_of(module) in rooms for found in imports(module))


def goes_up(found: Import) -> bool:
    if found.target.split(".")[0] != PACKAGE:
        return False
    if room_of(found.module) == "train" and found.target in READING_SIDE:
        return False
    return room_of(found.target) not in BELOW[room_of(found.module)]


def test_the_house_is_seen():
    """The other tests are worth nothing where they find no modules or no imports."""
    assert {room_of(module) for module in MODULES} == {*BELOW, PACKAGE}
    rooms = {(room_of(found.module), room_of(found.target)) for found in of_room(*BELOW) if PACKAGE in found.target}
    assert {(room, "predictors") for room in BELOW} | {("train", "data_collection")} <= rooms
    libraries = {found.target for found in of_room(*BELOW)}
    assert {"torch", "lightning", f"{PACKAGE}.train.figures"} <= libraries
    assert any(found.lazy for found in of_room(*BELOW))


def test_every_folder_of_modules_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {module if file.name == "__init__.py" else module.rpartition(".")[0] for module, file in MODULES.items()}
    assert folders <= set(listed)


def test_no_import_goes_up():
    assert [str(found) for found in of_room(*BELOW) if goes_up(found)] == []


def test_the_reading_side_of_a_trace_needs_nothing_of_what_records():
    wrong = [
        str(found)
        for module in READING_SIDE
        for found in imports(module)
        if room_of(found.target) == "data_collection" and found.target not in READING_SIDE
    ]
    assert wrong == []


def test_the_engine_imports_nothing_of_what_measures_it():
    engine = (found for found in of_room("runtime") if not in_measure(found.module))
    assert [str(found) for found in engine if in_measure(found.target)] == []


def test_predictors_and_the_runtime_name_no_training_library():
    found = of_room("predictors", "runtime")
    assert [str(one) for one in found if one.target.split(".")[0] in TRAINING_LIBRARIES] == []


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> int:
    """How many a caller may give: `self` and `cls` don't count, `*args` and `**kwargs` are one each."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    rest = [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
    return len([one for one in [*named, *rest] if one.arg not in ("self", "cls")])


def is_kernel(function: ast.AST) -> bool:
    """Whether it is a kernel. Kernels have no objects, so they take all that an object would hold."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in getattr(function, "decorator_list", []))


def test_no_function_has_too_many_parameters():
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{node.lineno} {getattr(node, 'name', 'lambda')} has {parameters(node)}"
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        and parameters(node) > MOST_PARAMETERS
        and not is_kernel(node)
    ]
    assert wrong == []


def test_no_file_is_too_long():
    lines = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for module, file in MODULES.items()
        if room_of(module) in BELOW
    }
    assert {file: count for file, count in lines.items() if count > MOST_LINES} == {}


def python(script: str, *arguments: str) -> str:
    """What a new Python process prints that runs `script`."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        # The help of the command line waits for none of these.
        ([PACKAGE, f"{PACKAGE}.cli", f"{PACKAGE}.runtime"], {"torch", "transformers", *TRAINING_LIBRARIES}),
        ([module for module in MODULES if room_of(module) in ("predictors", "runtime")], TRAINING_LIBRARIES),
    ],
    ids=["the names to import", "the whole runtime"],
)
def test_what_is_imported_loads_no_training_library(modules, unwanted):
    script = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(json.dumps([*sys.modules]))"
    )
    loaded = set(json.loads(python(script, *modules)))
    assert set(modules) <= loaded
    assert loaded & unwanted == set()
    # Of those rooms the command line needs the settings only.
    others = {name for name in loaded if name.startswith((f"{PACKAGE}.data_collection.", f"{PACKAGE}.train."))}
    assert others <= {f"{PACKAGE}.data_collection.settings", f"{PACKAGE}.train.settings"}


def outer_of(module: str) -> Iterator[str]:
    """The packages that a module is in, which are imported before it."""
    while module := module.rpartition(".")[0]:
        yield module


def test_each_module_can_be_imported_first():
    """No module needs itself to be there already. `TopologicalSorter` raises where one does."""
    needs: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in of_room(*BELOW, PACKAGE):
        target = found.target if found.target in MODULES else found.target.rpartition(".")[0]
        if not found.lazy and target in MODULES:
            # Its own packages have begun by then, so it does not wait for what they import unless it says so.
            needs[found.module] |= {target, *outer_of(target)} - ({*outer_of(found.module)} - {target})
    assert set(TopologicalSorter(needs).static_order()) == set(MODULES)
    assert sum(map(len, needs.values())) > len(MODULES)
