import numpy as np
import pytest

from ovcalib.calibration import fractal
from ovcalib.calibration.sources import Request, generate
from ovcalib.errors import UsageError
from ovcalib.models import builtin


def reference_orbit(maps, chosen):
    """Datumaro's loop, one point at a time."""
    x = y = np.float32(0)
    points = []
    for which in chosen:
        a, b, c, d, e, f = maps[which]
        x, y = a * x + b * y + e, c * x + d * y + f
        points.append((x, y))
    return np.array(points)


def test_many_orbits_at_once_are_the_orbits_one_by_one(rng) -> None:
    system = fractal.draw_system(rng)
    chosen = fractal.choose_maps(rng, system, 200, 7)
    together = fractal.iterate(system.maps, chosen)
    for orbit in range(7):
        assert np.allclose(together[:, :, orbit].T, reference_orbit(system.maps, chosen[:, orbit]), atol=1e-5)


def test_maps_are_chosen_as_often_as_they_cover_area(rng) -> None:
    maps = np.array([[0.5, 0, 0, 0.5, 0, 0], [0.5, 0, 0, 1.0, 0, 0], [0.1, 0, 0, 0.1, 0, 0]], np.float32)
    area = np.array([0.25, 0.5, 0.01])
    system = fractal.System(maps, fractal.lookup_table(area / area.sum()))
    share = np.bincount(fractal.choose_maps(rng, system, 200, 500).ravel()) / 100_000
    assert share == pytest.approx(area / area.sum(), abs=0.005)


def test_the_sierpinski_triangle_has_its_dimension(rng) -> None:
    maps = np.array([[0.5, 0, 0, 0.5, e, f] for e, f in ((0, 0), (0.5, 0), (0.25, 0.5))], np.float32)
    found, _ = fractal.attractor(rng, fractal.System(maps, fractal.lookup_table(np.full(3, 1 / 3))), 400_000)
    boxes = []
    for level in (4, 6):
        row, column = (found * 0.999 * 2**level).astype(int)
        boxes.append(len(np.unique(row * 2**level + column)))
    assert np.log2(boxes[1] / boxes[0]) / 2 == pytest.approx(np.log2(3), abs=0.08)


def test_diverging_systems_are_not_kept(rng) -> None:
    maps = np.array([[2, 0, 0, 2, 1, 1]], np.float32)
    found, chosen = fractal.attractor(rng, fractal.System(maps, fractal.lookup_table(np.ones(1))), 5_000)
    assert found.shape[1] == len(chosen) == 0
    assert not fractal._fills(rng, fractal.System(maps, fractal.lookup_table(np.ones(1))), 5_000, 80, 0.1)


def test_kept_systems_fill_the_picture() -> None:
    system = fractal.find_system(np.random.default_rng(3))
    assert 2 <= len(system.maps) <= 7
    assert fractal._fills(np.random.default_rng(4), system, 100_000, 512, 0.15)


def test_variants_change_one_parameter_of_all_maps(rng) -> None:
    system = fractal.draw_system(rng)
    factors = set()
    for _ in range(300):
        ratio = fractal.vary(rng, system).maps / system.maps
        assert np.allclose(ratio, ratio[:1], rtol=1e-5)
        changed = np.flatnonzero(~np.isclose(ratio[0], 1))
        assert len(changed) <= 1
        factors |= {(int(i), round(float(ratio[0, i]), 3)) for i in changed}
    assert factors == {(i, f) for i in range(6) for f in (0.2, 0.6, 1.4, 1.8)}


def test_noise_fields_have_natural_colours_and_no_mean() -> None:
    fields = fractal.noise_fields(0, 64, 64)
    assert np.abs(fields.mean((1, 2))).max() < 1e-5
    covariance = np.cov(fields.reshape(-1, 3).T)
    expected = fractal.COLOUR_AXES @ np.diag(fractal.COLOUR_STD**2) @ fractal.COLOUR_AXES.T
    assert covariance == pytest.approx(expected, abs=0.01)


def test_noise_amplitude_falls_with_the_frequency_as_asked() -> None:
    luminance = fractal.noise_fields(1, 256, 256, exponent=1.5).mean(-1)
    power = (np.abs(np.fft.fft2(luminance)) ** 2).mean(0)
    assert np.log2(power[0, 8] / power[0, 16]) == pytest.approx(2 * 1.5, abs=1.0)
    assert np.log2(power[0, 4:8].mean() / power[0, 32:64].mean()) == pytest.approx(2 * 1.5 * 3, abs=1.0)


def test_images_vary_in_brightness_and_contrast_as_photographs_do() -> None:
    spec = builtin.spec("resnet20-cifar10")
    made = generate("fractal", Request(count=40, seed=0, spec=spec), {"points": "20000", "systems": "4"})
    luminance = made.images.mean(-1) / 255
    assert 0.35 < luminance.mean() < 0.55
    assert 0.08 < luminance.mean((1, 2)).std() < 0.22
    assert 0.1 < luminance.std((1, 2)).mean() < 0.25


def test_plain_fractals_keep_their_margin(rng) -> None:
    systems = [fractal.find_system(np.random.default_rng(0))]
    grey = fractal.plain_fractal(rng, systems, 64, 48, 20_000)
    assert grey.shape == (64, 48)
    assert set(np.unique(grey)) == {0, 127}
    # Points lie in [6, size - 6], and a patch reaches one further.
    assert not grey[:5].any()
    assert not grey[:, -4:].any()
    with pytest.raises(UsageError, match="more than 12 pixels"):
        fractal.plain_fractal(rng, systems, 12, 64, 20_000)


def test_missing_colorizer_files_are_named(tmp_path) -> None:
    request = Request(count=1, seed=0, spec=builtin.spec("resnet20-cifar10"))
    with pytest.raises(UsageError, match=r"colorization_deploy_v2.prototxt.*not there"):
        generate("fractal", request, {"colorizer": str(tmp_path)})


def test_impossible_options_are_refused() -> None:
    request = Request(count=1, seed=0, spec=builtin.spec("resnet20-cifar10"))
    with pytest.raises(UsageError, match="points must be at least"):
        generate("fractal", request, {"points": "5"})


def test_the_lookup_table_is_that_of_a_search_for_every_entry(rng) -> None:
    quantiles = (np.arange(fractal.TABLE) + 0.5) / fractal.TABLE
    for count in (1, 2, 7):
        area = rng.random(count)
        probabilities = area / (1e-5 + area.sum())
        expected = np.minimum(np.searchsorted(np.cumsum(probabilities), quantiles), count - 1)
        np.testing.assert_array_equal(fractal.lookup_table(probabilities), expected)
