"""A metric of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ovcalib.errors import UsageError, brief
from ovcalib.evaluation.outputs import Outputs
from ovcalib.runtime import Port
from ovcalib.usercode import load_reference, users_code

EXPECTED = "Expected package.module:metric, importable from here: a function of the outputs and the labels."


class MetricFunction:
    """A function `metric(outputs, labels) -> float`.

    outputs   float32 arrays [N, ...] by the name of the output, of one model on all images
    labels    int64 [N], or None where the images have none

    raises   UsageError where the reference names no function
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference
        self.function: Callable[..., Any] = load_reference(reference, "metric", UsageError, EXPECTED)
        if not callable(self.function):
            raise UsageError(f"{reference!r} is a {type(self.function).__name__}. {EXPECTED}")

    def of(self, outputs: Outputs, ports: Sequence[Port]) -> float:
        """The metric of one model.

        raises   UsageError with the user's traceback where the function fails, or where it returns no finite number
        """
        with users_code(self.reference, UsageError):
            value = self.function(outputs.by_name(ports), outputs.labels)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UsageError(f"{self.reference!r} returned {brief(value)}. Expected one finite number.")
        return number
