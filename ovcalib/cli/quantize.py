"""`ovcalib quantize`, `generate` and `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ovcalib.cli.guard import OUTCOME_CODES, in_flags
from ovcalib.cli.options import Common, Option, add_command
from ovcalib.cli.plan import show
from ovcalib.cli.tables import print_table
from ovcalib.records.base import Shown, checked
from ovcalib.records.options import (
    CalibrationOptions,
    ConvertOptions,
    EvaluationOptions,
    GenerateOptions,
    MeasurementOptions,
    ModelOptions,
    QuantizationOptions,
)


def quantize(given: dict[str, Any], common: Common) -> int:
    """Quantize a model to INT8 and prove the result."""
    from ovcalib import api
    from ovcalib.records.read import read_recipe
    from ovcalib.reports.markdown import kernels_error, summary
    from ovcalib.reports.provenance import images_inside
    from ovcalib.reports.verdict import KERNELS, result_verdict

    recipe_file = given.pop("recipe", None)
    fields = {**(read_recipe(recipe_file) if recipe_file else {}), **given}
    recipe = api.make_recipe(**fields)
    source = (recipe.calibration.calib or "default").partition(":")[0]
    target = common.target(f"{recipe.model.reference}-{source}-{recipe.quantization.mode}")
    if common.dry_run:
        from ovcalib.rehearsal import plan_quantize

        return show(plan_quantize(recipe, target, common.overwrite, common.progress), common)
    result = api.run_recipe(recipe, target, overwrite=common.overwrite, progress=common.progress)
    warn(result.record.warnings, common)
    if common.as_json:
        print(result.record.model_dump_json(indent=2))
    else:
        print_table([summary(result.record)])
        for found in result.record.quantization.output_error:
            print(f"output error on {KERNELS[found.kernels]}: {kernels_error(found)}")
        print(f"\n{in_words(result_verdict(result.record)['text'])}")
        print(in_words(images_inside(result.record)))
        print(f"outcome: {result.record.outcome}; wrote {target / 'report.html'}")
    return OUTCOME_CODES[result.record.outcome]


def warn(warnings: tuple[str, ...], common: Common) -> None:
    """Show the warnings of a record in the words of the command line."""
    for warning in warnings:
        common.progress.say(f"warning: {in_words(warning)}")


def in_words(text: str) -> str:
    """A text of a record in the words of the command that runs."""
    return in_flags(text, getattr(click.get_current_context().command, "flags", {}))


def generate(given: dict[str, Any], common: Common) -> int:
    """Make a calibration set and write it.

    The set serves `ovcalib quantize --calib npz:FILE`, or other tools.
    """
    from ovcalib import api

    source, model, count = given.pop("calib"), given.pop("model"), given.pop("num_samples", None)
    target = common.target(f"{source.split(':')[0]}-{model}")
    if common.dry_run:
        from ovcalib.rehearsal import plan_generate

        about, rest = api.model_options(model, given)
        asked = checked(GenerateOptions, {"calib": source, "num_samples": count, **rest})
        return show(plan_generate(about, asked, target, common.overwrite, common.progress), common)
    calibration = api.generate(
        source, model, count, target, overwrite=common.overwrite, progress=common.progress, **given
    )
    made = calibration.provenance
    warn(made.warnings, common)
    if common.as_json:
        print(made.model_dump_json(indent=2))
        return 0
    print(f"{made.num_samples} images from {made.source} in {made.seconds:.1f} s; wrote {target}")
    if made.score is not None:
        for key, value in made.score.model_dump().items():
            print(f"{key}: {value:.4g}")
    elif given.get("score"):
        print(f"not scored: {made.score_reason}")
    return 0


def convert(given: dict[str, Any], common: Common) -> None:
    """Write a model as ONNX and FP32 IR, and compare their outputs."""
    from ovcalib import api

    model = given.pop("model")
    target = common.target(f"{model}-fp32")
    parity = api.convert(model, target, overwrite=common.overwrite, progress=common.progress, **given)
    if common.as_json:
        print(parity.model_dump_json(indent=2))
        return
    if parity.torch_vs_ir_max_abs is not None:
        print(
            f"largest difference from torch: ONNX {parity.torch_vs_onnx_max_abs:.2g} ({parity.onnx_runtime}), "
            f"IR {parity.torch_vs_ir_max_abs:.2g}; outputs reach {parity.output_max_abs:.3g}"
        )
    print(f"wrote {target}")


def add_to(app: click.Group) -> None:
    add_command(
        app,
        quantize,
        (CalibrationOptions, QuantizationOptions, EvaluationOptions, MeasurementOptions, ModelOptions),
        extra=[
            Option(
                ["-c", "--recipe", "recipe"],
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="A recipe (YAML, or the request.json of a result); options here beat it.",
            ),
        ],
        common=("output", "overwrite", "dry-run", "json"),
    )
    add_command(
        app,
        generate,
        (GenerateOptions, ModelOptions),
        renamed={"reference": Shown(("--model",), metavar="MODEL")},
        leave_out=("dynamic_batch", "keep_images"),
        common=("output", "overwrite", "dry-run", "json"),
    )
    add_command(app, convert, (ConvertOptions, ModelOptions))
