"""Quantize a PyTorch model without any images.

    python examples/quantize_without_data.py -o runs/example

The calibration set is made from the statistics in the BatchNorm layers of the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ovcalib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20-cifar10", help="a model reference")
    parser.add_argument("--images", type=int, default=128, help="calibration images")
    parser.add_argument("--steps", type=int, help="optimisation steps of each image; the source's default if left out")
    parser.add_argument("--benchmark-time", type=float, default=2.0, help="seconds; 0 leaves latency out")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/example"))
    arguments = parser.parse_args()

    result = ovcalib.quantize(
        arguments.model,
        arguments.output,
        calib="bn-inversion",
        num_samples=arguments.images,
        options={} if arguments.steps is None else {"steps": arguments.steps},
        benchmark_time=arguments.benchmark_time,
        overwrite=True,
        progress=ovcalib.Terminal(),
    )

    record = result.record
    # Agreement is the share of images for which INT8 and FP32 predict the same class. It is not accuracy.
    print(
        f"agreement with FP32: {record.agreement.top1:.1%} of {record.agreement.count} images of {record.agreement.on}"
    )
    for error in record.quantization.output_error:
        print(f"output error (NMSE) on {error.kernels} kernels: {error.nmse:.2g}")
    print(f"size: {record.size_bytes.fp32 / 1e6:.2f} MB -> {record.size_bytes.int8 / 1e6:.2f} MB")
    for warning in record.warnings:
        print(f"warning: {warning}")

    # `result.int8` is an openvino.Model, ready to compile.
    print(f"inputs: {result.int8.inputs}")
    print(f"written to {result.folder}")


if __name__ == "__main__":
    main()
