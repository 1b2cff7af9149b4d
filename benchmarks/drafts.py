"""Several tokens a pass with offloaded experts: copies and time a token with and without drafts, with and without speculation.

    python -m benchmarks.drafts SCRATCH

The embedded model goes on with held-out Python, greedily, with a quarter of its experts in slots and its predictors. Drafts are none, those of
prompt lookup, those of two dense layers that are trained for some minutes on the same corpus and kept in the folder SCRATCH, or those
of the same model with everything resident: it is always right, so it is the most that any way of drafting could reach. An assistant's
own time is counted apart. Prompts are run before anything is counted. Each way has to say the same tokens as plain transformers with the
same drafts. Prints and writes the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from predict_train.data_collection.corpus import read_documents, sequences
from predict_train.predictors.loading import load_tokenizer
from predict_train.predictors.provenance import hardware, versions
from predict_train.predictors.tables import broken, figure_table
from predict_train.runtime.load import load_offloaded
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.small_models import train

ROOT = Path(__file__).resolve().parents[1]
MODEL, PREDICTORS = ROOT / "checkpoints" / "tiny-moe", ROOT / "checkpoints" / "tiny-moe-predictors"
RESULTS = Path(__file__).parent / "results" / "drafts.json"
PROMPT, SLOTS = 192, 96
POLICIES = ("on_demand", "prefetch")
DRAFTS: dict[str, int | None] = {
    "none": None, "lookup 3": 3, "lookup 7": 7, "trained 3": 3, "trained 7": 7, "always right 3": 3, "always right 7": 7,
}  # fmt: skip
"""How many tokens are drafted for a pass at the most. What is no lookup begins with the assistant's name."""
SMALL: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
"""The assistant that is trained."""
STEPS = 3000


class Watch:
    """The time that a model spends in its forward passes, and how many tokens each is over."""

    def __init__(self, model: Any):
        self.seconds, self.tokens = 0.0, list[int]()
        self.already: int | None = None
        """How many tokens were said before anything was counted; None while nothing is."""
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end)

    def _begin(self, _: Any, __: Any, kwargs: dict[str, Any]) -> None:
        self.tokens.append(kwargs["input_ids"].shape[1])
        self._begun = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._begun


@torch.no_grad()
def small(plain: Any) -> Any:
    """A random model of two dense layers that has the embedding of `plain`, since it would take minutes to learn one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    for name in ("embed_tokens", "norm"):
        getattr(model.model, name).weight.copy_(getattr(plain.model, name).weight)
    return model


def arguments(draft: str, assistant: Any) -> dict[str, Any]:
    """Those of `generate` for a way to draft, by an `assistant` or without."""
    if assistant is None:
        return {} if draft == "none" else {"prompt_lookup_num_tokens": DRAFTS[draft]}
    config = assistant.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = DRAFTS[draft], "constant"
    config.assistant_confidence_threshold = 0.0
    return {"assistant_model": assistant}


def go_on(
    model: Any,
    ids: torch.Tensor,
    length: int,
    drafts: dict[str, Any],
    watch: Watch | None = None,
    its: Watch | None = None,
) -> torch.Tensor:
    """What `model` says after `ids` `[1, tokens]`: `[1, tokens + length]`. `watch`, `its` (the assistant's) and the offload count
    from the second pass on."""

    def after_a_pass(said: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if watch is not None and watch.already is None:
            model.expert_offload.reset()
            watch.already, watch.seconds, watch.tokens = said.shape[1] - ids.shape[1], 0.0, []
            if its is not None:
                its.seconds = 0.0
        return torch.zeros(len(said), dtype=torch.bool)

    said: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[after_a_pass],
        **drafts,
    )
    return said


@torch.no_grad()
def measure(
    models: dict[str, Any], plain: Any, assistants: dict[str, Any], prompts: list[torch.Tensor], length: int
) -> list[dict[str, Any]]:
    """Every policy and way to draft, in turn for each prompt."""
    watches = {name: Watch(model) for name, model in (models | assistants).items()}
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for ids in prompts:
        for draft in DRAFTS:
            name = draft.rpartition(" ")[0]
            drafts, its = arguments(draft, assistants.get(name)), watches.get(name)
            expected = go_on(plain, ids, length, drafts)
            for policy, model in models.items():
                offload, watch = model.expert_offload, watches[policy]
                watch.already = None
                if not torch.equal(go_on(model, ids, length, drafts, watch, its), expected):
                    raise SystemExit(f"{policy} with drafts {draft} says other tokens than plain transformers")
                counters = offload.counters
                own = sums.setdefault(
                    (draft, policy),
                    dict.fromkeys(("tokens", "passes", "copies", "late", "used"), 0) | {"ms": [], "its": []},
                )
                tokens = length - int(watch.already or 0)
                own["tokens"] += tokens
                own["passes"] += len(watch.tokens)
                own["copies"] += counters.copies
                own["late"] += counters.misses
                own["used"] += counters.hits + counters.misses
                own["ms"].append(1000 * watch.seconds / tokens)
                own["its"].append(0.0 if its is None else 1000 * its.seconds / tokens)
    return [
        {
            "draft": draft,
            "policy": policy,
            "tokens_a_pass": own["tokens"] / own["passes"],
            "experts_a_pass": own["used"] / own["passes"],
            "copies_a_token": own["copies"] / own["tokens"],
            "late_a_token": own["late"] / own["tokens"],
            "in_time": 1 - own["late"] / own["used"],
            "ms_a_token": statistics.median(own["ms"]),
            "assistant_ms_a_token": statistics.median(own["its"]),
        }
        for (draft, policy), own in sums.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the assistant's training")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    tokenizer = load_tokenizer(str(MODEL))
    text = read_documents(split="held_out", refuse=lambda *_: None)
    rows = sequences(text, tokenizer, PROMPT, 8 * PROMPT * given.prompts)
    prompts = [row.unsqueeze(0) for row in rows if len(row) == PROMPT][::8][: given.prompts]
    load: dict[str, Any] = {"dtype": "float32", "device": "cpu", "slots": SLOTS}
    models = {policy: load_offloaded(str(MODEL), str(PREDICTORS), policy=policy, **load) for policy in POLICIES}
    trained = given.scratch / "draft"
    plain, right = (AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval() for _ in range(2))
    if not (trained / "training.json").exists():
        train(small(plain), trained, given.steps, has_experts=False, rows=2, rate=2e-3)
    its = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    results = measure(models, plain, {"always right": right, "trained": its}, prompts, given.tokens)
    names = [name for name in results[0] if name not in ("draft", "policy")]
    table = figure_table("draft", "policy", *(broken(name.replace("_", " ")) for name in names))
    for row in results:
        table.add_row(row["draft"], row["policy"], *(f"{row[name]:.2f}" for name in names))
    Console().print(table)
    facts = {
        "model": "checkpoints/tiny-moe",
        "slots": SLOTS,
        "prompt": PROMPT,
        "prompts": len(prompts),
        "tokens": given.tokens,
        "assistant": json.loads((trained / "training.json").read_text()),
    }
    facts |= {
        "results": results,
        "command": "python -m benchmarks.drafts SCRATCH",
        "versions": versions(),
        "hardware": hardware(),
    }
    given.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
