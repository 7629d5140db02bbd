"""The snippet of a report prepares images as ovcalib does."""

from typing import Any

import numpy as np
import PIL.Image
import pytest

from ovcalib.calibration import SOURCES
from ovcalib.calibration.sources import licence_statement
from ovcalib.records.calibration import SetScore
from ovcalib.records.preprocessing import Preprocessing
from ovcalib.reports.provenance import score_facts, short_paths, snippet
from tests.unit.test_fp32_fault import spec


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"short_side": 20, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"},
        {"short_side": 16, "channel_order": "BGR", "mean": (0.5, 0.4, 0.3)},
        {"mean": (0.5,), "std": (0.25,)},
    ],
)
@pytest.mark.parametrize("size", [(40, 40), (40, 60), (62, 40)])
def test_the_snippet_prepares_images_as_ovcalib_does(options, size, tmp_path, monkeypatch):
    preprocessing = Preprocessing(height=16, width=16, **options)
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC)
    image.save("image.jpg", format="PNG")
    names: dict[str, Any] = {}
    code = snippet(preprocessing).splitlines()
    assert len(code) <= 10
    exec("\n".join(code[:-2]), names)
    expected = preprocessing.normalise(preprocessing.fit(image))
    np.testing.assert_allclose(names["x"].transpose(2, 0, 1), expected, atol=1e-5)


def test_every_made_image_has_a_licence_statement():
    licences = {name: licence_statement(False, SOURCES[name], spec()) for name in SOURCES}
    assert licences["fractal"] == "CC0-1.0 (made from random numbers)"
    assert licences["bn-inversion"] == "made without photographs, from the weights of net (whose licence is not stated)"
    assert all(licences.values())
    assert licence_statement(True, SOURCES["real"], spec()) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 of imagefolder:/home/ann/photos/val, by class", "5 of imagefolder:…/photos/val, by class"),
        (r"read C:\Users\ann\photos\val", "read …/photos/val"),
        ("'/home/ann/work/model.pth' holds", "'…/work/model.pth' holds"),
        ("https://example.org/a/b/c/d.pth", "https://example.org/a/b/c/d.pth"),
        ("photos/a/b/c/val", "photos/a/b/c/val"),
        ("/tmp/val", "/tmp/val"),
    ],
)
def test_folders_of_the_author_s_machine_are_cut(text, expected) -> None:
    assert short_paths(text) == expected


@pytest.mark.parametrize(
    ("distance", "diversity", "words"),
    [(0.1, 0.4, ("near", "varied")), (0.6, 0.2, ("some way from", "less varied")), (0.99, 0.05, ("far from", "alike"))],
)
def test_a_score_says_what_it_means(distance, diversity, words) -> None:
    score = SetScore(
        images=8, bn_distance=distance, range_coverage=0.5, diversity=diversity, output_range=4.0,
        output_range_distance=float(np.log(2)),
    )  # fmt: skip
    facts = dict(score_facts(score))
    assert words[0] in facts["distance from the BatchNorm statistics"]
    assert words[1] in facts["diversity"]
    assert facts["range of the outputs"] == "4, a factor of 2.0 from the expected one"
