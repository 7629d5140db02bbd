"""Comparison of devices and precisions with CPU in f32, on the same images.

Quantization and accuracy control run on CPU in f32 alone; a device with its own kernels, or with float16 between the
INT8 layers, can answer differently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovcalib.evaluation.dataset import open_dataset
from ovcalib.evaluation.metrics import same_class
from ovcalib.evaluation.outputs import collect
from ovcalib.graph.files import batch_one
from ovcalib.measurement.benchmark import effective_precision, model_files
from ovcalib.models.load import load_model
from ovcalib.progress import Progress
from ovcalib.records.benchmark import DeviceParity
from ovcalib.records.options import BenchmarkOptions, ModelOptions
from ovcalib.runtime import EVALUATION_PRECISION, OpenVINORunner

# Float32 results of different kernels correlate far better than this; a wrong kernel does not come near.
MIN_CORRELATION = 0.99


def device_parity(
    models: Sequence[Path], options: BenchmarkOptions, about: ModelOptions, progress: Progress
) -> tuple[DeviceParity, ...]:
    """Compare every device and precision of a benchmark with CPU in f32, on the images `options.data`, for each model.

    about   the input of files without metadata; its reference is not used
    """
    assert options.data is not None
    found = []
    for label, path in model_files(models).items():
        model = load_model(about.model_copy(update={"reference": str(path)}), say=progress.say)
        assert model.graph is not None
        graph = batch_one(model.graph, model.spec)
        items = open_dataset(options.data, model.spec, options.limit).images().items
        reference = collect(OpenVINORunner(graph, "CPU", EVALUATION_PRECISION), items).values
        for device, precision in product(options.device, options.precision):
            runner = OpenVINORunner(graph, device, None if precision == "default" else precision)
            progress.say(f"comparing {label} on {device} ({precision}) with CPU (f32)")
            values = collect(runner, items).values
            correlation, worst, difference = likeness(reference, values)
            agreement = float(same_class(reference, values).mean()) if model.spec.num_classes is not None else None
            found.append(
                DeviceParity(
                    model=label,
                    device=device,
                    precision=precision,
                    effective=effective_precision(runner.compiled),
                    on=options.data,
                    count=len(values),
                    correlation=correlation,
                    agreement=agreement,
                    worst_sample=worst,
                    worst_abs=difference,
                    agrees=correlation is not None
                    and correlation >= MIN_CORRELATION
                    and (agreement is None or agreement >= options.min_agreement),
                )
            )
    return tuple(found)


def likeness(reference: NDArray[np.float32], values: NDArray[np.float32]) -> tuple[float | None, int, float | None]:
    """Pearson's correlation over all outputs, the item with the largest absolute difference, and that difference.

    reference, values   [N, K]
    returns             correlation None where an output is constant or not finite; difference None where not finite
    """
    differences = np.abs(reference.astype(np.float64) - values).max(1)
    worst = int(np.argmax(np.where(np.isfinite(differences), differences, np.inf)))
    largest = float(differences[worst])
    if not math.isfinite(largest):
        return None, worst, None
    a, b = (v.astype(np.float64).reshape(-1) - v.mean(dtype=np.float64) for v in (reference, values))
    scale = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return (float(a @ b) / scale if scale else None), worst, largest
