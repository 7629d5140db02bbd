"""ONNX files as torch modules: the same outputs, and the BatchNorm statistics of the checkpoint."""

import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

import ovcalib
from ovcalib.calibration.bn_taps import find_layers
from ovcalib.calibration.make import few_statistics, inversion_obstacle
from ovcalib.errors import ModelError
from ovcalib.graph.files import read_graph
from ovcalib.models.graph_module import layer_counts, read_module
from ovcalib.models.load import load_model, with_statistics
from ovcalib.records.options import ModelOptions


def export(module, path, shape, folded=False, names=("y",)):
    with torch.no_grad():
        torch.onnx.export(
            module.eval(), (torch.zeros(1, *shape),), str(path), dynamo=True, optimize=folded, verbose=False,
            input_names=["x"], output_names=list(names),
        )  # fmt: skip
    return path


def read(path, shape):
    graph = read_graph(path)
    graph.reshape({graph.inputs[0]: ov.PartialShape([1, *shape])})
    return read_module(path, shape, "net", graph), graph


class Odd(nn.Module):
    """Operations of detectors and of mobile networks: squeeze and excitation, uneven padding, upsampling, slices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.up, self.bn2 = nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1), nn.BatchNorm2d(6)
        self.slope, self.fc = nn.PReLU(6), nn.Linear(12, 5)

    def forward(self, x):
        x = nn.functional.hardswish(self.bn(self.stem(nn.functional.pad(x, (0, 1, 0, 1)))))
        x = x * nn.functional.hardsigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = self.depth(nn.functional.max_pool2d(x, 3, 2, 1, ceil_mode=True))
        x = nn.functional.interpolate(self.slope(self.bn2(self.up(x))), scale_factor=2.0, mode="bilinear")
        a, b = x.split(3, 1)
        pooled = nn.functional.avg_pool2d(torch.cat([a, b[:, :, ::1], x.clamp(-1, 2)], 1), 3, 2, 1)
        whole = pooled.flatten(2).transpose(1, 2).amax(1)
        return pooled, self.fc(whole).softmax(1)


def with_statistics_of(module, shape):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    module.train()
    with torch.no_grad():
        for _ in range(5):
            module(2 * torch.randn(8, *shape) + 1)
    return module.eval()


def test_an_onnx_file_computes_in_torch_what_it_was_exported_from(tmp_path) -> None:
    shape = (3, 20, 28)
    net = with_statistics_of(Odd(), shape)
    module, _ = read(export(net, tmp_path / "net.onnx", shape, names=("maps", "scores")), shape)
    x = torch.randn(3, *shape)  # of any batch
    with torch.no_grad():
        for ours, theirs in zip(module(x), net(x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    layers = find_layers(module, "net")
    for layer, original in zip(layers, (net.bn, net.bn2), strict=True):
        torch.testing.assert_close(layer.mean0, original.running_mean)
        torch.testing.assert_close(layer.var0, original.running_var)
    assert layer_counts(module) == (2, 5)
    # Gradients reach the image, also in the memory format and the copies that inversion uses.
    image = torch.randn(2, *shape, requires_grad=True)
    module.to(memory_format=torch.channels_last)(image)[0].square().sum().backward()
    assert image.grad.abs().sum() > 0


def test_a_folded_file_says_what_would_help(toy, tmp_path) -> None:
    path = export(toy.net, tmp_path / "net.onnx", (3, 16, 16), folded=True)
    model = with_statistics(load_model(ModelOptions(reference=str(path), mean=(0.5,) * 3, std=(0.25,) * 3)))
    assert model.module is None
    for words in ("folded into the convolutions", "training checkpoint", "optimize=False"):
        assert words in model.obstacle


def test_a_module_that_computes_something_else_is_refused(toy, tmp_path) -> None:
    path = export(toy.net, tmp_path / "net.onnx", (3, 16, 16))
    other = type(toy.net)().eval()
    _, graph = read(export(other, tmp_path / "other.onnx", (3, 16, 16)), (3, 16, 16))
    with pytest.raises(ModelError, match="gives other outputs than OpenVINO"):
        read_module(path, (3, 16, 16), "net", graph)


def test_an_unknown_operation_is_named(tmp_path) -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)).cumsum(3)

    path = export(Sorted(), tmp_path / "net.onnx", (3, 8, 8))
    with pytest.raises(ModelError, match=r"the operation CumSum .* is not known"):
        read(path, (3, 8, 8))


def test_few_statistics_leave_the_usual_source_alone(tmp_path) -> None:
    net = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)), nn.BatchNorm2d(3))
    net[-1].state_dict()["running_mean"].fill_(0.5)
    path = export(net, tmp_path / "net.onnx", (3, 8, 8))
    model = with_statistics(load_model(ModelOptions(reference=str(path), mean=(0.5,) * 3, std=(0.25,) * 3)))
    assert inversion_obstacle(model.module, "net") is None
    assert "1 BatchNorm layers for 3 convolutions" in few_statistics(model)


def test_an_onnx_file_is_inverted_by_default_and_quantized_itself(toy, tmp_path) -> None:
    path = export(toy.net, tmp_path / "net.onnx", (3, 16, 16))
    result = ovcalib.quantize(
        str(path), mean=(0.5,) * 3, std=(0.25,) * 3, num_samples=8, options={"steps": "2"}, benchmark_time=0
    )
    assert result.record.calibration.source == "bn-inversion"
    assert result.record.calibration.score is not None
    assert not [w for w in result.record.warnings if "fractal instead" in w]
    assert "computes what the torch module" in result.record.parity_reason
    x = result.calibration.inputs()[0]
    with torch.no_grad():
        expected = toy.net(torch.from_numpy(np.array(x))).numpy()
    np.testing.assert_allclose(ov.Core().compile_model(result.fp32, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0],
                               expected, atol=1e-4)  # fmt: skip
