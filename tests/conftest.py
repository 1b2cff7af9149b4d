"""Tiny random models, a byte tokenizer and a little text: everything the tests need, made here, nothing downloaded."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The libraries read these when they are imported. The models are tiny: a second thread gains nothing, and waiting for it
# costs much where the cores are shared.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# Where Python is told to keep no bytecode, each of the many processes would compile all of our modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
from hypothesis import settings
from packaging.version import Version
from predict_train.runtime import Eviction
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# A busy machine is not a failure: no test is timed.
settings.register_profile("untimed", deadline=None, max_examples=30)
settings.load_profile("untimed")


def pytest_sessionstart(session: pytest.Session) -> None:
    """torch is imported where tests run only: all others would wait for it in the process that hands them out (xdist)."""
    if session.config.getoption("dist", "no") != "no":
        return
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # Triton's kernels then run in its interpreter. Triton reads this when it is imported, and transformers imports it.
        os.environ["TRITON_INTERPRET"] = "1"


UNTRAINED = [eviction for eviction in Eviction if eviction is not Eviction.LEARNED]
"""The evictions that need no reuse predictors."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def pytest_collection_finish() -> None:
    """What the libraries are made of stays, so no collection of garbage has to look at it again: that takes a second.

    What they make later would be looked at hundreds of times, since one collection of everything is due after 70,000 new objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or the libraries miss their end


PINNED = re.search(r"^transformers==(.+)$", (Path(__file__).parents[1] / "constraints.txt").read_text(), re.MULTILINE)
IS_OLDER_RELEASE = PINNED is not None and Version(version("transformers")) < Version(PINNED[1])
"""Whether transformers is older than what this was developed with."""


def skip_if_lacking(model_type: str) -> None:
    """Skips a test of a model type that an older release of transformers lacks, or whose routers it writes otherwise."""
    from predict_train.data_collection.catalog import examine

    if IS_OLDER_RELEASE and (reason := examine(model_type).reason):
        pytest.skip(f"transformers {version('transformers')}: {reason}")


ROOMS = ("predictors", "data_collection", "train", "runtime")
OWN_FILE = """
import os

if "ONLY_OURS" in os.environ:
    raise SystemExit(f"{__name__}.py of the user was imported in the place of the room")
OWNER = "the user"
"""


def write_own_files(folder: Path) -> None:
    """The user's own train.py and the others. Where a command runs by itself (ONLY_OURS), nobody has a reason to import them."""
    for room in ROOMS:
        (folder / f"{room}.py").write_text(OWN_FILE)


END_OF_TEXT = "<|endoftext|>"
SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 16},
    "mixtral": {},
    "olmoe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "deepseek_v3": {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {"head_dim": 16},
    "qwen3": {"head_dim": 16},
}


def build_model(architecture: str, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model of 4 layers, 8 experts, top 2, hidden size 32, whose routing is spread over the experts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **(SHAPE | ARCHITECTURES[architecture] | overrides))
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            is_router = ".gate." in name or ".router." in name
            if tensor.ndim >= 2 or "bias" in name:
                tensor.normal_(0.0, 0.5 if is_router else 0.2, generator=generator)
    return model


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    """Makes processes from a server that has imported the command line, the job collect and their libraries once."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        [
            "predict_train.cli",
            "predict_train.data_collection.collect",
            "transformers.models.qwen3_moe",
            # Most jobs are functions of test files, which import these.
            "pytest",
            "hypothesis",
        ]
    )
    return server


@pytest.fixture(scope="session")
def build_moe() -> Callable[..., PreTrainedModel]:
    """`build_moe(architecture, **config)` makes a tiny random model; see `build_model`."""
    return build_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token, which has id 0."""
    from transformers import PreTrainedTokenizerFast

    alphabet = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_moe_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Qwen3-MoE in transformers form: 4 layers, 8 experts, top 2, hidden 32, 257 tokens, fp32. Don't write to it."""
    return save_model(build_model("qwen3_moe"), tokenizer, tmp_path_factory.mktemp("models") / "tiny-moe")


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A dense model (Qwen3), which nothing can be speculated on."""
    return save_model(build_model("qwen3"), tokenizer, tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def tiny_moe(tiny_moe_folder: Path) -> PreTrainedModel:
    """A fresh copy of the model in `tiny_moe_folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_moe_folder, dtype=torch.float32).eval()
    return model


@pytest.fixture
def moe() -> PreTrainedModel:
    """A smaller model, of two layers."""
    return build_model("qwen3_moe", num_hidden_layers=2)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The pages that are made (`pages.Pages`). Meanwhile nothing is collected: what is freed is freed by reference."""
    from pages import Pages

    gc.collect()
    gc.disable()
    yield Pages(monkeypatch)
    gc.enable()


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two text files, of about 20 kB in all."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, topic in (("stones.txt", "stone"), ("rivers.txt", "river")):
        lines = (f"The {topic} number {i} is {i * i % 97} paces from the {topic} before it.\n" for i in range(200))
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def collected(tmp_path_factory: pytest.TempPathFactory, tiny_moe_folder: Path, text_corpus: Path) -> Path:
    """A trace of the tiny model, all four layers as targets, 8000 tokens in several shards. Don't write to it."""
    from predict_train.data_collection.collect import CollectConfig, collect
    from rich.console import Console

    out = tmp_path_factory.mktemp("traces") / "trace"
    config = CollectConfig(
        model=str(tiny_moe_folder),
        out=out,
        corpus=str(text_corpus),
        tokens=8000,
        sequence_length=100,
        shard_bytes=1 << 20,
        device="cpu",
    )
    return collect(config, Console(quiet=True))


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory, collected: Path) -> Path:
    """A finished run of `fit` on the collected trace: three epochs, width 32. Don't write to it."""
    from predict_train.train.fit import FitConfig, fit
    from rich.console import Console

    out = tmp_path_factory.mktemp("runs") / "run"
    config = FitConfig(trace=collected, out=out, width=32, epochs=3, batch_size=128, learning_rate=1e-2, device="cpu")
    return fit(config, Console(quiet=True))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` draws no figures, which take longer than the training of a tiny model. What is drawn is seen in test_board.py."""
    from predict_train.train.board import Board

    monkeypatch.setattr(Board, "_draw", lambda *_: None)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, fitted: Path) -> Path:
    """The predictors of the finished run, in fp32, as `export` writes them. Don't write to it."""
    from predict_train.train.export import export
    from predict_train.train.settings import ExportConfig

    return export(ExportConfig(run=fitted, out=tmp_path_factory.mktemp("exports") / "predictors"))
