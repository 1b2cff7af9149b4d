"""The files of a model's checkpoint: where they are, what is wrong with them, and a fingerprint of its weights."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import xxhash
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has left in the place of another."""
SMALL = ("F8_E4M3", "F8_E5M2")
"""What safetensors call numbers of 8 bits that need a scale."""
PIECE = 4096
"""Bytes of a piece that `checkpoint_fingerprint` reads."""
MOST_PIECES = 1 << 14


def local_folder(name: str | Path, revision: str | None = None) -> Path | None:
    """The folder of a checkpoint: `name` itself, or its snapshot in the Hub's cache; None if it is not on this machine."""
    if Path(name).is_dir():
        return Path(name)
    try:
        config = try_to_load_from_cache(str(name), CONFIG, revision=revision)
    except HFValidationError:  # no name of the Hub
        return None
    return Path(config).parent if isinstance(config, str) else None


def why_missing(name: str | Path, revision: str | None = None) -> str | None:
    """Why there is nothing at `name`, if it stands for a path on this machine; None where it exists or is a name of the Hub.

    It stands for a path if it is written like one, or if its first part is a folder here, unless the Hub's cache has what it names.
    """
    text = str(name)
    if os.path.exists(text):
        return None
    parent, *rest = text.split("/")
    if text.startswith(("/", ".", "~")) or "\\" in text or len(rest) > 1 or rest == [""]:
        return "no such file or folder"
    if rest and os.path.isdir(parent) and local_folder(text, revision) is None:
        return f"no such folder, and while a folder {parent} is here it is not looked for on the Hub"
    return None


def commit_of(folder: Path | None) -> str | None:
    """The commit that a folder of the Hub's cache is a snapshot of; None for other folders."""
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def weights_files(folder: Path) -> list[Path]:
    """The files that transformers reads a checkpoint's weights from, sorted; none if it has no index that can be read.

    A checkpoint may also be a single file.
    """
    if folder.is_file():
        return [folder]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                return [folder / part for part in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return []
    return []


def what_is_wrong(folder: Path) -> str | None:
    """One sentence on the first file of a checkpoint that is missing, empty, a pointer of Git LFS or broken; or None."""
    weights = weights_files(folder)
    for file in [*weights, *sorted(file for file in folder.iterdir() if file.is_file() and file not in weights)]:
        if not file.is_file():
            return f"{file} is missing; download it"
        with file.open("rb") as data:
            start = data.read(len(POINTER))
        if start == POINTER:
            return f"{file} is a pointer of Git LFS; get the file itself with git lfs pull"
        if file in weights and not start:
            return f"{file} is empty; download it again"
        if file in weights and file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except (OSError, SafetensorError) as error:
                return f"{file} is broken: {error}; download it again"
    return None


def dtypes_of(folder: Path) -> dict[str, str]:
    """The names of the weights in a checkpoint's safetensors files, and what these call their dtypes."""
    found: dict[str, str] = {}
    for file in weights_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                found |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - it can't be iterated
    return found


def without_scales(folder: Path) -> set[str]:
    """The weights of a checkpoint quantised in fp8 whose scales are not in it. Some releases of transformers load such weights as
    they are, and say nothing."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return set()
    if (config.get("quantization_config") or {}).get("quant_method") != "fp8":
        return set()
    small, scaled = set(), set()
    for name, dtype in dtypes_of(folder).items():
        owner, is_scale, _ = name.rpartition("scale")
        if is_scale:
            scaled.add(owner.rstrip("_."))
        elif dtype in SMALL:
            small.add(name)
    return {name for name in small if name not in scaled and name.removesuffix(".weight") not in scaled}


def checkpoint_fingerprint(folder: Path | None) -> str | None:
    """A hash of a checkpoint's weights in at most `MOST_PIECES` pieces of their files, and so in less than a second.

    A checkpoint of up to 64 MiB is read whole. Of a larger one the pieces are evenly spaced: one for every 4 MB of a
    checkpoint of 60 GB, whose experts have 9 MB each. So training changes it, even if it was of a single expert. It does
    not depend on the folder, nor on the files' times. None if the weights are not on this machine.
    """
    files = [] if folder is None else weights_files(folder)
    if not files or not all(file.is_file() for file in files):
        return None
    sizes = [file.stat().st_size for file in files]
    step = PIECE * max(1, math.ceil(sum(sizes) / PIECE / MOST_PIECES))
    digest = xxhash.xxh3_128(repr(sizes).encode())
    with ThreadPoolExecutor(16) as pool:  # several reads at once: the disk takes longer than the hash
        for file, size in zip(files, sizes, strict=True):
            offsets = range(0, size, step)
            for part in pool.map(partial(_digest, file), (offsets[n : n + 64] for n in range(0, len(offsets), 64))):
                digest.update(part)
    return digest.hexdigest()


def _digest(file: Path, offsets: range) -> bytes:
    digest = xxhash.xxh3_128()
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if hasattr(os, "posix_fadvise"):  # nothing is read ahead
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in offsets:
            digest.update(os.pread(handle, PIECE, offset))
    finally:
        os.close(handle)
    return digest.digest()
