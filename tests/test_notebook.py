"""The notebook of the docs runs from its first cell to its last."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from predict_train import cli

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "loop.ipynb"


def test_every_cell_runs(
    tiny_moe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        commands = [line[1:] for line in source.splitlines() if line.startswith("!")]
        for command in commands:
            name, *words = shlex.split(command.format(**scope))
            assert name == "predict-train"
            cli.app(words, standalone_mode=False)
        if not commands:
            exec(source, scope)
        if "MODEL" in source and not commands and "OUT.mkdir" in source:  # a smaller model, elsewhere
            scope |= {"MODEL": str(tiny_moe_folder), "TOKENS": "3k", "OUT": tmp_path}
    assert (tmp_path / "hit_rates.png").stat().st_size > 5000
    assert "Counters(" in capsys.readouterr().out
