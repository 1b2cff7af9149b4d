"""docs/models.md says of the field's models what `plan` reads of their configs."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import IS_OLDER_RELEASE

from benchmarks import field


@pytest.mark.skipif(IS_OLDER_RELEASE, reason="the table was made with another release of transformers")
@pytest.mark.parametrize("name", ["gpt-oss-20b", "Mixtral-8x7B", "DeepSeek-V4-Flash", "Gemma-4-26B-A4B"])
def test_the_table_of_models_is_what_plan_reads(name: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    assert field.row(name) in text
    for other in field.FIELD:
        assert f"| {other} |" in text
