"""Bias correction: the mean that quantized weights add to the channels of a layer's output is taken away again.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019, section 4.2 and
appendix D: layer after layer, b += E[y] - E[~y], where ~y is what the quantized layer makes of what the layers before
it, quantized and corrected, make of the calibration images. Here the expectation over the images is their median: the
error of a weight grows with the activation that it meets, so the few images with the largest activations would
otherwise decide over all others.

NNCF's `BiasCorrection` ("full") takes the mean over a fifth of the images. Where layers lie in parallel, or a shortcut
passes them by, it reads what their inputs were before all layers in front were corrected, and goes through all layers
behind the shortcut again for each in front of it: minutes for RepVGG, where this takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from ovcalib.graph import (
    Layer,
    activation_quantizers,
    add_to_biases,
    fold_weights,
    parameters_of,
    quantized_layers,
    redirect,
)
from ovcalib.runtime import Inference

# Values of one layer are kept for all images: where they do not fit, fewer images are looked at.
ACTIVATION_BYTES = 2**30

Values = list[NDArray[np.float32]]


def correct_biases(fp32: ov.Model, int8: ov.Model, images: Sequence[NDArray[np.float32]]) -> None:
    """Correct the bias of every quantized layer, in place; a layer without a bias gets one.

    fp32, int8   the same network before quantization and after it without bias correction, batch 1
    images       network inputs, float32 [1, C, H, W] each
    """
    graph = int8.clone()
    layers = quantized_layers(graph)
    largest = max((4 * int(np.prod(layer.output.get_partial_shape().get_max_shape())) for layer in layers), default=1)
    images = images[: max(1, ACTIVATION_BYTES // largest)]
    expected = channel_means(fp32, [layer.name for layer in layers], images)
    # What rounding does to activations has no mean, and what is beyond their range is the calibration's affair.
    for quantizer in activation_quantizers(graph):
        redirect(quantizer.output(0), quantizer.input_value(0))
    # As constants of the graph, because the CPU plugin (2026.4) now and then takes the packed weights of one integer
    # convolution with float inputs for those of another.
    fold_weights(layers)

    held: dict[str, Values] = {parameters_of(layers[-1].output)[0].get_name(): list(images)} if layers else {}

    def hold(value: ov.Output) -> Values:
        """The value for every image; what reads it reads an input of the graph from now on."""
        name = value.get_node().get_name()
        if name not in held:
            results = evaluate(value, held)
            parameter = ops.parameter(value.get_partial_shape(), np.float32)
            redirect(value, parameter.output(0))
            name = parameter.get_name()
            held[name] = results
        return held[name]

    shifts: dict[str, NDArray[np.float64]] = {}
    for i, layer in enumerate(layers):
        hold(layer.data)
        outputs = hold(layer.output)
        shift = np.median(expected[i] - means(outputs, layer.channel_axis), axis=0)
        shifts[layer.name] = shift
        for y in outputs:
            y += layer.along_channels(shift)
        needed = {p.get_name() for later in layers[i + 1 :] for p in parameters_of(later.output)}
        for name in held.keys() - needed:
            del held[name]
    add_to_biases(int8, shifts)


def means(values: Values, axis: int) -> NDArray[np.float64]:
    """The mean of each channel in each image, [N, C]."""
    axes = tuple(a for a in range(values[0].ndim) if a != axis)
    return np.stack([value.mean(axes, dtype=np.float64) for value in values])


def channel_means(
    graph: ov.Model, names: Sequence[str], images: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float64]]:
    """The mean of each channel of the named layers' outputs, bias included, in each image: [N, C] a layer."""
    graph = graph.clone()
    by_name = {op.get_friendly_name(): op for op in graph.get_ops()}
    layers = [Layer.of(by_name[name]) for name in names]
    outputs = [
        ops.reduce_mean(
            layer.output, [a for a in range(len(layer.output.get_partial_shape())) if a != layer.channel_axis]
        ).output(0)
        for layer in layers
    ]
    infer = Inference(ov.Model(outputs, graph.get_parameters(), "means"))
    found = [[value.astype(np.float64) for value in infer(image)] for image in images]
    return [np.stack(values) for values in zip(*found, strict=True)]


def evaluate(value: ov.Output, held: dict[str, Values]) -> Values:
    """A value for every image, from the held inputs that it depends on."""
    parameters = parameters_of(value)
    infer = Inference(ov.Model([value], parameters, "part"))
    return [infer(*inputs)[0].copy() for inputs in zip(*(held[p.get_name()] for p in parameters), strict=True)]
