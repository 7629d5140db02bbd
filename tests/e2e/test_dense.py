"""Networks whose outputs are maps: judged by their error, by the class of pixels, or by a metric of the user's own."""

import json
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

import ovcalib
from ovcalib.errors import UsageError
from ovcalib.reports.markdown import summary
from ovcalib.reports.verdict import result_verdict

QUICK: Any = {"calib": "noise", "num_samples": 8, "benchmark_time": 0, "mean": (0.5,) * 3, "std": (0.25,) * 3}


class Heads(nn.Module):
    """A trunk with an output map of 1 and one of 4 channels; `scale` makes the second far larger."""

    def __init__(self, trunk, scale=1.0):
        super().__init__()
        self.trunk, self.scale = nn.Sequential(trunk.stem, trunk.block), scale
        self.heat, self.size = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        features = self.trunk(x)
        return {"heat": torch.sigmoid(self.heat(features)), "size": self.scale * self.size(features)}


class Pixels(nn.Module):
    def __init__(self, trunk, softmax=True):
        super().__init__()
        self.trunk, self.softmax = nn.Sequential(trunk.stem, trunk.block), softmax
        self.head = nn.Conv2d(8, 3, 1, bias=False)
        self.head.weight.data[1:] = self.head.weight.data[:1] + 0.02 * self.head.weight.data[1:]  # near ties

    def forward(self, x):
        scores = self.head(self.trunk(x))
        return scores.softmax(1) if self.softmax else scores


def quantize(network, output=None, **options):
    torch.manual_seed(0)
    return ovcalib.quantize(network, output, input_shape=(3, 16, 16), **{**QUICK, **options})


def outputs(graph, inputs):
    """Every output on every input, by the place of the output."""
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [list(compiled(x).values()) for x in inputs]
    return [np.concatenate([values[i] for values in found]) for i in range(len(found[0]))]


def test_every_output_map_has_its_own_error(toy, tmp_path) -> None:
    result = quantize(Heads(toy.net, 50.0), tmp_path / "out", deploy_isa="host")
    agreed, inputs = result.record.agreement, result.calibration.inputs()
    fp32, int8 = outputs(result.fp32, inputs), outputs(result.int8, inputs)
    errors = [np.square(a - b).sum() / np.square(a).sum() for a, b in zip(fp32, int8, strict=True)]
    assert [output.nmse for output in agreed.outputs] == pytest.approx(errors, rel=1e-3)
    assert [output.shape for output in agreed.outputs] == [(1, 16, 16), (4, 16, 16)]
    whole = sum(np.square(a - b).sum() for a, b in zip(fp32, int8, strict=True)) / sum(np.square(a).sum() for a in fp32)
    assert agreed.nmse == pytest.approx(whole, rel=1e-3)
    assert agreed.top1 is agreed.pixels is None
    # Words of the report: nothing is a class here.
    text, page = (tmp_path / "out" / "report.md").read_text(), (tmp_path / "out" / "report.html").read_text()
    for shown in (text, page):
        assert "over 2 outputs, largest in" in shown
        assert "output1" in shown
        assert "names the class" not in shown
        assert "top-1" not in shown
    row = summary(result.record)
    assert "agreement" not in row
    assert float(row["output error (NMSE)"].split()[0]) == pytest.approx(agreed.nmse, rel=0.01)


@pytest.mark.parametrize(("softmax", "task"), [(True, "auto"), (False, "segmentation")])
def test_pixels_have_classes_where_the_channels_are_classes(toy, softmax, task) -> None:
    result = quantize(Pixels(toy.net, softmax), task=task, deploy_isa="host")
    inputs = result.calibration.inputs()
    (fp32,), (int8,) = outputs(result.fp32, inputs), outputs(result.int8, inputs)
    assert result.record.agreement.pixels == pytest.approx(np.mean(fp32.argmax(1) == int8.argmax(1)))
    assert result.record.agreement.pixels < 1  # or the test would show nothing
    assert result.record.agreement.top1 is None
    assert result.record.model.task == "segmentation"
    assert "of the pixels" in result_verdict(result.record)["text"]


def test_three_channels_are_no_classes_unless_they_are_said_to_be(toy) -> None:
    result = quantize(Pixels(toy.net, softmax=False))
    assert result.record.agreement.pixels is None
    assert result.record.model.task == "dense"


def test_logits_that_are_no_classes_are_judged_by_their_error(toy) -> None:
    result = quantize(toy.net, task="dense")
    assert result.record.agreement.top1 is None
    assert result.record.accuracy_reason == "no evaluation images were given (`eval`)"


@pytest.mark.parametrize(("task", "words"), [("segmentation", "an output [N, K, H, W]"), ("classification", "one")])
def test_a_task_that_the_outputs_do_not_have_is_refused(toy, task, words) -> None:
    network = toy.net if task == "segmentation" else Pixels(toy.net)
    with pytest.raises(UsageError, match="expects " + words.replace("[", r"\[")):
        quantize(network, task=task)


def test_accuracy_aware_quantization_of_maps_bounds_their_error(toy) -> None:
    result = quantize(Heads(toy.net), mode="accuracy-aware", max_drop=1e-5, max_iterations=3)
    restored = result.record.quantization.restoration
    assert restored.metric == "nmse"
    assert restored.baseline == 1
    assert restored.value <= 1
    with pytest.raises(UsageError, match=r"`metric=agreement` needs outputs that are .* Use `metric=nmse`"):
        quantize(Heads(toy.net), mode="accuracy-aware", metric="agreement")


METRICS = """
import numpy as np
def brightest(outputs, labels):
    print("noise")
    assert labels is None or labels.dtype == np.int64
    return outputs["output0"].max() + (0 if labels is None else 100 + labels.sum())
def broken(outputs, labels):
    return outputs["heatmap"].mean()
def text(outputs, labels):
    return "high"
"""


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_metric_of_the_users_own_judges_both_models(toy, tmp_path, metrics) -> None:
    result = quantize(Heads(toy.net), tmp_path / "out", metric_function="own_metrics:brightest", deploy_isa="host")
    inputs = result.calibration.inputs()
    fp32, int8 = (outputs(graph, inputs)[0].max() for graph in (result.fp32, result.int8))
    found = result.record.custom_metric
    assert (found.fp32, found.int8, found.difference) == pytest.approx((fp32, int8, int8 - fp32), abs=1e-5)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["custom_metric"]["int8"] == found.int8
    assert "own_metrics:brightest" in (tmp_path / "out" / "report.html").read_text()
    assert "own\\_metrics:brightest: FP32" in (tmp_path / "out" / "report.md").read_text()


def test_the_metric_gets_the_labels_that_are_with_the_images(toy, metrics) -> None:
    toys, labels = toy.images[:6], np.array([0, 7, 9, 1, 1, 2])
    result = quantize(Heads(toy.net), metric_function="own_metrics:brightest", eval=(toys, labels))
    assert result.record.custom_metric.fp32 > 100 + labels.sum()
    assert result.record.accuracy is None
    assert "no class logits" in result.record.accuracy_reason


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_metrics:broken", r"failed with KeyError: 'heatmap'(.|\n)*return outputs\[\"heatmap\"\]"),
        ("own_metrics:text", "returned 'high'. Expected one finite number"),
        ("own_metrics:nothing", "has no 'nothing'"),
        ("own_metrics:METRIC", "has no 'METRIC'"),
        ("own_metrics:np", "is a module"),
        ("missing_metrics:x", "no module 'missing_metrics' for the metric"),
        ("x", "not a metric reference"),
    ],
)
def test_a_mistake_in_the_metric_is_shown_where_it_is(toy, metrics, name, words) -> None:
    with pytest.raises(UsageError, match=words):
        quantize(Heads(toy.net), metric_function=name)
