"""Signal quality: numbers that can be worked out by hand."""

import math

import numpy as np
import pytest

from ovcalib.diagnosis.distortion import LIMIT_DB, Distortion, Histogram, Spread


def distortion(reference, value):
    found = Distortion()
    found.add(np.array(reference, np.float32), np.array(value, np.float32))
    return found


def test_noise_of_a_tenth_of_the_amplitude_is_20_db() -> None:
    assert distortion([10, 0], [10, 1]).sqnr_db == pytest.approx(20)


def test_cosine_of_perpendicular_and_opposite_signals() -> None:
    assert distortion([1, 0], [0, 1]).cosine == 0
    assert distortion([1, 2], [-1, -2]).cosine == pytest.approx(-1)


def test_a_batch_at_a_time_is_the_same_as_all_at_once(rng) -> None:
    reference, value = rng.standard_normal((2, 100)).astype(np.float32)
    parts = Distortion()
    for i in range(0, 100, 10):
        parts.add(reference[i : i + 10], value[i : i + 10])
    whole = distortion(reference, value)
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert parts.cosine == pytest.approx(whole.cosine)


def test_the_ends_of_the_scale() -> None:
    assert distortion([1, 2], [1, 2]).sqnr_db == LIMIT_DB
    assert distortion([0, 0], [1, 0]).sqnr_db == -LIMIT_DB
    assert distortion([1, 0], [math.nan, 0]).sqnr_db == -LIMIT_DB
    assert distortion([1, 0], [math.inf, 0]).cosine == 0
    assert distortion([0], [0]).cosine == 1
    assert distortion([0], [1]).cosine == 0


@pytest.mark.parametrize("bits", range(1, 8))
def test_half_the_noise_is_six_db_more(rng, bits) -> None:
    reference, noise = rng.standard_normal((2, 50))
    found = [distortion(reference, reference + noise / 2**k).sqnr_db for k in (bits - 1, bits)]
    assert found[1] - found[0] == pytest.approx(20 * math.log10(2), abs=1e-3)


def test_clipping_counts_what_no_level_reaches() -> None:
    spread = Spread(np.float32(0).reshape(1), np.float32(2.55).reshape(1))
    spread.add(np.array([[-0.004, 0.0, 1.0, 2.554, 2.6, 9.0]], np.float32))  # a step is 0.01
    assert spread.clipped_share == pytest.approx(2 / 6)
    assert spread.seen == (pytest.approx(-0.004), 9.0)
    assert spread.worst_channel() is None


def test_a_range_much_too_wide_is_hardly_used() -> None:
    spread = Spread(np.float32(0).reshape(1), np.float32(100).reshape(1))
    spread.add(np.array([[0, 5]], np.float32))
    assert spread.used_share == pytest.approx(0.05)
    assert spread.clipped_share == 0


def test_the_worst_channel_is_the_one_that_is_clipped() -> None:
    low, high = np.zeros((1, 2, 1, 1), np.float32), np.array([1, 1], np.float32).reshape(1, 2, 1, 1)
    spread = Spread(low, high)
    spread.add(np.array([0.5, 0.5, 0.5, 3.0], np.float32).reshape(1, 2, 1, 2))
    worst = spread.worst_channel()
    assert worst is not None
    assert (worst.channel, worst.seen, worst.clipped_share) == (1, (0.5, 3.0), 0.5)


def test_histograms_keep_what_lies_beyond() -> None:
    histogram = Histogram(0, 4, bins=4)
    histogram.add(np.array([-9, 0, 1.5, 3.9, 4, 99], np.float32))
    assert histogram.counts.tolist() == [2, 1, 0, 3]
    assert histogram.edges.tolist() == [0, 1, 2, 3, 4]
    assert Histogram(2, 2, bins=4).edges[0] < 2 < Histogram(2, 2, bins=4).edges[-1]
