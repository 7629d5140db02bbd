"""Inference on a device."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib import machine
from ovcalib.errors import DeviceError, ModelError, UnknownNameError

# Precision in which accuracy is measured. By default, a device may run the float parts of a model in 16 bits.
EVALUATION_PRECISION = "f32"
# All observed outputs of a graph are in memory at once; outputs that do not fit are observed in several passes.
GROUP_BYTES = 256 * 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class Port:
    """An output tensor, and its shape for one item."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def output_ports(graph: ov.Model) -> tuple[Port, ...]:
    """The outputs of a graph with batch 1; a batch that an output does not have is not taken off."""
    for port in graph.outputs:
        if port.get_partial_shape().is_dynamic:
            raise ModelError(
                f"The output {min(port.get_names())!r} has the shape {port.get_partial_shape()}, which depends on the "
                "image. Expected outputs of a fixed size: let the network return its raw heads."
            )
    shapes = [tuple(port.get_shape()) for port in graph.outputs]
    return tuple(
        Port(min(port.get_names()), shape[1:] if shape[:1] == (1,) else shape)
        for port, shape in zip(graph.outputs, shapes, strict=True)
    )


class Runner(Protocol):
    """Runs a network on inputs, in order."""

    def run(self, inputs: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Outputs of items, each float32 [K]: all output tensors of the item, flattened one after the other."""
        ...


@functools.cache
def core() -> ov.Core:
    return ov.Core()


class OpenVINORunner:
    """A compiled graph with enough requests in flight to keep the device busy.

    graph       with batch 1
    precision   inference precision hint: "f32", "bf16", "f16", or None for the device's default
    config      further properties of the device
    """

    def __init__(
        self,
        graph: ov.Model,
        device: str = "CPU",
        precision: str | None = EVALUATION_PRECISION,
        config: Mapping[str, str] | None = None,
    ) -> None:
        config = {"PERFORMANCE_HINT": "THROUGHPUT", **(config or {})}
        if precision is not None:
            config["INFERENCE_PRECISION_HINT"] = precision
        self.compiled = compile_graph(graph, device, config)
        self.requests = int(self.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) + 1

    def run(self, inputs: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        # Requests are waited for in the order in which they were started, so outputs need no sorting.
        pending: deque[tuple[ov.InferRequest, NDArray[np.float32]]] = deque()
        for x in inputs:
            if len(pending) < self.requests:
                request = self.compiled.create_infer_request()
            else:
                request, _ = pending.popleft()
                yield _outputs(request)
            request.set_input_tensor(ov.Tensor(x))
            request.start_async()
            pending.append((request, x))  # the array must outlive the request
        for request, _ in pending:
            yield _outputs(request)


class Inference:
    """All outputs of a graph for one image after another, on the CPU in f32."""

    def __init__(self, graph: ov.Model) -> None:
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": EVALUATION_PRECISION}
        self.request = compile_graph(graph, "CPU", config).create_infer_request()

    def __call__(self, x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Views that hold until the next call."""
        self.request.set_input_tensor(ov.Tensor(x))
        self.request.infer()
        return [tensor.data for tensor in self.request.output_tensors]


class MultiInference:
    """All outputs of a graph with several inputs, on the CPU in f32."""

    def __init__(self, graph: ov.Model) -> None:
        self.names = [min(port.get_names(), default=f"output{i}") for i, port in enumerate(graph.outputs)]
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": EVALUATION_PRECISION}
        self.request = compile_graph(graph, "CPU", config).create_infer_request()

    def __call__(self, inputs: Sequence[NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
        """Copies of the outputs by name, for inputs in the order of the graph."""
        for i, value in enumerate(inputs):
            self.request.set_input_tensor(i, ov.Tensor(np.ascontiguousarray(value)))
        self.request.infer()
        tensors = self.request.output_tensors
        return {name: np.array(tensor.data) for name, tensor in zip(self.names, tensors, strict=True)}


def groups_that_fit(items: Sequence[T], size: Callable[[T], int]) -> list[list[T]]:
    """Items in order, in groups of at most GROUP_BYTES; what is larger stands alone."""
    groups: list[list[T]] = []
    held = 0
    for item in items:
        own = size(item)
        if not groups or held + own > GROUP_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += own
    return groups


def size_of(value: ov.Output) -> int:
    """Bytes of a float32 value; 0 where its shape is not known before it is computed."""
    shape = value.get_partial_shape()
    return 4 * int(np.prod(list(shape.to_shape()))) if shape.is_static else 0


def outputs_of(graph: ov.Model, inputs: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Outputs [N, K] of a graph on the CPU in f32."""
    return np.stack(list(OpenVINORunner(graph).run(inputs)))


def _outputs(request: ov.InferRequest) -> NDArray[np.float32]:
    request.wait()
    values = [np.asarray(tensor.data, dtype=np.float32).reshape(-1) for tensor in request.output_tensors]
    return values[0].copy() if len(values) == 1 else np.concatenate(values)


def compile_graph(graph: ov.Model, device: str, config: Mapping[str, Any]) -> ov.CompiledModel:
    """Compile for one device.

    raises   DeviceError for a device that is not there, ModelError for a graph that it cannot run
    """
    check_device(device)
    try:
        return core().compile_model(graph, device, with_precision(device, config))
    except RuntimeError as error:
        raise ModelError(f"{device} cannot compile the model: {str(error).strip().splitlines()[-1]}") from error


def with_precision(device: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Properties with a precision that the CPU can compute in, where none is given.

    OpenVINO (2026.4) takes bfloat16 by the flags of the CPU alone, and cannot compile where ONEDNN_MAX_CPU_ISA
    withholds it.
    """
    if device == "CPU" and machine.bfloat16_is_withheld():
        return {"INFERENCE_PRECISION_HINT": "f32", **config}
    return dict(config)


def check_device(device: str) -> None:
    """Raise DeviceError with the devices that exist where `device` is not one of them."""
    available = core().available_devices
    for name in device.replace("AUTO", "").replace("HETERO", "").replace("MULTI", "").strip(":").split(","):
        if name and name not in available and name not in {a.split(".")[0] for a in available}:
            known = sorted({*available, "AUTO"})
            raise DeviceError(
                str(UnknownNameError("device", name, known))
                + (
                    " A GPU or NPU appears when its driver is installed; see `ovcalib doctor`."
                    if name in ("GPU", "NPU")
                    else ""
                )
            )
