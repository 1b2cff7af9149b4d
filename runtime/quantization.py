"""How many bits experts are quantised to."""

from __future__ import annotations

from enum import StrEnum

from .errors import StoreError


class Quantization(StrEnum):
    """Formats of `runtime.formats` that experts can be quantised to."""

    INT8 = "int8"
    INT4 = "int4"


class Shipped(StrEnum):
    """Formats of `runtime.formats` that experts are shipped in. They are kept as they are."""

    FP8 = "fp8"
    MXFP4 = "mxfp4"
    GGUF = "gguf"


def quantization(name: str | None) -> Quantization | None:
    """The quantisation of this name, None for None. Raises `StoreError` if there is none."""
    try:
        return None if name is None else Quantization(name)
    except ValueError:
        raise StoreError(f"experts can't be quantised to {name}; give one of {', '.join(Quantization)}") from None
