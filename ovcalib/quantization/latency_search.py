"""INT8 only where it is faster: operations that it makes slower on this machine compute in float again.

Where a CPU has no fast INT8 kernel for an operation, or values must be converted before it, INT8 can take longer than
float. Counters of the device tell how long each operation takes in either; what they promise is then measured, because
neighbours that are fused or converted make the times of single operations depend on each other:

1. The operations that float promises to save time on are ranked by what it saves.
2. The model with all of them in float, with the better half, with the better quarter, ... race each other. Conversions
   between INT8 and float belong to no operation, so where float saves time at all, the model with a single operation in
   INT8 takes part as well.
3. The fastest must win a second race, against the model that it was made from, beyond the 95 % interval: the fastest of
   several is partly luck. Then it is the new start, until nothing is won.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import openvino as ov

from ovcalib.evaluation.metrics import ratio_interval
from ovcalib.graph.editing import restore
from ovcalib.graph.reading import layer_name, quantized_operations
from ovcalib.kernels import host_kernels, kernels_of
from ovcalib.measurement.benchmark import race
from ovcalib.measurement.counters import operation_times
from ovcalib.progress import Progress
from ovcalib.records.options import DeployISA
from ovcalib.records.result import SpeedSearch
from ovcalib.runtime import check_device

# Of counting each graph, and of each graph in a race.
COUNT_S = 1.0
RACE_S = 1.5
FINAL_S = 3.0
# A share of INT8's time that float must promise to save on an operation; counters resolve microseconds.
WORTHWHILE = 0.002
# An output error that costs no accuracy that could be measured (benchmarks/results/predicted_loss.md). Below it, float
# may add some: what follows an operation was fitted to its INT8 output.
NEGLIGIBLE_NMSE = 0.001

Candidate = TypeVar("Candidate")
# Median time of each round, by candidate; rounds are taken in turns.
Race = Callable[[Mapping[int, Candidate], float], Mapping[int, Sequence[float]]]


@dataclass(frozen=True)
class Faster(Generic[Candidate]):
    """The model, and its operations in float, those first that promised to save most."""

    model: Candidate
    in_float: tuple[str, ...]


def restore_latency(
    operations: Sequence[str],
    build: Callable[[Sequence[str]], Candidate],
    gains: Callable[[Candidate, Sequence[str]], Mapping[str, float]],
    allowed: Callable[[Candidate], bool],
    race: Race[Candidate],
) -> Faster[Candidate]:
    """The model with those operations in float that it is fastest with.

    operations   every quantized operation
    build        the model in which the given operations compute in float
    gains        time that float promises to save on the given operations of a model, as a share of the model's
    allowed      whether a model may be chosen
    race         times of several models, seconds for each given
    returns      the model that all operations are quantized in, where nothing is won; one operation always stays
    """
    in_float: tuple[str, ...] = ()
    model = build(in_float)
    while True:
        left = [name for name in operations if name not in in_float]
        promised = gains(model, left)
        ranked = sorted(left, key=lambda name: -promised[name])
        useful = sum(promised[name] > WORTHWHILE for name in left)
        counts = {*halves(min(useful, len(left) - 1))}
        if useful or in_float:
            counts.add(len(left) - 1)
        tries = {n: build((*in_float, *ranked[:n])) for n in sorted(counts - {0}, reverse=True)}
        tries = {n: tried for n, tried in tries.items() if allowed(tried)}
        if not tries:
            return Faster(model, in_float)
        times = race({0: model, **tries}, RACE_S)
        best = min(times, key=lambda n: float(np.mean(np.log(times[n]))))
        if best == 0 or not wins(race({0: model, best: tries[best]}, FINAL_S), best, 0):
            return Faster(model, in_float)
        model, in_float = tries[best], (*in_float, *ranked[:best])


def halves(count: int) -> Iterator[int]:
    """`count`, half of it, a quarter, ... down to one."""
    while count > 0:
        yield count
        count //= 2


def wins(times: Mapping[int, Sequence[float]], one: int, other: int) -> bool:
    """Whether one is faster than another beyond the 95 % interval."""
    _, low, _ = ratio_interval(times[other], times[one])
    return low > 1


def faster_in_float(
    int8: ov.Model, fp32: ov.Model, error: Callable[[ov.Model], float], device: str, progress: Progress
) -> tuple[ov.Model, SpeedSearch]:
    """Give operations of an INT8 model back to float that make it faster on a device of this machine.

    fp32     the graph that INT8 was made from
    error    NMSE of a model's outputs against FP32; no model with a larger one than INT8's is taken, unless it is
             negligible
    raises   DeviceError
    """
    check_device(device)
    progress.say(f"looking for operations that float makes faster on {device}")
    operations = [op.get_friendly_name() for op in quantized_operations(int8)]
    most = error(int8)
    floating = operation_times(restore(int8, fp32, operations), operations, device, COUNT_S)

    def build(names: Sequence[str]) -> ov.Model:
        return restore(int8, fp32, names) if names else int8

    def gains(model: ov.Model, names: Sequence[str]) -> dict[str, float]:
        quantized = operation_times(model, operations, device, COUNT_S)
        whole = sum(quantized.values())
        return (
            {name: (quantized[name] - floating[name]) / whole for name in names} if whole else dict.fromkeys(names, 0)
        )

    def allowed(model: ov.Model) -> bool:
        found = error(model)
        return math.isfinite(found) and found <= max(most, NEGLIGIBLE_NMSE)

    def timed(models: Mapping[int, ov.Model], seconds: float) -> Mapping[int, Sequence[float]]:
        return race(models, device, seconds)

    found = restore_latency(operations, build, gains, allowed, timed)
    times = race({"fp32": fp32, "all": int8, "chosen": found.model}, device, FINAL_S)
    over_all, over_fp32 = (ratio_interval(times[other], times["chosen"]) for other in ("all", "fp32"))
    record = SpeedSearch(
        device=device, in_float=tuple(map(layer_name, found.in_float)),
        over_int8=over_all[0], over_int8_ci95=over_all[1:], over_fp32=over_fp32[0], over_fp32_ci95=over_fp32[1:],
        nmse=(most, error(found.model)),
    )  # fmt: skip
    return found.model, record


def speed_warnings(found: SpeedSearch, deploy_isa: DeployISA) -> list[str]:
    """Where the times do not speak for the machine that the model is for, or speak against INT8."""
    warnings = []
    if found.device == "CPU" and host_kernels() not in kernels_of(deploy_isa):
        warnings.append(
            f"`optimize_for=latency` timed operations on this CPU, which is no {deploy_isa}. Run it on the machine "
            "that the model is for."
        )
    if found.over_fp32_ci95[1] < 1:
        warnings.append(
            f"FP32 is faster on {found.device} than INT8 is with any of the operations that were tried in float. Ship "
            "FP32 for this machine."
        )
    elif found.over_fp32_ci95[0] <= 1 and found.in_float:
        warnings.append(
            f"Even with {len(found.in_float)} operations in float the model is no faster than FP32 on {found.device}: "
            "INT8 saves no time on this machine. Ship FP32, or omit `optimize_for=latency` for a smaller file."
        )
    return warnings
