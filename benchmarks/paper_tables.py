"""Tables 1a, 1b and 2 of the first paper beside those of a sweep.

    ovcalib gan score CIFAR-10=imagefolder:cifar10-jpeg/test StyleGAN2-ADA=stylegan2-ada:teacher.safetensors \
        DiStyleGAN=distylegan Fractal=fractal --reference imagefolder:cifar10-jpeg/train --json > scores.json
    python benchmarks/paper_tables.py runs/paper [--scores scores.json] [-o benchmarks/results/paper_tables.md]

Masouris et al., "Post-training Model Quantization Using GANs for Synthetic Data Generation".
Rows and columns meet by their names in benchmarks/paper.yaml. A cell that was not run says so; nothing is filled in.
Without Inception's weights (`gan score --inception-weights`) the scores are those of another classifier; they stand
under their own names, and the Inception Score stays "not run".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from ovcalib.records.result import Result
from ovcalib.records.sweep import Sweep
from ovcalib.report.markdown import escape_markdown
from ovcalib.sweep.state import read_results, read_sweep
from ovcalib.sweep.tables import (
    AGREEMENT,
    DROP,
    NMSE,
    NOTES,
    RELATIVE,
    REVERTED,
    SECONDS,
    Metric,
    best,
    failures,
    group,
    metric_table,
    over_seeds,
    shown_estimate,
)

MODELS = ("ResNet20", "VGG16", "MobileNetV2", "ShuffleNetV2", "RepVGG")
# The narrow relatives of benchmarks/paper_narrow.yaml, which a CPU can train, and the model of the paper beside each.
NARROW = {
    "VGG11": "VGG16",
    "MobileNetV2 x0.5": "MobileNetV2",
    "ShuffleNetV2 x0.5": "ShuffleNetV2",
    "RepVGG-A0": "RepVGG",
}
# Top-1 of the checkpoints, in per cent, by their publisher.
PUBLISHED_TOP1 = dict(zip(MODELS, (92.60, 94.16, 94.22, 93.81, 94.98), strict=True))
# "Degradation percentage": whether points or per cent of FP32, the paper does not say.
TABLE_1A = {
    "CIFAR-10": (0.28, 0.05, 0.07, 1.26, 41.94),
    "StyleGAN2-ADA": (0.43, 0.16, 0.05, 7.48, 41.37),
    "DiStyleGAN": (0.46, 0.07, 0.16, 1.49, 42.85),
    "Fractal": (1.10, 0.69, 0.54, 87.21, 41.73),
}
TABLE_1B = {
    "CIFAR-10": (None, None, None, 1.26, 0.45),
    "StyleGAN2-ADA": (None, None, None, 0.59, 0.48),
    "DiStyleGAN": (None, None, None, 0.11, 0.55),
    "Fractal": (None, None, None, 87.21, 42.16),
}
TABLE_2 = {"StyleGAN2-ADA": 10.34, "DiStyleGAN": 6.78, "Fractal": 3.31}

INCEPTION_SCORE = "inception-score"

Published = Mapping[str, tuple[float | None, ...]]
Scores = Mapping[str, Mapping[str, float]]
DIFFERENCES = """\
- Data: the paper evaluates on the original CIFAR-10; ours is in the protocol of each model below. The paper does not
  say which 5,000 images its real calibration set held; ours are 500 a class of the training split, by seed.
- Weights: the paper takes the published checkpoints; ours are named below by their SHA-256.
- Tool: the paper quantizes with the Post-training Optimization Tool of OpenVINO 2022.1; it is gone, and ours is NNCF.
- Accuracy-aware: the paper allows 2 points and measures them on the calibration images with their labels; ours allows
  0.3 points, measured on the same: top-1 where the images came with labels (real, GANs, IntraQ), else top-1 as
  FP32's probabilities let expect. The evaluation images steer nothing.
- RepVGG is in its multi-branch training form, as in the paper."""


def drop_table(sweep: Sweep | None, results: Mapping[str, Result], mode: str, published: Published) -> str:
    """Rows of the paper, then those that only we have: "ours in points (ours in % of FP32) | published"."""
    ours = [source.label for source in sweep.recipe.sources] if sweep else []
    sources = [*published, *(label for label in ours if label not in published)]
    rows = [[escape_markdown(source)] for source in sources]
    models = columns(sweep)
    for model in models:
        k = MODELS.index(NARROW.get(model, model))
        groups = [group(sweep, model, source, mode) if sweep else [] for source in sources]
        drops = [over_seeds(cells, DROP, results, {}) for cells in groups]
        marked = best(drops, "less")
        for i, cells in enumerate(groups):
            relative = over_seeds(cells, RELATIVE, results, {})
            text = shown_estimate(drops[i], cells) if cells else "not run"
            text += f" ({relative.mean:.2f} %)" if relative else ""
            known = published.get(sources[i], (None,) * len(MODELS))[k]
            rows[i] += [f"**{text}**" if i == marked else text, "-" if known is None else f"{known:.2f}"]
    named = {model: f"paper ({NARROW[model]})" if model in NARROW else "paper" for model in models}
    header = ["calibration", *(name for model in models for name in (model, named[model]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def columns(sweep: Sweep | None) -> list[str]:
    """The paper's models, or those of a sweep of their narrow relatives."""
    ours = [model.label for model in sweep.recipe.models] if sweep else []
    if not set(ours) & set(NARROW):
        return list(MODELS)
    return [model for model in ours if model in MODELS or model in NARROW]


def provenance(sweep: Sweep, results: Mapping[str, Result]) -> list[str]:
    """One line a model: its weights and the images that it was proven on."""
    lines = []
    for model in columns(sweep):
        found = [results[cell.key] for cell in sweep.cells if cell.model == model and cell.key in results]
        if not found or found[0].accuracy is None:
            continue
        first, accuracy = found[0], found[0].accuracy
        stands = f", a narrower relative of the paper's {NARROW[model]}" if model in NARROW else ""
        theirs = PUBLISHED_TOP1[NARROW.get(model, model)]
        lines.append(
            f"- {model}{stands}: FP32 top-1 {100 * accuracy.fp32.top1:.2f} % (published weights, by their publisher: "
            f"{theirs:.2f} %), weights {first.model.weights.origin} {first.model.sha256[:12]}, on "
            f"{escape_markdown(accuracy.protocol)}"
        )
    return lines


def score_table(scores: Scores) -> str:
    """The published Inception Score, ours where it was measured, and every other measure under its own name."""
    images = [*TABLE_2, *(name for name in scores if name not in TABLE_2)]
    measures = list(dict.fromkeys(name for row in scores.values() for name in row if name != INCEPTION_SCORE))
    rows = [["images", "paper: Inception Score of 50,000", "ours: Inception Score", *measures]]
    rows.append(["---"] * len(rows[0]))
    for name in images:
        found = scores.get(name, {})
        ours = [f"{found[m]:.3g}" if m in found else "not run" for m in (INCEPTION_SCORE, *measures)]
        rows.append([escape_markdown(name), f"{TABLE_2[name]:.2f}" if name in TABLE_2 else "-", *ours])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def document(sweep: Sweep | None, results: Mapping[str, Result], scores: Scores) -> str:
    """The whole of paper_tables.md."""
    lines = [
        "# The paper's tables",
        "",
        "Written by `python benchmarks/paper_tables.py` from a sweep of `benchmarks/paper.yaml` (`make tables`), or of "
        "`benchmarks/paper_narrow.yaml` where the names are of narrower networks. Each cell is ours: the drop of top-1 "
        "accuracy in points, and in brackets in % of the FP32 accuracy; beside it the published number. " + NOTES,
        "",
        "## What differs",
        "",
        DIFFERENCES,
    ]
    if sweep:
        lines += provenance(sweep, results)
        versions = next((r.environment.versions for r in results.values()), {})
        lines += [f"- Versions: {', '.join(f'{name} {value}' for name, value in versions.items() if value)}"]
    for title, mode, published in (
        ("Table 1a: default algorithm", "default", TABLE_1A),
        ("Table 1b: accuracy-aware algorithm", "accuracy-aware", TABLE_1B),
    ):
        lines += ["", f"## {title}", "", drop_table(sweep, results, mode, published)]
        if sweep and mode in sweep.recipe.modes:
            more: list[Metric] = [AGREEMENT, NMSE] if mode == "default" else [REVERTED, SECONDS]
            for metric in more:
                lines += ["", f"### {metric.title}", "", metric_table(sweep, mode, metric, results, {})]
    lines += ["", "## Table 2: scores of the images", "", score_table(scores)]
    if sweep and sweep.failed:
        lines += ["", "## Failed cells", "", *(f"- {name}: {error}" for name, error in failures(sweep))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sweep",
        type=Path,
        nargs="?",
        help="folder of `ovcalib sweep benchmarks/paper.yaml`; without it nothing was run",
    )
    parser.add_argument("--scores", type=Path, help="what `ovcalib gan score --json` printed")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "paper_tables.md")
    args = parser.parse_args()
    sweep = read_sweep(args.sweep) if args.sweep else None
    args.output.parent.mkdir(parents=True, exist_ok=True)
    scores = json.loads(args.scores.read_text()) if args.scores else {}
    args.output.write_text(document(sweep, read_results(args.sweep, sweep) if sweep else {}, scores))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
