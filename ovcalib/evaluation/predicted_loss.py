"""The loss of top-1 accuracy to expect on real images, from the error of INT8 on images that were made.

To first order, rounding noise moves as many images to the right class as away from it; the loss is of second order. So
it grows in proportion to the squared error of the logits. The lines below were fitted to networks, calibration sources
and bits that `benchmarks/loss_cells.py` measured with labels. Of all probes and errors that were tried, the NMSE on
fractals does best on networks that the lines were not fitted to: benchmarks/results/predicted_loss.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.evaluation.metrics import expected_hits, nmse, probabilities, same_class
from ovcalib.kernels import outputs_on
from ovcalib.records.model import ModelSpec
from ovcalib.records.result import Kernels, PredictedLoss, ProbeError
from ovcalib.runtime import outputs_of

# Intercept and slope over the NMSE, of the lower end, the median and the upper end of the loss in points.
LINES = ((-0.51, 20.3), (-0.01, 25.7), (0.44, 41.9))
# The largest NMSE that the lines were fitted on.
LARGEST_NMSE = 0.1


def predict_loss(
    fp32: ov.Model,
    int8: ov.Model,
    spec: ModelSpec,
    source: str,
    images: Callable[[], Sequence[NDArray[np.float32]]],
    obstacle: str | None,
    kernels: Kernels | None,
) -> tuple[PredictedLoss | None, str | None]:
    """The predicted loss, or None and the reason why it cannot be predicted.

    fp32, int8       batch 1
    source, images   of the probe; `images` makes network inputs [1, C, H, W]
    obstacle         why the probe says nothing of the calibration set; None where it does
    kernels          on which INT8 runs, or is emulated; None for what computes in float
    """
    if spec.num_classes is None:
        return None, f"the outputs of {spec.name} are no class logits"
    if spec.weights.origin == "random":
        return None, f"the weights of {spec.name} are random"
    if obstacle is not None:
        return None, obstacle
    inputs = images()
    return predicted_loss(probe_error(source, outputs_of(fp32, inputs), outputs_on(kernels, int8, inputs)))


def predicted_loss(probe: ProbeError) -> tuple[PredictedLoss | None, str | None]:
    """What an error on images that were made says of the loss on real ones."""
    if probe.nmse is None:
        return None, "INT8 gives outputs that are not finite"
    if probe.nmse > LARGEST_NMSE:
        return None, (
            f"the output error on {probe.count} images of {probe.source} (NMSE {probe.nmse:.2g}) is larger than any "
            f"that predictions are known for ({LARGEST_NMSE:g}). Expect a large loss"
        )
    low, middle, high = (intercept + slope * probe.nmse for intercept, slope in LINES)
    return PredictedLoss(points=middle, interval90=(low, high), probe=probe), None


def probe_error(source: str, reference: NDArray[np.float32], outputs: NDArray[np.float32]) -> ProbeError:
    """INT8 against FP32 on images of one source.

    reference, outputs   float32 [N, K], logits of FP32 and INT8
    """
    confidence = probabilities(reference).max(1)
    return ProbeError(
        source=source,
        count=len(reference),
        agreement=float(same_class(reference, outputs).mean()),
        expected_loss=float((confidence - expected_hits(reference, outputs)).mean()),
        confidence=float(confidence.mean()),
        nmse=nmse(reference, outputs),
    )
