"""All formats that experts can be quantised to, by name."""

from __future__ import annotations

from torch import nn

from ..quantization import Quantization
from . import ExpertFormat
from .full import FullFormat
from .int4 import Int4Format
from .int8 import Int8Format
from .quantized import QuantizedFormat

QUANTIZED: dict[Quantization, type[QuantizedFormat]] = {Quantization.INT8: Int8Format, Quantization.INT4: Int4Format}


def format_of(modules: list[nn.Module], quantize: Quantization | None) -> ExpertFormat:
    """The common format of all experts modules of a model, unchanged or quantised.

    Raises `StoreError` where the modules differ, or where their weights can't be quantised so.
    """
    full = FullFormat.common(modules)
    return full if quantize is None else QUANTIZED[quantize].of(full, bool(modules[0].is_transposed))


def quantization_of(form: ExpertFormat) -> Quantization | None:
    """What experts of a format are quantised to; None if they are unchanged."""
    return next((name for name, kind in QUANTIZED.items() if isinstance(form, kind)), None)
