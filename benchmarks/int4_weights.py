"""What a CPU makes of weights that are stored with 4 bits, beside activations with 8.

    python benchmarks/int4_weights.py resnet20-cifar10 --calib fractal --count 64 -o int4-weights.json

Compares FP32, INT8, INT8 whose weights lie on a grid of 4 bits, and the same weights stored as `i4`: size of the
weights' file, NMSE of the outputs on the calibration images (not an accuracy), the kernels that the CPU plugin chose,
and the median latency, measured in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

import command
import numpy as np
import openvino as ov
from settings import about, add_model, save

import ovcalib
from ovcalib.evaluation.metrics import nmse
from ovcalib.export.convert import export
from ovcalib.graph.files import read_graph, write_ir
from ovcalib.graph.reading import integer_weights, quantized_layers
from ovcalib.progress import Progress
from ovcalib.quantization.low_bits import Bits, simulate
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.rounding import compensated
from ovcalib.quantization.settings import Settings, resolve_overflow_fix
from ovcalib.runtime import EVALUATION_PRECISION, compile_graph, outputs_of

ROUNDS, INFERENCES = 7, 50
LAYERS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")


def stored_as_i4(graph: ov.Model) -> ov.Model:
    """A copy whose integer weights, where they are within -8..7, have the element type i4: two in a byte."""
    copy = graph.clone()
    for layer in quantized_layers(copy):
        found = integer_weights(layer)
        if found is None or np.abs(found[0]).max() > 7:
            continue
        node = layer.op.input_value(1).get_node()
        if node.get_type_name() == "Reshape":
            node = node.input_value(0).get_node()
        convert = node.input_value(0).get_node()
        before = convert.input_value(0).get_node()
        flat = np.array(before.get_data(), np.int8).reshape(-1)
        flat = np.append(flat, np.zeros(flat.size % 2, np.int8)).view(np.uint8) & 15
        tensor = ov.Tensor(flat[0::2] | flat[1::2] << 4, ov.Shape(list(before.get_output_shape(0))), ov.Type.i4)
        constant = ov.op.Constant(tensor, shared_memory=False)
        convert.input(0).replace_source_output(constant.output(0))
    copy.validate_nodes_and_infer_types()
    return copy


def kernels(compiled: ov.CompiledModel) -> dict[str, int]:
    """How many layers run on each kernel."""
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    return dict(Counter(str(info["primitiveType"].value) for info in infos if str(info["layerType"].value) in LAYERS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--calib", default="fractal")
    parser.add_argument("--count", type=command.positive, default=64)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    given = about(args)
    model = ovcalib.load_model(args.model, **given)
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": EVALUATION_PRECISION}
    with tempfile.TemporaryDirectory() as folder:
        fp32 = export(model, Path(folder, "fp32"), Progress()).graph
        settings = Settings(overflow_fix=resolve_overflow_fix("auto", "host"), bias_correction="none")
        made = ovcalib.generate(args.calib, args.model, args.count, **given)
        inputs = made.inputs()
        int8 = quantize_default(fp32, made, settings)
        (coarse,) = compensated(fp32, [simulate(fp32, int8, Bits(weights=4), inputs)], inputs)
        arms = {"FP32": fp32, "INT8": compensated(fp32, [int8], inputs)[0], "4-bit weights as i8": coarse,
                "4-bit weights as i4": stored_as_i4(coarse)}  # fmt: skip
        reference, rows, requests = outputs_of(fp32, inputs), {}, {}
        for number, (name, graph) in enumerate(arms.items()):
            path = Path(folder, str(number), "model.xml")
            path.parent.mkdir()
            write_ir(graph, path)
            compiled = compile_graph(read_graph(path), "CPU", config)
            requests[name] = compiled.create_infer_request()
            rows[name] = {
                "bytes": path.with_suffix(".bin").stat().st_size, "kernels": kernels(compiled),
                "nmse": nmse(reference, outputs_of(read_graph(path), inputs)),
            }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(ROUNDS):
            for name, request in requests.items():
                for _ in range(INFERENCES):
                    began = time.perf_counter()
                    request.infer([inputs[0]])
                    times[name].append(1000 * (time.perf_counter() - began))
        for name, row in rows.items():
            row["p50_ms"] = round(float(np.median(times[name])), 3)
            print(f"{name}: {row}")
    save(args, rows=rows)


if __name__ == "__main__":
    command.run(main)
