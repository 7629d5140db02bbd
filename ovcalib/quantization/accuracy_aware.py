"""Accuracy-aware quantization of a model: the search on its graphs, outputs and metric."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from typing import Any

import openvino as ov

from ovcalib.evaluation.dataset import Images, require_labels
from ovcalib.evaluation.metrics import expected_hits, hits, nmse, same_class, same_pixels
from ovcalib.evaluation.outputs import Outputs, collect
from ovcalib.graph.editing import restore
from ovcalib.graph.reading import layer_name, quantized_operations
from ovcalib.kernels import proof_kernels, runner_for
from ovcalib.progress import Progress
from ovcalib.quantization.accuracy_search import Restoration, restore_accuracy
from ovcalib.records.model import Task, is_class_map
from ovcalib.records.options import GoalMetric, QuantizationOptions
from ovcalib.records.result import Restored
from ovcalib.runtime import OpenVINORunner, output_ports

SHORTER = "a limit (`max_time`, `max_iterations`), or a part of the images (`limit`)."
# Items on which candidates of accuracy-aware quantization are ranked.
RANKING_ITEMS = 100


def restore_to_goal(
    options: QuantizationOptions,
    fp32: ov.Model,
    int8: ov.Model,
    steering: Images,
    task: Task,
    out_of_time: Callable[[], bool],
    progress: Progress,
    reference: Outputs | None = None,
) -> tuple[Restoration[ov.Model], Restored]:
    """Revert operations of a default INT8 model to float until the metric drops by at most `max_drop`.

    task        what the outputs are
    reference   outputs of FP32 on the steering images, where they are known
    raises      DataError where the metric needs labels, and the images have none
    """
    items, kernels = steering.items, proof_kernels(options.deploy_isa)
    reference = reference or collect(OpenVINORunner(fp32), items)
    require_labels(options.metric, reference.labels, steering.on)
    usual: dict[Task, GoalMetric] = {
        "classification": "expected-top1" if reference.labels is None else "top1",
        "segmentation": "agreement",
    }
    metric = options.metric or usual.get(task, "nmse")
    ports = output_ports(fp32)
    class_map = next((port.name for port in ports if is_class_map(port.shape)), "")
    subset = list(islice(items, RANKING_ITEMS))

    def score(outputs: Outputs) -> float:
        if metric == "top1":
            assert reference.labels is not None
            return float(hits(outputs.values, reference.labels).mean())
        if metric == "expected-top1":
            return float(expected_hits(reference.values, outputs.values).mean())
        if metric == "nmse":
            return 1 - nmse(reference.values, outputs.values)
        if task == "segmentation":
            return same_pixels(*(values.by_name(ports)[class_map] for values in (reference, outputs)))
        return float(same_class(reference.values, outputs.values).mean())

    def error(model: ov.Model) -> float:
        return nmse(reference.values[: len(subset)], collect(runner_for(model, kernels), subset).values)

    with ExitStack() as stack:
        tasks: dict[str, Any] = {}

        def say(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = stack.enter_context(progress.task(step, total, SHORTER))
            tasks[step](done)

        found = restore_accuracy(
            operations=[op.get_friendly_name() for op in quantized_operations(int8)],
            build=functools.partial(restore, int8, fp32),
            validate=lambda model: score(collect(runner_for(model, kernels), items)),
            error=error,
            baseline=score(reference),
            max_drop=options.max_drop,
            max_iterations=options.max_iterations,
            out_of_time=out_of_time,
            say=say,
        )
    return found, Restored(
        metric=metric, on=steering.on, count=len(reference), max_drop=options.max_drop, baseline=score(reference),
        value=found.metric, validations=found.validations,
        ranking=tuple((layer_name(name), value) for name, value in found.ranking),
    )  # fmt: skip
