"""What is done to a model while its experts are offloaded: it works as on a plain model, or it is refused in a sentence.

Never is a result wrong without a word, and never is the model left half changed.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import build_model
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.generation import CACHE
from predict_train.runtime import OffloadError, load_experts, load_offloaded, offload_experts, offloaded
from predict_train.runtime.pack import pack
from predict_train.runtime.packfile import PackedStore
from predict_train.runtime.store import HostStore, empty_blocks
from safetensors.torch import load_file
from test_offload import prompt
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, PreTrainedModel

CPU = torch.device("cpu")
IDS = prompt(1, 6)
REFUSED = r"detach.*: model\.expert_offload\.detach\(\)"


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of some tokens together, and then of one at a time."""
    output = model(IDS, use_cache=True)
    found, cache = [output.logits], output[CACHE]
    for token in (7, 8, 9):
        found.append(model(torch.tensor([[token]]), **{CACHE: cache}).logits)
    return torch.cat(found, 1)


def experts_of(model: PreTrainedModel, number: int = 1) -> Any:
    return find_moe_layers(model)[number].experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `moe`, and its packed file beside it."""
    path = tmp_path_factory.mktemp("guard")
    build_model("qwen3_moe", num_hidden_layers=2).save_pretrained(path / "model")
    pack(path / "model", path / "experts")
    return path


@pytest.fixture
def packed(folder: Path) -> PreTrainedModel:
    """The same model, offloaded, with its experts in a packed file."""
    return load_offloaded(folder / "model", pack=folder / "experts", device="cpu", dtype="float32", slots=3)


# -- copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["host", "file"])
def test_an_offloaded_model_is_not_copied_and_is_not_harmed(
    store: str, moe: PreTrainedModel, packed: PreTrainedModel
) -> None:
    expected, model = logits(moe), packed if store == "file" else offload_experts(moe, slots=3, device="cpu")
    layer: Any = model.model.layers[0]
    parts = [model, model.model, layer, layer.mlp, layer.mlp.experts, layer.mlp.gate, model.expert_offload]
    for number, part in enumerate(parts):
        for copied in (copy.deepcopy, pickle.dumps, *([copy.copy] if number < 4 else [])):
            with pytest.raises(UserError, match=f"can't be copied or pickled.*{REFUSED}"):
                copied(part)
    assert torch.equal(logits(model), expected)


def test_a_detached_model_is_copied_as_any_other(packed: PreTrainedModel, moe: PreTrainedModel) -> None:
    expected = logits(moe)
    packed.expert_offload.detach()
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        with pytest.raises(OffloadError, match="load_experts"):
            twin(IDS)
        offload_experts(twin, slots=3, device="cpu")
        assert torch.equal(logits(twin), expected)
        twin.expert_offload.detach()
        load_experts(twin)
        assert torch.equal(logits(twin), expected)


def test_copies_of_a_packed_store_have_files_of_their_own(folder: Path) -> None:
    store = PackedStore(folder / "experts")
    slots = empty_blocks(2, store.format.bytes, CPU)
    store.read(1, 3, slots[0].numpy())
    for copied in (copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))):
        twin = copied(store)
        twin.read(1, 3, slots[1].numpy())
        assert torch.equal(slots[0], slots[1])
        twin.close()
        store.read(1, 3, slots[1].numpy())
    store.close()


# -- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_an_offloaded_model_is_saved_whole(architecture: str, tmp_path: Path) -> None:
    """By transformers, and by accelerate, which leaves out weights that share their memory with others."""
    model = build_model(architecture, num_hidden_layers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    offload_experts(model, slots=3, device="cpu")
    model.save_pretrained(tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    Accelerator(cpu=True).save_model(model, str(tmp_path))
    for found in (saved, load_file(tmp_path / "model.safetensors")):
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], before[name]) for name in before)


def test_a_model_without_its_experts_is_not_saved(
    packed: PreTrainedModel, moe: PreTrainedModel, tmp_path: Path
) -> None:
    for _ in range(2):  # offloaded and detached
        for model in (packed, packed.base_model):
            with pytest.raises(
                OffloadError, match=r"the experts of this model are in .*experts; load them \(load_experts\)"
            ):
                model.save_pretrained(tmp_path / "saved")
        assert not list(tmp_path.iterdir())
        if hasattr(packed, "expert_offload"):
            packed.expert_offload.detach()
    load_experts(packed)
    packed.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in moe.state_dict().items())


# -- training ----------------------------------------------------------------------------------------------------


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def only(model: PreTrainedModel, part: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)


TRAINED: dict[str, Callable[[PreTrainedModel], Any]] = {
    "all": lambda model: model.train(),
    "the experts alone": lambda model: only(model, "experts"),
    "the last experts alone": lambda model: only(model, "layers.1.mlp.experts"),
    "the first router": lambda model: only(model, "layers.0.mlp.gate"),
    "the embedding": lambda model: only(model, "embed"),
    "with checkpoints": lambda model: (model.train(), model.gradient_checkpointing_enable()),
    "with reentrant checkpoints": lambda model: (
        model.train(),
        model.enable_input_require_grads(),
        model.gradient_checkpointing_enable({"use_reentrant": True}),
    ),
}


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_enable:FutureWarning", "ignore:None of the inputs have requires_grad"
)
@pytest.mark.parametrize("trained", TRAINED)
def test_gradients_are_refused_and_right_after_detaching(trained: str, moe: PreTrainedModel) -> None:
    TRAINED[trained](moe)
    expected, right = gradients(moe), logits(moe)
    assert expected
    for policy in ("on_demand", "prefetch", "speculative"):
        with offloaded(moe, slots=5, device="cpu", policy=policy):
            undisturbed = logits(moe)
            with pytest.raises(OffloadError, match=f"no gradients pass through offloaded experts.*{REFUSED}"):
                gradients(moe)
            assert torch.equal(logits(moe), undisturbed)
            assert policy == "speculative" or torch.equal(undisturbed, right)
    torch.testing.assert_close(gradients(moe), expected)


def test_gradients_of_functions_are_refused_too(moe: PreTrainedModel) -> None:
    embedded = moe.get_input_embeddings()(IDS).detach()

    def first(x: torch.Tensor) -> torch.Tensor:
        return moe(inputs_embeds=x, use_cache=False).logits[0, 0, 0]

    moe.set_attn_implementation("eager")  # it has forward gradients
    offload_experts(moe, slots=5, device="cpu")
    for differentiate in (
        lambda: torch.func.grad(first)(embedded),
        lambda: torch.func.jvp(first, (embedded,), (embedded,)),
        lambda: torch.autograd.functional.jacobian(first, embedded),
    ):
        with pytest.raises(OffloadError, match="no gradients pass through offloaded experts"):
            differentiate()


def test_what_no_expert_is_needed_for_can_be_trained(moe: PreTrainedModel) -> None:
    only(moe, "lm_head")
    expected = gradients(moe)
    with offloaded(moe, slots=5, device="cpu"):
        torch.testing.assert_close(gradients(moe), expected)


# -- weights -----------------------------------------------------------------------------------------------------


def in_state(model: PreTrainedModel, **how: Any) -> None:
    model.load_state_dict(
        {name: 1.5 * t if ".experts." in name else t for name, t in model.state_dict().items()}, **how
    )


def merged(parameter: nn.Parameter) -> None:
    parameter.data += 0.1


def put_by(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[PreTrainedModel], Any]:
    return lambda model: change(getattr(experts_of(model), name))


def replaced(model: PreTrainedModel) -> None:
    experts_of(model).down_proj = nn.Parameter(2 * experts_of(model).down_proj.detach())


def elsewhere(parameter: nn.Parameter) -> None:
    parameter.data = 2 * parameter.data


@torch.no_grad()
def written(parameter: nn.Parameter) -> None:
    parameter[0] = 0.3


@torch.inference_mode()
def written_in_inference(parameter: nn.Parameter) -> None:
    parameter.mul_(1.2)


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "load_state_dict": in_state,
    "load_state_dict with assign": lambda model: in_state(model, assign=True),
    "a write": put_by("gate_up_proj", written),
    "a write in inference mode": put_by("down_proj", written_in_inference),
    "a write to data": put_by("down_proj", lambda p: p.data.mul_(1.2)),
    "a write to detached": put_by("down_proj", lambda p: p.detach()[3].zero_()),
    "a merge, as of peft": put_by("gate_up_proj", merged),
    "a safe merge, as of peft": put_by("gate_up_proj", elsewhere),
    "an initialisation": put_by("gate_up_proj", nn.init.ones_),
    "another parameter": replaced,
    "a mask": lambda model: prune.random_unstructured(experts_of(model), "down_proj", 0.5),
    "one in state_dict": lambda model: model.state_dict()["model.layers.1.mlp.experts.down_proj"].add_(0.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_experts_that_change_are_refused_and_kept(change: str, moe: PreTrainedModel) -> None:
    """They are refused before anything is computed with the old ones, and `detach` gives the new ones back."""
    twin = copy.deepcopy(moe)
    for model in (twin, moe):
        if model is moe:
            offload_experts(moe, slots=16, device="cpu", policy="on_demand")
            logits(moe)
        torch.manual_seed(0)
        CHANGES[change](model)
    for _ in range(2):
        with pytest.raises(OffloadError, match=f"the experts.* of MoE layer .* have changed.*{REFUSED}"):
            logits(moe)
    moe.expert_offload.detach()
    ours, theirs = moe.state_dict(), twin.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(moe), logits(twin))
    if change != "a mask":
        with offloaded(moe, slots=3, device="cpu"):
            assert torch.equal(logits(moe), logits(twin))


def test_data_that_somebody_holds_is_watched(moe: PreTrainedModel) -> None:
    offload_experts(moe, slots=16, device="cpu")
    held = experts_of(moe).down_proj.data
    logits(moe)
    held.add_(0.1)
    with pytest.raises(OffloadError, match="have changed"):
        logits(moe)


@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}])
def test_a_step_with_gradients_of_before_is_refused(how: dict[str, bool], moe: PreTrainedModel) -> None:
    """A fused step would be past torch's count, and would write where no weights are."""
    twin = copy.deepcopy(moe)
    optimiser, other = (torch.optim.AdamW(model.parameters(), lr=0.1, **how) for model in (moe, twin))
    for model in (moe, twin):
        gradients(model)
    expected = logits(moe)
    offload_experts(moe, slots=16, device="cpu")
    with pytest.raises(OffloadError, match=f"can't be trained.*{REFUSED}"):
        optimiser.step()
    assert torch.equal(logits(moe), expected)
    torch.optim.AdamW(moe.lm_head.parameters(), lr=0.1).step()
    other.step()
    moe.expert_offload.detach()
    optimiser.step()
    torch.testing.assert_close(moe.model.state_dict(), twin.model.state_dict())


def test_reading_is_no_change(moe: PreTrainedModel) -> None:
    expected = logits(moe)
    with offloaded(moe, slots=3, device="cpu"):
        for parameter in moe.parameters():
            assert torch.equal(parameter.data, parameter)
        copy.deepcopy(moe.state_dict())
        for parameter in (moe.model.layers[1].post_attention_layernorm.weight, experts_of(moe).down_proj):
            assert type(copy.deepcopy(parameter)) is nn.Parameter
        moe.requires_grad_(False).zero_grad()
        moe.train().eval().tie_weights()
        moe.to("cpu").to(torch.float32)
        assert torch.equal(logits(moe), expected)


@pytest.mark.filterwarnings("ignore:.*no-op")
def test_experts_in_a_file_are_not_changed(packed: PreTrainedModel, moe: PreTrainedModel, folder: Path) -> None:
    expected = logits(moe)
    state = {name: 2 * tensor for name, tensor in moe.state_dict().items() if ".experts." in name}
    for assign in (False, True):
        packed.load_state_dict(state, strict=False, assign=assign)
        with pytest.raises(OffloadError, match="have changed"):
            logits(packed)
        packed.expert_offload.detach()
        packed = load_offloaded(folder / "model", pack=folder / "experts", device="cpu", dtype="float32", slots=3)
        assert torch.equal(logits(packed), expected)


def test_weights_of_one_call_are_refused_and_forgotten(moe: PreTrainedModel) -> None:
    expected, name = logits(moe), "model.layers.1.mlp.experts.down_proj"
    offload_experts(moe, slots=3, device="cpu")
    other = 2 * moe.get_parameter(name).detach()
    with pytest.raises(OffloadError, match="have changed"):
        torch.func.functional_call(moe, {name: other}, (IDS,))
    assert torch.equal(logits(moe), expected)
    same = {"lm_head.weight": 2 * moe.lm_head.weight.detach()}
    assert not torch.equal(torch.func.functional_call(moe, same, (IDS,)).logits, moe(IDS).logits)


@pytest.mark.parametrize("part", ["gate", "post_attention_layernorm"])
def test_what_guesses_are_folded_from_is_watched(part: str, moe: PreTrainedModel) -> None:
    """Under gating `true` the router's weights come from the folded router."""
    module = moe.model.layers[1].mlp.gate if part == "gate" else moe.model.layers[1].post_attention_layernorm
    for policy in ("prefetch", "speculative"):
        with offloaded(moe, slots=8, device="cpu", policy=policy):
            logits(moe)
            module.weight.data.mul_(1.1)
            with pytest.raises(OffloadError, match=f"norm or router of MoE layer 1 have changed.*{REFUSED}"):
                logits(moe)
    expected = logits(moe)
    with offloaded(moe, slots=8, device="cpu", policy="on_demand"):
        module.weight.data.mul_(1.1)
        changed = logits(moe)
    assert torch.equal(changed, logits(moe))
    assert not torch.equal(changed, expected)


def test_what_would_compute_the_experts_is_nothing(moe: PreTrainedModel) -> None:
    """Transformers' `generate` sets another implementation for decoding on a GPU. The runtime computes as its default does."""
    expected = logits(moe)
    with offloaded(moe, slots=3, device="cpu"):
        for name in ("batched_mm", "eager"):
            moe.set_experts_implementation(name)
            assert torch.equal(logits(moe), expected)
    assert moe.config._experts_implementation == "eager"


def test_the_order_of_parameters_is_nothing(moe: PreTrainedModel) -> None:
    expected = logits(moe)
    experts = experts_of(moe)
    experts.gate_up_proj = nn.Parameter(vars(experts)["_parameters"].pop("gate_up_proj").detach())
    with offloaded(moe, slots=3, device="cpu"):
        assert torch.equal(logits(moe), expected)


def test_the_store_of_another_model_is_refused(moe: PreTrainedModel) -> None:
    other = HostStore(find_moe_layers(build_model("qwen3_moe", num_hidden_layers=2)), CPU)
    with pytest.raises(UserError, match="the experts of another model"):
        offload_experts(moe, store=other, device="cpu")
    own = HostStore(find_moe_layers(moe), CPU)
    with offloaded(moe, store=own, device="cpu"):
        logits(moe)
    own.close()
    with pytest.raises(UserError, match="the store is closed"):
        offload_experts(moe, store=own, device="cpu")
