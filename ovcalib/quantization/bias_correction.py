"""Layerwise bias correction: removes the mean shift that rounding a layer's weights causes in each output channel.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019, section 4.2:
E[~y] = E[y] + eps E[x], where eps is the rounding error of the weights, so b -= eps E[x]. Here E[x], the mean input of
the layer in the FP32 network, is computed on calibration images; the layer runs on them with both weights, which also
accounts for padding at the border of the image.

NNCF's `BiasCorrection` ("full") is that of the paper's appendix D: b += E[y] - E[~y], with the outputs of the
quantized and corrected layers before it as input. The shift then also has to compensate errors of earlier layers that
grow with the activation, which a shift cannot; the coarser the weights, the larger the effect
(benchmarks/results/calibration.md, "Bias correction"). A layer corrected alone stays corrected when others are reverted
to float.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from ovcalib.graph.editing import add_to_biases, fold_weights, redirect
from ovcalib.graph.reading import activation_quantizers, quantized_layers
from ovcalib.runtime import Inference


def correct_biases(fp32: ov.Model, int8: ov.Model, images: Sequence[NDArray[np.float32]]) -> None:
    """Correct the bias of every quantized layer, in place; a layer without a bias gets one.

    fp32, int8   the same network before quantization and after it without bias correction, batch 1
    images       network inputs, float32 [1, C, H, W] each
    """
    errors = weight_errors(fp32, int8, images)
    add_to_biases(int8, {name: -error for name, error in errors.items()})


def weight_errors(
    fp32: ov.Model, int8: ov.Model, images: Sequence[NDArray[np.float32]]
) -> dict[str, NDArray[np.float64]]:
    """The mean change of each layer's output from rounding its weights, over images and positions: [C] by name."""
    original, rounded = fp32.clone(), int8.clone()
    layers = quantized_layers(rounded)
    for quantizer in activation_quantizers(rounded):
        redirect(quantizer.output(0), quantizer.input_value(0))
    # As constants of the graph, because the CPU plugin (2026.4) now and then takes the packed weights of one integer
    # convolution with float inputs for those of another.
    fold_weights(layers)
    exact, same = ({op.get_friendly_name(): op for op in graph.get_ops()} for graph in (original, rounded))
    means = []
    for layer in layers:
        # Both read the FP32 network's value.
        value = exact[layer.name].input_value(0)
        redirect(same[value.get_node().get_friendly_name()].output(value.get_index()), value)
        error = ops.subtract(layer.op, exact[layer.name])
        axes = [axis for axis in range(len(error.output(0).get_partial_shape())) if axis != layer.channel_axis]
        means.append(ops.reduce_mean(error, axes).output(0))
    infer = Inference(ov.Model(means, original.get_parameters(), "errors"))
    found = [[value.astype(np.float64) for value in infer(image)] for image in images]
    return {layer.name: np.mean(values, axis=0) for layer, values in zip(layers, zip(*found, strict=True), strict=True)}
