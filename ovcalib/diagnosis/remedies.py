"""What mends an INT8 model: new quantizations of its FP32 model, tried and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import openvino as ov

from ovcalib.calibration.make import make_set, resolve_calibration
from ovcalib.calibration.probe import judging_inputs
from ovcalib.errors import MissingDependencyError, ModelError, require_installed
from ovcalib.models.load import Model
from ovcalib.progress import Progress
from ovcalib.quantization.quantize import quantize_graph
from ovcalib.quantization.settings import resolve_settings
from ovcalib.records.diagnosis import Metrics, Remedy
from ovcalib.records.options import CalibrationOptions, ModelOptions, QuantizationOptions
from ovcalib.records.recipe import Recipe
from ovcalib.reports.result import quantize_command

NOT_INSTALLED = "No new quantization was tried: NNCF or scipy is not installed here (pip install 'ovcalib[quantize]')."


def can_quantize() -> bool:
    try:
        require_installed(("nncf", "scipy"), "Quantization")
    except MissingDependencyError:
        return False
    return True


def can_finetune(fp32: ov.Model, name: str) -> bool:
    """Whether torch is installed, and computes every operation of the graph."""
    try:
        require_installed(("torch",), "Fine-tuning")
        from ovcalib.quantization.finetuning import refuse_unknown_operations

        refuse_unknown_operations(fp32, name)
    except (MissingDependencyError, ModelError):
        return False
    return True


def try_remedies(
    about: ModelOptions,
    model: Model,
    fp32: ov.Model,
    source: str,
    seed: int,
    harmful: Sequence[str],
    measure: Callable[[ov.Model], Metrics],
    good_enough: Callable[[Metrics], bool],
    progress: Progress,
) -> tuple[Remedy, ...]:
    """Quantize with the defaults and, where that is not good enough, in ways that cost more.

    The most harmful operations in float cost speed, and fine-tuning, which is tried last, takes minutes.

    about       how the FP32 model was named; model and fp32 are what it holds
    source      calibration source, at its own number of images
    seed        of the source: another than that of the images to measure on, so that made images are not the same
    harmful     patterns of operations for `ignore`
    measure     the metrics of an INT8 graph
    returns     in the order in which they were tried; the first that is good enough is the last
    raises      DataError, ModelError
    """
    options, _ = resolve_calibration(CalibrationOptions(calib=source, seed=seed), model, progress)
    calibration = make_set(options, model, progress, score=False, graph=fp32)

    def attempts() -> Iterator[QuantizationOptions]:
        yield QuantizationOptions()
        if harmful:
            yield QuantizationOptions(ignore=tuple(harmful))
        if can_finetune(fp32, model.spec.name):
            yield QuantizationOptions(finetune=True)

    tried: list[Remedy] = []
    for asked in attempts():
        settings = resolve_settings(asked, fp32)
        judges = judging_inputs(model, calibration, progress) if asked.finetune else None
        made = quantize_graph(
            asked, settings, fp32, calibration, None, model.spec.task, lambda: False, progress, judges=judges
        )
        found = measure(made.int8)
        recipe = Recipe(model=about, calibration=options, quantization=asked)
        tried.append(Remedy(command=quantize_command(recipe), **found.model_dump()))
        if good_enough(found):
            break
    return tuple(tried)
