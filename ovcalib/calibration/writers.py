"""Calibration sets as ordinary image data sets, for other tools."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from ovcalib.calibration.sets import CalibrationSet, write_description
from ovcalib.errors import require
from ovcalib.records.model import ModelSpec


def write_images(
    calibration: CalibrationSet,
    spec: ModelSpec,
    folder: Path,
    form: Literal["imagefolder", "datumaro"],
    preview: bool = True,
) -> None:
    """Write 8-bit PNG files: FOLDER/<class>/000000.png, or a Datumaro project.

    Images of the network's domain are rounded and clipped to pixels; `calibration.json` says how much that took.
    """
    write_description(calibration, folder, preview)
    if form == "imagefolder":
        _write_folders(calibration, spec, folder)
    else:
        _write_datumaro(calibration, spec, folder)


def class_name(spec: ModelSpec, label: int) -> str:
    """A folder name for a class; padded numbers where names are unknown, so that sorting keeps their order."""
    name = re.sub(r"[^\w ,.'()-]", "_", spec.classes[label]).strip(". ")[:100] if spec.classes is not None else ""
    if name:
        return name
    return f"class_{label:0{len(str(spec.num_classes or 1))}}"


def _write_folders(calibration: CalibrationSet, spec: ModelSpec, folder: Path) -> None:
    import PIL.Image

    for i in range(len(calibration)):
        name = "images" if calibration.labels is None else class_name(spec, int(calibration.labels[i]))
        target = folder / name
        target.mkdir(exist_ok=True)
        pixels = calibration.pixels(i)
        PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(target / f"{i:06}.png")


def _write_datumaro(calibration: CalibrationSet, spec: ModelSpec, folder: Path) -> None:
    dm = require("datumaro", "quantize", "`format=datumaro`")
    items = []
    for i in range(len(calibration)):
        label = [] if calibration.labels is None else [dm.Label(int(calibration.labels[i]))]
        image = dm.Image.from_numpy(data=calibration.pixels(i)[..., ::-1], ext=".png")  # BGR, as OpenCV has it
        items.append(dm.DatasetItem(id=f"{i:06}", subset="train", media=image, annotations=label))
    classes = [class_name(spec, label) for label in range(spec.num_classes or 0)]
    dm.Dataset.from_iterable(items, categories=classes).export(str(folder), "datumaro", save_media=True)
