"""The best of several sources for this model, found without real data.

Every candidate makes its set. The model is quantized with one half of some images of each, and its INT8 error is
measured on the other halves of all of them. Activation ranges that are too narrow clip the images of the other
candidates, and ranges that are too wide cost levels on all images, so the set whose quantization does best on
everybody's images is taken; where some are real, real images alone judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.calibration.make import default_source
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.calibration.sources import Generated, Request, open_source
from ovcalib.calibration.sources import generate as generate_set
from ovcalib.calibration.sources import images_wanted as wanted_of
from ovcalib.errors import UsageError
from ovcalib.evaluation.metrics import nmse
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.selection import OutputError, QuantizedCandidate, compared_outputs, select_activation_ranges
from ovcalib.quantization.settings import Settings, resolve_settings
from ovcalib.records.calibration import Trial
from ovcalib.records.model import ModelSpec
from ovcalib.records.options import QuantizationOptions

NEEDS = frozenset({"optional argument"})
ARGUMENT = "SOURCE,SOURCE"
# Ranges alone tell the sources apart; corrections would take longer than all the rest.
QUICK = QuantizationOptions(deploy_isa="vnni", rounding="nearest", bias_correction="none", guard=False)
# An error of zero, which a network without anything to quantize has, is no reason to divide by it.
LEAST_NMSE = 1e-12


@dataclass(frozen=True)
class Options:
    """
    trial   images of each candidate in the comparison
    """

    trial: int = 64

    def __post_init__(self) -> None:
        if self.trial < 2:
            raise ValueError(f"trial={self.trial}: expected at least 2, one to quantize with and one to compare on")


def parts(argument: str) -> tuple[str, ...]:
    """The candidates that are named, in their order; raises UsageError."""
    if not argument:
        return ()
    named = tuple(part.strip() for part in argument.split(","))
    for reference in named:
        if not reference or reference.partition(":")[0] in ("auto", "mix"):
            raise UsageError(f"auto:{argument}: {reference!r} is no candidate. Expected {ARGUMENT}, such as fractal.")
        if named.count(reference) > 1:
            raise UsageError(f"auto:{argument}: {reference!r} is named twice.")
    return named


def usual_candidates(request: Request) -> tuple[str, ...]:
    """The sources that need nothing but this model."""
    usual, _ = default_source(request.module, request.spec)
    found = [] if usual == "fractal" else [usual]
    if request.spec.input_shape == (3, 32, 32) and request.spec.num_classes == 10:
        found.append("distylegan")
    return (*found, "fractal")


def images_wanted(spec: ModelSpec, argument: str) -> int:
    """As many as the most expensive of the candidates makes by default."""
    return min(wanted_of(reference, spec) for reference in parts(argument) or ("bn-inversion",))


def errors_on_each_other(graph: ov.Model, sets: Sequence[CalibrationSet]) -> NDArray[np.float64]:
    """INT8 error by the set that calibrates and the set that it is measured on.

    graph     float, batch 1
    sets      at least two images each; the first half of a set calibrates, the other half judges
    returns   float64 [S, S], NMSE of the outputs: entry [i, j] is calibrated with set i, on images of set j
    """
    judging = [OutputError(graph, s.inputs(len(s) // 2)) for s in sets]
    bounds = np.cumsum([len(output.inputs) for output in judging])[:-1]
    everything = list(chain.from_iterable(output.inputs for output in judging))
    errors = np.empty((len(sets), len(sets)))
    for i, (own, output) in enumerate(zip(sets, judging, strict=True)):
        int8 = quantized_quickly(own.subset(range(len(own) // 2)), output)
        outputs = np.split(compared_outputs(int8, everything), bounds)
        errors[i] = [nmse(other.reference, found) for other, found in zip(judging, outputs, strict=True)]
    return errors


def quantized_quickly(images: CalibrationSet, output: OutputError) -> ov.Model:
    """INT8 of the float graph of `output`, with the kind of activation ranges that has the smaller error there."""

    def make(settings: Settings) -> QuantizedCandidate:
        return QuantizedCandidate(quantize_default(output.fp32, images, settings), settings, output)

    seen = OutputError(output.fp32, images.inputs())
    return select_activation_ranges(make(resolve_settings(QUICK, output.fp32)), make, seen)[0].int8


def judges(sets: Sequence[CalibrationSet]) -> list[int]:
    """Whose images judge: those of all sets, or the real ones alone where there are any."""
    return [i for i, s in enumerate(sets) if s.provenance.real] or list(range(len(sets)))


def excess(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many times the least error each set has, as the geometric mean over all images that judge.

    errors    float64 [S, J], NMSE
    returns   float64 [S], at least 1; 1 for a set that nobody surpasses on any images
    """
    bounded = np.maximum(errors, LEAST_NMSE)
    ratios: NDArray[np.float64] = np.exp(np.log(bounded / bounded.min(0)).mean(1))
    return ratios


def generate(request: Request, options: Options) -> Generated:
    """The images of the best candidate, as it makes them by itself.

    The sets that are compared are whole, because those that take long to make are the ones that are usually taken.
    """
    candidates = parts(request.argument) or usual_candidates(request)
    for reference in candidates:  # refused before any of them works
        open_source(reference, request.spec, request.module)
    tried = candidates if request.count > 1 else candidates[:1]

    def images_of(turn: int, reference: str) -> CalibrationSet:
        def tick(done: float, note: str) -> None:
            request.tick((turn * request.count + done) / len(tried), f"{reference}{f', {note}' if note else ''}")

        folder = request.resume and request.resume / f"turn-{turn}"
        return generate_set(reference, dataclasses.replace(request, tick=tick, resume=folder))

    sets: list[CalibrationSet] = []
    for turn, reference in enumerate(tried):
        if not sets or not request.out_of_time():
            sets.append(images_of(turn, reference))
    sets = [s for s in sets if len(s) > 1] or sets[:1]  # when time is up, a source ends with what it has
    trials: tuple[Trial, ...] = ()
    if len(sets) > 1:
        assert request.graph is not None, "sources are compared by what they do to the model"
        trials = compare(request.graph(), [s.subset(range(min(options.trial, len(s)))) for s in sets])
    made = sets[int(np.argmin([t.excess for t in trials])) if trials else 0]
    found = made.provenance
    request.tick(len(made), found.source)
    return Generated(
        images=made.images,
        domain=found.domain,
        labels=made.labels,
        label_origin=found.labels,
        real=found.real,
        licence=found.licence,
        parts=(found,),
        trials=trials,
        warnings=found.warnings,
    )


def compare(graph: ov.Model, sets: Sequence[CalibrationSet]) -> tuple[Trial, ...]:
    """What each set does on the images of all of them."""
    errors = errors_on_each_other(graph, sets)
    factors = excess(errors[:, judges(sets)])
    return tuple(
        Trial(source=made.source, seconds=made.seconds, nmse=tuple(map(float, row)), excess=float(factor))
        for made, row, factor in zip((s.provenance for s in sets), errors, factors, strict=True)
    )
