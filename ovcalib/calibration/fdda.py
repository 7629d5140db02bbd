"""FDDA: a generator for the statistics of each class, which one real image of the class gives (Zhong et al. 2022).

"Fine-grained Data Distribution Alignment for Post-Training Quantization", ECCV 2022. The BatchNorm statistics of one
photograph are the centre of its class. GDFQ's loss, at half the weight of the classes and twice that of the statistics,
is joined by a batch of one class, whose statistics in the deeper half of the layers are to be at the centre, and at the
centre with noise. The images are made, but photographs entered them: that is in their licence statement.

The weight of the centre is the paper's, 0.05; the code has 0.01. As in the code, the noise's 0.5 and 1 are standard
deviations and the statistics are those of the whole batch. The code's special treatment of classes whose photograph
is misclassified is left out. Classes without a photograph are trained without a centre. The joint fine-tuning on real
and made images is not part of a calibration source.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ovcalib.calibration.generator_options import GeneratorOptions
from ovcalib.calibration.sources import Generated, Request
from ovcalib.data.sets import Reader, choose, model_labels, open_data

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from ovcalib.gan.class_losses import Statistics

NEEDS = frozenset({"argument", "checkpoint"})
ARGUMENT = "DATA"


@dataclass(frozen=True)
class Options(GeneratorOptions):
    __doc__ = f"""{GeneratorOptions.__doc__}
    classes_weight    weight of the classes, in the mixed batch and in that of one class (alpha 1)
    distorted_weight  weight of the class's centre with noise (alpha 3)
    centre_weight     weight of the class's centre (alpha 4)
    mean_noise        standard deviation of the noise of the means (v_mu)
    variance_noise    standard deviation of the noise of the variances (v_sigma)
    """

    bn_weight: float | None = 0.2
    classes_weight: float = 0.5
    distorted_weight: float = 0.9
    centre_weight: float = 0.05
    mean_noise: float = 0.5
    variance_noise: float = 1.0

    PASSES: ClassVar[int] = 2


def generate(request: Request, options: Options) -> Generated:
    """Labelled images of a generator that has seen one photograph of each class through the classifier."""
    from torch.nn.functional import cross_entropy

    from ovcalib.calibration.generator_training import Training
    from ovcalib.gan.class_losses import distorted, first_deep_layer, statistics_gap

    training = Training(request, options)
    photographs, warnings = one_image_a_class(request)
    o = training.options
    assert o.bn_weight is not None
    bn_weight = o.bn_weight
    seen_of = {label: training.look_at(image) for label, image in photographs.items()}
    ran = next(iter(seen_of.values())).names
    order = [layer.name for layer in training.network.layers if layer.name in ran]
    shallow = set(order[: first_deep_layer(len(order))])

    def deep(found: list[Statistics]) -> list[Statistics]:
        return [each for each, name in zip(found, ran, strict=True) if name not in shallow]

    centres = {label: deep(seen.found) for label, seen in seen_of.items()}

    def loss(draws: torch.Generator) -> torch.Tensor:
        labels = training.labels(draws)
        mixed = training.network(training.generator(training.latents(draws), labels))
        one = training.labels(draws, 1)
        same = one.expand(training.batch)
        alone = training.network(training.generator(training.latents(draws), same))
        classes = cross_entropy(mixed.logits, labels) + cross_entropy(alone.logits, same)
        value = o.classes_weight * classes + bn_weight * statistics_gap(mixed.found, mixed.stored)
        if (centre := centres.get(int(one))) is not None:
            found, moved = deep(alone.found), distorted(centre, o.mean_noise, o.variance_noise, draws)
            value = value + o.distorted_weight * statistics_gap(found, moved)
            value = value + o.centre_weight * statistics_gap(found, centre)
        return value

    made = training.run(loss)
    weights = request.spec.weights.licence or "whose licence is not stated"
    return dataclasses.replace(
        made,
        licence=f"made from the weights of {request.spec.name} ({weights}) and, through their BatchNorm statistics, "
        f"from {len(photographs)} real images of {request.argument} (whose licence is not stated)",
        warnings=(*warnings, *made.warnings),
    )


def one_image_a_class(request: Request) -> tuple[dict[int, NDArray[np.float32]], tuple[str, ...]]:
    """A seeded real image of each class, as network input [1, C, H, W], by class of the model; and warnings.

    raises   DataError for images without labels, or with those of another model
    """
    data = open_data(request.argument, split="train", download=request.download)
    labels = model_labels(data, request.spec)
    present = set(labels.tolist())
    found: dict[int, NDArray[np.float32]] = {}
    for sample in Reader(data, request.spec, labels, choose(labels, len(data), request.seed)):
        if sample.label is not None and sample.label not in found:
            found[sample.label] = request.spec.preprocessing.normalise(sample.pixels)[None]
        if len(found) == len(present):
            break
    classes = request.spec.num_classes
    if len(found) == classes:
        return found, ()
    return found, (
        f"{len(found)} of the model's {classes} classes have an image that can be read: images of the others were made "
        "without a class's statistics",
    )
