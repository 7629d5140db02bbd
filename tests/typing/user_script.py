"""A user's script: type-checked, never run."""

from pathlib import Path

import numpy as np
import torch

import ovcalib

module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
result = ovcalib.quantize(
    module,
    "runs/mine",
    input_shape=(3, 32, 32),
    mean=(0.5, 0.5, 0.5),
    std=[0.25, 0.25, 0.25],
    calib="fractal",
    options={"systems": 4},
    mode="accuracy-aware",
    metric="agreement",
    ignore=["layer1.*"],
    progress=ovcalib.Terminal(),
)
pixels = np.zeros((8, 32, 32, 3), np.uint8)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(8, 3, 32, 32), torch.arange(8)))
names: list[str | None] = [p.name for p in ovcalib.quantize(module, calib=pixels, eval=loader).predict("cat.jpg")]
drop: float | None = result.record.accuracy.drop_points if result.record.accuracy else None
agreement: float | None = result.record.agreement.top1
source: str = result.record.calibration.source
cpu: str | None = result.record.environment.cpu
made: ovcalib.CalibrationSet = ovcalib.generate("noise", "resnet20-cifar10", 8, seed=1, score=True)
difference: float | None = ovcalib.convert("resnet20-cifar10", Path("runs/ir"), to=("ir",)).torch_vs_ir_max_abs
evaluated = ovcalib.evaluate("resnet20-cifar10", "cifar10", limit=100, precision="f16")
top1: float | None = evaluated.accuracy.top1 if evaluated.accuracy else None
fps: list[float] = [run.throughput_fps for run in ovcalib.benchmark("runs/mine", seconds=1.0).runs]
worst: str = ovcalib.diagnose("a.xml", "b.xml", calib=["noise"]).operations[0].name
written: list[Path] = ovcalib.report(["runs/mine"], formats=("html",))
failed: int = len(ovcalib.sweep("recipe.yaml", "runs/sweep", jobs=2).failed)
