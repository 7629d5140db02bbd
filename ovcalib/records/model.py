"""What ovcalib records about a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ovcalib.records.base import Frozen, ImageShape
from ovcalib.records.preprocessing import Preprocessing

# What the outputs are: classification, logits [N, K]; segmentation, [N, K, H, W] with the class of every pixel;
# detection, the raw heads of a detector; dense, anything else, such as heatmaps.
Task = Literal["classification", "segmentation", "detection", "dense"]


def is_class_map(shape: Sequence[int]) -> bool:
    """Whether an output of this shape of one item, [K, H, W], can hold the class of every pixel."""
    return len(shape) == 3 and shape[0] > 1


class Weights(Frozen):
    """The origin of a model's weights.

    origin      "shipped", "published", "file", "random", or the library that brings them
    sha256      of the weights file, as far as it is known before the file is read
    top1        published top-1 accuracy, a fraction, of `source`; never measured here
    """

    origin: str
    sha256: str | None = None
    licence: str | None = None
    url: str | None = None
    top1: float | None = None
    source: str | None = None


class ModelSpec(Frozen):
    """The description of a model: name, input, classes, preprocessing and weights.

    input_shape   (C, H, W) of one item
    num_classes   width of the logits; None where the output is not [N, classes]
    classes       names in class order, where they are known
    box_labels    first and last number that a detector can give its boxes, where they are known
    task          of specs of earlier versions: classification where there are logits, else dense
    """

    name: str
    task: Task = "dense"
    dataset: str | None = None
    input_shape: ImageShape
    num_classes: int | None = Field(gt=0)
    classes: tuple[str, ...] | None = None
    box_labels: tuple[int, int] | None = None
    preprocessing: Preprocessing
    weights: Weights

    @model_validator(mode="before")
    @classmethod
    def _task_of_outputs(cls, values: Any) -> Any:
        if isinstance(values, dict) and "task" not in values:
            logits = values.get("num_classes") is not None
            return {**values, "task": "classification" if logits else "dense"}
        return values


class ModelInput(Frozen):
    """What the model takes. Normalisation is not inside the graph: `preprocessing` comes before it.

    shape   one image, or -1 for an open batch, then channels, height and width (layout NCHW)
    """

    name: str
    dtype: str
    shape: tuple[int, int, int, int]
    layout: Literal["NCHW"] = "NCHW"
    preprocessing: Preprocessing


class ModelRecord(Frozen):
    """The model block of a result.

    sha256   of the weights as they were loaded
    input, task   None in records of earlier versions
    """

    name: str
    input_shape: ImageShape
    parameters: int = Field(ge=0)
    sha256: str
    weights: Weights
    input: ModelInput | None = None
    task: Task | None = None
