"""Sets of several sources: shares, turns, and what becomes of domains, labels and provenance."""

import numpy as np
import PIL.Image
import pytest

import ovcalib
from ovcalib.calibration.mix import images_wanted, shares, turns
from ovcalib.calibration.sources import Request, generate
from ovcalib.errors import DataError, UnknownNameError, UsageError
from ovcalib.evaluation.dataset import calibration_hashes, open_dataset, refuse_same_images
from ovcalib.models import builtin
from ovcalib.records.options import EvaluationOptions
from ovcalib.reports.provenance import _without_paths

SPEC = builtin.spec("resnet20-cifar10")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("mix") / "photos"
    rng = np.random.default_rng(0)
    for name in SPEC.classes:
        (root / name).mkdir(parents=True)
        PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(root / name / "0.png")
    return root


def made(reference, count, **more):
    return generate(reference, Request(count=count, seed=3, spec=SPEC, **more))


@pytest.mark.parametrize("parts", [(0.5, 0.5), (0.25, 0.75), (1 / 3, 1 / 3, 1 / 3), (0.07, 0.9, 0.03), (1.0,)])
def test_every_beginning_of_a_set_holds_the_sources_in_their_shares(parts) -> None:
    order = turns(np.array(parts), 400)
    for n in range(1, 401):
        counts = np.bincount(order[:n], minlength=len(parts))
        assert np.all(np.abs(counts - n * np.array(parts)) < len(parts) - 1 + 1e-9)
    np.testing.assert_array_equal(turns(np.array(parts), 37), order[:37])


def test_shares_are_relative() -> None:
    assert shares("noise=1,real:imagefolder:a=b=3") == {"noise": 0.25, "real:imagefolder:a=b": 0.75}
    assert shares(" fractal=0.5, noise=0.5") == {"fractal": 0.5, "noise": 0.5}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("noise", "'noise' is no share of a source"),
        ("noise=0,fractal=1", "'noise=0' is no share"),
        ("noise=inf,fractal=1", "each above 0"),
        ("noise=nan", "each above 0"),
        ("noise=1,,fractal=1", "'' is no share"),
        ("=1", "is no share"),
        ("noise=1,noise=2", "'noise' is named twice"),
        ("mix:noise=1,fractal=1", "a mix cannot hold 'mix:noise'"),
    ],
)
def test_shares_that_make_no_sense_are_refused(argument, message) -> None:
    with pytest.raises(UsageError, match=message):
        made(f"mix:{argument}", 8)


def test_sources_are_refused_before_any_of_them_works(tmp_path) -> None:
    told = []
    for part, error in (("nois", UnknownNameError), ("bn-inversion", UsageError), ("real", UsageError)):
        with pytest.raises(error):
            made(f"mix:noise=1,{part}=1", 4, tick=lambda *progress: told.append(progress))
    for mixed in ("fractal=1,noise=99", "noise=99,fractal=1"):
        with pytest.raises(UsageError, match="4 images hold none of 'fractal'"):
            made(f"mix:{mixed}", 4, tick=lambda *progress: told.append(progress))
    assert told == []


def test_a_mix_of_pixels_takes_turns_and_stays_pixels(folder) -> None:
    real = f"real:imagefolder:{folder}"
    mixed = made(f"mix:{real}=1,fractal=2", 9)
    assert (mixed.domain, mixed.images.dtype, mixed.labels) == ("pixels", np.uint8, None)
    photos, fractals = made(real, 3), made("fractal", 6)
    order = turns(np.array([1 / 3, 2 / 3]), 9)
    np.testing.assert_array_equal(mixed.images[order == 0], photos.images)
    np.testing.assert_array_equal(mixed.images[order == 1], fractals.images)
    about = mixed.provenance
    assert about.real  # so the range of the network's input is that of the images
    assert mixed.input_range is None
    assert [(part.source, part.num_samples, part.real) for part in about.parts] == [
        (real, 3, True),
        ("fractal", 6, False),
    ]
    assert about.parts[1].options == fractals.provenance.options
    assert about.licence == f"{real}: not stated; fractal: CC0-1.0 (made from random numbers)"
    shown = _without_paths(about)
    assert str(folder.parent) not in shown.model_dump_json()


def test_network_inputs_and_pixels_become_network_inputs(folder, tmp_path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "inverted.npz", images=rng.standard_normal((4, 3, 32, 32)).astype(np.float32), domain="network",
        labels=np.arange(4),
    )  # fmt: skip
    stored, real = f"npz:{tmp_path / 'inverted.npz'}", f"real:imagefolder:{folder}"
    mixed = made(f"mix:{stored}=1,{real}=1", 8)
    assert (mixed.domain, mixed.images.shape) == ("network", (8, 3, 32, 32))
    parts = made(stored, 4), made(real, 4)
    for i in range(8):
        np.testing.assert_array_equal(mixed[i], parts[i % 2][i // 2])
    np.testing.assert_array_equal(mixed.labels, np.stack([part.labels for part in parts], 1).reshape(-1))
    assert mixed.provenance.labels == "data"


def test_photographs_of_a_mix_are_not_evaluated(folder, tmp_path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "inverted.npz", images=rng.standard_normal((4, 3, 32, 32)).astype(np.float32), domain="network")
    mixed = made(f"mix:real:imagefolder:{folder}=1,npz:{tmp_path / 'inverted.npz'}=1", 8)
    assert mixed.domain == "network"
    data = open_dataset(f"imagefolder:{folder}", SPEC, None)
    with pytest.raises(DataError, match="is in the calibration set and in the evaluation set"):
        list(data.images(calibration_hashes(mixed)).items)
    with pytest.raises(DataError, match="come out of the evaluation set"):
        refuse_same_images(mixed.provenance.source, data, EvaluationOptions())


def test_progress_goes_through_all_sources() -> None:
    told = []
    made("mix:noise=1,fractal=1", 6, tick=lambda done, note: told.append((done, note)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (6, "fractal")


def test_as_many_images_as_the_most_expensive_source_makes() -> None:
    assert images_wanted(SPEC, "fractal=1,bn-inversion=1") == 128
    assert images_wanted(SPEC, "fractal=1,noise=1") == 300


def test_a_source_without_options_says_nothing_about_them() -> None:
    assert {name for name, entry in ovcalib.sources().items() if not entry["help"]} == {"mix", "npz"}
