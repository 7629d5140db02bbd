"""Reading ONNX and IR files, writing IR, and the metadata of an IR.

An IR has its metadata twice: in `model_info`, with the names that OpenVINO's Model API reads, and in
`ovcalib`, with the whole ModelSpec.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path

import openvino as ov

from ovcalib.errors import ModelError
from ovcalib.graph.reading import signal_names
from ovcalib.records.model import ModelSpec
from ovcalib.records.preprocessing import Preprocessing

SPEC_PATH = ["ovcalib", "spec"]
# OpenVINO takes minutes for an opset far beyond those that there are, and twice as long for each level of an If.
MAX_OPSET = 1000
MAX_SUBGRAPHS = 4


def read_graph(path: Path) -> ov.Model:
    """Read FILE.onnx or FILE.xml (with FILE.bin beside it).

    raises   ModelError for a file that is missing, damaged, or no model
    """
    if not path.is_file():
        raise ModelError(f"There is no model file {str(path)!r}.")
    if path.suffix == ".xml" and not path.with_suffix(".bin").is_file():
        raise ModelError(f"{str(path)!r} has no weights beside it: {str(path.with_suffix('.bin'))!r} is missing.")
    if path.suffix == ".onnx" and importlib.util.find_spec("onnx"):
        _refuse_endless(path)
    try:
        # The front end is named, because probing all of them prints errors.
        name = {".onnx": "onnx", ".xml": "ir"}[path.suffix]
        frontend = ov.frontend.FrontEndManager().load_by_framework(name)
        loaded = frontend.load(str(path))
        # convert_model folds what the ONNX front end leaves as shape arithmetic; without it no bias is a
        # constant, and NNCF silently corrects none of them.
        graph = ov.convert_model(str(path)) if name == "onnx" else ov.Model(frontend.convert(loaded))
    except Exception as error:  # OpenVINO raises RuntimeError and its own types
        reason = _reason(error)
        raise ModelError(
            f"{str(path)!r} cannot be read as {path.suffix[1:].upper()}: {reason} Export the model again."
        ) from error
    ensure_names(graph)
    return graph


def describe(graph: ov.Model, spec: ModelSpec, dynamic_batch: bool = False) -> None:
    """Fix the input's shape and write the spec and Model API's metadata into the graph."""
    graph.reshape({graph.inputs[0]: ov.PartialShape([-1 if dynamic_batch else 1, *spec.input_shape])})
    graph.set_rt_info(spec.model_dump_json(), SPEC_PATH)
    for key, value in model_api_info(spec).items():
        graph.set_rt_info(value, ["model_info", key])


def model_api_info(spec: ModelSpec) -> dict[str, str]:
    """The `model_info` entries that OpenVINO's Model API and DL Streamer read; mean and scale on the 0..255 scale."""
    pre: Preprocessing = spec.preprocessing
    info = {
        "mean_values": " ".join(f"{255 * m:.6g}" for m in pre.mean),
        "scale_values": " ".join(f"{255 * s:.6g}" for s in pre.std),
        # Model API images are BGR, as OpenCV decodes them.
        "reverse_input_channels": str(pre.channel_order == "RGB"),
        "resize_type": "standard" if pre.short_side is None else "crop",
        "orig_height": str(pre.height),
        "orig_width": str(pre.width),
    }
    if spec.num_classes is not None:
        info["model_type"] = "Classification"
    if spec.classes is not None:
        info["labels"] = " ".join(name.replace(" ", "_") for name in spec.classes)
    return info


def stored_spec(graph: ov.Model) -> ModelSpec | None:
    """The spec that ovcalib wrote into an IR, or None."""
    if not graph.has_rt_info(SPEC_PATH):
        return None
    try:
        return ModelSpec.model_validate_json(graph.get_rt_info(SPEC_PATH).astype(str))
    except ValueError:  # written by another version
        return None


def write_ir(graph: ov.Model, path: Path, fp16: bool = False) -> None:
    """Write FILE.xml and FILE.bin; float constants stay float32 unless `fp16`.

    Constants, and operations on constants, that OpenVINO named are named by their position: it numbers them by all that
    the process made before, and the same graph should give the same bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    signals = signal_names(graph)
    for i, op in enumerate(graph.get_ordered_ops()):
        if op.get_name() not in signals and re.fullmatch(r"[A-Z]\w*_\d+", op.get_friendly_name()):
            op.set_friendly_name(f"{op.get_type_name()}_{i}")
    ov.save_model(graph, str(path), compress_to_fp16=fp16)


def ir_bytes(folder: Path) -> int:
    """Bytes of model.xml and model.bin in a folder."""
    return sum((folder / name).stat().st_size for name in ("model.xml", "model.bin"))


def _refuse_endless(path: Path) -> None:
    """Refuse an ONNX file that OpenVINO would read for ever; a damaged one is left to OpenVINO."""
    import onnx

    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except Exception:  # of protobuf, whose errors have no common base
        return
    opset = max((entry.version for entry in model.opset_import), default=0)
    if opset > MAX_OPSET:
        raise ModelError(f"{str(path)!r} cannot be read as ONNX: it asks for opset {opset}. Export the model again.")
    level, depth = [model.graph], 0
    while level:
        level = [
            inner
            for graph in level
            for node in graph.node
            for attribute in node.attribute
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else []))
        ]
        depth += bool(level)
        if depth > MAX_SUBGRAPHS:
            raise ModelError(
                f"{str(path)!r} cannot be read as ONNX: its control flow is nested more than {MAX_SUBGRAPHS} levels "
                "deep. Export the model without it, for example by tracing."
            )


def ensure_names(graph: ov.Model) -> None:
    """Give a tensor name to every input and output that has none; NNCF and users index by name."""
    for kind, ports in (("input", graph.inputs), ("output", graph.outputs)):
        for i, port in enumerate(ports):
            if not port.get_names():
                port.get_tensor().set_names({kind if len(ports) == 1 else f"{kind}{i}"})


def is_quantized(graph: ov.Model) -> str | None:
    """The name of an operation that shows that a graph is already quantized, or None.

    NNCF's bare `nncf` entry does not count: it is written onto float models too.
    """
    if graph.has_rt_info(["nncf", "quantization"]):
        return "nncf/quantization"
    for op in graph.get_ops():
        kind = op.get_type_name()
        if kind in ("FakeQuantize", "FakeConvert"):
            return str(op.get_friendly_name())
        if kind == "Convert" and op.input_value(0).get_node().get_type_name() == "Constant":
            source = op.input_value(0)
            small = source.get_element_type().to_string() in ("i4", "u4", "i8", "u8", "nf4", "f8e4m3", "f8e5m2")
            if small and op.output(0).get_element_type().is_real() and len(source.get_shape()) > 1:
                return str(op.get_friendly_name())
    return None


def refuse_quantized_graph(graph: ov.Model, name: str) -> None:
    found = is_quantized(graph)
    if found is not None:
        raise ModelError(
            f"{name!r} is already quantized (it has {found!r}); quantizing it again would double the rounding. "
            "Pass the float model."
        )


def graph_sha256(graph: ov.Model) -> str:
    """A hash of structure and constants, whatever names and metadata the .xml file has."""
    digest = hashlib.sha256()
    ops = graph.get_ordered_ops()
    number = {op.get_name(): i for i, op in enumerate(ops)}
    for op in ops:
        sources = [(number[v.get_node().get_name()], v.get_index()) for v in op.input_values()]
        shapes = [str(port.get_partial_shape()) + port.get_element_type().to_string() for port in op.outputs()]
        digest.update(f"{op.get_type_name()} {sources} {shapes}".encode())
        if op.get_type_name() == "Constant":
            digest.update(op.get_data().tobytes())
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    """The last informative line of OpenVINO's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API"))]
    return (telling or lines or [type(error).__name__])[-1].rstrip(".") + "."


def batch_one(graph: ov.Model, spec: ModelSpec) -> ov.Model:
    """The graph with batch 1; a copy where its batch is open."""
    if graph.inputs[0].get_partial_shape().is_static:
        return graph
    fixed = graph.clone()
    fixed.reshape({fixed.inputs[0]: ov.PartialShape([1, *spec.input_shape])})
    return fixed
