"""Weights in 8 bits, computed with in float: NNCF's `compress_weights` beside `ovcalib quantize --mode weight-only`.

    python benchmarks/weights_only.py mobilenetv3_small-cifar10 --eval imagefolder:cifar10-jpeg/test --limit 2000 \\
        -o weights-only.json

NMSE, agreement and top-1 are those of the evaluation images, executed in float32 with the weights as constants. Bytes
are those of the weights' file. `wrong` counts the compilations of the written file, of `--compilations`, whose outputs
on one image are not those of the weights. ovcalib rounds and corrects on `--count` images of `--calib`, NNCF on none.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import command
import nncf
import numpy as np
import openvino as ov
from numpy.typing import NDArray
from settings import about, add_model, save

import ovcalib
from ovcalib.calibration.make import export_once
from ovcalib.evaluation.dataset import open_evaluation, proof_images
from ovcalib.evaluation.metrics import nmse
from ovcalib.evaluation.proof import prove, reference_outputs
from ovcalib.graph.editing import fold_weights
from ovcalib.graph.files import read_graph, write_ir
from ovcalib.graph.reading import Layer, float_operations
from ovcalib.progress import Progress
from ovcalib.quantization.quantize import weights_only
from ovcalib.quantization.settings import resolve_settings
from ovcalib.records.options import EvaluationOptions, QuantizationOptions
from ovcalib.runtime import outputs_of

# Of the square of the outputs; what summing in another order changes is far less.
SAME_NMSE = 1e-4


def wrong_compilations(written: ov.Model, exact: ov.Model, image: NDArray[np.float32], count: int) -> int:
    """How many of several compilations of a graph do not compute what another one does."""
    expected = outputs_of(exact, [image])
    return sum(nmse(expected, outputs_of(written.clone(), [image])) > SAME_NMSE for _ in range(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--calib", default="fractal")
    parser.add_argument("--count", type=command.positive, default=64)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--limit", type=command.positive)
    parser.add_argument("--compilations", type=command.positive, default=50)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    given, progress = about(args), Progress()
    model = ovcalib.load_model(args.model, **given)
    made = ovcalib.generate(args.calib, args.model, args.count, **given)
    options = QuantizationOptions(mode="weight-only")

    fp32 = export_once(model)
    evaluation = open_evaluation(EvaluationOptions(eval=args.eval, limit=args.limit), model.spec, None)
    images = proof_images(evaluation, made, False)
    reference = reference_outputs(fp32, images, progress)

    def compress(mode: nncf.CompressWeightsMode) -> ov.Model:
        with contextlib.redirect_stdout(io.StringIO()):
            return nncf.compress_weights(fp32.clone(), mode=mode)

    ways: dict[str, Callable[[], ov.Model]] = {
        "NNCF, INT8_ASYM (its default)": lambda: compress(nncf.CompressWeightsMode.INT8_ASYM),
        "NNCF, INT8_SYM": lambda: compress(nncf.CompressWeightsMode.INT8_SYM),
        "ovcalib": lambda: weights_only(options, resolve_settings(options, fp32), fp32, made, progress).int8,
    }
    rows = {}
    for name, make in ways.items():
        began = time.perf_counter()
        graph = make()
        seconds = round(time.perf_counter() - began, 1)
        exact = graph.clone()
        fold_weights(map(Layer.of, float_operations(exact)))
        proof = prove(reference, exact, images, evaluation, model.spec, None, progress)
        with tempfile.TemporaryDirectory() as folder:
            write_ir(graph.clone(), Path(folder, "model.xml"))
            size = Path(folder, "model.bin").stat().st_size
            wrong = wrong_compilations(read_graph(Path(folder, "model.xml")), exact, made[0], args.compilations)
        agreed, accuracy = proof.agreement, proof.accuracy
        rows[name] = {
            "nmse": agreed.nmse, "agreement": agreed.top1, "top1": accuracy and accuracy.int8.top1,
            "fp32_top1": accuracy and accuracy.fp32.top1, "bytes": size, "wrong": wrong, "seconds": seconds,
        }  # fmt: skip
        print(f"{name}: {rows[name]}", flush=True)
    save(args, rows=rows)


if __name__ == "__main__":
    command.run(main)
