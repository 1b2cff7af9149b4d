"""The packed file: each expert of a model is one block. Blocks begin at multiples of 4096 bytes, for direct reads.

    page 0      magic, format version, offset, length and checksum (xxh3_64) of the header, then zeros
    blocks      layer by layer, expert by expert
    header      JSON: the model, the layout of a block, the layers, a checksum (xxh3_64) of every block, and whose experts
                they are: samples of each layer's, and the fingerprint of the checkpoint

The file is written under another name and renamed when it is whole. A file that is wrong in any way ends in a `StoreError`.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from transformers import PreTrainedModel

from ..predictors.architecture import ExpertLayer, describe_shape, moe_shape
from ..predictors.experts import expert_modules
from .errors import StoreError
from .formats import PAGE, ExpertFormat, Place, laid_out
from .formats.full import FullFormat
from .formats.gguf import GgufFormat
from .formats.quantized import QuantizedFormat
from .formats.registry import QUANTIZED, format_of, named, quantization_of
from .gatherer import sample_experts
from .quantization import Shipped
from .store import Bytes

FORMAT_VERSION = 1
QUANTIZED_VERSION = 2
"""Older releases read no quantised experts, so these have another version. The header does not tell how quantised blocks are laid
out: this follows from `runtime.formats`, so a change there needs a new version."""
GGUF_VERSION = 3
"""Of experts in GGUF's types, whose bytes version 2 had in another order."""
START = struct.Struct("<8sQQQQ")
MAGIC = b"EXPERTS\n"


class TensorPlace(BaseModel):
    """The place of one tensor of an expert in its block."""

    model_config = ConfigDict(strict=True)

    shape: list[int] = Field(min_length=1)
    offset: int = Field(ge=0)
    """Counted in elements."""


class Header(BaseModel):
    """The header of a packed file."""

    model_config = ConfigDict(strict=True)

    model: dict[str, Any]
    """`name`, the facts of `architecture.moe_shape`, and `weights`: what `weights_fingerprint` returns."""
    dtype: str
    """Of the experts before they were quantised."""
    tensors: dict[str, TensorPlace]
    """The tensors of an expert before it was quantised."""
    quantized: str | None = None
    """What they were quantised to, a `Quantization`, or are shipped in, a `Shipped`; None if they are unchanged."""
    is_transposed: bool = False
    """Of quantised experts: whether their weights are `[inputs, outputs]` in the model."""
    rooms: dict[str, int] | None = None
    """Of experts in GGUF's types: the bytes that a block has for each weight."""
    block_bytes: int = Field(gt=0, multiple_of=PAGE)
    layers: list[str] = Field(min_length=1)
    """The names of the experts modules in the model, in the order of their blocks."""
    num_experts: int = Field(gt=0)
    checksums: list[list[int]]
    """xxh3_64 of each block, by layer and expert."""
    samples: list[str] | None = None
    """By layer, what `sample_experts` returns. Files of older releases have none."""
    checkpoint: str | None = None
    """The `checkpoint_fingerprint` of what was packed; None for random weights and in older files."""

    @property
    def sample_of(self) -> dict[str, str]:
        """The samples by the names of `layers`; empty where there are none."""
        return dict(zip(self.layers, self.samples or [], strict=False))

    @property
    def kept(self) -> str:
        """In words, in what form the experts are kept."""
        return f"in torch.{self.dtype}" + (f" quantised to {self.quantized}" if self.quantized else "")

    @property
    def version(self) -> int:
        """The format version of the file."""
        if self.quantized is None:
            return FORMAT_VERSION
        return GGUF_VERSION if self.quantized == Shipped.GGUF else QUANTIZED_VERSION

    def format(self) -> ExpertFormat:
        """The format of the blocks. Raises `ValueError` where parts of the header contradict each other."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{self.dtype} is no dtype")
        places = {
            name: Place(dtype, torch.Size(tensor.shape), tensor.offset * dtype.itemsize)
            for name, tensor in self.tensors.items()
        }
        form: ExpertFormat = FullFormat(places, self.block_bytes)
        if self.quantized is not None:
            full = FullFormat(*laid_out({name: place[:2] for name, place in places.items()}))
            form = QUANTIZED[named(self.quantized)].of(full, self.is_transposed, self.rooms)
        inside = form.bytes == self.block_bytes and all(p.offset + p.bytes <= form.bytes for p in form.places.values())
        if any(min(p.shape) < 1 for p in places.values()) or not inside:
            raise ValueError("a tensor lies beyond its block")
        if [len(row) for row in self.checksums] != [self.num_experts] * len(self.layers):
            raise ValueError("it has not one checksum a block")
        if self.samples is not None and len(self.samples) != len(self.layers):
            raise ValueError("it has not one sample a layer")
        return form


def described(form: ExpertFormat) -> dict[str, Any]:
    """What a `Header` says of a format."""
    tensors = {
        name: TensorPlace(shape=list(place.shape), offset=place.offset // place.dtype.itemsize)
        for name, place in form.full.places.items()
    }
    dtype = str(form.full.dtype).removeprefix("torch.")
    is_transposed = isinstance(form, QuantizedFormat) and form.is_transposed
    return {
        "dtype": dtype,
        "tensors": tensors,
        "quantized": quantization_of(form),
        "is_transposed": is_transposed,
        "rooms": form.rooms if isinstance(form, GgufFormat) else None,
    }


@contextmanager
def told(path: Path, done: str, advice: str) -> Iterator[None]:
    """Turns an error of the disk into a `StoreError`: `path` can't be `done`, and what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path} can't be {done} ({error.strerror}); {advice}") from error


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the names, dtypes and first values of all weights but the experts'. It tells models of one shape apart."""
    digest = xxhash.xxh3_64()
    experts = {id(p) for module in expert_modules(model).values() for p in module.parameters(recurse=False)}
    for name, parameter in sorted(model.named_parameters()):
        if id(parameter) not in experts:
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().flatten()[:1024].cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class PackedStore:
    """The experts of a model in a packed file. They are read past the page cache where the file system allows it.

    The first read of each block compares it with its checksum, and so does the first one after somebody has written to the file.
    The model's own expert parameters are not touched. Raises
    `StoreError` for a file that is not a packed file, or not whole.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self.header = read_header(self.path)
        self.format: ExpertFormat = self.header.format()
        self.extent = len(self.header.layers), self.header.num_experts
        self._verified = np.zeros(self.extent, dtype=bool)
        self._written = 0  # when the file was last written to, as far as is known
        self._position = list(range(len(self.header.layers)))  # in the file, of each layer of the model
        self.direct = False
        self._file = -1
        with told(self.path, "read", "check its disk and its rights"):
            self._file = self._open()

    def _open(self) -> int:
        if hasattr(os, "O_DIRECT"):
            with suppress(OSError):
                file = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                try:
                    with mmap.mmap(-1, PAGE) as page:
                        os.preadv(file, [page], 0)
                    self.direct = True
                    return file
                except OSError:  # some file systems refuse only at the first read
                    os.close(file)
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def check(self, model: PreTrainedModel, layers: Sequence[ExpertLayer]) -> None:
        """Finds the model's layers in the file. Raises `StoreError` where the file does not belong to `model`."""
        theirs, shape = self.header.model, moe_shape(model.config, layers)
        if theirs.get("fingerprint") != shape["fingerprint"]:
            raise StoreError(
                f"{self.path} holds the experts of {theirs.get('name')}, and the model is a {describe_shape(shape)}; "
                "pack this model"
            )
        wanted = format_of([layers[0].experts], quantization_of(self.format), self.header.rooms)
        if wanted != self.format:
            raise StoreError(
                f"{self.path} holds experts {self.header.kept}, and the model's are in {wanted.full.dtype} or laid out otherwise; "
                "load the model in that dtype or pack it again"
            )
        if theirs.get("weights") != weights_fingerprint(model):
            raise StoreError(
                f"{self.path} was packed from {theirs.get('name')}, whose other weights are not those of this model; "
                "pack this model"
            )
        names = {module: path for path, module in model.named_modules()}
        places = {name: position for position, name in enumerate(self.header.layers)}
        try:
            self._position = [places[names[layer.experts]] for layer in layers]
        except KeyError as error:
            raise StoreError(f"{self.path} lacks the experts of {error.args[0]}; pack this model again") from error
        self._check_experts(model, {names[layer.experts]: layer.experts for layer in layers})

    def _check_experts(self, model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
        """Compares the experts with those of a model, by their `modules`. If they are not in memory, it knows their samples."""
        known: dict[str, str] = vars(model).get("expert_samples", {})
        for name, experts in modules.items():
            tensors: dict[str, torch.Tensor] = {part: experts.get_parameter(part) for part in self.format.full.places}
            absent = [tensor.is_meta for tensor in tensors.values()]
            if any(absent) and not all(absent):
                raise StoreError(
                    f"some weights of {name} are in memory, and would not be used beside those in {self.path}; load the model again"
                )
            sample = known.get(name) if any(absent) else sample_experts(tensors)
            if sample is not None and self.header.samples is None:
                warnings.warn(
                    f"{self.path} is of an older release and does not say whose experts it holds, so they are not compared "
                    "with the model's; pack the model again",
                    stacklevel=2,
                )
                return
            if sample is not None and sample != self.header.sample_of[name]:
                raise StoreError(f"{self.path} holds other experts than those of this model ({name}); pack this model")

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        position, size = self._position[layer], self.format.bytes
        offset = PAGE + (position * self.header.num_experts + expert) * size
        try:
            count = os.preadv(self._file, [into.data], offset)
            # A signal may cut a read short. At the end of the file a read gives nothing.
            while 0 < count < size and (more := os.preadv(self._file, [into[count:].data], offset + count)):
                count += more
            if not self.direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file, offset, size, os.POSIX_FADV_DONTNEED)  # the slots are the only cache
        except OSError as error:
            raise StoreError(
                f"expert {expert} of {self.header.layers[position]} can't be read from {self.path} ({error.strerror}); "
                "check its disk"
            ) from error
        if count < size:
            raise StoreError(f"{self.path} has become shorter since it was opened; pack the model again")
        if self._written != (written := os.fstat(self._file).st_mtime_ns):
            self._written, self._verified = written, np.zeros(self.extent, dtype=bool)
        if not self._verified[position, expert]:
            if xxhash.xxh3_64_intdigest(into.data) != self.header.checksums[position][expert]:
                raise StoreError(
                    f"expert {expert} of {self.header.layers[position]} in {self.path} is not what was packed; pack the "
                    "model again"
                )
            self._verified[position, expert] = True

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy opens the file itself."""
        return PackedStore, (self.path,), {"_position": self._position}

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()


def read_header(path: str | Path) -> Header:
    """Reads the header of a packed file. Raises `StoreError` where the file is missing, not a packed file, or not whole."""
    path = Path(path)
    with told(path, "read", "give the file that predict-train pack wrote"), path.open("rb") as file:
        page = file.read(PAGE)
        size = os.fstat(file.fileno()).st_size
        if len(page) < PAGE or not page.startswith(MAGIC):
            raise StoreError(f"{path} is no packed file; make one with predict-train pack")
        _, version, offset, length, checksum = START.unpack_from(page)
        if version not in (FORMAT_VERSION, QUANTIZED_VERSION, GGUF_VERSION):
            raise StoreError(
                f"{path} has format version {version}, and this release reads up to {GGUF_VERSION}; pack the model again"
            )
        if offset + length != size:
            raise StoreError(f"{path} is cut short or was added to; pack the model again")
        file.seek(offset)
        text = file.read(length)
    try:
        header = Header.model_validate(json.loads(text))
        header.format()
        if version != header.version:
            raise ValueError("its version is not that of its blocks")
        if offset != PAGE + len(header.layers) * header.num_experts * header.block_bytes:
            raise ValueError("its blocks are not as many as it says")
        # Older releases wrote neither samples nor a checksum of the header.
        is_older = header.samples is None and not checksum
        if any(page[START.size :]) or not (is_older or checksum == xxhash.xxh3_64_intdigest(text)):
            raise ValueError("it is not what was written")
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "it"
        raise StoreError(f"the header of {path} is broken ({field}: {first['msg']}); pack the model again") from error
    except (ValueError, TypeError) as error:
        raise StoreError(f"the header of {path} is broken ({error}); pack the model again") from error
    return header
