"""Transformers' own tests of `generate`, on models whose experts are offloaded, against the same tests without us.

    pip install parameterized httpx
    python -m benchmarks.transformers_tests CHECKOUT --types qwen3_moe,olmoe --policy prefetch

CHECKOUT is transformers' source tree, of about the installed release: its tests are in no wheel. Each model is offloaded when it
first runs in evaluation mode, with the fewest slots. The table says for each supported type how many tests pass without and with
us, and lists those that pass without us only. If there are some, or if none passes without us, the exit code is 1. Why none does is
shown in the last lines of what pytest said. Two versions are printed: of the transformers that run, and of CHECKOUT.

Tests that a model is compiled are among them: on a CPU, `generate` compiles the offloaded model there as it does the plain one.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from predict_train.data_collection.catalog import examine, moe_types
from predict_train.predictors.architecture import UnsupportedModelError
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.tables import broken, figure_table
from predict_train.runtime import offload_experts
from rich.console import Console
from transformers import GenerationMixin, PreTrainedModel, __version__

LAST = 8
"""Lines that are shown of what pytest said."""


class Offloading:
    """Offloads every mixture-of-experts model that a test runs, and detaches it after the test."""

    def __init__(self, policy: str):
        self._policy = policy
        self._running = 0
        self._models: list[PreTrainedModel] = []
        self.calls = 0
        """Calls of offloaded models. Without any, the tests say nothing about us."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it models are offloaded when they are called, or generate."""
        with ExitStack() as stack:
            for kind, name in ((GenerationMixin, "generate"), (PreTrainedModel, "__call__")):
                original = getattr(kind, name)
                is_own = name in vars(kind)
                setattr(kind, name, self._offloading(original))
                stack.callback(*((setattr, kind, name, original) if is_own else (delattr, kind, name)))
            yield

    def _offloading(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            self._running += 1
            try:
                if self._running == 1 and isinstance(model, GenerationMixin) and not model.training:
                    self._offload(model)
                return original(model, *args, **kwargs)
            finally:
                self._running -= 1

        return call

    def _offload(self, model: PreTrainedModel) -> None:
        if getattr(model, "expert_offload", None) is None:
            try:
                top_k = find_moe_layers(model)[0].top_k
            except UnsupportedModelError:  # a dense model, as assistants are
                return
            offload_experts(model, policy=self._policy, slots=top_k, device="cpu")
            self._models.append(model)
        self.calls += 1

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        while self._models:
            vars(self._models.pop())["expert_offload"].detach()


class Results:
    """Runs only the tests of `generate`, and keeps how each ended."""

    def __init__(self) -> None:
        self.ended: dict[str, str] = {}
        """By test: `passed`, `failed` or `skipped`."""
        self.errors: dict[str, str] = {}
        self.said: list[str] = []
        """Lines on what could not be collected, and all that was printed."""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.said += report.longreprtext.splitlines()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        mixin = importlib.import_module("tests.generation.test_utils").GenerationTesterMixin
        items[:] = [item for item in items if getattr(item, "originalname", item.name) in vars(mixin)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.split("::", 1)[1]
            if self.ended.get(name) != "failed":
                self.ended[name] = report.outcome
            if report.failed:
                told = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
                self.errors[name] = told[0].removeprefix("E ").strip() if told else report.longreprtext[:200]

    def passed(self) -> set[str]:
        return {name for name, outcome in self.ended.items() if outcome == "passed"}


def run(file: Path, offloading: Offloading | None, match: str | None) -> Results:
    """The tests of `generate` in a file, with or without offloading."""
    results, options = Results(), ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:warnings"]
    options += [] if match is None else ["-k", match]
    printed = io.StringIO()
    with ExitStack() as stack, redirect_stdout(printed), redirect_stderr(printed):
        if offloading is not None:
            stack.enter_context(offloading.watching())
        pytest.main([*options, str(file)], plugins=[results, *([] if offloading is None else [offloading])])
    results.said += printed.getvalue().splitlines()
    return results


def version_of(checkout: Path) -> str:
    """What transformers' source tree calls itself. Raises `SystemExit` with a sentence if it is none."""
    file = checkout / "src" / "transformers" / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"$', file.read_text(), re.MULTILINE) if file.is_file() else None
    if found is None or not (checkout / "tests" / "models").is_dir():
        raise SystemExit(f"{checkout} is no source tree of transformers; give a clone of its repository")
    return found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--types", help="with commas; by default all that have tests and experts")
    parser.add_argument("--policy", default="prefetch")
    parser.add_argument("--match", help="as pytest's -k")
    args = parser.parse_args()
    console = Console()
    console.print(f"transformers {__version__} runs the tests of {version_of(args.checkout)}", highlight=False)
    sys.path.insert(0, str(args.checkout.resolve()))
    table = figure_table(
        "type", *map(broken, ("tests that pass", "with experts offloaded", "calls of offloaded models"))
    )
    wrong = 0
    for model_type in args.types.split(",") if args.types else moe_types():
        file = args.checkout / "tests" / "models" / model_type / f"test_modeling_{model_type}.py"
        if not file.exists() or examine(model_type).reason is not None:
            continue
        theirs, offloading = run(file, None, args.match), Offloading(args.policy)
        plain = theirs.passed()
        ours = run(file, offloading, args.match)
        table.add_row(*map(str, (model_type, len(plain), len(plain & ours.passed()), offloading.calls)))
        if not plain:
            wrong += 1
            console.print(
                f"{model_type}: no test passes without us; install what the tests lack (parameterized, httpx), or give a checkout of "
                f"the release {__version__}:",
                *[*theirs.errors.values(), *theirs.said][-LAST:],
                sep="\n    ",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        for name in sorted(plain - ours.passed()):
            wrong += 1
            console.print(
                f"{model_type} {name}: {ours.errors.get(name, ours.ended.get(name))}", markup=False, soft_wrap=True
            )
    console.print(table)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
