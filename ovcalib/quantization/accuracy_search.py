"""Accuracy-aware quantization: revert operations to float until the goal is met.

As NNCF's `quantize_with_accuracy_control`, it ranks the operations by their output error and reverts the worst
ones. It uses the public OpenVINO API, because NNCF's loop cannot be stopped with its best result and does not say
whether it met the goal or what it reverted. There are two differences:

- An operation is ranked by the output error when it *alone* is quantized. Reverting one at a time, as NNCF does,
  shows little while ten others are still harmful.
- The number of reverted operations is found by doubling and bisection, so a hundred candidates cost a dozen
  validations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from ovcalib.errors import DataError

Outcome = Literal["goal-met", "goal-missed", "budget"]
Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Restoration(Generic[Candidate]):
    """What the search found.

    reverted      operations that compute in float in `model`, worst first
    metric        of `model` on the validation set, higher is better
    drop          metric of FP32 minus `metric`
    validations   how often a candidate was measured on the whole validation set
    ranking       (operation, output error when it alone is quantized), worst first
    """

    model: Candidate
    outcome: Outcome
    reverted: tuple[str, ...]
    metric: float
    drop: float
    validations: int
    ranking: tuple[tuple[str, float], ...]


def restore_accuracy(
    operations: Sequence[str],
    build: Callable[[Sequence[str]], Candidate],
    validate: Callable[[Candidate], float],
    error: Callable[[Candidate], float],
    baseline: float,
    max_drop: float,
    max_iterations: int | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
    say: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Restoration[Candidate]:
    """The model with the fewest reverted operations, worst first, whose metric is within `max_drop` of the baseline.

    operations       every quantized operation
    build            the model in which the given operations compute in float
    validate         the metric on the whole validation set, higher is better
    error            distance of the outputs from FP32 on a subset, lower is better
    baseline         the metric of the FP32 model
    max_iterations   bound on the calls of `validate` after the first, or None
    say              receives the current step, and how much of it is done
    returns          the best model so far, with the outcome "budget", where time or iterations run out; reverting
                     everything is no result, so at least one operation stays quantized
    raises           DataError where the metric is not finite
    """
    tried: dict[int, float] = {}  # number of reverted operations -> metric
    harm: dict[str, float] = {}
    ranked: list[str] = []

    def measure(count: int) -> bool:
        value = validate(build(ranked[:count]))
        if not math.isfinite(value):
            raise DataError(f"The metric of the quantized model is {value}. Expected a finite number.")
        tried[count] = value
        return baseline - value <= max_drop

    def exhausted() -> bool:
        # The first validation, before anything is reverted, is not counted.
        return out_of_time() or (max_iterations is not None and len(tried) > max_iterations)

    def result(outcome: Outcome) -> Restoration[Candidate]:
        met = [count for count, value in tried.items() if baseline - value <= max_drop]
        count = min(met) if met else max(tried, key=lambda c: (tried[c], -c))
        return Restoration(
            model=build(ranked[:count]),
            outcome="goal-met" if met else outcome,
            reverted=tuple(ranked[:count]),
            metric=tried[count],
            drop=baseline - tried[count],
            validations=len(tried),
            ranking=tuple(sorted(harm.items(), key=lambda item: -item[1])),
        )

    if not math.isfinite(baseline):
        raise DataError(f"The metric of the FP32 model is {baseline}. Expected a finite number.")
    say("validating the INT8 model", 0, 1)
    if measure(0):
        return result("goal-met")

    for i, operation in enumerate(operations):
        if exhausted():
            return result("budget")
        say("ranking operations", i, len(operations))
        value = error(build([other for other in operations if other != operation]))
        harm[operation] = value if math.isfinite(value) else math.inf
    # Sorting is stable, so equally harmful operations keep their order in the network.
    ranked = sorted(harm, key=lambda operation: -harm[operation])

    low, high = 0, None  # the goal is missed at `low` and met at `high`
    count = 1
    while high is None and count < len(ranked):
        if exhausted():
            return result("budget")
        say(f"{count} operations in float", len(tried), len(tried) + 1)
        if measure(count):
            high = count
        else:
            low = count
            count = len(ranked) if count == len(ranked) - 1 else min(2 * count, len(ranked) - 1)
    while high is not None and high - low > 1 and not exhausted():
        count = (low + high) // 2
        say(f"{count} operations in float", len(tried), len(tried) + 1)
        if measure(count):
            high = count
        else:
            low = count
    return result("goal-missed")


def deadline(seconds: float | None, clock: Callable[[], float] = time.monotonic) -> Callable[[], bool]:
    """Tells whether `seconds` have passed since this call; never, for None."""
    if seconds is None:
        return lambda: False
    end = clock() + seconds
    return lambda: clock() >= end
