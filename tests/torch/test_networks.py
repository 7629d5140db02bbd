import json
import zlib

import numpy as np
import pytest
import torch

from ovcalib import load_model
from ovcalib.errors import UsageError
from ovcalib.models import builtin
from ovcalib.models.repvgg import reparameterise
from ovcalib.models.weights import read_safetensors, save_state_dict

NETWORKS = list(builtin.PUBLISHED)
# Channels are large and activations saturate under the filling rule, so float32 noise grows more in some.
TOLERANCE = {"mobilenetv2_x0_5": 1e-3, "mobilenetv2_x1_4": 1e-3}
REFERENCE = ["resnet20", "resnet56", "vgg11_bn", "vgg16_bn", "mobilenetv2_x0_5", "mobilenetv2_x1_4",
             "shufflenetv2_x0_5", "shufflenetv2_x2_0", "repvgg_a0", "repvgg_a2"]  # fmt: skip


def filled(module):
    """The filling rule of the reference: every tensor from a generator seeded by its key."""
    state = module.state_dict()
    for key, tensor in state.items():
        shape = tuple(tensor.shape)
        value = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype("float32")
        if key.endswith("num_batches_tracked"):
            continue
        if key.endswith("running_var"):
            value = abs(value) * 0.1 + 0.5
        elif len(shape) == 1 and key.endswith("weight"):
            value = 1 + 0.1 * value
        elif len(shape) > 1:
            value = value * np.sqrt(2 / np.prod(shape[1:]))
        else:
            value = 0.1 * value
        state[key] = torch.from_numpy(np.asarray(value, np.float32))
    module.load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize("name", REFERENCE)
def test_keys_shapes_and_logits_are_those_of_the_public_networks(shared_data, name) -> None:
    described = json.loads((shared_data / "cifar10_zoo" / "cifar10_zoo_state_dicts.json").read_text())[name]
    module = builtin.build(f"{name}-cifar10")
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == described["state_dict"]
    assert sum(p.numel() for p in module.parameters()) == described["parameters"]
    with np.load(shared_data / "cifar10_zoo" / "cifar10_zoo_reference_logits.npz") as reference, torch.no_grad():
        logits = filled(module)(torch.from_numpy(reference["input"])).numpy()
        scale = np.abs(reference[name]).max()
        assert np.abs(logits - reference[name]).max() < TOLERANCE.get(name, 1e-4) * scale


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_the_parameters_that_are_published(shared_data, name) -> None:
    published = json.loads((shared_data / "cifar10_zoo" / "published_weights.json").read_text())
    for dataset in ("cifar10", "cifar100"):
        module = builtin.build(f"{name}-{dataset}")
        millions = sum(p.numel() for p in module.parameters()) / 1e6
        entry = published[dataset][name]
        assert millions == pytest.approx(entry["parameters_million"], abs=0.006)
        weights = builtin.weights_of(f"{name}-{dataset}", "published")
        assert weights.url == entry["url"]
        assert weights.sha256 == entry["sha256_prefix"]
        assert weights.top1 == pytest.approx(entry["top1_percent"] / 100)


@pytest.mark.parametrize("name", ["resnet20", "vgg11_bn", "mobilenetv2_x0_5", "shufflenetv2_x0_5", "repvgg_a0"])
def test_forward_gives_one_logit_a_class(name) -> None:
    with torch.no_grad():
        assert builtin.build(f"{name}-cifar100").eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_reparameterised_repvgg_computes_the_same() -> None:
    module = filled(builtin.build("repvgg_a0-cifar10"))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    deployed = reparameterise(module)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32))
    with torch.no_grad():
        expected, found = module(x), deployed(x)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in deployed.modules())


def test_the_bytes_of_a_safetensors_file_depend_on_its_content_alone(tmp_path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.zeros(2, dtype=torch.int64)}
    metadata = {name: f'"{name}" \\ ü 猫' for name in "hgfedcba"}
    files = set()
    for _ in range(8):
        save_state_dict(tensors, tmp_path / "x.safetensors", metadata)
        files.add((tmp_path / "x.safetensors").read_bytes())
    assert len(files) == 1
    found, about = read_safetensors(tmp_path / "x.safetensors")
    assert about == metadata
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_vit_keeps_its_shape_on_smaller_images() -> None:
    with torch.no_grad():
        net = builtin.build("vit-cifar10").eval()
        assert net(torch.zeros(2, 3, 32, 32)).shape == net(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("network", builtin.OURS)
def test_our_own_networks_are_for_cifar10_and_have_shipped_weights_alone(network) -> None:
    assert builtin.default_weights(f"{network}-cifar10").origin == "shipped"
    assert f"{network}-cifar100" not in builtin.NAMES
    with pytest.raises(UsageError, match=f"No weights of '{network}-cifar10' are published"):
        builtin.weights_of(f"{network}-cifar10", "published")


def test_the_last_maps_of_our_own_networks_have_sixteen_positions_of_a_small_image() -> None:
    """As many as their strides leave: 32 pixels, halved three times."""
    with torch.no_grad():
        for network in ("mobilenetv3_small", "convnext"):
            net = builtin.build(f"{network}-cifar10").eval()
            assert net.get_submodule("features")(torch.zeros(1, 3, 32, 32)).shape[-2:] == (4, 4)
            assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "segmentation"}, r"`task=segmentation` expects an output \[N, K, H, W\]"),
        ({"input_shape": (3, 64, 64)}, r"takes images of shape 3,32,32 alone"),
    ],
)
def test_a_built_in_network_refuses_what_it_cannot_be(options, said) -> None:
    with pytest.raises(UsageError, match=said):
        load_model("resnet20-cifar10", **options)


def test_outputs_of_a_built_in_network_may_be_compared_as_numbers_alone() -> None:
    spec = load_model("resnet20-cifar10", task="dense", input_shape=(3, 32, 32)).spec
    assert (spec.task, spec.num_classes) == ("dense", None)
