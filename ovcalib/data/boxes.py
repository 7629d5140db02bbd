"""Boxes of objects in an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Boxes:
    """The boxes of one image: what a detector found, or the truth.

    corners   float [n, 4]: left, top, right, bottom, in pixels of the network's input
    labels    int64 [n]
    scores    float [n]; None for the truth
    crowd     bool [n]: of the truth, a group that counts neither as found nor as missed; None where there are none
    """

    corners: NDArray[np.floating]
    labels: NDArray[np.int64]
    scores: NDArray[np.floating] | None = None
    crowd: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def scaled(self, x: float, y: float) -> Boxes:
        """The same boxes in an image that was stretched by two factors."""
        return Boxes(self.corners * np.array([x, y, x, y]), self.labels, self.scores, self.crowd)

    def above(self, score: float) -> Boxes:
        """Those that were found with at least this score."""
        assert self.scores is not None
        return self.only(self.scores >= score)

    def only(self, kept: NDArray[np.bool_]) -> Boxes:
        """Some of the boxes.

        kept   bool [n]
        """
        scores = None if self.scores is None else self.scores[kept]
        crowd = None if self.crowd is None else self.crowd[kept]
        return Boxes(self.corners[kept], self.labels[kept], scores, crowd)
