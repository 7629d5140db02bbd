"""Torchvision's one-stage detectors as networks with raw heads: boxes are decoded outside, in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ovcalib.data.boxes import Boxes
from ovcalib.errors import ModelError
from ovcalib.records.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList


class RawHeads(nn.Module):
    """Backbone and head of a torchvision SSD, RetinaNet or FCOS, without its transform and postprocessing.

    forward   float32 [N, 3, H, W], normalised -> maps [N, anchors, ...] in the order of `names`
    labels    first and last number of a box; 0 is SSD's background
    """

    def __init__(self, detector: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.detector, self.size = detector, (int(shape[1]), int(shape[2]))
        image = torch.zeros(1, *shape)
        with torch.no_grad():
            features = self._features(image)
            heads = detector.head(features)  # type: ignore[operator]
            self.anchors = detector.anchor_generator(self._image_list(image), features)  # type: ignore[operator]
        self.names = tuple(sorted(heads))
        self.is_ssd = any(kind.__name__ == "SSD" for kind in type(detector).__mro__)
        self.labels = (int(self.is_ssd), heads["cls_logits"].shape[-1] - 1)
        positions = [feature.shape[2] * feature.shape[3] for feature in features]
        each = heads["cls_logits"].shape[1] // sum(positions)
        # The heads of SSD differ in their anchors a position; its postprocessing takes all levels at once.
        self.levels = [count * each for count in positions]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = self.detector.head(self._features(x))  # type: ignore[operator]
        return tuple(heads[name] for name in self.names)

    def _features(self, x: Tensor) -> list[Tensor]:
        features = self.detector.backbone(x)  # type: ignore[operator]
        return [features] if isinstance(features, Tensor) else list(features.values())

    def _image_list(self, image: Tensor) -> ImageList:
        from torchvision.models.detection.image_list import ImageList

        return ImageList(image, [self.size])

    def boxes(self, heads: Sequence[NDArray[np.float32]]) -> Boxes:
        """The boxes of one image, by torchvision's own postprocessing.

        heads   the outputs of `forward`, [1, anchors, ...]
        """
        tensors = {name: torch.from_numpy(np.array(head)) for name, head in zip(self.names, heads, strict=True)}
        given: Any = tensors
        anchors: Any = self.anchors
        if not self.is_ssd:
            given = {name: list(torch.split(head, self.levels, 1)) for name, head in tensors.items()}
            anchors = [list(torch.split(each, self.levels)) for each in anchors]
        with torch.no_grad():
            (found,) = self.detector.postprocess_detections(given, anchors, [self.size])  # type: ignore[operator]
        return Boxes(found["boxes"].numpy(), found["labels"].numpy().astype(np.int64), found["scores"].numpy())


def is_detector(module: nn.Module) -> bool:
    """Whether a module is a detector of torchvision, which takes lists of images and returns lists of boxes."""
    return any(kind.__module__.startswith("torchvision.models.detection") for kind in type(module).__mro__)


def usual_input(detector: nn.Module) -> tuple[tuple[int, int, int], Preprocessing]:
    """The input that a detector's own transform makes of an image, as far as that is one size for all."""
    transform: Any = detector.transform
    height, width = transform.fixed_size[::-1] if transform.fixed_size else (transform.min_size[-1],) * 2
    return (3, height, width), Preprocessing(
        height=height, width=width, mean=tuple(transform.image_mean), std=tuple(transform.image_std)
    )


def with_raw_heads(detector: nn.Module, name: str, shape: Sequence[int]) -> RawHeads:
    """A detector up to its raw heads.

    shape    (C, H, W)
    raises   ModelError for a detector with two stages
    """
    if not any(kind.__name__ in ("SSD", "RetinaNet", "FCOS") for kind in type(detector).__mro__):
        raise ModelError(
            f"{name!r} is a {type(detector).__name__}, whose second stage reads boxes of the first. Expected one with "
            "raw heads: SSD, SSDLite, RetinaNet or FCOS."
        )
    try:
        return RawHeads(detector.cpu().float().eval(), shape)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{name!r} does not take inputs of shape {list(shape)}: {str(error).splitlines()[0]}. Pass the right "
            "`input_shape`."
        ) from error
