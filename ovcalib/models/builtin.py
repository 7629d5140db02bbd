"""The built-in CIFAR networks: their table, which needs no torch, and their construction.

Architectures, parameter names and input normalisation are those of the public hub
`chenyaofo/pytorch-cifar-models`, so that its checkpoints load with strict=True, but for `OURS`. A name with
`_deploy` is RepVGG in re-parameterised form; it takes the weights of the training form.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any

from ovcalib.errors import UnknownNameError, UsageError
from ovcalib.records.model import ModelSpec as ModelSpec
from ovcalib.records.model import Weights
from ovcalib.records.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn

HUB = "https://github.com/chenyaofo/pytorch-cifar-models"

# name: (module:class, arguments)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"resnet{d}": ("resnet:CifarResNet", {"depth": d}) for d in (20, 32, 44, 56)},
    **{f"vgg{d}_bn": ("vgg:CifarVGG", {"depth": d}) for d in (11, 13, 16, 19)},
    "vgg16_bn_x0_25": ("vgg:CifarVGG", {"depth": 16, "width": 0.25}),
    **{
        f"mobilenetv2_x{w}".replace(".", "_"): ("mobilenetv2:CifarMobileNetV2", {"width": w})
        for w in (0.5, 0.75, 1.0, 1.4)
    },
    **{
        f"shufflenetv2_x{w}".replace(".", "_"): ("shufflenetv2:CifarShuffleNetV2", {"width": w})
        for w in (0.5, 1.0, 1.5, 2.0)
    },
    **{f"repvgg_{v}": ("repvgg:CifarRepVGG", {"variant": v}) for v in ("a0", "a1", "a2")},
    **{f"repvgg_{v}_deploy": ("repvgg:CifarRepVGG", {"variant": v}) for v in ("a0", "a1", "a2")},
    "mobilenetv3_small": ("mobilenetv3:mobilenetv3_small", {}),
    "convnext": ("convnext:convnext", {}),
    "vit": ("vit:CifarViT", {"depth": 6, "width": 96, "heads": 3}),
}
OURS = ("vgg16_bn_x0_25", "mobilenetv3_small", "convnext", "vit")  # not of the hub, and for CIFAR-10 alone

# First eight digits of the checkpoint's SHA-256 and the hub's top-1 in per cent, CIFAR-10 then CIFAR-100.
PUBLISHED: dict[str, tuple[tuple[str, float], tuple[str, float]]] = {
    "resnet20": (("4118986f", 92.60), ("23dac2f1", 68.83)),
    "resnet32": (("ef93fc4d", 93.53), ("84213ce6", 70.16)),
    "resnet44": (("2a3cabcb", 94.01), ("ffe32858", 71.63)),
    "resnet56": (("187c023a", 94.37), ("f2eff4c8", 72.63)),
    "vgg11_bn": (("eaeebf42", 92.79), ("57d0759e", 70.78)),
    "vgg13_bn": (("c01e4a43", 94.00), ("5ebe5778", 74.63)),
    "vgg16_bn": (("6ee7ea24", 94.16), ("7d8c4031", 74.00)),
    "vgg19_bn": (("57191229", 93.91), ("b98f7bd7", 73.87)),
    "mobilenetv2_x0_5": (("ca14ced9", 92.88), ("9f915757", 70.88)),
    "mobilenetv2_x0_75": (("a53c314e", 93.72), ("d7891e60", 73.61)),
    "mobilenetv2_x1_0": (("fe6a5b48", 93.79), ("1311f9ff", 74.20)),
    "mobilenetv2_x1_4": (("3bbbd6e2", 94.22), ("8a269f5e", 75.98)),
    "shufflenetv2_x0_5": (("1308b4e9", 90.13), ("1977720f", 67.82)),
    "shufflenetv2_x1_0": (("98807be3", 92.98), ("9ae22beb", 72.39)),
    "shufflenetv2_x1_5": (("296694dd", 93.55), ("e2c85ad8", 73.91)),
    "shufflenetv2_x2_0": (("ec31611c", 93.81), ("e7e584cd", 75.35)),
    "repvgg_a0": (("ef08a50e", 94.39), ("2df1edd0", 75.22)),
    "repvgg_a1": (("38d2431b", 94.89), ("c06b21a7", 76.12)),
    "repvgg_a2": (("09488915", 94.98), ("8e71b1f8", 77.18)),
}

CLASSES: dict[str, tuple[str, ...]] = {
    "cifar10": tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    "cifar100": tuple(
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
        "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
        "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
        "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
        "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm".split()
    ),
}

PREPROCESSING = {
    "cifar10": Preprocessing(
        height=32, width=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
    ),
    "cifar100": Preprocessing(
        height=32, width=32, mean=(0.5070, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2761)
    ),
}  # fmt: skip

NAMES = tuple(
    f"{network}-{dataset}" for dataset in CLASSES for network in NETWORKS if dataset == "cifar10" or network not in OURS
)


def shipped_weights(name: str) -> Traversable | None:
    """The weights file that comes with the package, or None."""
    file = importlib.resources.files("ovcalib.models").joinpath("weights", f"{_trained(name)}.safetensors")
    return file if file.is_file() else None


def weights_of(name: str, origin: str | None) -> Weights:
    """The description of "shipped" or "published" weights; None takes the shipped ones where there are any."""
    network, _, dataset = _trained(name).rpartition("-")
    file = shipped_weights(name)
    if origin == "shipped" or (origin is None and file is not None):
        if file is None:
            shipped = ", ".join(n for n in NAMES if shipped_weights(n))
            raise UsageError(
                f"No weights are shipped for {name!r}, only for {shipped}. Pass `weights=published` or a file."
            )
        card = json.loads(
            importlib.resources.files("ovcalib.models").joinpath("weights", f"{_trained(name)}.json").read_text()
        )
        return Weights(
            origin="shipped", sha256=card["sha256"], licence="Apache-2.0", top1=card["top1"], source=card["test_data"]
        )
    if origin is None:
        raise UsageError(
            f"No weights are shipped for {name!r}. Pass `weights=FILE`, or `weights=published` to download the "
            f"checkpoint of {HUB}."
        )
    if network not in PUBLISHED:
        raise UsageError(
            f"No weights of {name!r} are published. Leave out `weights` for the shipped ones, or pass a file."
        )
    digest, percent = PUBLISHED[network][0 if dataset == "cifar10" else 1]
    family = (
        network.split("_")[0].rstrip("0123456789")
        if not network.startswith(("mobile", "shuffle"))
        else network.split("_")[0]
    )
    return Weights(
        origin="published",
        sha256=digest,
        licence="BSD-3-Clause",
        url=f"{HUB}/releases/download/{family}/{dataset}_{network}-{digest}.pt",
        top1=round(percent / 100, 4),
        source=HUB,
    )


def default_weights(name: str) -> Weights:
    """The weights that a name stands for: the shipped ones, else the published ones."""
    return weights_of(name, None if shipped_weights(name) else "published")


def spec(name: str, weights: Weights | None = None) -> ModelSpec:
    """The spec of a built-in network; without weights it describes a randomly initialised one."""
    if name not in NAMES:
        raise UnknownNameError("built-in model", name, NAMES)
    dataset = name.rpartition("-")[2]
    return ModelSpec(
        name=name,
        dataset=dataset,
        input_shape=(3, 32, 32),
        num_classes=len(CLASSES[dataset]),
        classes=CLASSES[dataset],
        preprocessing=PREPROCESSING[dataset],
        weights=weights or Weights(origin="random"),
    )


def build(name: str) -> nn.Module:
    """A randomly initialised network in the form in which it is trained."""
    network, _, dataset = name.rpartition("-")
    path, arguments = NETWORKS[network]
    module, _, attribute = path.partition(":")
    constructor = getattr(importlib.import_module(f"ovcalib.models.{module}"), attribute)
    return constructor(**arguments, num_classes=len(CLASSES[dataset]))  # type: ignore[no-any-return]


def deploy(name: str, module: nn.Module) -> nn.Module:
    """The module as the name asks for it: re-parameterised where it says `_deploy`, else the module itself."""
    if "_deploy-" not in name:
        return module
    from ovcalib.models.repvgg import CifarRepVGG, reparameterise

    assert isinstance(module, CifarRepVGG)
    return reparameterise(module)


def _trained(name: str) -> str:
    return name.replace("_deploy-", "-")
