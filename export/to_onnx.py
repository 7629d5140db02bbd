"""torch -> ONNX: one file, named inputs and outputs, nodes named after the modules they come from."""

from __future__ import annotations

import ast
import contextlib
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovcalib.errors import ModelError, excerpt, interrupted, require

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import nn

INPUT_NAME = "input"
OPSET = 20


def to_onnx(module: nn.Module, input_shape: tuple[int, int, int], path: Path, dynamic_batch: bool = False) -> None:
    """Write an eval-mode module as one ONNX file.

    input_shape     (C, H, W)
    dynamic_batch   leave the first dimension open; otherwise it is 1
    raises          ModelError where neither of torch's exporters can trace the module
    """
    onnx = require("onnx", "quantize", "Export to ONNX")
    refuse_quantized(module)
    model = _export(module, input_shape, dynamic_batch)
    _name_outputs(model)
    _name_nodes(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # onnx raises several unrelated types
        raise ModelError(f"The exported ONNX model is not valid: {excerpt(error)}.") from error
    onnx.save(model, str(path))


def refuse_quantized(module: nn.Module) -> None:
    """Raise ModelError for a module that holds quantized layers or quantized weights."""
    for name, child in module.named_modules():
        if ".quantized" in type(child).__module__ or type(child).__name__ in ("FakeQuantize", "QuantStub"):
            raise ModelError(
                f"The model is already quantized: {name or 'it'} is a {type(child).__name__}. Pass the float model."
            )
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() and not parameter.is_complex():
            raise ModelError(f"The model is already quantized: {name} is {parameter.dtype}. Pass the float model.")


def _export(module: nn.Module, input_shape: tuple[int, int, int], dynamic_batch: bool) -> onnx.ModelProto:
    import torch

    # Tracing specialises a dimension of 1, so an open batch is traced with 2.
    example = torch.zeros(2 if dynamic_batch else 1, *input_shape)
    arguments: dict[str, Any] = {"input_names": [INPUT_NAME], "opset_version": OPSET, "verbose": False}
    with _quiet():
        try:
            shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
            program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=shapes, **arguments)
            assert program is not None
            return program.model_proto
        except Exception as modern:  # torch.export refuses some modules that tracing accepts
            if interrupted(modern):
                raise KeyboardInterrupt from modern
            return _export_by_tracing(module, example, dynamic_batch, arguments, modern)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' warnings, which a user can do nothing about."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _export_by_tracing(
    module: nn.Module, example: torch.Tensor, dynamic_batch: bool, arguments: dict[str, Any], modern: Exception
) -> onnx.ModelProto:
    import onnx
    import torch

    axes = {INPUT_NAME: {0: "batch"}} if dynamic_batch else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(module, (example,), str(path), dynamo=False, dynamic_axes=axes, **arguments)
            return onnx.load(str(path))
    except Exception as error:
        reason = str(modern).strip().splitlines()
        raise ModelError(
            f"torch cannot export the model to ONNX: {reason[0] if reason else type(modern).__name__}. "
            "Control flow that depends on values is the usual cause; export it yourself and pass the .onnx file."
        ) from error


def _name_outputs(model: onnx.ModelProto) -> None:
    """Outputs are "logits" where there is one of rank 2, else "output0", "output1", ..."""
    single = len(model.graph.output) == 1 and len(model.graph.output[0].type.tensor_type.shape.dim) == 2
    taken = {name for node in model.graph.node for name in node.output}
    for i, output in enumerate(model.graph.output):
        old, new = output.name, "logits" if single else f"output{i}"
        if old == new:
            continue
        if new in taken:
            _rename_tensor(model, new, f"{new}_inner")
        _rename_tensor(model, old, new)
        output.name = new


def _rename_tensor(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
    for value in model.graph.value_info:
        if value.name == old:
            value.name = new


def _name_nodes(model: onnx.ModelProto) -> None:
    """Name every node after the module that owns its weight, or after the module and the operation.

    So an ignored scope or a report says `layer1.0.conv1`, where the exporter says `node_Conv_309`.
    """
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        owner = next((name[: -len(".weight")] for name in node.input[1:2] if name.endswith(".weight")), None)
        name = owner or "/".join(part for part in (module_scope(node), node.op_type) if part)
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"


def module_scope(node: onnx.NodeProto) -> str:
    """The dotted path of the module in whose forward a node was made; "" for the model itself."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""
