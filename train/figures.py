"""Figures of hit rates, recall, missed experts and calibration. They are drawn without pyplot, which would ask for a
window system and keep figures in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..predictors.metrics import CalibrationCurve
from .measures import Kind, Measured

# Okabe and Ito's palette, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00")
MARKERS = ("o", "s", "^", "D")
STYLE: dict[Kind, tuple[str, str, str]] = {
    "training_free": ("training-free", COLOURS[2], MARKERS[2]),
    "without_memory": ("predictor without its memory", COLOURS[3], MARKERS[3]),
    "predictor": ("predictor", COLOURS[0], MARKERS[0]),
}


def draw_rates(axes: Axes, layers: Sequence[int], curves: Mapping[str, Sequence[float | None]]) -> None:
    """Hit rates by target layer, one line a curve; None is left out."""
    for (label, values), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        points = [(layer, value) for layer, value in zip(layers, values, strict=True) if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.5, label=label)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("target layer")
    axes.set_ylabel("hit rate")
    axes.set_xticks(layers[:: max(1, len(layers) // 24)])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=9)
    _plain(axes)


def hit_rates(layers: Sequence[int], measured: Mapping[Kind, Measured]) -> Figure:
    """Hit rate by target layer, with and without the predictors, and without their memory if they have one."""
    figure = new_figure(7.5, 4.4)
    predictor, training_free = measured["predictor"].recall, measured["training_free"].recall
    axes = figure.subplots()
    curves = {
        "predictor": predictor[:, 0].tolist(),
        "predictor, 2k candidates": predictor[:, -1].tolist(),
        "training-free": training_free[:, 0].tolist(),
    }
    if "without_memory" in measured:
        curves[STYLE["without_memory"][0]] = measured["without_memory"].recall[:, 0].tolist()
    draw_rates(axes, layers, curves)
    axes.set_ylim(min(0.9, math.floor(10 * float(training_free.min())) / 10), 1.005)
    axes.set_title("hit rate by target layer", fontsize=11)
    return figure


def recall_by_candidates(layers: Sequence[int], top_k: int, measured: Mapping[Kind, Measured]) -> Figure:
    """Recall against the number of candidates: the mean over the layers, and the weakest layer."""
    figure = new_figure(7.5, 4.4)
    axes = figure.subplots()
    for kind, (label, colour, marker) in _styles(measured):
        recall = measured[kind].recall
        numbers = range(top_k, top_k + recall.shape[1])
        weakest = int(recall[:, 0].argmin())
        style: dict[str, Any] = {"color": colour, "marker": marker}
        axes.plot(numbers, recall.mean(0).tolist(), label=f"{label}, mean of all layers", **style)
        style |= {"markerfacecolor": "white", "linestyle": "--"}
        axes.plot(numbers, recall[weakest].tolist(), label=f"{label}, weakest layer ({layers[weakest]})", **style)
    axes.set_title("recall by number of candidates", fontsize=11)
    axes.set_xlabel(f"candidates (the router chooses {top_k})")
    axes.set_ylabel("share of the router's experts among them")
    axes.set_xticks(numbers)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    _plain(axes)
    return figure


def missed_experts(layers: Sequence[int], measured: Mapping[Kind, Measured]) -> Figure:
    """Layers by experts: how often an expert was not among k candidates when the router chose it. Grey: never chosen."""
    styles = _styles(measured)
    figure = new_figure(9, 3.5 * len(styles))
    figure.suptitle("how often an expert that the router chose was missed (each panel has its own scale)", fontsize=11)
    for axes, (kind, (label, *_)) in zip(figure.subplots(len(styles), 1), styles, strict=True):
        missed = 1 - measured[kind].expert_recall
        # Each panel has its own scale: else one bad layer without predictors would make the other panel one colour. The
        # colours end at the 99th percentile: else one expert that is always missed would do the same.
        known = missed[~missed.isnan()]
        top = max(0.01, float(known.quantile(0.99))) if len(known) else 1.0
        axes.set_facecolor("0.8")
        image = axes.imshow(missed.numpy(), aspect="auto", cmap="magma_r", vmin=0, vmax=top, interpolation="nearest")
        axes.set_title(label, fontsize=11)
        axes.set_xlabel("expert")
        axes.set_ylabel("target layer")
        ticks = range(0, len(layers), max(1, len(layers) // 12))
        axes.set_yticks(list(ticks), [str(layers[number]) for number in ticks])
        beyond = len(known) > 0 and float(known.max()) > top
        figure.colorbar(image, ax=axes, pad=0.02, extend="max" if beyond else "neither", format="{x:.0%}")
    return figure


def calibration(measured: Mapping[Kind, Measured]) -> Figure:
    """The share of right candidates by speculated probability, over all layers; and how many have each probability."""
    figure = new_figure(7.5, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    upper.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="a probability that holds")
    for kind, (label, colour, marker) in _styles(measured):
        curve = _pooled(measured[kind].calibration)
        error = float(curve.error())
        points = curve.candidates[0] > 0
        probability, right = curve.probability[0, points].tolist(), curve.right[0, points].tolist()
        label = f"{label} (off by {error:.3f} in the mean)"
        upper.plot(probability, right, color=colour, marker=marker, markersize=4, label=label)
        share = curve.candidates[0] / curve.candidates.sum()
        lower.stairs(share.tolist(), torch.linspace(0, 1, len(share) + 1).tolist(), color=colour, linewidth=1.5)
    upper.set_title("calibration of the speculated scores: k to 2k candidates of all layers", fontsize=11)
    upper.set_ylabel("share that the router chose")
    upper.legend(loc="upper left", frameon=False, fontsize=9)
    lower.set_ylabel("of all")
    lower.set_yscale("log")
    lower.set_xlabel("speculated probability: sigmoid of a candidate's logit above the border of being chosen")
    _plain(upper)
    _plain(lower)
    return figure


def draw_loads(axes: Axes, layers: list[int], loads: list[list[int]]) -> None:
    """Layers by experts: each expert's load over the mean load of its layer."""
    shares = [[count * len(load) / sum(load) for count in load] for load in loads]
    # Colours end at the 99th percentile: else one expert far above the rest would make all others one colour.
    ranked = sorted(share for row in shares for share in row)
    top = max(1.0, ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))])
    image = axes.imshow(shares, aspect="auto", cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("target layer")
    ticks = range(0, len(layers), max(1, len(layers) // 16))
    axes.set_yticks(list(ticks), [str(layers[number]) for number in ticks])
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, extend="max" if ranked[-1] > top else "neither")
    bar.set_label("load over the mean load")


def draw_kept(
    axes: Axes, layers: Sequence[int], slots: Sequence[int], hit_rates: Mapping[str, Sequence[Sequence[float]]]
) -> None:
    """Hit rates of slots by layer: a colour for each number of slots, a line for each rule that says what they keep."""
    lines = (":", "--", "-.", "-")
    for number, (size, colour) in enumerate(zip(slots, COLOURS, strict=False)):
        for (name, rates), line in zip(hit_rates.items(), lines[: len(hit_rates) - 1] + lines[-1:], strict=True):
            axes.plot(layers, rates[number], color=colour, linestyle=line, linewidth=1.5, label=f"{size} slots, {name}")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("layer")
    axes.set_ylabel("hit rate of its slots")
    axes.set_xticks(layers[:: max(1, len(layers) // 24)])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(slots), frameon=False, fontsize=9)
    _plain(axes)


def _styles(measured: Mapping[Kind, Measured]) -> list[tuple[Kind, tuple[str, str, str]]]:
    """Label, colour and marker of each kind that was measured."""
    return [(kind, style) for kind, style in STYLE.items() if kind in measured]


def _pooled(curve: CalibrationCurve) -> CalibrationCurve:
    """The candidates of all layers together, as one layer."""
    count = curve.candidates.sum(0, keepdim=True)
    probability, right = (
        (part.nan_to_num() * curve.candidates).sum(0, keepdim=True) / count for part in (curve.probability, curve.right)
    )
    return CalibrationCurve(probability, right, count)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes are in inches of 100 dots."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color="0.88")
    axes.spines[["top", "right"]].set_visible(False)
