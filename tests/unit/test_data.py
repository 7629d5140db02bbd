from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ovcalib import ModelSpec, Preprocessing
from ovcalib.data.sets import (
    ArrayData,
    Reader,
    choose,
    imagenet_wnids,
    load_images,
    model_labels,
    open_data,
)
from ovcalib.errors import DataError, UnknownNameError, UsageError
from ovcalib.records.model import Weights


def spec(classes=("cat", "dog", "frog"), num_classes=None):
    return ModelSpec(
        name="toy",
        input_shape=(3, 8, 8),
        num_classes=num_classes or len(classes),
        classes=classes,
        preprocessing=Preprocessing(height=8, width=8),
        weights=Weights(origin="random"),
    )


def write_folder(root: Path, classes, count=4):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            PIL.Image.new("RGB", (8, 8), (10 * k, i, 0)).save(root / name / f"{i}.png")
    return root


def test_labels_follow_the_models_class_names_not_the_folder_order(tmp_path) -> None:
    data = open_data(f"imagefolder:{write_folder(tmp_path / 'd', ['dog', 'frog'])}")
    assert set(model_labels(data, spec()).tolist()) == {1, 2}


def test_wordnet_ids_map_to_imagenet_classes(tmp_path) -> None:
    wnids = imagenet_wnids()
    assert len(wnids) == 1000
    assert (wnids[0], wnids[207], wnids[999]) == ("n01440764", "n02099601", "n15075141")
    data = open_data(str(write_folder(tmp_path / "d", ["n02099601", "n15075141"])))
    assert set(model_labels(data, spec(None, 1000)).tolist()) == {207, 999}
    # With a background class in front, as TensorFlow models have it.
    assert set(model_labels(data, spec(None, 1001)).tolist()) == {208, 1000}


def test_unknown_class_names_are_taken_in_sorted_order_when_their_number_fits(tmp_path) -> None:
    data = open_data(str(write_folder(tmp_path / "d", ["b", "a"])))
    assert sorted(set(model_labels(data, spec(None, 2)).tolist())) == [0, 1]
    with pytest.raises(DataError, match=r"classes a, b \(2\), but toy has 3"):
        model_labels(data, spec())


def test_a_flat_folder_has_no_labels(tmp_path) -> None:
    write_folder(tmp_path, ["x"])
    data = open_data(str(tmp_path / "x"))
    assert data.labels is None
    assert len(data) == 4
    with pytest.raises(DataError, match="has no labels"):
        model_labels(data, spec())


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("imagefolder:/no/such/folder", DataError, "no folder '/no/such/folder'"),
        ("/no/such/folder", DataError, "no folder"),
        ("imagefoldr:x", UnknownNameError, "Did you mean 'imagefolder:DIR'"),
        ("datumaro:voc", UsageError, "datumaro:FORMAT:DIR"),
        ("npz:/no/file.npz", DataError, "no file"),
        ("cifar10:/no/such/root", DataError, "`download=True`"),
    ],
)
def test_bad_references_say_what_was_expected(reference, error, message) -> None:
    with pytest.raises(error, match=message):
        open_data(reference)


def test_empty_folders_and_splits_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        open_data(f"imagefolder:{tmp_path}")
    write_folder(tmp_path / "train", ["cat"])
    write_folder(tmp_path / "test", ["cat"])
    with pytest.raises(DataError, match="splits test, train"):
        open_data(f"imagefolder:{tmp_path}")


def test_npz_sets_are_checked(tmp_path) -> None:
    path = tmp_path / "d.npz"
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(path, images=images, labels=np.array([0, 1, 2]))
    assert len(open_data(f"npz:{path}")) == 3
    for arrays, message in (
        ({"pictures": images}, "holds pictures"),
        ({"images": images.astype(np.float32)}, "float32"),
        ({"images": images, "labels": np.array([0, 1])}, r"\[2\]"),
        ({"images": images[..., :2]}, r"\[3, 8, 8, 2\]"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=message):
            open_data(f"npz:{path}")
    path.write_text("not a zip file")
    with pytest.raises(DataError, match="not a readable npz"):
        open_data(f"npz:{path}")


def test_npz_never_unpickles(tmp_path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="not a readable npz"):
        open_data(f"npz:{path}")


def test_any_prefix_of_a_choice_is_balanced() -> None:
    labels = np.repeat(np.arange(5), [10, 10, 10, 10, 3])
    order = choose(labels, len(labels), seed=0)
    assert sorted(order) == list(range(len(labels)))
    counts = np.bincount(labels[order[:15]], minlength=5)
    assert counts.tolist() == [3, 3, 3, 3, 3]
    assert np.bincount(labels[order[:23]], minlength=5).tolist() == [5, 5, 5, 5, 3]


def test_a_choice_depends_on_the_seed_alone() -> None:
    labels = np.arange(20) % 4
    assert choose(labels, 20, 1) == choose(labels, 20, 1)
    assert choose(labels, 20, 1) != choose(labels, 20, 2)
    assert sorted(choose(None, 20, 0)) == list(range(20))


def test_reading_keeps_the_order_and_every_image(rng) -> None:
    images = rng.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    data = ArrayData("memory", images, np.arange(50) % 3, ("cat", "dog", "frog"))
    order = list(rng.permutation(50))
    read = list(Reader(data, spec(), data.labels, order))
    assert np.array_equal(np.stack([s.pixels for s in read]), images[order])
    assert [s.label for s in read] == [i % 3 for i in order]
    pixels, labels = load_images(data, spec())
    assert np.array_equal(pixels, images)
    assert labels.tolist() == (np.arange(50) % 3).tolist()


def test_damaged_files_are_skipped_and_counted_until_there_are_too_many(tmp_path) -> None:
    root = write_folder(tmp_path / "d", ["cat", "dog"], count=15)
    (root / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    data = open_data(str(root))
    reader = Reader(data, spec())
    assert len(list(reader)) == 29
    assert [Path(name).name for name in reader.unreadable] == ["0.png"]
    for i in range(1, 10):
        (root / "cat" / f"{i}.png").write_text("text")
    with pytest.raises(DataError, match="cannot be decoded"):
        list(Reader(data, spec()))


def test_grey_and_cmyk_jpegs_are_read(tmp_path) -> None:
    (tmp_path / "cat").mkdir()
    PIL.Image.new("L", (20, 10), 128).save(tmp_path / "cat" / "grey.jpg")
    PIL.Image.new("CMYK", (20, 10)).save(tmp_path / "cat" / "print.jpg")
    read = list(Reader(open_data(str(tmp_path)), spec()))
    assert [s.pixels.shape for s in read] == [(8, 8, 3)] * 2


def test_datumaro_reads_its_formats(tmp_path) -> None:
    pytest.importorskip("datumaro")
    root = write_folder(tmp_path / "d", ["cat", "dog"])
    data = open_data(f"datumaro:imagenet:{root}")
    assert len(data) == 8
    labels = model_labels(data, spec())
    samples = {s.name: s for s in Reader(data, spec(), labels)}
    assert {s.label for s in samples.values()} == {0, 1}
    # The colours survive Datumaro's BGR.
    dogs = [s.pixels for s in samples.values() if s.label == 1]
    assert all(p[0, 0, 0] == 10 and p[0, 0, 2] == 0 for p in dogs)
    with pytest.raises(UnknownNameError, match="Did you mean 'imagenet'"):
        open_data(f"datumaro:imagenett:{root}")
