"""The parts of a calibration set."""

import numpy as np
import pytest

from ovcalib.calibration.sets import CalibrationSet, read_set
from ovcalib.calibration.sources import Request, generate
from ovcalib.calibration.split import split
from ovcalib.models import builtin
from ovcalib.records.calibration import Provenance

SPEC = builtin.spec("resnet20-cifar10")


def numbered(count):
    """A set whose images are their own indices."""
    images = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, 3, 32, 32)).copy()
    provenance = Provenance(
        source="test",
        options={},
        num_samples=count,
        requested=count,
        seed=0,
        seconds=0.0,
        domain="network",
        labels="data",
    )
    return CalibrationSet(images, np.arange(count) % 10, SPEC.preprocessing, provenance)


def members(part):
    return [int(x[0, 0, 0, 0]) for x in part]


@pytest.mark.parametrize(
    ("count", "ranges", "corrections", "choices"),
    [(300, 268, 64, 32), (64, 48, 48, 16), (100, 75, 64, 25), (8, 6, 6, 2)],
)
def test_defaults_are_chosen_on_images_that_nothing_was_fitted_on(count, ranges, corrections, choices) -> None:
    parts = split(numbered(count))
    assert members(parts.ranges) == list(range(ranges))
    assert members(parts.corrections) == list(range(corrections))
    assert members(parts.choices) == list(range(ranges, count))
    assert parts.ranges.labels.tolist() == [i % 10 for i in range(ranges)]
    record = parts.record()
    assert (record.ranges, record.corrections, record.choices) == (ranges, corrections, choices)
    assert record.shared == ("ranges", "corrections")


def test_a_set_too_small_to_split_says_what_is_shared() -> None:
    parts = split(numbered(7))
    assert members(parts.ranges) == members(parts.corrections) == members(parts.choices) == list(range(7))
    assert parts.record().shared == ("ranges", "corrections", "choices")


def test_made_images_stay_made_in_a_file(tmp_path) -> None:
    """So that they are quantized as they would be by their source: the input's range is that of pixels."""
    made = generate("fractal", Request(count=4, seed=0, spec=SPEC))
    made.save(tmp_path / "made")
    again = generate(f"npz:{tmp_path}/made/calibration.npz", Request(count=4, seed=0, spec=SPEC))
    assert made.input_range is not None
    assert again.input_range == read_set(tmp_path / "made").input_range == made.input_range
    np.savez(tmp_path / "own.npz", images=np.zeros((4, 32, 32, 3), np.uint8))
    assert generate(f"npz:{tmp_path}/own.npz", Request(count=4, seed=0, spec=SPEC)).input_range is None


@pytest.mark.parametrize(("source", "real"), [("real:x", True), ("npz:x", True), ("fractal", False)])
def test_sets_of_earlier_versions_are_real_by_their_source(source, real) -> None:
    old = {
        "source": source, "options": {}, "num_samples": 1, "requested": 1, "seed": 0, "seconds": 0.0,
        "domain": "pixels", "labels": None,
    }  # fmt: skip
    assert Provenance.model_validate(old).real == real
