import dataclasses
import json
from typing import Literal

import numpy as np
import PIL.Image
import pytest

from ovcalib.calibration import SOURCES
from ovcalib.calibration.sets import CalibrationSet, load_calibration, preflight
from ovcalib.calibration.sources import Request, generate, images_wanted, parse_options
from ovcalib.errors import DataError, UnknownNameError, UsageError
from ovcalib.models import builtin
from ovcalib.records.calibration import Provenance

SPEC = builtin.spec("resnet20-cifar10")


def calibration_set(images, labels=None, source="test"):
    domain = "pixels" if images.dtype == np.uint8 else "network"
    provenance = Provenance(
        source=source, options={}, num_samples=len(images), requested=len(images), seed=0, seconds=0.0, domain=domain,
        labels=None if labels is None else "data",
    )  # fmt: skip
    return CalibrationSet(images, labels, SPEC.preprocessing, provenance)


def pixels(rng, count=4):
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_pixels_are_normalised_and_network_values_are_left_alone(rng) -> None:
    images = pixels(rng)
    assert np.array_equal(calibration_set(images)[1], SPEC.preprocessing.normalise(images[1])[None])
    values = rng.standard_normal((4, 3, 32, 32), dtype=np.float32)
    assert np.array_equal(calibration_set(values)[1], values[1:2])
    assert calibration_set(values)[0].dtype == np.float32


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_set_survives_saving_exactly(tmp_path, rng, dtype) -> None:
    images = pixels(rng) if dtype == "uint8" else rng.standard_normal((4, 3, 32, 32), dtype=np.float32) * 3
    labels = np.array([3, 1, 2, 0])
    made = calibration_set(images, labels)
    made.save(tmp_path)
    again, domain, again_labels, origin, real = load_calibration(tmp_path / "calibration.npz", SPEC)
    assert np.array_equal(again, images)
    assert again.dtype == images.dtype
    assert again_labels is not None
    assert again_labels.tolist() == labels.tolist()
    assert (domain, origin, real) == (made.domain, "data", made.provenance.real)
    described = json.loads((tmp_path / "calibration.json").read_text())
    assert described["provenance"]["num_samples"] == 4
    assert described["preprocessing"]["mean"] == list(SPEC.preprocessing.mean)
    assert (described["clipped_share"] > 0) == (dtype == "float32")
    with PIL.Image.open(tmp_path / "preview.png") as preview:
        assert preview.size == (2 * 96 + 2, 2 * 96 + 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: np.where(x > 2.4, np.nan, x), "NaN"),
        (lambda x: np.where(x > 2.4, np.inf, x), "infinite"),
        (lambda x: np.zeros_like(x), "constant"),
        (lambda x: (x - x.min()) * 25, "unnormalised pixels"),
        (lambda x: x * 1e6, "run from"),
    ],
)
def test_impossible_values_are_refused(rng, change, message) -> None:
    values = rng.standard_normal((8, 3, 32, 32)).astype(np.float32)
    with pytest.raises(DataError, match=message):
        preflight(calibration_set(change(values).astype(np.float32)))


def test_unlikely_values_are_warned_about(rng) -> None:
    values = rng.random((8, 3, 32, 32), dtype=np.float32)
    assert any("lie in 0..1" in warning for warning in preflight(calibration_set(values)))
    dark = np.clip(pixels(rng, 8) // 64, 0, 255).astype(np.uint8)
    assert any("unlike photographs" in warning for warning in preflight(calibration_set(dark)))
    mixed = pixels(rng, 20)
    mixed[3] = 7
    assert preflight(calibration_set(mixed)) == ["image 3 of 'test' is constant"]


def test_noise_with_the_moments_of_photographs_passes(rng) -> None:
    assert preflight(calibration_set(rng.standard_normal((8, 3, 32, 32), dtype=np.float32))) == []


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(3)}, "array 'images' was expected"),
        ({"images": np.zeros((0, 32, 32, 3), np.uint8)}, "empty"),
        ({"images": np.zeros((2, 3, 32, 32), np.uint8)}, r"Expected uint8 \[N, 32, 32, 3\]"),
        ({"images": np.zeros((2, 3, 16, 16), np.float32)}, r"float32 \[2, 3, 16, 16\]"),
        ({"images": np.zeros((2, 32, 32, 3), np.uint8), "labels": np.zeros(3, int)}, r"expected integers \[2\]"),
    ],
)
def test_npz_files_that_do_not_fit_say_what_would(tmp_path, arrays, message) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_calibration(tmp_path / "x.npz", SPEC)


def test_truncated_npz_files_are_refused(tmp_path, rng) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=pixels(rng))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match="not a readable npz"):
        load_calibration(path, SPEC)


# Options ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    steps: int = 10
    rate: float = 0.5
    clip: bool = True
    scope: Literal["sample", "batch"] = "batch"
    limit: int | None = None


def test_options_are_converted_by_the_types_of_their_fields() -> None:
    given = {"steps": "20", "rate": "1e-3", "clip": "no", "scope": "sample", "limit": "none"}
    assert parse_options(Options, given, "toy") == Options(20, 1e-3, False, "sample", None)
    assert parse_options(Options, {"limit": "3"}, "toy").limit == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": "1"}, "Did you mean 'steps'"),
        ({"steps": "1.5"}, "steps=1.5: expected a whole number"),
        ({"rate": "fast"}, "expected a number"),
        ({"clip": "maybe"}, "true or false"),
        ({"scope": "set"}, "one of sample, batch"),
    ],
)
def test_bad_options_say_what_was_expected(given, message) -> None:
    with pytest.raises(UsageError, match=message):
        parse_options(Options, given, "toy")


# Sources; what all of them promise is in tests/torch/test_source_contract.py --------------------------------

FREE = [name for name in SOURCES if not SOURCES[name].NEEDS]
SMALL = {"fractal": {"points": "20000", "systems": "4"}}


@pytest.mark.parametrize("name", FREE)
def test_images_made_from_nothing_pass_the_preflight(name) -> None:
    assert preflight(generate(name, Request(count=5, seed=0, spec=SPEC), SMALL.get(name))) == []


@pytest.mark.parametrize("name", FREE)
def test_other_input_shapes_are_made(name) -> None:
    shape = {"input_shape": (1, 40, 24), "preprocessing": SPEC.preprocessing.model_copy(
        update={"height": 40, "width": 24, "mean": (0.5,), "std": (0.5,)})}  # fmt: skip
    made = generate(name, Request(count=2, seed=0, spec=SPEC.model_copy(update=shape)), SMALL.get(name))
    assert made[0].shape == (1, 1, 40, 24)


def test_references_are_checked() -> None:
    request = Request(count=1, seed=0, spec=SPEC)
    with pytest.raises(UnknownNameError, match="Did you mean 'fractal'"):
        generate("fractals", request)
    with pytest.raises(UsageError, match="expected real:DATA"):
        generate("real", request)
    with pytest.raises(UsageError, match="takes nothing after the colon"):
        generate("noise:loud", request)
    with pytest.raises(UsageError, match="at least 1 image"):
        generate("noise", dataclasses.replace(request, count=0))


def test_real_images_are_balanced_and_know_their_labels(tmp_path, rng) -> None:
    for k, name in enumerate(SPEC.classes or ()):
        (tmp_path / name).mkdir()
        for i in range(6):
            PIL.Image.fromarray(np.full((32, 32, 3), 20 * k + i, np.uint8)).save(tmp_path / name / f"{i}.png")
    made = generate(f"real:{tmp_path}", Request(count=20, seed=0, spec=SPEC))
    assert made.labels is not None
    assert np.bincount(made.labels).tolist() == [2] * 10
    assert all(made.pixels(i)[0, 0, 0] // 20 == label for i, label in enumerate(made.labels))
    with pytest.raises(UsageError, match="`num_samples=61` is more than the 60 images"):
        generate(f"real:{tmp_path}", Request(count=61, seed=0, spec=SPEC))
    one = generate(f"real:{tmp_path / 'cat'}", Request(count=2, seed=0, spec=SPEC))
    assert one.labels is None
    assert any("labels are not used" in warning for warning in one.provenance.warnings)
    # Folders are no classes of a network that has none.
    maps = generate(f"real:{tmp_path}", Request(count=2, seed=0, spec=SPEC.model_copy(update={"num_classes": None})))
    assert (maps.labels, maps.provenance.warnings) == (None, ())


def test_an_npz_set_is_taken_in_its_order(tmp_path, rng) -> None:
    images = pixels(rng, 6)
    np.savez(tmp_path / "x.npz", images=images)
    made = generate(f"npz:{tmp_path / 'x.npz'}", Request(count=4, seed=5, spec=SPEC))
    assert np.array_equal(made.images, images[:4])
    assert images_wanted(f"npz:{tmp_path / 'x.npz'}", SPEC) == 6
    assert images_wanted(f"npz:{tmp_path / 'none.npz'}", SPEC) == images_wanted("fractal", SPEC) == 300
    assert images_wanted("bn-inversion", SPEC) == 128
    with pytest.raises(UsageError, match="more than the 6 images"):
        generate(f"npz:{tmp_path / 'x.npz'}", Request(count=7, seed=0, spec=SPEC))
