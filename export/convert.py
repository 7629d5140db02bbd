"""A model as ONNX and FP32 IR, with the parity of all forms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import openvino as ov

from ovcalib.errors import UsageError
from ovcalib.export.parity import NOT_MEASURED, check_parity, ir_difference
from ovcalib.graph.files import batch_one, describe, read_graph, refuse_quantized_graph, write_ir
from ovcalib.graph.heads import Detector, split_detector
from ovcalib.models.load import Model
from ovcalib.progress import Progress
from ovcalib.records.result import Parity


@dataclass(frozen=True)
class Exported:
    """The FP32 graph with batch 1, and how far the forms of the model are apart.

    graph      what is quantized and compared: of a detector with boxes in the graph, the part up to the raw heads
    detector   its parts; None for any other graph
    """

    graph: ov.Model
    detector: Detector | None
    parity: Parity
    parity_reason: str | None

    def whole(self, graph: ov.Model) -> ov.Model:
        """`graph`, or what it was made into, with what follows the raw heads."""
        return graph if self.detector is None else self.detector.join(graph)


def export(model: Model, folder: Path, progress: Progress, dynamic_batch: bool = False, fp16: bool = False) -> Exported:
    """Write model.onnx (of a torch module) and model.xml into a folder.

    dynamic_batch   leave the batch of the written files open
    fp16            store the weights of model.xml in 16 bits; parity is then also that of the stored file
    raises          ModelError where the model cannot be exported, or is quantized already
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model.graph is not None:
        refuse_quantized_graph(model.graph, model.spec.name)
        graph, parity, reason = model.graph, NOT_MEASURED, "the model was given as a graph"
        if model.module is not None:
            reason += ", and computes what the torch module for its statistics does"
        describe(graph, model.spec, dynamic_batch)
    else:
        assert model.module is not None
        from ovcalib.export.to_onnx import to_onnx

        progress.say(f"exporting {model.spec.name}")
        path = folder / "model.onnx"
        to_onnx(model.module, model.spec.input_shape, path, dynamic_batch)
        graph = read_graph(path)
        describe(graph, model.spec, dynamic_batch)
        parity, reason = check_parity(model.module, path, graph), None
    detector = split_detector(batch_one(graph, model.spec)) if model.spec.task == "detection" else None
    if detector is not None and dynamic_batch:
        raise UsageError(
            f"`dynamic_batch=True`: {model.spec.name} computes boxes of one image in its graph. Leave the batch at 1."
        )
    write_ir(graph, folder / "model.xml", fp16)
    if fp16 and model.graph is None:
        assert model.module is not None
        # Rounded weights are no fault of the export, so there is no limit on their difference.
        stored = ir_difference(model.module, read_graph(folder / "model.xml"))
        parity = parity.model_copy(update={"torch_vs_ir_max_abs": stored})
    return Exported(batch_one(graph, model.spec) if detector is None else detector.body, detector, parity, reason)
