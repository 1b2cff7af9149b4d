"""The embedded model: trained, balanced, split by file, and run exactly by the runtime."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from predict_train.data_collection.corpus import read_documents, sequences
from predict_train.data_collection.hooks import Recorder
from predict_train.predictors.discovery import find_moe_layers
from predict_train.runtime import offloaded
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).parent.parent / "checkpoints" / "tiny-moe"
PROMPTS = [
    "import os\nimport sys\n\n\ndef main():\n    parser",
    "class Reader:\n    def __init__(self, path):\n        self.path",
    "    for name, value in self.items():\n        if value",
    'def read(path, mode="r"):\n    """Opens the file',
    "    try:\n        return self._cache[key]\n    except KeyError",
    "from typing import Any\n\nimport torch\n\n\ndef forward(self, x",
    "        self.assertEqual(len(result), 3)\n        self.assert",
    "    if not isinstance(other, type(self)):\n        return",
    "async def fetch(session, url):\n    async with session.get(url",
]
PROMPT_TOKENS, NEW_TOKENS = 8, 8


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(FOLDER)
    return loaded


@pytest.fixture(scope="module")
def held_out(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """`[16, 256]` token ids of held-out files."""
    return torch.stack(list(sequences(read_documents(split="held_out"), tokenizer, 256, 4096)))


def generated(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    return output


def test_exact_policies_give_the_very_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """With few slots and with many, one sequence and several."""
    rows = torch.tensor([tokenizer(prompt)["input_ids"][:PROMPT_TOKENS] for prompt in PROMPTS])
    batches = [rows[:1], rows[1:]]
    with torch.no_grad():
        expected = [(generated(model, batch), model(batch).logits) for batch in batches]
        for policy, slots in itertools.product(("on_demand", "prefetch"), (4, 24)):
            with offloaded(model, policy=policy, slots=slots, device="cpu"):
                for batch, (tokens, logits) in zip(batches, expected, strict=True):
                    assert torch.equal(generated(model, batch), tokens), (policy, slots, len(batch))
                    assert torch.equal(model(batch).logits, logits)


def test_the_control_is_one_and_every_expert_is_used(model: PreTrainedModel, held_out: torch.Tensor) -> None:
    layers = find_moe_layers(model)
    assert len(layers) == 12
    with torch.no_grad(), Recorder(layers, [layer.index for layer in layers]) as recorder:
        model(held_out)
        records = recorder.take()
    assert set(recorder.control_hit_rates().values()) == {1.0}
    for record in records.values():
        share = torch.bincount(record.routing.ids.flatten(), minlength=32) / record.routing.ids.numel()
        assert share.min() > 0.05 / 32, "no expert is dead"
        assert share.max() < 5 / 32


def test_it_has_learned_what_its_readme_says(model: PreTrainedModel, held_out: torch.Tensor) -> None:
    facts = json.loads((FOLDER / "training.json").read_text())
    assert facts["tokens"] >= 20_000_000
    with torch.no_grad():
        loss = model(held_out, labels=held_out).loss.item()
    # The files differ a little between versions of Python and torch, and these are a small sample.
    assert loss == pytest.approx(facts["held_out_loss"], abs=0.4)
    assert f"{facts['held_out_loss']:.3f} nats" in (FOLDER / "README.md").read_text()


def test_it_fits_the_repository() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 30_000_000
