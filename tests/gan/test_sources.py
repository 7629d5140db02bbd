"""Both generators as calibration sources."""

import numpy as np
import pytest
import torch

from ovcalib.calibration.sets import preflight
from ovcalib.calibration.sources import Request, generate
from ovcalib.errors import DataError, UsageError
from ovcalib.gan.distylegan import StudentConfig, StudentGenerator, save_student
from ovcalib.gan.snapshot import write_generator
from ovcalib.gan.stylegan2 import Generator
from ovcalib.models import builtin
from tests.gan.snapshots import dumps, generator_kwargs, record, tiny_config

SPEC = builtin.spec("resnet20-cifar10")
CLASSES = builtin.CLASSES["cifar10"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("gan")
    torch.manual_seed(0)
    config = tiny_config(c_dim=10, img_resolution=32)
    teacher = Generator(config)
    write_generator(teacher, root / "teacher.safetensors", CLASSES)
    (root / "teacher.pkl").write_bytes(dumps({"G_ema": record(teacher, kwargs=generator_kwargs(config))}))
    write_generator(Generator(tiny_config(c_dim=0, img_resolution=32)), root / "free.safetensors")
    write_generator(teacher, root / "shuffled.safetensors", CLASSES[::-1])
    student = StudentGenerator(StudentConfig(z_dim=16, ngf=16, project_dim=8))
    save_student(student, root / "student.safetensors", CLASSES)
    return root


REFERENCES = ["stylegan2-ada:teacher.safetensors", "stylegan2-ada:teacher.pkl", "distylegan:student.safetensors"]


def make(files, reference, count=7, seed=0, spec=SPEC, **options):
    name, _, file = reference.partition(":")
    return generate(f"{name}:{files / file}", Request(count=count, seed=seed, spec=spec), options)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OVCALIB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("reference", REFERENCES)
def test_sources_keep_their_contract(files, reference) -> None:
    made = make(files, reference, count=70)
    assert made.images.shape == (70, 32, 32, 3)
    assert made.images.dtype == np.uint8
    assert np.bincount(made.labels).tolist() == [7] * 10
    assert made.provenance.labels == "method"
    # An untrained student paints grey, which calibrates nothing.
    assert ["unlike photographs" in warning for warning in preflight(made)] == [True] * reference.startswith(
        "distylegan"
    )
    few = make(files, reference, count=3)
    assert np.array_equal(few.images, made.images[:3])
    assert not np.array_equal(few.images, make(files, reference, count=3, seed=1).images)
    assert len({image.tobytes() for image in made.images}) == 70


def test_the_snapshot_and_its_conversion_make_the_same(files) -> None:
    assert np.array_equal(make(files, REFERENCES[0]).images, make(files, REFERENCES[1]).images)


@pytest.mark.parametrize(
    ("reference", "options"),
    [
        (REFERENCES[0], {"truncation": "0.5"}), (REFERENCES[0], {"truncation": "0.5", "cutoff": "2"}),
        (REFERENCES[0], {"z": "uniform01"}), (REFERENCES[2], {"z": "uniform01"}),
        (REFERENCES[2], {"pixels": "minmax-per-image"}),
    ],
)  # fmt: skip
def test_every_option_changes_the_images(files, reference, options) -> None:
    assert not np.array_equal(make(files, reference, **options).images, make(files, reference).images)


def test_random_noise_belongs_to_the_image(files, tmp_path) -> None:
    teacher = Generator(tiny_config(c_dim=10, img_resolution=32))
    for name, parameter in teacher.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.5)
    write_generator(teacher, tmp_path / "noisy.safetensors")
    const, none = (make(tmp_path, "stylegan2-ada:noisy.safetensors", noise=mode).images for mode in ("const", "none"))
    random = make(tmp_path, "stylegan2-ada:noisy.safetensors", noise="random")
    more = make(tmp_path, "stylegan2-ada:noisy.safetensors", count=66, noise="random")
    assert np.array_equal(more.images[:7], random.images)
    assert len({images.tobytes() for images in (const, none, random.images)}) == 3


def test_minmax_uses_the_whole_range(files) -> None:
    images = make(files, REFERENCES[2], pixels="minmax-per-image").images
    assert images.min(axis=(1, 2, 3)).tolist() == [0] * 7
    assert images.max(axis=(1, 2, 3)).tolist() == [255] * 7


def test_labels_follow_the_names_of_the_classes(files) -> None:
    assert make(files, "stylegan2-ada:shuffled.safetensors").labels.tolist() == [9, 8, 7, 6, 5, 4, 3]
    assert make(files, "stylegan2-ada:free.safetensors").labels is None


def test_models_out_of_reach_are_told_so(files) -> None:
    imagenet = SPEC.model_copy(update={
        "name": "efficientnet", "input_shape": (3, 224, 224), "num_classes": 1000, "classes": None,
        "preprocessing": SPEC.preprocessing.model_copy(update={"height": 224, "width": 224}),
    })  # fmt: skip
    for reference in REFERENCES:
        with pytest.raises(DataError, match="32x32, but efficientnet takes 224x224"):
            make(files, reference, spec=imagenet)
    with pytest.raises(DataError, match="10 classes, but resnet20-cifar100 knows 100"):
        make(files, REFERENCES[2], spec=builtin.spec("resnet20-cifar100"))
    animals = SPEC.model_copy(update={"classes": tuple("abcdefghij")})
    with pytest.raises(DataError, match="no class 'airplane'"):
        make(files, REFERENCES[2], spec=animals)


def test_smaller_inputs_are_scaled_down(files) -> None:
    small = SPEC.model_copy(update={
        "input_shape": (3, 24, 24), "preprocessing": SPEC.preprocessing.model_copy(update={"height": 24, "width": 24}),
    })  # fmt: skip
    assert make(files, REFERENCES[2], spec=small).images.shape == (7, 24, 24, 3)


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        (REFERENCES[0], {"truncation": "3"}, "0 to 2"),
        (REFERENCES[0], {"cutoff": "-1"}, "number of layers"),
        (REFERENCES[0], {"noise": "loud"}, "const, random, none"),
        (REFERENCES[2], {"pixels": "stretch"}, "affine"),
    ],
)
def test_bad_options_say_what_was_expected(files, reference, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        make(files, reference, **options)


def test_a_missing_file_or_a_missing_argument_is_named() -> None:
    request = Request(count=1, seed=0, spec=SPEC)
    with pytest.raises(UsageError, match="stylegan2-ada:FILE"):
        generate("stylegan2-ada", request)
    with pytest.raises(Exception, match=r"There is no generator 'nowhere\.pkl'"):
        generate("stylegan2-ada:nowhere.pkl", request)
    with pytest.raises(Exception, match=r"There is no weights file 'nowhere\.pt'"):
        generate("distylegan:nowhere.pt", request)
