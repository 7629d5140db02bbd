"""Which images judge what was fitted to a calibration set."""

import numpy as np
import pytest
import torch
from torch import nn

import ovcalib.calibration.probe as probe
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.calibration.sources import Request, generate
from ovcalib.models.load import Model
from ovcalib.progress import Progress
from ovcalib.records.calibration import Provenance


def set_of(toy, *sources: str, real: bool = False) -> CalibrationSet:
    """A calibration set of these sources; of several, a mix."""
    parts = tuple(
        Provenance(
            source=source, options={}, num_samples=1, requested=1, seed=0, seconds=0.0, domain="pixels", labels=None,
            real=real,
        )
        for source in sources
    )  # fmt: skip
    whole = parts[0] if len(parts) == 1 else parts[0].model_copy(update={"source": "mix:...", "parts": parts})
    return CalibrationSet(np.zeros((1, 16, 16, 3), np.uint8), None, toy.spec.preprocessing, whole)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(probe, "IMAGES", 3)
    probe._made.cache_clear()
    yield 3
    probe._made.cache_clear()


@pytest.mark.parametrize(
    ("sources", "judges"),
    [(["noise"], ["fractal", "bn-inversion"]), (["real:photos"], ["fractal", "bn-inversion"]),
     (["zeroq"], ["fractal", "bn-inversion"]), (["fractal"], ["bn-inversion"]), (["bn-inversion"], ["fractal"]),
     (["noise", "fractal"], ["bn-inversion"]), (["bn-inversion", "fractal"], []), (["npz:set.npz"], []),
     (["noise", "npz:set.npz"], [])],
)  # fmt: skip
def test_a_source_does_not_judge_its_own_images(toy, few, sources, judges) -> None:
    model = Model(toy.spec, toy.net)
    found = probe.judging_inputs(model, set_of(toy, *sources), Progress())
    assert list(found) == judges
    assert all(x.shape == (1, 3, 16, 16) for images in found.values() for x in images)
    assert {len(images) for images in found.values()} <= {few}


def test_photographs_of_a_file_are_judged(toy, few) -> None:
    found = probe.judging_inputs(Model(toy.spec, toy.net), set_of(toy, "npz:photos.npz", real=True), Progress())
    assert list(found) == ["fractal", "bn-inversion"]


def test_the_images_are_those_of_the_sources_with_a_seed_of_their_own(toy, few) -> None:
    found = probe.judging_inputs(Model(toy.spec, toy.net), set_of(toy, "noise"), Progress())
    request = Request(count=few, seed=probe.SEED, spec=toy.spec, module=toy.net)
    np.testing.assert_array_equal(found["bn-inversion"], generate("bn-inversion", request).inputs())
    np.testing.assert_array_equal(found["fractal"], generate("fractal", request, probe.OPTIONS).inputs())
    assert probe.SEED != 0


def test_without_statistics_fractals_judge_alone(toy, few) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()
    for model in (
        Model(toy.spec, plain), Model(toy.spec), Model(toy.spec, toy.net, obstacle="most of them are folded away"),
    ):  # fmt: skip
        assert list(probe.judging_inputs(model, set_of(toy, "noise"), Progress())) == ["fractal"]
        assert probe.judging_inputs(model, set_of(toy, "fractal"), Progress()) == {}


def test_with_attention_the_usual_source_judges(toy, few, monkeypatch) -> None:
    monkeypatch.setattr(probe, "usual_source", lambda model: ("patch-similarity", "no BatchNorm"))
    monkeypatch.setattr(
        probe, "generate", lambda source, request, options=None: {"patch-similarity": toy, "fractal": toy}[source].calibration(3)
    )  # fmt: skip
    assert list(probe.judging_inputs(Model(toy.spec, toy.net), set_of(toy, "noise"), Progress())) == [
        "fractal", "patch-similarity",
    ]  # fmt: skip
    assert list(probe.judging_inputs(Model(toy.spec, toy.net), set_of(toy, "patch-similarity"), Progress())) == [
        "fractal"
    ]
