"""The loss of top-1 accuracy to expect on real images, from images that were made."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovcalib.evaluation.classification import finite
from ovcalib.evaluation.metrics import expected_hits, nmse, probabilities, same_class
from ovcalib.records.result import ProbeError

# Sources of images beside the held-out ones of the calibration set, and how many of each.
PROBES = ("fractal", "noise")
PROBE_IMAGES = 64


def probe_error(name: str, reference: NDArray[np.float32], outputs: NDArray[np.float32]) -> ProbeError:
    """INT8 against FP32 on images of one source.

    reference, outputs   float32 [N, K], logits of FP32 and INT8
    """
    confidence = probabilities(reference).max(1)
    return ProbeError(
        source=name,
        count=len(reference),
        agreement=float(same_class(reference, outputs).mean()),
        expected_loss=float((confidence - expected_hits(reference, outputs)).mean()),
        confidence=float(confidence.mean()),
        nmse=finite(nmse(reference, outputs)),
    )
