"""Compare calibration sources on the same images.

    python examples/compare_sources.py --eval imagefolder:photos/val -o runs/comparison

With labelled images the comparison is by accuracy. Without --eval every INT8 model is compared with FP32 on one set of
fractals, which none of the sources used, by agreement and output error.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ovcalib import api
from ovcalib.progress import Terminal

SOURCES = ("bn-inversion", "fractal", "noise")
JUDGING_SEED = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20-cifar10", help="a model reference")
    parser.add_argument("--sources", nargs="+", default=SOURCES)
    parser.add_argument("--images", type=int, default=64, help="calibration images of each source")
    parser.add_argument("--eval", help="images to compare on, such as imagefolder:DIR")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/comparison"))
    arguments = parser.parse_args()

    judge = arguments.eval
    if judge is None:
        folder = arguments.output / "judge"
        api.generate("fractal", arguments.model, arguments.images, folder, seed=JUDGING_SEED, overwrite=True)
        judge = f"npz:{folder / 'calibration.npz'}"

    folders = []
    print(f"{'source':20} {'top-1 INT8':>10} {'agreement':>10} {'NMSE':>10}")
    for source in arguments.sources:
        folder = arguments.output / source.replace(":", "-").replace("/", "-")
        result = api.quantize(
            arguments.model,
            folder,
            calib=source,
            num_samples=arguments.images,
            eval=judge,
            benchmark_time=0,
            overwrite=True,
            progress=Terminal(),
        )
        folders.append(folder)
        accuracy, agreement = result.record.accuracy, result.record.agreement
        top1 = "-" if accuracy is None else f"{accuracy.int8.top1:.2%}"
        print(f"{source:20} {top1:>10} {agreement.top1:>10.2%} {agreement.nmse:>10.2g}")

    for path in api.report(folders, arguments.output):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
