"""The columns of a trace's shards: their names, dtypes and widths."""

from __future__ import annotations

from enum import StrEnum

import torch

from .manifest import Manifest

Columns = dict[str, torch.Tensor]
"""Tensors of some rows, by their names in a shard."""

TOKEN_IDS, POSITION, SEQUENCE = ROW_COLUMNS = ("token_ids", "position", "sequence")
"""The columns of the row's token; all others belong to a layer."""


class Column(StrEnum):
    """The columns of a layer; `trace.py` describes them."""

    RESIDUAL = "residual"
    INNER = "inner"
    INPUT = "input"
    EXPERT_IDS = "expert_ids"
    EXPERT_WEIGHTS = "expert_weights"
    ROUTER_LOGITS = "router_logits"

    def of(self, layer: int) -> str:
        """The column's name in a shard."""
        return f"layers.{layer}.{self}"


def column_shapes(manifest: Manifest) -> dict[str, tuple[torch.dtype, int | None]]:
    """Dtype and width of each column; a width of None is one value a row."""
    model = manifest.model
    shapes: dict[str, tuple[torch.dtype, int | None]] = dict.fromkeys(ROW_COLUMNS, (torch.int32, None))
    for entry in manifest.layers:
        if entry.source is None or entry.has_input:
            shapes[Column.INPUT.of(entry.layer)] = (torch.bfloat16, model.hidden_size)
        if entry.source is not None:
            shapes[Column.RESIDUAL.of(entry.source)] = (torch.bfloat16, model.hidden_size)
            if entry.has_inner:
                shapes[Column.INNER.of(entry.source)] = (torch.bfloat16, model.hidden_size)
        shapes[Column.ROUTER_LOGITS.of(entry.layer)] = (torch.bfloat16, model.num_experts)
    for layer in {layer for entry in manifest.layers for layer in (entry.layer, entry.source) if layer is not None}:
        shapes[Column.EXPERT_IDS.of(layer)] = (torch.int16, model.top_k)
        shapes[Column.EXPERT_WEIGHTS.of(layer)] = (torch.bfloat16, model.top_k)
    return shapes


def first_not_finite(columns: Columns) -> tuple[int, str, int] | None:
    """The first layer with a value that is not finite: its number, the name of the value and the row; or None."""
    floats = {name: column for name, column in columns.items() if column.is_floating_point() and column.numel()}
    # A sum is not finite if a part of it is not. It takes a fiftieth of the time of a look at each part.
    suspects = {name: column for name, column in floats.items() if not column.sum().isfinite()}
    found = []
    for name, column in suspects.items():
        _, layer, kind = name.split(".")
        rows = (~column.isfinite()).any(-1).nonzero().flatten()
        if len(rows):
            found.append((int(layer), kind.replace("_", " "), int(rows[0])))
    return min(found, default=None, key=lambda entry: entry[0])
