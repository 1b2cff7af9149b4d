from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from predict_train.train.board import PAUSE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

LAYERS = range(4)
K, EXPERTS = 2, 8


@pytest.fixture(scope="module")
def events(fitted: Path) -> EventAccumulator:
    return EventAccumulator(str(fitted)).Reload()


@pytest.fixture(scope="module")
def result(fitted: Path) -> dict:
    return json.loads((fitted / "result.json").read_text())


def last(events: EventAccumulator, tag: str) -> float:
    return events.Scalars(tag)[-1].value


def test_every_chart_of_the_first_page_shows_something(events):
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    tags = events.Tags()["scalars"]
    overview, by_layer = layout.category
    assert overview.title == "Overview"
    assert [chart.title for chart in by_layer.chart] == [f"layer {layer}" for layer in LAYERS]
    for category in layout.category:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                assert any(re.match(pattern, tag) for tag in tags), pattern
    for layer, chart in zip(LAYERS, by_layer.chart, strict=True):
        shown = {tag for tag in tags if any(re.match(pattern, tag) for pattern in chart.multiline.tag)}
        assert shown == {f"{kind}/layer_{layer:02d}" for kind in ("hit_rate", "without_memory", "training_free")}
    loss = {tag for tag in tags if any(re.match(pattern, tag) for pattern in overview.chart[0].multiline.tag)}
    assert loss == {"loss/train", "loss/validation"}


def test_baselines_and_final_figures_are_those_of_the_result(events, result):
    rates = {kind: [entry[kind]["recall@k"] for entry in result["layers"]] for kind in ("training_free", "predictor")}
    for layer, rate in zip(LAYERS, rates["training_free"], strict=True):
        assert last(events, f"training_free/layer_{layer:02d}") == pytest.approx(rate, abs=1e-6)
    assert last(events, "training_free/weakest") == pytest.approx(min(rates["training_free"]), abs=1e-6)
    assert last(events, "final/hit_rate") == pytest.approx(result["mean"]["predictor"], abs=1e-6)
    assert last(events, "final/training_free") == pytest.approx(result["mean"]["training_free"], abs=1e-6)
    assert last(events, "final/weakest_layer") == pytest.approx(min(rates["predictor"]), abs=1e-6)
    assert last(events, "final/without_memory") == pytest.approx(result["mean"]["without_memory"], abs=1e-6)
    before, after = result["mean"]["training_free"], result["mean"]["predictor"]
    assert last(events, "final/gap_closed") == pytest.approx((after - before) / (1 - before), abs=1e-5)


def test_recall_is_charted_by_number_of_candidates(events, result):
    curves = [entry["predictor"]["recall"] for entry in result["layers"]]
    points = events.Scalars("recall_by_candidates/predictor")
    assert [point.step for point in points] == [K, K + 1, 2 * K]
    for number, point in enumerate(points):
        assert point.value == pytest.approx(sum(curve[number] for curve in curves) / len(curves), abs=1e-6)
    weakest = events.Scalars("recall_by_candidates/predictor_weakest")
    assert weakest[0].value == pytest.approx(min(curve[0] for curve in curves), abs=1e-6)


def test_the_last_validation_has_figures_and_no_two_come_too_soon(events):
    steps = [event.step for event in events.Scalars("hit_rate/mean")]
    assert len(steps) == 3
    for name in ("hit_rate_by_layer", "recall_by_candidates", "missed_experts", "calibration"):
        images = events.Images(f"validation/{name}")
        assert images[-1].step == steps[-1]
        assert {image.step for image in images} <= set(steps)
        times = [image.wall_time for image in images[:-1]]
        assert all(later - earlier >= PAUSE for earlier, later in pairwise(times))
        drawn = Image.open(io.BytesIO(images[-1].encoded_image_string)).convert("RGB")
        assert (drawn.width, drawn.height) == (images[-1].width, images[-1].height)
        assert len(drawn.getcolors(drawn.width * drawn.height)) > 20
        assert len(images[-1].encoded_image_string) < 200_000


def test_hyperparameters_stand_beside_the_final_figures_in_the_same_run(events, fitted):
    found = {
        tag: HParamsPluginData.FromString(content) for tag, content in events.PluginTagToContent("hparams").items()
    }
    settings = found["_hparams_/session_start_info"].session_start_info.hparams
    assert settings["width"].number_value == 32
    assert settings["learning_rate"].number_value == pytest.approx(1e-2)
    assert "out" not in settings
    metrics = [info.name.tag for info in found["_hparams_/experiment"].experiment.metric_infos]
    assert "final/hit_rate" in metrics
    assert set(metrics) <= set(events.Tags()["scalars"])
    assert "_hparams_/session_end_info" in found
    assert not [file for file in fitted.rglob("events.out.*") if file.parent != fitted]


def test_settings_and_provenance_are_there_to_read(events, fitted):
    def text(name: str) -> str:
        return events.Tensors(f"run/{name}/text_summary")[0].tensor_proto.string_val[0].decode()

    config = json.loads((fitted / "config.json").read_text())
    assert "| width | 32 |" in text("settings")
    assert f"| version: torch | {config['versions']['torch']} |" in text("provenance")
    assert config["trace"]["model"]["fingerprint"] in text("provenance")
    assert config["trace"]["command"].split()[0] in text("provenance")


def test_throughput_is_measured_in_every_epoch(events):
    points = events.Scalars("throughput/rows_per_second")
    assert len(points) >= 3
    assert all(point.value > 0 for point in points)


def test_scalars_are_grouped(events):
    groups = {tag.split("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {
        "calibration", "epoch", "exact", "final", "hit_rate", "hit_rate_at_2k", "loss", "recall_by_candidates",
        "reuse", "throughput", "training_free", "without_memory",
    }  # fmt: skip
