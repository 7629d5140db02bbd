"""Tables 1a, 1b and 2 of the paper, compared with a sweep.

    ovcalib gan score CIFAR-10=imagefolder:cifar10-jpeg/test StyleGAN2-ADA=stylegan2-ada:teacher.safetensors \
        DiStyleGAN=distylegan Fractal=fractal --reference imagefolder:cifar10-jpeg/train --json > scores.json
    python benchmarks/paper_tables.py runs/paper [--scores scores.json] [--nncf runs/paper-nncf] \
        [-o benchmarks/results/paper_tables.md]

`--nncf` is a sweep of the same networks with NNCF's own settings, benchmarks/paper_nncf.yaml.

Masouris et al., "Post-training Model Quantization Using GANs for Synthetic Data Generation".
Rows and columns are matched by their names in benchmarks/paper.yaml. A cell that was not run is "not run". Without
Inception's weights (`gan score --inception-weights`) the scores are those of another classifier; they have their own
names, and the Inception Score is "not run".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import command

from ovcalib.records.options import QuantizationOptions
from ovcalib.records.result import Result
from ovcalib.records.sweep import Sweep
from ovcalib.reports.tables import escape_markdown
from ovcalib.sweeps.state import read_results, read_sweep
from ovcalib.sweeps.tables import (
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
# Networks that a CPU can train (paper_narrow.yaml) or that ship with ovcalib (paper_shipped.yaml), and the model of the
# paper that each stands beside.
INSTEAD = {
    "VGG11": "VGG16",
    "VGG16 x0.25": "VGG16",
    "MobileNetV3": "MobileNetV2",
    "MobileNetV2 x0.5": "MobileNetV2",
    "ShuffleNetV2 x0.5": "ShuffleNetV2",
    "RepVGG-A0": "RepVGG",
}
# Top-1 of the published checkpoints in %, as published.
PUBLISHED_TOP1 = dict(zip(MODELS, (92.60, 94.16, 94.22, 93.81, 94.98), strict=True))
# "Degradation percentage"; the paper does not state whether it is points or percent of FP32.
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
- Unit: the paper reports a "degradation percentage" and does not state whether it is points or percent of FP32. For
  ShuffleNetV2 with fractals, 87.21, percent is more plausible, since 93.81 - 87.21 points is below chance for ten
  classes.
- Data: the paper evaluates on the original CIFAR-10; the protocol of each model here is listed below. `cifar10-jpeg` is
  CIFAR-10 stored as 32x32 JPEG, quality 75. The paper does not state which 5,000 images its real calibration set held;
  here they are drawn from the training split by seed, as many of each class.
- Weights: the paper uses the published checkpoints; the weights here are listed below by SHA-256.
- Quantizer: the paper uses the Post-training Optimization Tool of OpenVINO 2022.1. Here it is NNCF with ovcalib's
  defaults for activation ranges, rounding and bias correction. "NNCF's own settings", where they were run, have NNCF's.
- StyleGAN2-ADA (narrow sweep only): own training, 326 thousand images, 24 channels wide at 32x32, not NVIDIA's
  snapshot.
- DiStyleGAN: uses no data at calibration time; its generator was trained on the CIFAR-10 training split.
- Fractal: ovcalib's own generator, not Datumaro's.
- DGH, ZeroQ, DSG, IntraQ, Genie, bn-inversion: quick budgets. The number of images of every source is below.
- RepVGG is in its multi-branch training form, as in the paper."""


def drop_table(sweep: Sweep | None, results: Mapping[str, Result], mode: str, published: Published) -> str:
    """Rows of the paper, then further rows of the sweep: "points (% of FP32) | published"."""
    ours = [source.label for source in sweep.recipe.sources] if sweep else []
    sources = [*published, *(label for label in ours if label not in published)]
    rows = [[escape_markdown(source)] for source in sources]
    models = columns(sweep)
    for model in models:
        k = MODELS.index(INSTEAD.get(model, model))
        groups = [group(sweep, model, source, mode) if sweep else [] for source in sources]
        drops = [over_seeds(cells, DROP, results, {}) for cells in groups]
        marked = best(drops, "less")
        for i, cells in enumerate(groups):
            relative = over_seeds(cells, RELATIVE, results, {})
            text = shown_estimate(drops[i], cells) if cells else "not run"
            text += f" ({relative.mean:.2f} %)" if relative else ""
            known = published.get(sources[i], (None,) * len(MODELS))[k]
            rows[i] += [f"**{text}**" if i == marked else text, "-" if known is None else f"{known:.2f}"]
    named = {model: f"paper ({INSTEAD[model]})" if model in INSTEAD else "paper" for model in models}
    header = ["calibration", *(name for model in models for name in (model, named[model]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def with_seeds(table: str, sweep: Sweep | None) -> str:
    """A table whose first column says so if there is one seed."""
    if sweep is None or len(sweep.recipe.seeds) > 1:
        return table
    header, rule, *rows = table.splitlines()
    return "\n".join([header, rule, *(row.replace(" |", " (1 seed) |", 1) for row in rows)])


def columns(sweep: Sweep | None) -> list[str]:
    """The paper's models, or the networks of a sweep that stand beside them."""
    ours = [model.label for model in sweep.recipe.models] if sweep else []
    if not set(ours) & set(INSTEAD):
        return list(MODELS)
    return [model for model in ours if model in MODELS or model in INSTEAD]


def provenance(sweep: Sweep, results: Mapping[str, Result]) -> list[str]:
    """One line per model: its weights and the images that it was evaluated on."""
    lines = []
    for model in columns(sweep):
        found = [results[cell.key] for cell in sweep.cells if cell.model == model and cell.key in results]
        if not found or found[0].accuracy is None:
            continue
        first, accuracy = found[0], found[0].accuracy
        instead = f", in place of the paper's {INSTEAD[model]}" if model in INSTEAD else ""
        theirs = PUBLISHED_TOP1[INSTEAD.get(model, model)]
        lines.append(
            f"- {model}{instead}: FP32 top-1 {100 * accuracy.fp32.top1:.2f} % (published checkpoint: {theirs:.2f} %), "
            f"weights {first.model.weights.origin} {first.model.sha256[:12]}, on "
            f"{escape_markdown(accuracy.protocol)}"
        )
    counts: dict[int, list[str]] = {}
    for source in sweep.recipe.sources:
        made = [results[cell.key] for cell in sweep.cells if cell.source == source.label and cell.key in results]
        if made:
            counts.setdefault(made[0].calibration.num_samples, []).append(escape_markdown(source.label))
    shown = "; ".join(f"{count} for {', '.join(labels)}" for count, labels in sorted(counts.items(), reverse=True))
    return [*lines, f"- Calibration images: {shown}."]


def steering(sweep: Sweep) -> str:
    """What the accuracy-aware algorithm allows, and on which images."""
    common = sweep.recipe.common
    points = 100 * float(common.get("max_drop", QuantizationOptions().max_drop))
    images = common.get("validate_on")
    where = (
        "the same images: top-1 where there are labels, else expected top-1 under FP32's probabilities"
        if images == "calibration"
        else f"`{images or sweep.recipe.eval}`, whatever the calibration set"
    )
    limit = "" if sweep.recipe.limit is None or images == "calibration" else f", of at most {sweep.recipe.limit} images"
    return (
        "- Accuracy-aware: the paper allows 2 points, measured on the calibration images with their labels. Here "
        f"{points:g} points are allowed, measured on {where}{limit}."
    )


def score_table(scores: Scores) -> str:
    """The published Inception Score, that of ovcalib's images, and every other score by its own name."""
    images = [*TABLE_2, *(name for name in scores if name not in TABLE_2)]
    measures = list(dict.fromkeys(name for row in scores.values() for name in row if name != INCEPTION_SCORE))
    rows = [["images", "paper: Inception Score of 50,000", "ovcalib: Inception Score", *measures]]
    rows.append(["---"] * len(rows[0]))
    for name in images:
        found = scores.get(name, {})
        ours = [f"{found[m]:.3g}" if m in found else "not run" for m in (INCEPTION_SCORE, *measures)]
        rows.append([escape_markdown(name), f"{TABLE_2[name]:.2f}" if name in TABLE_2 else "-", *ours])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def nncf_tables(sweep: Sweep, results: Mapping[str, Result]) -> list[str]:
    """What NNCF's own settings make of the same networks and images."""
    kernels = {result.accuracy.kernels for result in results.values() if result.accuracy}
    settings = ", ".join(f"`{name}={value}`" for name, value in sweep.recipe.common.items() if name != "limit")
    lines = ["", "## NNCF's own settings", "", f"{settings}. Measured on: {', '.join(sorted(map(str, kernels)))}."]
    for metric in (DROP, AGREEMENT, NMSE):
        table = metric_table(sweep, "default", metric, results, {}).markdown()
        lines += ["", f"### {metric.title}, NNCF's own settings", "", with_seeds(table, sweep)]
    return lines


def document(
    sweep: Sweep | None,
    results: Mapping[str, Result],
    scores: Scores,
    nncf: tuple[Sweep, Mapping[str, Result]] | None = None,
) -> str:
    """The whole of paper_tables.md.

    nncf    the sweep with NNCF's own settings, and its results
    """
    lines = [
        "# The paper's tables",
        "",
        "Generated by `python benchmarks/paper_tables.py` from a sweep of `benchmarks/paper.yaml` (`make tables`), or, "
        "where the columns are other networks than the paper's, of `benchmarks/paper_narrow.yaml` or "
        "`benchmarks/paper_shipped.yaml`. Each cell is the drop of top-1 accuracy in points, in brackets in % of FP32; "
        "the column beside it is the published value. Networks, data and quantizer differ from the paper, so this is "
        "not a like-for-like comparison. " + NOTES,
        "",
        *([f"Seeds per cell: {len(sweep.recipe.seeds)}.", ""] if sweep else []),
        "## Differences from the paper",
        "",
        DIFFERENCES,
    ]
    if sweep:
        if "accuracy-aware" in sweep.recipe.modes:
            lines += [steering(sweep)]
        lines += provenance(sweep, results)
        for machine in dict.fromkeys((r.environment.cpu, r.environment.isa) for r in results.values()):
            lines += [f"- CPU: {machine[0]}, {machine[1]}"]
        versions = next((r.environment.versions for r in results.values()), {})
        lines += [f"- Versions: {', '.join(f'{name} {value}' for name, value in versions.items() if value)}"]
    for title, mode, published in (
        ("Table 1a: default algorithm", "default", TABLE_1A),
        ("Table 1b: accuracy-aware algorithm", "accuracy-aware", TABLE_1B),
    ):
        lines += ["", f"## {title}", "", with_seeds(drop_table(sweep, results, mode, published), sweep)]
        if sweep and mode in sweep.recipe.modes:
            more: list[Metric] = [AGREEMENT, NMSE] if mode == "default" else [REVERTED, SECONDS]
            for metric in more:
                table = metric_table(sweep, mode, metric, results, {}).markdown()
                lines += ["", f"### {metric.title}", "", with_seeds(table, sweep)]
    if nncf:
        lines += nncf_tables(*nncf)
    lines += ["", "## Table 2: scores of the images", "", score_table(scores)]
    if sweep and sweep.failed:
        lines += [
            "",
            "## Failed cells",
            "",
            *(f"- {escape_markdown(name)}: {escape_markdown(error)}" for name, error in failures(sweep)),
        ]
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
    parser.add_argument("--nncf", type=Path, help="folder of the sweep with NNCF's own settings")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "paper_tables.md")
    args = parser.parse_args()
    sweep = read_sweep(args.sweep) if args.sweep else None
    args.output.parent.mkdir(parents=True, exist_ok=True)
    scores = json.loads(args.scores.read_text()) if args.scores else {}
    own = read_sweep(args.nncf) if args.nncf else None
    nncf = (own, read_results(args.nncf, own)) if own else None
    args.output.write_text(document(sweep, read_results(args.sweep, sweep) if sweep else {}, scores, nncf))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    command.run(main)
