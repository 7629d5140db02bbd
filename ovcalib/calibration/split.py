"""Which images of a calibration set ranges and corrections are computed from, and which defaults are chosen on."""

from __future__ import annotations

from dataclasses import dataclass

from ovcalib.calibration.sets import CalibrationSet
from ovcalib.records.result import SetSplit

# Images that defaults are chosen on: a quarter of the set, but no more than the error needs.
CHOICE_SHARE = 0.25
CHOICE_IMAGES = 32
# Images that biases are corrected on.
CORRECTION_IMAGES = 64
# Sets with fewer images are not split.
SMALLEST_SPLIT = 8


@dataclass(frozen=True)
class Split:
    """The parts of a calibration set.

    ranges        activation ranges are taken from them
    corrections   rounding and biases are fitted on them; they are among those of the ranges
    choices       defaults are chosen by the output error on them, which neither of the others has seen, except in a
                  set too small to be split
    """

    ranges: CalibrationSet
    corrections: CalibrationSet
    choices: CalibrationSet

    @property
    def fresh(self) -> bool:
        """Whether no other part has seen the images of the choices."""
        return self.choices is not self.ranges

    def record(self) -> SetSplit:
        """How many images each part has, and which parts share some."""
        return SetSplit(
            ranges=len(self.ranges),
            corrections=len(self.corrections),
            choices=len(self.choices),
            shared=("ranges", "corrections") if self.fresh else ("ranges", "corrections", "choices"),
        )


def split(calibration: CalibrationSet) -> Split:
    """The parts of a calibration set; defaults are chosen on the last images. No other code splits a set."""
    count = len(calibration)
    if count < SMALLEST_SPLIT:
        return Split(calibration, calibration, calibration)
    choices = min(CHOICE_IMAGES, round(CHOICE_SHARE * count))
    ranges = calibration.subset(range(count - choices))
    return Split(
        ranges=ranges,
        corrections=ranges.subset(range(min(CORRECTION_IMAGES, len(ranges)))),
        choices=calibration.subset(range(count - choices, count)),
    )
