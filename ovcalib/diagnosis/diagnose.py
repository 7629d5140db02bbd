"""Diagnosis of accuracy loss: the error of every quantized operation, alone and with those before it, against FP32."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib import __version__
from ovcalib.calibration.make import make_set, resolve_calibration
from ovcalib.diagnosis.distortion import Distortion, Histogram, Spread
from ovcalib.diagnosis.remedies import NOT_INSTALLED, can_quantize, try_remedies
from ovcalib.errors import ModelError
from ovcalib.evaluation.dataset import calibration_images, open_dataset
from ovcalib.evaluation.metrics import hits, nmse, same_class
from ovcalib.evaluation.outputs import Item, Items, Outputs, collect
from ovcalib.graph.editing import restore
from ovcalib.graph.files import batch_one, is_quantized
from ovcalib.graph.probing import instrument, observe
from ovcalib.graph.reading import layer_name, literal_pattern, quantized_operations
from ovcalib.kernels import outputs_on
from ovcalib.measurement.benchmark import interleaved_latency
from ovcalib.models.load import Model, load_model
from ovcalib.progress import Progress
from ovcalib.records.diagnosis import (
    Candidate,
    Diagnosis,
    Metrics,
    OperationDiagnosis,
    QuantizedInput,
    Remedy,
    SignalQuality,
)
from ovcalib.records.options import CalibrationOptions, DiagnosisOptions, ModelOptions
from ovcalib.runtime import Inference, OpenVINORunner, check_device, groups_that_fit, outputs_of, size_of

# A range is named as a likely fault if a larger share of the values is clipped, or a smaller share of it is used.
CLIPPED_SHARE = 0.01
USED_SHARE = 0.25
# More NMSE than this on the kernels of AVX2 than on those of VNNI is a fault.
SATURATED_NMSE = 0.01
# Images on which saturation is measured.
SATURATION_IMAGES = 16
# Operations whose ranges are described in `faults`.
FAULTS = 5

Metric = Literal["top1", "agreement", "nmse"]


def diagnose(about: ModelOptions, int8: str, options: DiagnosisOptions, progress: Progress) -> Diagnosis:
    """Compare a quantized model with its float original, operation by operation.

    about    the FP32 model
    int8     FILE.xml of the same network after quantization
    raises   ModelError where the two are not one network
    """
    check_device(options.device)
    model = load_model(about, say=progress.say)
    other = load_model(about.model_copy(update={"reference": int8}), say=progress.say)
    fp32, quantized = graphs(model, other)

    sets: dict[str, Sequence[NDArray[np.float32]]] = {}
    if options.data is not None:
        images = open_dataset(options.data, model.spec, options.limit).images()
        on, items = images.on, images.items
        sets[on] = [item.input for item in islice(items, options.num_samples)]
    for i, source in enumerate(options.calib):
        asked = CalibrationOptions(calib=source, num_samples=options.num_samples, seed=options.seed)
        made = make_set(resolve_calibration(asked, model, progress)[0], model, progress)
        sets[source] = made.inputs()
        if options.data is None and i == 0:
            on, items = source, calibration_images(made).items

    names = [op.get_friendly_name() for op in quantized_operations(quantized)]
    signals = operation_signals(fp32, quantized, names, sets, progress)
    harm = output_errors(fp32, quantized, names, list(islice(items, options.num_samples)), progress)
    # The most harmful first; where the output does not tell, the operation whose own output is worst.
    worst = sorted(names, key=lambda name: (-harm[name], signals[name]["alone"].sqnr_db))
    operations = tuple(
        OperationDiagnosis(
            name=layer_name(op),
            kind=op.get_type_name(),
            output_nmse=harm[name],
            **signals[name],
        )
        for name in worst
        for op in [next(op for op in quantized.get_ops() if op.get_friendly_name() == name)]
    )
    saturation = saturation_fault(fp32, quantized, sets[on][:SATURATION_IMAGES])
    found_faults = [*([saturation] if saturation else []), *faults(operations, on)]
    search = Search(fp32, quantized, items, options, model.spec.num_classes is not None, progress)
    found = search.run(worst)
    int8_metrics: Candidate = found["int8"]
    warnings = list(model.warnings)
    remedies: tuple[Remedy, ...] = ()
    if options.calib and not search.good_enough(int8_metrics):
        if can_quantize():
            back = () if found["suggested"] is None else found["candidates"][found["suggested"]].in_float
            remedies = try_remedies(
                about, model, fp32, options.calib[0], options.seed + 1, [literal_pattern(name) for name in back],
                search.measure, search.good_enough, progress,
            )  # fmt: skip
        else:
            warnings.append(NOT_INSTALLED)
    best_remedy = search.best(remedies)
    if best_remedy is not None and search.value(remedies[best_remedy]) <= search.value(int8_metrics):
        best_remedy = None
    return Diagnosis(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), ovcalib=__version__,
        model=model.spec.name, fp32_sha256=model.sha256, int8_sha256=other.sha256, device=options.device, on=on,
        count=len(search.reference), signal_count=len(sets[on]), max_drop=options.max_drop, sets=tuple(sets),
        operations=operations, faults=tuple(found_faults), remedies=remedies,
        remedy=best_remedy, warnings=tuple(warnings), **found,
    )  # fmt: skip


def graphs(model: Model, other: Model) -> tuple[ov.Model, ov.Model]:
    """Both graphs with batch 1, checked to be one network before and after quantization."""
    if model.graph is None or other.graph is None:
        raise ModelError("A diagnosis compares two graphs. Pass FILE.xml (or FILE.onnx) before and after quantization.")
    fp32, quantized = batch_one(model.graph, model.spec), batch_one(other.graph, model.spec)
    if is_quantized(fp32) is not None:
        raise ModelError(f"{model.spec.name!r} is quantized already. Expected the float model first, INT8 second.")
    operations = quantized_operations(quantized)
    if not operations:
        raise ModelError(
            "The second model has no quantized operation: it is a float model, or one of which the weights alone are "
            "quantized. Expected the INT8 model second."
        )
    known = {op.get_friendly_name(): op.get_type_name() for op in fp32.get_ops()}
    strange = [op for op in operations if known.get(op.get_friendly_name()) != op.get_type_name()]
    if strange:
        raise ModelError(
            f"The INT8 model has the operation {strange[0].get_friendly_name()!r}, which the FP32 model has not. "
            "Expected the same network before and after quantization: take both from one result folder."
        )
    return fp32, quantized


# Signals --------------------------------------------------------------------------------------


def operation_signals(
    fp32: ov.Model,
    quantized: ov.Model,
    names: Sequence[str],
    sets: Mapping[str, Sequence[NDArray[np.float32]]],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """The signal fields of OperationDiagnosis for each operation.

    sets   image sets, float32 [1, C, H, W] an image; quality is measured on the first, ranges on all
    """
    found: dict[str, dict[str, Any]] = {}
    first = next(iter(sets.values()))
    with progress.task("comparing signals", len(names)) as tick:
        operations = {op.get_friendly_name(): op for op in quantized.get_ops()}
        # Four variants of the output, and the inputs, which are about as large.
        for group in groups_that_fit(names, lambda name: 6 * size_of(operations[name].output(0))):
            graph, probes = instrument(quantized, fp32, group)
            beside = Inference(graph)
            company = Inference(observe(quantized, [probe.name for probe in probes]))
            quality = [{kind: Distortion() for kind in ("cumulative", *variants(probe))} for probe in probes]
            spreads: dict[str, list[list[Spread]]] = {
                name: [[Spread(i.low, i.high) for i in probe.inputs] for probe in probes] for name in sets
            }
            for x in first:
                values, inherited = beside(x), company(x)
                for i, probe in enumerate(probes):
                    reference = values[probe.reference]
                    quality[i]["cumulative"].add(reference, inherited[i])
                    for kind, index in variants(probe).items():
                        quality[i][kind].add(reference, values[index])
            # Ranges need only the values before quantization.
            wanted = [entry.value for probe in probes for entry in probe.inputs]
            watch = Inference(ov.Model([graph.outputs[i].get_node().input_value(0) for i in wanted],
                                       graph.get_parameters(), "inputs"))  # fmt: skip
            for name, images in sets.items():
                counted = [spread for row in spreads[name] for spread in row]
                for x in images:
                    for spread, value in zip(counted, watch(x), strict=True):
                        spread.add(value)
            # Where ranges are per channel, the histogram is of the channel that the first set clips most.
            flat = [spread for row in spreads[next(iter(sets))] for spread in row]
            channels = [worst.channel if (worst := spread.worst_channel()) else None for spread in flat]
            everywhere = [[spread for row in spreads[name] for spread in row] for name in sets]
            limits = [
                (min(s.bounds(c)[0] for s in same), max(s.bounds(c)[1] for s in same))
                for c, same in zip(channels, zip(*everywhere, strict=True), strict=True)
            ]
            counter = iter(limits)
            bounds = [[next(counter) for _ in probe.inputs] for probe in probes]
            histograms = {name: [[Histogram(*b) for b in row] for row in bounds] for name in sets}
            for name, images in sets.items():
                counters = [histogram for row in histograms[name] for histogram in row]
                for x in images:
                    for histogram, spread, value in zip(counters, flat, watch(x), strict=True):
                        histogram.add(spread.telling(value))
            for i, probe in enumerate(probes):
                measured: dict[str, SignalQuality | None] = {"weights": None, "activations": None}
                measured.update({kind: value.quality() for kind, value in quality[i].items()})
                found[probe.name] = {
                    **measured,
                    "inputs": tuple(
                        quantized_input(
                            entry.source, {s: spreads[s][i][j] for s in sets}, {s: histograms[s][i][j] for s in sets}
                        )
                        for j, entry in enumerate(probe.inputs)
                    ),
                }
            tick(len(found))
    return found


def variants(probe: Any) -> dict[str, int]:
    """Which output holds which variant of an operation."""
    named = {"alone": probe.alone, "weights": probe.weights, "activations": probe.activations}
    return {kind: index for kind, index in named.items() if index is not None}


def quantized_input(source: str, spreads: Mapping[str, Spread], histograms: Mapping[str, Histogram]) -> QuantizedInput:
    one = next(iter(spreads.values()))
    return QuantizedInput(
        source=source,
        low=float(one.low.min()),
        high=float(one.high.max()),
        seen={name: s.seen for name, s in spreads.items()},
        clipped_share={name: s.clipped_share for name, s in spreads.items()},
        used_share={name: s.used_share for name, s in spreads.items()},
        worst_channel=one.worst_channel(),
        edges=tuple(float(f"{edge:.5g}") for edge in next(iter(histograms.values())).edges),
        counts={name: tuple(map(int, h.counts)) for name, h in histograms.items()},
    )


# Output errors and latency ---------------------------------------------------------------------------


def output_errors(
    fp32: ov.Model, quantized: ov.Model, names: Sequence[str], items: Iterable[Item], progress: Progress
) -> dict[str, float]:
    """For each operation, the NMSE of the network's output when it alone is quantized; infinite where not finite."""
    items = list(items)
    reference = collect(OpenVINORunner(fp32), items).values
    harm = {}
    with progress.task("quantizing one operation at a time", len(names)) as tick:
        for name in names:
            alone = restore(quantized, fp32, [other for other in names if other != name])
            harm[name] = nmse(reference, collect(OpenVINORunner(alone), items).values)
            tick(len(harm))
    return harm


class Search:
    """Reverts more and more operations to float, and measures each candidate."""

    def __init__(
        self, fp32: ov.Model, quantized: ov.Model, items: Items, options: DiagnosisOptions, classification: bool,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.fp32, self.quantized, self.items, self.options, self.progress = fp32, quantized, items, options, progress
        self.classification = classification
        self.reference = collect(OpenVINORunner(fp32), items)
        self.metric: Metric = "nmse"
        if classification:
            self.metric = "agreement" if self.reference.labels is None else "top1"
        self.of_fp32 = self.metrics(self.reference)
        self.goal = self.value(self.of_fp32) - options.max_drop

    def run(self, worst: Sequence[str]) -> dict[str, Any]:
        """The fields of Diagnosis about candidates; `worst` lists all operations, most harmful first."""
        models = {"fp32": self.fp32, "int8": self.quantized}
        measured = {"fp32": self.of_fp32, "int8": self.measure(self.quantized)}
        sizes: list[int] = []
        count = 1
        with self.progress.task("giving operations their precision back", len(worst)) as tick:
            while count < len(worst) and not self.good_enough(measured[str(sizes[-1]) if sizes else "int8"]):
                key = str(count)
                models[key] = restore(self.quantized, self.fp32, worst[:count])
                measured[key] = self.measure(models[key])
                sizes.append(count)
                tick(count)
                count *= 2
        latency: dict[str, float | None] = dict.fromkeys(models)
        if self.options.benchmark_time > 0:
            self.progress.say(f"measuring latency on {self.options.device}")
            taken = interleaved_latency(models, self.options.device, self.options.benchmark_time)
            latency.update({key: value.p50 for key, value in taken.items()})
        operations = {op.get_friendly_name(): layer_name(op) for op in self.quantized.get_ops()}

        def candidate(key: str, names: Sequence[str]) -> Candidate:
            in_float = tuple(operations[name] for name in names)
            return Candidate(in_float=in_float, latency_p50_ms=latency[key], **measured[key].model_dump())

        candidates = tuple(candidate(str(size), worst[:size]) for size in sizes)
        # The search stops at the first that is good enough, which is then the last.
        last = len(candidates) - 1 if candidates and self.good_enough(candidates[-1]) else None
        return {
            "metric": self.metric,
            "fp32": candidate("fp32", ()),
            "int8": candidate("int8", ()),
            "candidates": candidates,
            "suggested": self.best(candidates) if last is None else last,
        }

    def good_enough(self, found: Metrics) -> bool:
        """Whether no more than `max_drop` of FP32's metric is lost."""
        return self.value(found) >= self.goal

    def best(self, found: Sequence[Metrics]) -> int | None:
        """Index of the best, the first of equals; None of none."""
        return max(range(len(found)), key=lambda i: (self.value(found[i]), -i), default=None)

    def value(self, found: Metrics) -> float:
        """The metric, higher is better; a missing one is the worst."""
        value: float | None = getattr(found, self.metric)
        if value is None:
            return -math.inf
        return -value if self.metric == "nmse" else value

    def measure(self, graph: ov.Model) -> Metrics:
        return self.metrics(collect(OpenVINORunner(graph), self.items))

    def metrics(self, outputs: Outputs) -> Metrics:
        labels = self.reference.labels if self.classification else None
        error = nmse(self.reference.values, outputs.values)
        return Metrics(
            top1=None if labels is None else float(hits(outputs.values, labels).mean()),
            agreement=float(same_class(self.reference.values, outputs.values).mean()) if self.classification else None,
            nmse=error,
        )


def saturation_fault(fp32: ov.Model, int8: ov.Model, inputs: Sequence[NDArray[np.float32]]) -> str | None:
    """The output error from sums that saturate on CPUs without VNNI, in words; None where it is small."""
    reference = outputs_of(fp32, inputs)
    exact, saturated = (nmse(reference, outputs_on(kernels, int8, inputs)) for kernels in ("vnni", "avx2"))
    if saturated <= exact + SATURATED_NMSE:
        return None
    return (
        f"sums of products saturate on CPUs without VNNI, which no single layer shows: output NMSE {saturated:.2g} "
        f"there, {exact:.2g} with VNNI. Quantize with --deploy-isa any or avx2, which use half of the weights' range"
    )


def faults(operations: Sequence[OperationDiagnosis], on: str) -> list[str]:
    """What is wrong with the ranges of the most harmful operations, in words."""
    lines = []
    for operation in operations[:FAULTS]:
        for entry in operation.inputs:
            channel = entry.worst_channel
            seen = channel.seen if channel else entry.seen[on]
            low, high = (channel.low, channel.high) if channel else (entry.low, entry.high)
            where = f", channel {channel.channel}," if channel else ""
            range_ = f"{operation.name} reads {entry.source}{where} quantized to {low:.3g}..{high:.3g}"
            if entry.clipped_share[on] > CLIPPED_SHARE:
                lines.append(
                    f"{range_}, but on {on} it reaches {seen[0]:.3g}..{seen[1]:.3g}: "
                    f"{entry.clipped_share[on]:.1%} of all its values are clipped"
                )
            elif entry.used_share[on] < USED_SHARE:
                lines.append(
                    f"{range_}, of which {on} uses {entry.used_share[on]:.0%} ({seen[0]:.3g}..{seen[1]:.3g}): "
                    "most levels are wasted"
                )
    return list(dict.fromkeys(lines))
