"""Comparison of the outputs of torch module, ONNX file and IR."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.errors import ModelError
from ovcalib.records.result import Parity

if TYPE_CHECKING:
    from torch import nn

Run = Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]

# Of the largest output: float32 kernels of deep networks differ by up to 5e-4 of it.
TOLERANCE = 2e-3


NOT_MEASURED = Parity(
    torch_vs_ir_max_abs=None, torch_vs_onnx_max_abs=None, output_max_abs=None, onnx_runtime=None
)  # fmt: skip


def check_parity(module: nn.Module, onnx_path: Path, ir: ov.Model, seed: int = 0, items: int = 4) -> Parity:
    """Compare the outputs of all three on the same inputs.

    raises   ModelError that names the first layer at which they part, where they differ by more than TOLERANCE
    """
    inputs = _inputs(ir, seed, items)
    expected = [_torch_outputs(module, x) for x in inputs]
    run_onnx, runtime = _onnx_runner(onnx_path)
    run_ir = _ir_runner(ir)
    scale = max(float(np.abs(y).max()) for outputs in expected for y in outputs)
    differences = {}
    for kind, run in (("ONNX", run_onnx), ("IR", run_ir)):
        worst = _largest_difference(inputs, expected, run)
        # NaN compares false with everything, so the test is written the other way round.
        if not worst <= TOLERANCE * max(scale, 1e-6):
            layer = first_difference(module, onnx_path, inputs[0])
            raise ModelError(
                f"The {kind} differs from the torch model by {worst:.3g} (outputs reach {scale:.3g}), first at layer "
                f"{layer!r}. Expected at most {TOLERANCE:g} of the outputs; report it with the model, or export the "
                "model yourself and pass the .onnx file."
            )
        differences[kind] = worst
    return Parity(
        torch_vs_ir_max_abs=differences["IR"], torch_vs_onnx_max_abs=differences["ONNX"],
        output_max_abs=scale, onnx_runtime=runtime,
    )  # fmt: skip


def ir_difference(module: nn.Module, ir: ov.Model, seed: int = 0, items: int = 4) -> float:
    """The largest difference of the outputs of torch module and IR, on the inputs of `check_parity`."""
    inputs = _inputs(ir, seed, items)
    return _largest_difference(inputs, [_torch_outputs(module, x) for x in inputs], _ir_runner(ir))


def _inputs(ir: ov.Model, seed: int, items: int) -> list[NDArray[np.float32]]:
    shape = [d.get_length() if d.is_static else 1 for d in ir.inputs[0].get_partial_shape()]
    return [np.random.default_rng((seed, i)).standard_normal(shape, dtype=np.float32) for i in range(items)]


def _largest_difference(
    inputs: list[NDArray[np.float32]], expected: list[list[NDArray[np.float32]]], run: Run
) -> float:
    return max(
        float(np.abs(a - b).max()) for x, outputs in zip(inputs, expected, strict=True)
        for a, b in zip(outputs, run(x), strict=True)
    )  # fmt: skip


def first_difference(module: nn.Module, onnx_path: Path, x: NDArray[np.float32]) -> str:
    """The first module, in execution order, whose output in the ONNX file is not its output in torch.

    A layer that an export folded into its neighbour is compared where the fold ends.
    """
    import onnx
    import torch

    from ovcalib.export.to_onnx import module_scope
    from ovcalib.graph.files import read_graph

    modules = dict(module.named_modules())
    tensors: dict[str, str] = {}
    names: dict[str, str] = {}
    for node in onnx.load(str(onnx_path)).graph.node:
        scope = module_scope(node)
        if scope in modules and not any(modules[scope].children()):
            tensors[scope], names[scope] = node.output[0], node.name
    outputs: dict[str, NDArray[np.float32]] = {}

    def keep(scope: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs[scope] = output.detach().clone().numpy()

        return hook

    handles = [modules[scope].register_forward_hook(keep(scope)) for scope in tensors]
    try:
        _torch_outputs(module, x)
    finally:
        for handle in handles:
            handle.remove()
    graph = read_graph(onnx_path)
    known = {name for op in graph.get_ops() for port in op.outputs() for name in port.get_names()}
    scopes = [scope for scope in tensors if scope in outputs and tensors[scope] in known]
    graph.add_outputs([tensors[scope] for scope in scopes if not _is_output(graph, tensors[scope])])
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(x)
    for scope in scopes:
        ours, theirs = outputs[scope], results[tensors[scope]]
        if ours.shape == theirs.shape and not np.abs(ours - theirs).max() <= TOLERANCE * max(np.abs(ours).max(), 1e-6):
            return names[scope]
    return "(the layers agree one by one)"


def _is_output(graph: ov.Model, tensor: str) -> bool:
    return any(tensor in port.get_names() for port in graph.outputs)


def _torch_outputs(module: nn.Module, x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    import torch

    with torch.no_grad():
        outputs = module(torch.from_numpy(x))
    leaves, _ = torch.utils._pytree.tree_flatten(outputs)
    return [leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _onnx_runner(path: Path) -> tuple[Run, str]:
    try:
        import onnxruntime
    except ImportError:
        from ovcalib.graph.files import read_graph

        return _ir_runner(read_graph(path)), "openvino"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: list(session.run(None, {name: x})), "onnxruntime"


def _ir_runner(graph: ov.Model) -> Run:
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: list(compiled(x).values())
