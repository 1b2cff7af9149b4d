"""Used by all commands that run a model: loading it by their settings, and the text to run it on."""

from __future__ import annotations

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data_collection.corpus import read_documents, sequences
from .data_collection.refusals import Refuse
from .predictors.loading import load_model, resolve_device, resolve_dtype
from .runtime.load import check_quantized, load_offloaded, load_to_host
from .runtime.measure.evaluate import cross_entropy
from .runtime.offload import ExpertOffload
from .runtime.pack import given
from .runtime.packfile import Header, read_header
from .runtime.policy import Policy
from .runtime.quantization import Quantization
from .runtime.settings import Loading, Room
from .runtime.shipped import form_and_options, widening
from .settings import EvaluateConfig


def dtype_of(model: Loading, device: torch.device) -> torch.dtype | str:
    """The dtype to load a model in; `auto` is left to its packed file if there is one, or on CUDA to the checkpoint."""
    if model.dtype == "auto" and model.pack is not None and model.pack.exists():
        return "auto"
    return resolve_dtype(model.dtype, device)


def tell_slots(model: PreTrainedModel, config: Room) -> None:
    """Says how many experts the device holds, and why, where the settings don't say it."""
    if config.slots is None and config.expert_memory is None:
        offload: ExpertOffload = vars(model)["expert_offload"]
        layers, experts = offload.store.extent
        said = f"{offload.slots:,} of {layers * experts:,} experts are on the device at a time ({offload.why_slots})"
        typer.echo(said, err=True)


def header_of(config: Loading) -> Header | None:
    """The header of the packed file, if there is one already. Raises `StoreError` where it has other experts than asked for."""
    if config.pack is None or not config.pack.exists():
        return None
    header = read_header(config.pack)
    check_quantized(config.pack, header, config.quantize)
    return header


def quantization_asked(config: Loading) -> str | None:
    """What the experts are quantised to: as they are in the packed file, as they are shipped, or as the settings say.

    Raises `StoreError` where these differ.
    """
    header = header_of(config)
    if header is not None:
        return header.quantized
    model: str | None = getattr(config, "model", None)
    return config.quantize if model is None else form_and_options(model, config.quantize, given(config.gguf))[0]


def load_unquantized(config: EvaluateConfig) -> PreTrainedModel:
    """The model of the checkpoint on its device, in the dtype in which `load_to_evaluate` loads it.

    Its experts pass through slots where they are to be quantised: whole, it may not fit where the quantised model does. What is
    shipped quantised is widened whole.
    """
    device = resolve_device(config.device)
    dtype = dtype_of(config, device)
    if dtype == "auto" and (header := header_of(config)) is not None:
        dtype = header.format().full.dtype
    if quantization_asked(config) in list(Quantization):
        return load_offloaded(config.model, dtype=dtype, device=str(device), policy=Policy.ON_DEMAND)
    return load_model(config.model, device, dtype, **widening(config.model, config.gguf))


def unquantized_cross_entropy(config: EvaluateConfig, batches: list[torch.Tensor]) -> float:
    """The cross-entropy of the model of the checkpoint, as it was before it was quantised; for the rest see `cross_entropy`."""
    model = load_unquantized(config)
    try:
        return cross_entropy(model, batches, progress=True)
    finally:
        if (offload := vars(model).get("expert_offload")) is not None:
            offload.detach()  # its slots are freed


def load_to_evaluate(config: EvaluateConfig) -> PreTrainedModel:
    """The model on its device; or in host memory with its experts in a packed file or quantised, where the settings say so."""
    device = resolve_device(config.device)
    dtype = dtype_of(config, device)
    loading = Loading(**config.values_of(Loading) | {"dtype": dtype})
    if config.pack is None and quantization_asked(config) is None:
        return load_model(config.model, device, dtype)
    return load_to_host(config.model, loading)


def batches_of(tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig, refuse: Refuse) -> list[torch.Tensor]:
    """Token ids `[sequences, length]`; a shorter last sequence is a batch of its own, so nothing is padded."""
    documents = read_documents(config.corpus, config.split, tokenizer=tokenizer, refuse=refuse)
    rows = list(sequences(documents, tokenizer, config.sequence_length, config.tokens))
    whole = [row for row in rows if len(row) == config.sequence_length]
    batches = list(torch.stack(whole).split(config.batch_size)) if whole else []
    return batches + [row.unsqueeze(0) for row in rows[len(whole) :]]
