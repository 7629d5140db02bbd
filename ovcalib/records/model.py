"""What ovcalib records about a model."""

from __future__ import annotations

from pydantic import Field

from ovcalib.records.base import Frozen, ImageShape
from ovcalib.records.preprocessing import Preprocessing


class Weights(Frozen):
    """Where the numbers of a model come from.

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
    """What ovcalib knows about a model, apart from its graph.

    input_shape   (C, H, W) of one item
    num_classes   width of the logits; None where the output is not [N, classes]
    classes       names in class order, where they are known
    """

    name: str
    dataset: str | None = None
    input_shape: ImageShape
    num_classes: int | None = Field(gt=0)
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing
    weights: Weights


class ModelRecord(Frozen):
    name: str
    input_shape: ImageShape
    parameters: int = Field(ge=0)
    sha256: str
    weights: Weights
