"""Inversion with another network's BatchNorm layers, for networks that have none.

ConvNeXt, a ViT, or an ONNX file with its BatchNorm folded away remembers nothing of its training images. A network that
was trained on images of the same kind does: fractals are optimised for the statistics in the BatchNorm layers of that
network, the prior, as in `bn-inversion`. The model itself takes part where it is a classifier that can be read as a
torch module: each image is to be of a class for it (the soft inception loss of IntraQ, Zhong et al. 2022).

Images are in the model's own preprocessing; the prior sees them in its own, resized where its input has another size.
BatchNorm layers that the model has itself count as well.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ovcalib.calibration import bn_inversion
from ovcalib.calibration.inversion_options import images_wanted as images_wanted
from ovcalib.calibration.sources import Generated, Request
from ovcalib.errors import UsageError
from ovcalib.records.options import ModelOptions

if TYPE_CHECKING:
    from ovcalib.models.load import Model

NEEDS = frozenset({"argument"})
ARGUMENT = "MODEL"


@dataclass(frozen=True)
class Options(bn_inversion.Options):
    __doc__ = bn_inversion.Options.__doc__

    output: Literal["none", "stretch", "labels"] = "labels"
    output_weight: float | None = 0.1
    distance_weight: float = 0.0


def generate(request: Request, options: Options) -> Generated:
    """Fractals, optimised for the BatchNorm statistics of another network and the classes of the model."""
    from ovcalib.calibration.inversion import invert
    from ovcalib.calibration.joint import JointNetwork

    prior = load_prior(request)
    spec = request.spec
    if request.module is None or spec.num_classes is None:
        # The prior's classes are not those of the model.
        spec = spec.model_copy(update={"num_classes": None})
        options = dataclasses.replace(options, output="none" if options.output == "labels" else options.output)
    joint = JointNetwork(prior, request.module, spec.preprocessing)
    made = invert(dataclasses.replace(request, spec=spec, module=joint), options)
    both = [prior.spec] if request.module is None else [prior.spec, request.spec]
    weights = " and ".join(f"{s.name} ({s.weights.licence or 'whose licence is not stated'})" for s in both)
    return dataclasses.replace(made, licence=f"made without photographs, from the weights of {weights}")


def load_prior(request: Request) -> Model:
    """The network whose statistics are used.

    raises   UsageError, ModelError for one without a torch module, without statistics, or for other channels
    """
    from ovcalib.calibration.bn_taps import find_layers
    from ovcalib.models.load import load_model, with_statistics

    about, shown = ModelOptions(reference=request.argument), request.spec.preprocessing
    try:
        prior = load_model(about)
    except UsageError:  # a factory or a file that does not tell its input sees that of the model
        told = {"input_shape": request.spec.input_shape, "mean": shown.mean, "std": shown.std}
        prior = load_model(about.model_copy(update=told))
    prior = with_statistics(prior)
    channels = request.spec.input_shape[0]
    if prior.module is None:
        raise UsageError(f"{request.argument!r} cannot be the prior: {prior.obstacle}.")
    if prior.spec.input_shape[0] != channels:
        raise UsageError(
            f"{request.argument!r} cannot be the prior: it takes {prior.spec.input_shape[0]} channels, and "
            f"{request.spec.name} takes {channels}."
        )
    find_layers(prior.module, prior.spec.name)  # refuses
    return prior
