"""How much of the time each operation of a graph takes, from the counters of the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.graph.reading import MOVING, signal_names, signals_of
from ovcalib.runtime import compile_graph

# Microseconds by name.
Times = dict[str, float]


def executed_times(request: ov.InferRequest, seconds: float, clock: Callable[[], float] = time.perf_counter) -> Times:
    """Mean time of every executed node in one inference, for `seconds` of inferences.

    request   of a graph that was compiled with PERF_COUNT, its inputs set
    """
    request.infer()
    totals: Times = {}
    inferences, end = 0, clock() + seconds
    while not inferences or clock() < end:
        request.infer()
        inferences += 1
        for node in request.profiling_info:
            if node.status == ov.ProfilingInfo.Status.EXECUTED:
                totals[node.node_name] = totals.get(node.node_name, 0.0) + node.real_time.total_seconds()
    return {name: 1e6 * total / inferences for name, total in totals.items()}


def operation_times(graph: ov.Model, names: Collection[str], device: str, seconds: float) -> Times:
    """Time of operations of a graph, each with what only serves it: its quantizers, biases and activations.

    Devices fuse operations and rename what they make of them. Of each executed node, the operations that it was made
    from are followed to the named operation that they belong to. What a device adds by itself, such as a change of the
    layout, belongs to what reads it. What leads to none is left out.

    names   friendly names of operations of the graph
    """
    compiled = compile_graph(graph, device, {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True})
    request = compiled.create_infer_request()
    set_random_input(request)
    taken = executed_times(request, seconds)
    owner = owners(graph, names)
    found = dict.fromkeys(names, 0.0)
    belongs: dict[str, str] = {}
    executed: Sequence[Any] = compiled.get_runtime_model().get_ordered_ops()
    for node in reversed(executed):
        info, name = node.get_rt_info(), node.get_friendly_name()
        made_from = info["originalLayersNames"].astype(str).split(",") if "originalLayersNames" in info else []
        readers = [t.get_node().get_friendly_name() for out in node.outputs() for t in out.get_target_inputs()]
        candidates = [*(owner[n] for n in made_from if n in owner), *(belongs[r] for r in readers if r in belongs)]
        if candidates:
            belongs[name] = candidates[0]
            found[belongs[name]] += taken.get(name, 0.0)
    return found


def set_random_input(request: ov.InferRequest) -> None:
    """Seeded standard normal values, as normalised images have, for one item."""
    (port,) = request.model_inputs
    request.set_input_tensor(ov.Tensor(random_input(port, np.random.default_rng(0))))


def random_input(port: Any, rng: np.random.Generator) -> NDArray[Any]:
    """Standard normal values, as normalised images have, or bytes; in the type that the model takes.

    An open dimension, such as the batch, is taken as 1.
    """
    dtype = port.get_element_type().to_dtype()
    shape = [d.get_length() if d.is_static else 1 for d in port.get_partial_shape()]
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(shape, np.float32).astype(dtype)
    return rng.integers(0, 2 if dtype != np.uint8 else 256, shape).astype(dtype)


def owners(graph: ov.Model, names: Collection[str]) -> dict[str, str]:
    """Which of the named operations an operation belongs to, by friendly name.

    A quantizer belongs to the first operation that reads it, anything else to the one that its first signal comes from.
    """
    names, signals = set(names), signal_names(graph)
    found: dict[str, str] = {}
    ordered: Sequence[Any] = graph.get_ordered_ops()
    for op in ordered:
        name = op.get_friendly_name()
        if name in names:
            found[name] = name
        elif op.get_type_name() != "FakeQuantize":
            before = [value.get_node().get_friendly_name() for value in signals_of(op, signals)]
            # What only moves quantized values has the quantizer before it, which has no owner yet.
            if before and before[0] in found:
                found[name] = found[before[0]]
    for op in reversed(ordered):
        name = op.get_friendly_name()
        if name not in found and (op.get_type_name() == "FakeQuantize" or op.get_type_name() in MOVING):
            readers = [port.get_node().get_friendly_name() for port in op.output(0).get_target_inputs()]
            reader = next((found[r] for r in readers if r in found), None)
            if reader is not None:
                found[name] = reader
    return found
