"""The snippet of a report prepares images as ovcalib does."""

from typing import Any

import numpy as np
import PIL.Image
import pytest

from ovcalib.calibration import SOURCES
from ovcalib.calibration.sources import licence_statement
from ovcalib.records.preprocessing import Preprocessing
from ovcalib.reports.provenance import snippet
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
