"""All formats of quantised experts, by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ...predictors.experts import marks_of
from ..quantization import Quantization, Shipped
from . import ExpertFormat
from .fp8 import Fp8Format
from .full import FullFormat
from .gguf import GgufFormat
from .int4 import Int4Format
from .int8 import Int8Format
from .mxfp4 import Mxfp4Format
from .quantized import QuantizedFormat

QUANTIZED: dict[Quantization | Shipped, type[QuantizedFormat]] = {
    Quantization.INT8: Int8Format,
    Quantization.INT4: Int4Format,
    Shipped.FP8: Fp8Format,
    Shipped.MXFP4: Mxfp4Format,
    Shipped.GGUF: GgufFormat,
}


def named(name: str) -> Quantization | Shipped:
    """The form of quantised experts of this name. Raises `ValueError` where there is none."""
    found = next((form for form in QUANTIZED if form == name), None)
    if found is None:
        raise ValueError(f"{name} is no form of experts")
    return found


def format_of(
    modules: list[nn.Module], quantize: Quantization | Shipped | None, rooms: Mapping[str, int] | None = None
) -> ExpertFormat:
    """The common format of all experts modules of a model, unchanged or quantised. For `rooms` see `QuantizedFormat.of`.

    Raises `StoreError` where the modules differ, or where their weights can't be quantised so.
    """
    full = FullFormat.common(modules)
    return full if quantize is None else QUANTIZED[quantize].of(full, bool(marks_of(modules[0]).is_transposed), rooms)


def quantization_of(form: ExpertFormat) -> Quantization | Shipped | None:
    """What experts of a format are quantised to, or shipped in; None if they are unchanged."""
    return next((name for name, kind in QUANTIZED.items() if isinstance(form, kind)), None)
