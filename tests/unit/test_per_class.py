"""What changes class by class."""

import numpy as np

from ovcalib.evaluation.classification import new_confusions, per_class


def test_accuracy_of_the_classes_that_have_images() -> None:
    labels = np.array([0, 0, 2])
    found = per_class(np.array([True, True, False]), np.array([True, False, True]), labels, ["a", "b", "c"])
    assert [(c.label, c.name, c.count, c.fp32_top1, c.int8_top1) for c in found] == [
        (0, "a", 2, 1.0, 0.5),
        (2, "c", 1, 0.0, 1.0),
    ]


def test_only_mistakes_that_become_more_frequent_are_named() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    before = np.array([0, 0, 1, 0, 1])
    after = np.array([2, 2, 1, 1, 0])
    # 0 taken for 2 appears twice; 0 for 1 stays; 1 for 0 stays, on another image.
    found = new_confusions(before, after, labels)
    assert [(c.label, c.predicted, c.fp32, c.int8, c.name) for c in found] == [(0, 2, 0, 2, None)]
