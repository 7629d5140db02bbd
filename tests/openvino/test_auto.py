"""The choice of a source: errors on each other's images, and what becomes of the best one."""

import dataclasses

import numpy as np
import openvino as ov
import pytest
import torch

from ovcalib.calibration.auto import (
    QUICK,
    compare,
    errors_on_each_other,
    excess,
    images_wanted,
    judges,
    quantized_quickly,
    usual_candidates,
)
from ovcalib.calibration.make import export_once
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.calibration.sources import Request, generate
from ovcalib.errors import DataError, ModelError, UnknownNameError, UsageError
from ovcalib.evaluation.dataset import open_dataset, refuse_same_images
from ovcalib.evaluation.metrics import nmse
from ovcalib.kernels import without_saturation
from ovcalib.models import builtin
from ovcalib.models.load import Model
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.selection import OutputError, compared_outputs, select_activation_ranges
from ovcalib.quantization.settings import resolve_settings
from ovcalib.records.calibration import Provenance
from ovcalib.records.options import EvaluationOptions
from tests.toy import ToyNet, with_statistics_of

SPEC = builtin.spec("resnet20-cifar10").model_copy(update={"input_shape": (3, 16, 16), "num_classes": 4})
SPEC = SPEC.model_copy(
    update={"preprocessing": SPEC.preprocessing.model_copy(update={"height": 16, "width": 16}), "classes": None}
)


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return with_statistics_of(ToyNet(), lambda net: net(torch.randn(64, 3, 16, 16)))


@pytest.fixture(scope="module")
def graph(module):
    return export_once(Model(SPEC, module))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Sets of grey images that hardly vary, of photographs as they should be, and of the same with other pixels."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    spread = {"dull": (118, 138), "good": (0, 256), "mild": (90, 166)}
    for name, (low, high) in spread.items():
        images = rng.integers(low, high, (12, 16, 16, 3), np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(12) % 4)
    return {name: f"npz:{folder / f'{name}.npz'}" for name in spread}


@pytest.fixture
def make(module, graph):
    def make(reference, count, options=None, **more):
        more = {"module": module, "graph": lambda: graph, **more}
        return generate(reference, Request(count=count, seed=3, spec=SPEC, **more), options)

    return make


def test_excess_is_the_geometric_mean_of_ratios_to_the_least() -> None:
    errors = np.array([[1.0, 4.0, 2.0], [2.0, 1.0, 2.0], [8.0, 8.0, 1.0]])
    np.testing.assert_allclose(excess(errors), [(1 * 4 * 2) ** (1 / 3), (2 * 1 * 2) ** (1 / 3), (8 * 8 * 1) ** (1 / 3)])
    rng = np.random.default_rng(0)
    errors = rng.uniform(0.1, 9, (5, 4))
    # How loud the images of a judge are makes no difference.
    np.testing.assert_allclose(excess(errors * rng.uniform(1e-3, 1e3, 4)), excess(errors))
    assert np.all(excess(errors) >= 1)
    np.testing.assert_allclose(excess(np.outer([1, 3], [5.0, 7.0])), [1, 3])
    np.testing.assert_array_equal(excess(np.zeros((2, 2))), [1, 1])


def made_of(images: np.ndarray, real: bool = False, domain: str = "pixels") -> CalibrationSet:
    """A set of images [N, H, W, 3], or of inputs [N, 3, H, W] of the domain "network"."""
    about = Provenance(
        source="x", options={}, num_samples=len(images), requested=len(images), seed=0, seconds=0.0, domain=domain,
        labels=None, real=real,
    )  # fmt: skip
    return CalibrationSet(images, None, SPEC.preprocessing, about)


def test_real_images_judge_alone(graph) -> None:
    rng = np.random.default_rng(0)
    sets = [
        made_of(rng.integers(low, high, (4, 16, 16, 3), np.uint8), real)
        for low, high, real in ((0, 256, False), (60, 90, True), (90, 200, True))
    ]
    assert judges(sets) == [1, 2]
    assert judges(sets[:1] * 3) == [0, 1, 2]
    errors = errors_on_each_other(graph, sets)
    assert [t.excess for t in compare(graph, sets)] == pytest.approx(excess(errors[:, 1:]))
    assert [t.nmse for t in compare(graph, sets)] == [pytest.approx(tuple(row)) for row in errors]


def test_ranges_are_those_that_do_better_on_the_other_half(graph) -> None:
    """A single image far beyond the others widens the extremes; the other half has none."""
    images = np.random.default_rng(0).standard_normal((64, 3, 16, 16), np.float32)
    images[3] *= 100
    own = made_of(images, domain="network")
    settings = resolve_settings(QUICK, graph)
    judge = [own[k] for k in range(32, 64)]
    reference = compared_outputs(graph, judge)

    def error(int8):
        return nmse(reference, compared_outputs(int8, judge))

    by_ranges = {
        ranges: error(quantize_default(graph, own.subset(range(32)), dataclasses.replace(settings, activation_ranges=ranges)))
        for ranges in ("min-max", "mean-min-max")
    }  # fmt: skip
    assert by_ranges["mean-min-max"] < by_ranges["min-max"]
    found = quantized_quickly(own.subset(range(32)), OutputError(graph, own.inputs(32, 64)))
    assert error(found) == pytest.approx(by_ranges["mean-min-max"])


def test_ranges_are_compared_on_the_half_that_calibrates_as_well(graph, monkeypatch) -> None:
    own = made_of(np.random.default_rng(0).standard_normal((8, 3, 16, 16), np.float32), domain="network")
    compared = []

    def watched(extremes, make, seen):
        compared.append((extremes.output, seen))
        return select_activation_ranges(extremes, make, seen)

    monkeypatch.setattr("ovcalib.calibration.auto.select_activation_ranges", watched)
    output = OutputError(graph, own.inputs(4, 8))
    quantized_quickly(own.subset(range(4)), output)
    ((judge, seen),) = compared
    assert (judge, seen.fp32) == (output, graph)
    assert np.array_equal(np.concatenate(list(seen.inputs)), np.concatenate(list(own.inputs(0, 4))))


def test_each_set_calibrates_with_one_half_and_judges_with_the_other(make, files, graph) -> None:
    sets = [make(files[name], 8) for name in ("dull", "good")]
    errors = errors_on_each_other(graph, sets)
    settings = resolve_settings(QUICK, graph)
    core = ov.Core()

    def outputs(model, images):
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.concatenate([compiled(image)[0] for image in images])

    for i, calibrating in enumerate(sets):
        int8 = without_saturation(quantize_default(graph, calibrating.subset(range(4)), settings))
        for j, judging in enumerate(sets):
            images = [judging[k] for k in range(4, 8)]
            reference = outputs(graph, images)
            expected = np.square(outputs(int8, images) - reference).sum() / np.square(reference).sum()
            assert errors[i, j] == pytest.approx(expected, rel=1e-3)


def test_the_set_is_the_one_that_the_best_source_makes_by_itself(make, files) -> None:
    dull, good, mild = files["dull"], files["good"], files["mild"]
    taken = make(f"auto:{dull},{good},{mild}", 8, {"trial": "6"})
    alone = make(good, 8)
    np.testing.assert_array_equal(taken.images, alone.images)
    np.testing.assert_array_equal(taken.labels, alone.labels)
    about = taken.provenance
    assert [t.source for t in about.trials] == [dull, good, mild]
    assert [t.excess for t in about.trials] == pytest.approx(excess(np.array([t.nmse for t in about.trials])))
    assert min(about.trials, key=lambda t: t.excess).source == good
    assert [(part.source, part.num_samples) for part in about.parts] == [(good, 8)]
    assert (about.real, about.labels, about.licence, about.options) == (
        True, "data", alone.provenance.licence, {"trial": 6},
    )  # fmt: skip


def test_one_candidate_is_not_compared(make, files) -> None:
    made = make(f"auto:{files['good']}", 8, graph=None)
    assert (made.provenance.trials, len(made)) == ((), 8)


def test_one_image_has_no_halves_to_compare(make, files) -> None:
    made = make(f"auto:{files['dull']},{files['good']}", 1, graph=None)
    assert (made.provenance.trials, made.provenance.parts[0].source) == ((), files["dull"])


def test_the_first_images_of_each_set_are_compared(make, files, graph) -> None:
    dull, good = (make(files[name], 8) for name in ("dull", "good"))
    trials = make(f"auto:{files['dull']},{files['good']}", 8, {"trial": "4"}).provenance.trials
    expected = errors_on_each_other(graph, [dull.subset(range(4)), good.subset(range(4))])
    assert [t.nmse for t in trials] == [pytest.approx(tuple(row)) for row in expected]


def test_progress_only_grows(make, files) -> None:
    ticks = []
    made = make(f"auto:{files['dull']},{files['good']}", 8, tick=lambda done, note: ticks.append(done))
    np.testing.assert_array_equal(made.images, make(files["good"], 8).images)
    assert ticks == sorted(ticks)
    assert ticks[-1] == 8


@pytest.mark.parametrize("trials", [1, 2])
def test_when_time_is_up_the_best_so_far_is_taken(make, files, trials) -> None:
    asked = iter(range(100))
    made = make(
        f"auto:{files['dull']},{files['good']},{files['mild']}", 8, {"trial": "4"},
        out_of_time=lambda: next(asked) >= trials - 1,
    )  # fmt: skip
    about = made.provenance
    assert about.parts[0].source == files["dull" if trials == 1 else "good"]
    assert (len(made), about.requested) == (8, 8)
    assert len(about.trials) == (0 if trials == 1 else 2)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("auto:noise,", UsageError, "'' is no candidate"),
        ("auto:noise,auto", UsageError, "'auto' is no candidate"),
        ("auto:mix:noise=1", UsageError, "'mix:noise=1' is no candidate"),
        ("auto:noise,noise", UsageError, "'noise' is named twice"),
        ("auto:noise,nois", UnknownNameError, "nois"),
        ("auto:noise,real", UsageError, "needs more"),
    ],
)
def test_candidates_that_make_no_sense_are_refused_before_any_work(make, reference, error, message) -> None:
    told = []
    with pytest.raises(error, match=message):
        make(reference, 8, tick=lambda *progress: told.append(progress))
    assert told == []


def test_a_trial_needs_an_image_for_each_half(make) -> None:
    with pytest.raises(UsageError, match="trial=1: expected at least 2"):
        make("auto:noise,fractal", 8, {"trial": "1"})


def test_the_usual_candidates_are_what_the_model_allows(module) -> None:
    def names(**about):
        return usual_candidates(Request(count=1, seed=0, **{"spec": SPEC, "module": module, **about}))

    assert names() == ("bn-inversion", "fractal")
    assert names(module=None) == ("fractal",)
    assert names(module=torch.nn.Linear(1, 1)) == ("fractal",)
    cifar = builtin.spec("resnet20-cifar10")
    assert names(spec=cifar) == ("bn-inversion", "distylegan", "fractal")


def test_as_many_images_as_the_most_expensive_candidate_makes() -> None:
    assert images_wanted(SPEC, "fractal,bn-inversion") == images_wanted(SPEC, "") == 128
    assert images_wanted(SPEC, "fractal,noise") == 300


def test_candidates_out_of_the_evaluation_set_are_refused(tmp_path) -> None:
    rng = np.random.default_rng(0)
    spec = builtin.spec("resnet20-cifar10")
    np.savez(tmp_path / "test.npz", images=rng.integers(0, 256, (10, 32, 32, 3), np.uint8), labels=np.arange(10))
    data = open_dataset(f"npz:{tmp_path / 'test.npz'}", spec, None)
    with pytest.raises(DataError, match="come out of the evaluation set"):
        refuse_same_images(f"auto:fractal,npz:{tmp_path / 'test.npz'}", data, EvaluationOptions())


def test_a_model_that_cannot_be_exported_says_so(make) -> None:
    def fails():
        raise ModelError("no graph of this")

    with pytest.raises(ModelError, match="no graph of this"):
        make("auto:noise,fractal", 4, graph=fails)
