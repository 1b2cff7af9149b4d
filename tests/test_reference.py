"""The pages that are made from docstrings and from the sentences of errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from predict_train.runtime.settings import LoadConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["api.md", "troubleshooting.md"])
def test_a_page_is_what_the_sources_say(reference, name):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == reference.PAGES[name](), "run python docs/make_reference.py"


def test_all_settings_and_sentences_are_there(reference):
    api = reference.api()
    assert all(f"- **`{name}`**" in api for name in LoadConfig.model_fields)
    page = reference.troubleshooting()
    for part in ("hold no expert of … bytes; give more host_memory", "and the model is a config; set it there",
                 "expert_memory and slots say the same", "no packed file; make one with predict-train pack"):  # fmt: skip
        assert part in page
