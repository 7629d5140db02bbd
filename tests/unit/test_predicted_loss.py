"""The loss of top-1 that is predicted from images that were made."""

import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from scipy.special import softmax

from ovcalib.calibration.probe import blind_to
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.evaluation import predicted_loss as predicted
from ovcalib.evaluation.predicted_loss import LARGEST_NMSE, LINES, predict_loss, predicted_loss, probe_error
from ovcalib.records.calibration import Provenance
from ovcalib.records.model import ModelSpec, Weights
from ovcalib.records.preprocessing import Preprocessing
from ovcalib.records.read import read_record
from ovcalib.records.result import Accuracy, ProbeError, Result, Top
from ovcalib.reports.markdown import summary
from ovcalib.reports.verdict import predicted_note, result_verdict

PREPROCESSING = Preprocessing(height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3)
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "result-0.1.json"


def probe(nmse: float | None) -> ProbeError:
    return ProbeError(source="fractal", count=64, agreement=1.0, expected_loss=0.0, confidence=0.9, nmse=nmse)


def test_the_error_of_a_probe(rng) -> None:
    reference = rng.normal(size=(20, 5)).astype(np.float32)
    outputs = (reference + rng.normal(size=(20, 5))).astype(np.float32)
    found = probe_error("fractal", reference, outputs)
    p, named = softmax(reference.astype(np.float64), axis=1), outputs.argmax(1)
    assert found.agreement == (named == reference.argmax(1)).mean() < 1
    assert found.confidence == pytest.approx(p.max(1).mean())
    assert found.expected_loss == pytest.approx((p.max(1) - p[np.arange(20), named]).mean())
    assert found.nmse == pytest.approx(np.square(outputs - reference).sum() / np.square(reference).sum(), rel=1e-6)
    assert probe_error("fractal", reference, np.full_like(outputs, np.nan)).nmse is None


def test_a_larger_error_costs_more_and_is_less_certain() -> None:
    small, large = (predicted_loss(probe(nmse))[0] for nmse in (0.001, 0.1))
    assert small is not None
    assert large is not None
    assert small.points < large.points
    widths = [found.interval90[1] - found.interval90[0] for found in (small, large)]
    assert widths[0] < widths[1]
    for found in (small, large):
        assert found.interval90[0] <= found.points <= found.interval90[1]
    low, middle, high = (a + b * 0.1 for a, b in LINES)
    assert (large.interval90[0], large.points, large.interval90[1]) == (low, middle, high)


@pytest.mark.parametrize(("nmse", "reason"), [(None, "not finite"), (2 * LARGEST_NMSE, "Expect a large loss")])
def test_thin_evidence_is_said_instead(nmse, reason) -> None:
    found, why = predicted_loss(probe(nmse))
    assert found is None
    assert why is not None
    assert reason in why


@pytest.mark.parametrize(
    ("num_classes", "origin", "obstacle", "reason"),
    [
        (None, "file", None, "no class logits"), (10, "random", None, "weights of toy are random"),
        (10, "file", "they are fractals", "they are fractals"),
    ],
)  # fmt: skip
def test_there_is_a_reason_where_nothing_is_predicted(num_classes, origin, obstacle, reason) -> None:
    spec = ModelSpec(
        name="toy", input_shape=(3, 8, 8), num_classes=num_classes, weights=Weights(origin=origin),
        preprocessing=PREPROCESSING,
    )  # fmt: skip
    x = ops.parameter([1, 3, 8, 8])
    graph = ov.Model([x], [x], "unused")
    found, why = predict_loss(graph, graph, spec, "fractal", lambda: pytest.fail("for nothing"), obstacle, "vnni")
    assert found is None
    assert why is not None
    assert reason in why


def made_by(source: str, real: bool = False, parts: tuple[Provenance, ...] = ()) -> CalibrationSet:
    provenance = Provenance(
        source=source, options={}, num_samples=1, requested=1, seed=0, seconds=0.0, domain="pixels", labels=None,
        real=real, parts=parts,
    )  # fmt: skip
    return CalibrationSet(np.zeros((1, 8, 8, 3), np.uint8), None, PREPROCESSING, provenance)


def test_fractals_say_nothing_of_a_model_that_is_calibrated_with_them() -> None:
    inversion, fractal = (made_by(source).provenance for source in ("bn-inversion", "fractal"))
    for made in (
        made_by("fractal"), made_by("mix:bn-inversion=0.5,fractal=0.5", parts=(inversion, fractal)),
        made_by("auto", parts=(fractal,)), made_by("npz:set/calibration.npz"),
    ):  # fmt: skip
        assert blind_to(made) is not None
    for made in (
        made_by("bn-inversion"), made_by("noise"), made_by("real:photos", real=True), made_by("npz:x.npz", real=True),
        made_by("auto:bn-inversion,fractal", parts=(inversion,)),
    ):  # fmt: skip
        assert blind_to(made) is None


def test_reports_show_it_beside_what_was_measured(tmp_path) -> None:
    shutil.copy(GOLDEN, tmp_path / "result.json")
    old = read_record(tmp_path / "result.json")
    assert isinstance(old, Result)
    assert predicted_note(old) == ""
    found, _ = predicted_loss(probe(0.01))
    assert found is not None
    low, high = found.interval90
    figure = f"{found.points:.1f} ({low:.1f} to {high:.1f})"
    top = Top(top1=0.9, top5=None, ci95=(0.88, 0.92))
    accuracy = Accuracy(protocol="p", count=9, data_sha256="", fp32=top, int8=top, drop_points=0.31, drop_ci95=(0, 1))
    record = old.model_copy(update={"predicted_loss": found, "accuracy": accuracy})
    assert figure in predicted_note(record)
    assert "Measured: 0.3 points." in predicted_note(record)
    assert "expected loss, points" not in summary(record)

    without = record.model_copy(update={"accuracy": None})
    assert "Measured" not in predicted_note(without)
    assert summary(without)["expected loss, points"] == figure
    assert f"expected loss of top-1, in points: {figure}." in result_verdict(without)["text"]
    reason = without.model_copy(update={"predicted_loss": None, "predicted_loss_reason": "the weights are random"})
    assert "was not predicted: the weights are random." in predicted_note(reason)
    assert "Accuracy was not measured." in result_verdict(reason)["text"]


def test_the_lines_are_those_that_were_fitted() -> None:
    """Quantiles in order at every error that is accepted."""
    for nmse in np.linspace(0, LARGEST_NMSE, 20):
        low, middle, high = (a + b * nmse for a, b in predicted.LINES)
        assert low <= middle <= high
