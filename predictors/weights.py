"""The files of a model's checkpoint: where they are, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has left in the place of another."""


def local_folder(name: str | Path, revision: str | None = None) -> Path | None:
    """The folder of a checkpoint: `name` itself, or its snapshot in the Hub's cache; None if it is not on this machine."""
    if Path(name).is_dir():
        return Path(name)
    try:
        config = try_to_load_from_cache(str(name), CONFIG, revision=revision)
    except HFValidationError:  # no name of the Hub
        return None
    return Path(config).parent if isinstance(config, str) else None


def weights_files(folder: Path) -> list[Path]:
    """The files that transformers reads a checkpoint's weights from, sorted; none if it has no index that can be read."""
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
