"""What every calibration source promises, tested for all of the registry: a new source is tested without a change here.

One that takes an argument after the colon needs a line in ARGUMENTS.
"""

import dataclasses
import itertools
import json
import typing

import numpy as np
import PIL.Image
import pytest
import torch

from ovcalib.calibration import SOURCES
from ovcalib.calibration.make import export_once
from ovcalib.calibration.sets import preflight
from ovcalib.calibration.sources import Generated, Request, generate
from ovcalib.models import builtin
from ovcalib.models.load import Model
from ovcalib.records.calibration import Domain, LabelOrigin
from tests.toy import ToyNet, with_statistics_of

COUNT, BATCH = 6, 3
SPEC = builtin.spec("resnet20-cifar10")
# Given to every source that has an option of this name.
TINY = {"steps": "2", "batch": str(BATCH), "precision": "fp32", "points": "2000", "systems": "2", "trial": "2"}


def image_folder(folder) -> str:
    rng = np.random.default_rng(0)
    for name in SPEC.classes:
        (folder / name).mkdir()
        for i in range(2):
            PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / name / f"{i}.png")
    return f"imagefolder:{folder}"


def npz_file(folder):
    rng = np.random.default_rng(0)
    labels = np.arange(9) % 10
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (9, 32, 32, 3), np.uint8), labels=labels)
    return str(folder / "images.npz")


def teacher(folder):
    from ovcalib.gan.snapshot import write_generator
    from ovcalib.gan.stylegan2 import Generator
    from tests.gan.snapshots import tiny_config

    torch.manual_seed(0)
    write_generator(
        Generator(tiny_config(c_dim=10, img_resolution=32)), folder / "teacher.safetensors", builtin.CLASSES["cifar10"]
    )
    return str(folder / "teacher.safetensors")


def student(folder):
    from ovcalib.gan.distylegan import StudentConfig, StudentGenerator, save_student

    torch.manual_seed(0)
    small = StudentGenerator(StudentConfig(z_dim=16, ngf=16, project_dim=8))
    save_student(small, folder / "student.safetensors", builtin.CLASSES["cifar10"])
    return str(folder / "student.safetensors")


def mixed(folder):
    return f"real:{image_folder(folder)}=1,noise=2"


# What follows the colon: a function that makes it in a folder.
ARGUMENTS = {
    "real": image_folder, "npz": npz_file, "fdda": image_folder, "stylegan2-ada": teacher, "distylegan": student,
    "mix": mixed, "auto": lambda folder: "noise,fractal", "prior": lambda folder: "resnet20-cifar10",
}  # fmt: skip
# Sources that take images in their order, whatever the seed.
IN_ORDER = {"npz"}


def options_of(name):
    return {field.name: field for field in dataclasses.fields(SOURCES[name].Options)}


def scope_of(name):
    """Whether images are made one by one ("sample"), or what they share."""
    return getattr(SOURCES[name].Options(), "scope", "sample")


def keeps_state(name):
    return "steps" in options_of(name)


class Net(ToyNet):
    """With attention between the positions of its last maps."""

    def forward(self, x):
        tokens = self.top(self.down(self.block(self.stem(x)))).flatten(2).transpose(1, 2)
        return self.fc(torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).mean(1))


@pytest.fixture(scope="module")
def module():
    """A network with the classes of SPEC and statistics of some images, as training would leave them."""
    torch.manual_seed(0)
    net = Net()
    net.fc = torch.nn.Linear(16, SPEC.num_classes)
    return with_statistics_of(net, lambda net: net(torch.randn(64, 3, 32, 32)))


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return {
        name: f"{name}:{ARGUMENTS[name](tmp_path_factory.mktemp(name))}" if name in ARGUMENTS else name
        for name in SOURCES
    }


@pytest.fixture(scope="module")
def graph(module):
    return export_once(Model(SPEC, module))


@pytest.fixture(scope="module")
def make(module, graph, references):
    def make(name, count=COUNT, seed=0, resume=None, tick=lambda done, note: None, **options):
        request = Request(
            count=count, seed=seed, spec=SPEC, module=module, graph=lambda: graph, resume=resume, tick=tick
        )
        tiny = {key: value for key, value in TINY.items() if key in options_of(name)}
        return generate(references[name], request, {**tiny, **options})

    return make


@pytest.fixture(scope="module")
def first(make):
    """The set of every source with the first seed, made once."""
    made: dict[str, Generated] = {}
    return lambda name: made[name] if name in made else made.setdefault(name, make(name))


def test_every_source_that_takes_an_argument_has_one_here() -> None:
    takes = {name for name in SOURCES if SOURCES[name].NEEDS & {"argument", "optional argument"}}
    missing, gone = takes - ARGUMENTS.keys(), ARGUMENTS.keys() - takes
    assert not missing, (
        f"add to ARGUMENTS in {__file__} a function for {', '.join(sorted(missing))}, which gets an empty folder and "
        "returns what follows the colon of the reference"
    )
    assert not gone, f"{', '.join(sorted(gone))} of ARGUMENTS takes no argument"


@pytest.mark.parametrize("name", list(SOURCES))
def test_shape_type_domain_and_count(first, name) -> None:
    made = first(name)
    assert len(made) == COUNT
    if made.domain == "pixels":
        assert (made.images.shape, made.images.dtype) == ((COUNT, 32, 32, 3), np.uint8)
    else:
        assert (made.images.shape, made.images.dtype) == ((COUNT, 3, 32, 32), np.float32)
    assert np.isfinite(made.images).all()
    assert all(x.shape == (1, 3, 32, 32) and x.dtype == np.float32 and np.isfinite(x).all() for x in made)
    assert len({image.tobytes() for image in made.images}) == COUNT
    assert all("constant" not in warning for warning in preflight(made))


@pytest.mark.parametrize("name", list(SOURCES))
def test_provenance_is_complete(first, references, name) -> None:
    made = first(name)
    about = made.provenance
    assert (about.source, about.seed, about.num_samples, about.requested) == (references[name], 0, COUNT, COUNT)
    assert about.seconds >= 0
    assert about.domain in typing.get_args(Domain)
    assert set(about.options) == set(options_of(name))
    given = {key: value for key, value in TINY.items() if key in about.options}
    assert {key: str(about.options[key]) for key in given} == given
    assert about.model == (SPEC.name if "checkpoint" in SOURCES[name].NEEDS else None)
    assert (about.labels is None) == (made.labels is None)
    if made.labels is not None:
        assert about.labels in typing.get_args(LabelOrigin)
        assert (made.labels.shape, made.labels.dtype) == ((COUNT,), np.int64)
        assert set(made.labels.tolist()) <= set(range(SPEC.num_classes))
    json.dumps(about.model_dump(mode="json"), allow_nan=False)


@pytest.mark.parametrize("name", list(SOURCES))
def test_a_seed_decides_the_images(first, make, name) -> None:
    assert np.array_equal(first(name).images, make(name).images)
    other = make(name, seed=1).images
    assert np.array_equal(first(name).images, other) == (name in IN_ORDER)


@pytest.mark.parametrize("name", list(SOURCES))
def test_images_do_not_depend_on_how_many_are_made_or_go_together(first, make, name) -> None:
    scope = scope_of(name)
    if scope == "set":
        pytest.skip("images of one set depend on each other, which is the method")
    made = first(name).images
    if scope == "batch":  # whole batches do not depend on those after them
        np.testing.assert_allclose(make(name, count=BATCH).images, made[:BATCH], atol=1e-5)
        return
    alike = nearly_equal if keeps_state(name) else np.testing.assert_array_equal
    alike(make(name, count=2).images, made[:2])
    if "batch" in options_of(name):
        alike(make(name, batch="1").images, made)


def nearly_equal(one, other) -> None:
    """Adam divides by the size of a gradient, so where that is near zero its float noise moves a pixel far."""
    assert one.shape == other.shape
    assert np.mean(np.abs(one - other) > 2e-3) < 1e-3


@pytest.mark.parametrize("name", list(SOURCES))
def test_progress_counts_up_to_the_images(make, name) -> None:
    told = []
    make(name, tick=lambda done, note: told.append(done))
    assert told == sorted(told)
    assert told[-1] == COUNT


@pytest.mark.parametrize("name", list(SOURCES))
def test_the_model_stays_as_it_is(make, module, name) -> None:
    before = {key: value.clone() for key, value in module.state_dict().items()}
    make(name)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules()
    )
    assert not module.training


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("name", list(SOURCES))
def test_an_interrupted_run_goes_on_to_the_same_images(first, make, tmp_path, name) -> None:
    whole = []
    make(name, tick=lambda done, note: whole.append(done))
    calls = itertools.count(1)

    def stop(done, note) -> None:
        if next(calls) == max(1, len(whole) - 1):
            raise Stop

    with pytest.raises(Stop):
        make(name, resume=tmp_path, tick=stop)
    assert bool(list(tmp_path.iterdir())) == keeps_state(name)
    again = []
    found = make(name, resume=tmp_path, tick=lambda done, note: again.append(done))
    assert np.array_equal(found.images, first(name).images)
    if keeps_state(name):
        assert len(again) < len(whole)
