"""Data as users have it: what our own writer wrote, flat folders, odd pictures, any items."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import datasets

import tta
from corruptions.commands import main as corruptions_main
from corruptions.pictures import UnreadablePictureError, to_rgb
from experiments import cli, data
from experiments.data.labels import read_labels
from experiments.records.file import read_header, read_lines
from experiments.run.settings import make_run, read_settings
from tests.helpers.tiny_models import use_tiny_models
from tta.streams.items import as_pixels

RNG = np.random.default_rng(0)


def pictures(count: int, side: int = 32) -> np.ndarray:
    return RNG.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def save(path, pixels=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pictures(1, 16)[0] if pixels is None else pixels
    Image.fromarray(image).save(path, **options)
    return path


def write_cifar(tmp_path, count=20, *arguments):
    """A folder that our own writer made of `count` images, and the labels of these."""
    labels = RNG.integers(0, 10, count)
    npz, out = tmp_path / "c.npz", tmp_path / "written"
    np.savez(npz, test_images=pictures(count), test_labels=labels)
    command = ["write", "cifar10", str(npz), str(out), "--processes", "1", "--quiet"]
    assert corruptions_main([*command, *arguments]) == 0
    return out, labels


def experiment(tmp_path, *arguments):
    """Run the command line on a tiny model; returns the status and the run's folders."""
    common = ["--output", str(tmp_path / "runs"), "--device", "cpu", "--quiet", "--batch-size", "8"]
    status = cli.main(["run", *common, "--methods", "source", *arguments])
    return status, sorted((tmp_path / "runs").glob("*"))


# What our own writer wrote


@pytest.mark.parametrize("severities", [(3,), (2, 5), (1, 2, 3, 4, 5)])
def test_what_corruptions_write_has_written_is_read(tmp_path, severities):
    chosen = [str(severity) for severity in severities]
    arguments = ["--severities", *chosen, "--corruptions", "contrast", "fog"]
    out, labels = write_cifar(tmp_path, 20, *arguments)
    rows = np.load(out / "fog.npy")
    opened = data.open_data(out)
    assert opened.stored == ("contrast", "fog")
    for place, severity in enumerate(severities):
        found = opened.read_stored("fog", severity)
        assert np.array_equal(found.images, rows[20 * place : 20 * (place + 1)])
        assert np.array_equal(found.labels, labels)
        assert f"severity {severity}" in found.origin
    assert data.default_severity(out) == max(severities)
    if len(severities) < 5:
        with pytest.raises(ValueError, match=r"`severity` must be one of .*fog.npy.*, got 4: ask"):
            opened.read_stored("fog", 4)


def test_a_run_on_one_written_severity_shows_that_severity(tmp_path, monkeypatch, capsys):
    use_tiny_models(monkeypatch)
    out, _ = write_cifar(tmp_path, 20, "--severities", "3", "--corruptions", "fog")
    status, (folder,) = experiment(tmp_path, "--data", str(out))
    assert status == 0
    (stream,) = read_header(folder)["config"]["streams"]
    assert stream["severity"] == 3 and stream["domains"] == ["fog"]
    assert next(read_lines(folder / "results.jsonl", "summary"))["images"] == 20
    capsys.readouterr()
    assert experiment(tmp_path, "--data", str(out), "--severity", "4")[0] == 2
    assert "has (3), got 4" in capsys.readouterr().err


def test_a_written_file_that_lost_rows_is_said_with_what_the_writer_says(tmp_path):
    out, _ = write_cifar(tmp_path, 20, "--severities", "2", "4", "--corruptions", "fog")
    np.save(out / "fog.npy", np.load(out / "fog.npy")[:-1])
    words = r"fog.npy` must have 40 rows \(2 severities of 20, as settings.json says\), got 39"
    with pytest.raises(ValueError, match=words):
        data.read_cifar_c(out, "fog", 2)


@pytest.mark.parametrize(
    ("image_rows", "label_rows", "part"),
    [
        (35, "five", slice(7, 14)),  # five severities
        (35, "once", slice(7, 14)),  # and labels for one of them
        (7, "once", slice(0, 7)),  # one severity, whichever is asked for
        (7, "five", slice(0, 7)),  # one severity, beside the labels of all
    ],
)
def test_folders_of_other_numbers_of_images(tmp_path, image_rows, label_rows, part):
    labels, images = np.array([3, 1, 4, 1, 5, 9, 2]), pictures(image_rows)
    np.save(tmp_path / "labels.npy", np.tile(labels, 5) if label_rows == "five" else labels)
    np.save(tmp_path / "snow.npy", images)
    save(tmp_path / "._snow.npy.png").rename(tmp_path / "._snow.npy")
    assert data.list_cifar_c(tmp_path) == ["snow"]
    found = data.read_cifar_c(tmp_path, "snow", 2)
    assert np.array_equal(found.images, images[part]) and np.array_equal(found.labels, labels)


def test_rows_that_no_rule_explains_are_refused(tmp_path):
    np.save(tmp_path / "labels.npy", np.arange(7))
    np.save(tmp_path / "snow.npy", pictures(9))
    words = r"snow.npy` must have 7 rows \(one for each label\), got 9"
    with pytest.raises(ValueError, match=words):
        data.read_cifar_c(tmp_path, "snow", 1)


def test_cifar_10_1_is_one_block_of_its_own_labels(tmp_path):
    sets = {}
    for name, count in (("cifar10.1_v4", 21), ("cifar10.1_v6", 20)):
        # Labels that repeat five times by chance are not taken for five severities.
        sets[name] = pictures(count), np.arange(count) % 4
        for end, array in zip(("data", "labels"), sets[name], strict=True):
            np.save(tmp_path / f"{name}_{end}.npy", array)
    opened = data.open_data(tmp_path)
    assert opened.stored == tuple(sets)
    for name, (images, labels) in sets.items():
        found = opened.read_stored(name, 5)
        assert np.array_equal(found.images, images) and np.array_equal(found.labels, labels)
        assert "severity" not in found.origin
    with pytest.raises(ValueError, match=r"must be the folder of a .npy file .*pass "):
        data.open_data(tmp_path / "cifar10.1_v6_data.npy")


def test_folders_of_one_written_severity(tmp_path):
    for name in ("ant/a.png", "ant/b.png", "bee/c.jpg"):
        save(tmp_path / "clean" / name)
    command = ["write", "folder", str(tmp_path / "clean"), str(tmp_path / "out"), "--quiet"]
    command += ["--severities", "2", "--corruptions", "fog", "--processes", "1"]
    assert corruptions_main(command) == 0
    assert data.default_severity(tmp_path / "out") == 2
    opened = data.open_data(tmp_path / "out", size=16)
    assert opened.stored == ("fog",)
    assert opened.read_stored("fog", 2).labels.tolist() == [0, 0, 1]
    with pytest.raises(FileNotFoundError, match=r"fog/5` is missing: .* has there \(2\)"):
        opened.read_stored("fog", 5)
    (tmp_path / "out" / "settings.json").unlink()  # the folders themselves say it
    assert data.default_severity(tmp_path / "out") == 2


# Pictures without class folders

NAMES = [f"ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 3)]


@pytest.fixture
def flat(tmp_path):
    for name in (*NAMES, "._ILSVRC2012_val_00000001.JPEG"):
        save(tmp_path / "val" / name)
    return tmp_path / "val"


@pytest.mark.parametrize(
    "text",
    [
        "8\n1\n0\n",
        "\n8\n1\n0",
        "n01514859\nn01443537\nn01440764\n",  # hen, goldfish, tench
        f"{NAMES[2]} 0\n{NAMES[0]} 8\n{NAMES[1]} 1\n",
        f"{NAMES[0]},n01514859\nval/{NAMES[1]},n01443537\n{NAMES[2]},0\n",
        # With a heading, names without suffixes, boxes after the label, and other pictures.
        "ImageId,PredictionString\nILSVRC2012_val_00000003,n01440764 85 1 499 272\n"
        "ILSVRC2012_val_00000001,n01514859 1 2 3 4\nILSVRC2012_val_00000002,n01443537 9 9 9 9\n"
        "ILSVRC2012_val_00000009,n01443537 9 9 9 9\n",
    ],
    ids=["numbers", "blank lines", "ids", "names", "commas", "csv"],
)
def test_a_flat_folder_of_validation_images_with_a_list_of_labels(flat, tmp_path, text):
    (tmp_path / "labels.txt").write_text(text)
    opened = data.open_data(flat, size=16, num_classes=1000, labels=tmp_path / "labels.txt")
    assert opened.clean.labels.tolist() == [8, 1, 0] and len(opened.clean.classes) == 1000
    assert opened.clean.classes[8] == "n01514859" and opened.files
    assert [path.rpartition("/")[2] for path, _ in opened.clean.files] == NAMES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1\n2\n", r"one label for each of the 3 pictures, but .* has 2"),
        ("1\n2\n3\n", r"class numbers in 0\.\.2, .* has 1\.\.3: count from 0"),
        ("0\n2\n-1\n", r"class numbers in 0\.\.2, .* has -1\.\.2"),
        ("0\ncat\n1\n", r"has the line 'cat'"),
        (f"{NAMES[0]} 0\n{NAMES[1]} 1\n", rf"lacks 1 of them, such as {NAMES[2]}"),
        ("", "has 0"),
    ],
)
def test_labels_that_do_not_fit(flat, tmp_path, text, words):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=r"^`labels` must .*" + words):
        data.read_folder(flat, num_classes=3, labels=tmp_path / "labels.txt")


def test_labels_by_names_that_two_pictures_share_are_refused(tmp_path):
    (tmp_path / "labels.txt").write_text("a 0\nb 1\n")
    with pytest.raises(ValueError, match="tell pictures by their names"):
        read_labels(tmp_path / "labels.txt", ["x/a.png", "y/a.png", "b.png"])


def test_a_flat_folder_without_labels_says_what_is_missing(flat):
    with pytest.raises(ValueError, match=r"pictures without class folders.* as `labels`"):
        data.open_data(flat)
    with pytest.raises(FileNotFoundError, match=r"`labels` must be a text file"):
        data.open_data(flat, labels=flat / "nothing.txt")
    with pytest.raises(ValueError, match=r"`labels` must come with a folder of pictures"):
        data.open_data("bundled", labels=flat / "nothing.txt")


def test_a_run_on_corruptions_of_a_flat_folder(tmp_path, monkeypatch):
    use_tiny_models(monkeypatch)
    for i in range(4):
        save(tmp_path / "flat" / f"{i}.png", pictures(1, 32)[0])
    (tmp_path / "labels.txt").write_text("9\n0\n3\n3\n")
    command = ["write", "folder", str(tmp_path / "flat"), str(tmp_path / "out"), "--quiet"]
    command += ["--severities", "4", "--corruptions", "fog", "--processes", "1"]
    assert corruptions_main(command) == 0
    labels = ["--labels", str(tmp_path / "labels.txt")]
    status, (folder,) = experiment(
        tmp_path, "--data", str(tmp_path / "out"), "--clean", str(tmp_path / "flat"), *labels
    )
    assert status == 0
    (stream,) = read_header(folder)["config"]["streams"]
    assert stream["severity"] == 4 and stream["domains"] == ["fog"]
    opened = data.open_data(tmp_path / "out", 32, num_classes=10, labels=labels[1])
    assert opened.read_stored("fog", 4).labels.tolist() == [9, 0, 3, 3]


# Parts of a data set


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["train/ant", "train/bee", "val/ant", "val/bee", "test/ant", "test/bee"], "val"),
        (["Train/ant", "Test/ant"], "Test"),
        (["train", "test"], "test"),  # without classes
        (["validation/ant", "validation/bee"], "validation"),
        (["train/ant", "val/ant", "extra/ant"], "val"),
        (["photo/train/ant", "photo/test/ant", "art/train/ant", "art/test/ant"], "art/test"),
    ],
)
def test_train_val_and_test_are_no_domains_and_no_classes(tmp_path, folders, named):
    for folder in folders:
        save(tmp_path / folder / "x.png")
    for num_classes in (None, 2):
        if named.startswith("art") and num_classes:
            continue  # two folders are a model's two classes, whatever lies in them
        with pytest.raises(ValueError, match=rf"parts of one data set .* such as .*/{named}$"):
            data.open_data(tmp_path, num_classes=num_classes)


def test_folders_that_are_called_like_parts_may_be_classes(tmp_path):
    for folder in ("train", "bus"):  # a train is also a vehicle
        save(tmp_path / "a" / folder / "x.png")
    assert data.open_data(tmp_path / "a").clean.classes == ("bus", "train")
    for folder in ("train", "test"):
        save(tmp_path / "b" / folder / "x.png")
    assert len(data.open_data(tmp_path / "b", classes=["test", "train"]).clean) == 2


# Pictures of any kind

LEVELS = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
GREY = np.stack([(LEVELS // 257).astype(np.uint8)] * 3, axis=-1)


def oriented(orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def odd_files(root):
    """Pictures of one class in kinds that common loaders read wrongly, and their right pixels."""
    colour = Image.fromarray(pictures(1, 16)[0])
    grey = Image.fromarray(GREY)
    right = {}
    root.mkdir(parents=True)
    for suffix in ("png", "tif"):
        Image.fromarray(LEVELS).save(root / f"sixteen.{suffix}")
        right[f"sixteen.{suffix}"] = GREY
    Image.fromarray(LEVELS).save(root / "turned.png", exif=oriented())
    right["turned.png"] = np.rot90(GREY, -1)
    for mode in ("RGBA", "P", "LA", "CMYK"):
        source = grey if mode == "LA" else colour
        source.convert(mode).save(root / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    right["RGBA.png"] = np.asarray(colour)
    right["P.png"] = np.asarray(colour.convert("P").convert("RGB"))
    right["LA.png"] = GREY
    right["CMYK.tif"] = np.asarray(colour)
    return right


def test_a_folder_reads_every_kind_of_picture_right(tmp_path):
    right = odd_files(tmp_path / "d" / "a")
    (tmp_path / "d" / "a" / "._turned.png").write_bytes(b"resource fork")
    save(tmp_path / "d" / "a" / ".ipynb_checkpoints" / "x-checkpoint.png")
    images = data.read_folder(tmp_path / "d", size=16)
    assert [path.rpartition("/")[2] for path, _ in images.files] == sorted(right)
    for number, name in enumerate(sorted(right)):
        assert np.array_equal(images[number][0].permute(1, 2, 0).numpy(), right[name]), name


def test_a_stream_of_pillow_pictures_reads_every_kind_right(tmp_path):
    right = odd_files(tmp_path / "a")
    names = sorted(right)
    items = [(Image.open(tmp_path / "a" / name), 0) for name in names]
    (batch,) = tta.streams.build("sorted", items, ["clean"], batch_size=len(items))
    for pixels, index in zip(batch.images, batch.index.tolist(), strict=True):
        levels = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(levels, right[names[index]]), names[index]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F",
             "I;16", "La", "RGBa", "PA"],
)  # fmt: skip
def test_streams_and_corruptions_agree_on_every_mode(mode):
    colour = Image.fromarray(pictures(1, 16)[0])
    if mode == "I;16":
        picture = Image.fromarray(LEVELS)
    elif mode == "PA":
        picture = colour.convert("P").convert("PA")
    elif mode in ("La", "RGBa"):
        picture = colour.convert(f"{mode[:-1]}A").convert(mode)
    elif mode == "LAB":
        picture = Image.new("LAB", (16, 16), (120, 90, 200))
    else:
        picture = colour.convert(mode)
    assert picture.mode == mode
    found = (as_pixels(picture) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(to_rgb(picture)))
    if mode in ("YCbCr", "HSV"):  # and not their own channels taken for RGB
        assert np.abs(found.astype(int) - np.asarray(colour)).mean() < 6


def test_a_picture_that_cannot_be_converted_is_named(tmp_path):
    path = save(tmp_path / "cut.png", pictures(1, 64)[0])
    path.write_bytes(path.read_bytes()[:500])
    items = [(Image.open(path), 0)]
    with pytest.raises(ValueError, match=r"whole pictures, but .*cut.png of mode RGB"):
        next(iter(tta.streams.build("sorted", items, ["clean"])))
    negative = Image.fromarray(np.full((4, 4), -1, dtype=np.int32))
    with pytest.raises(ValueError, match=r"grey levels must lie in 0\.\.65535, got -1\.\.-1"):
        as_pixels(negative)


# Pictures that cannot be read


@pytest.fixture
def broken(tmp_path):
    root = tmp_path / "broken"
    for i in range(6):
        save(root / ("ant" if i < 3 else "bee") / f"{i}.png", pictures(1, 32)[0])
    (root / "ant" / "1.png").write_bytes(b"no picture")
    (root / "bee" / "4.png").write_bytes((root / "bee" / "4.png").read_bytes()[:300])
    return root


def test_pictures_that_cannot_be_read_are_left_out_and_counted(broken):
    images = data.read_folder(broken, size=32)
    with pytest.raises(UnreadablePictureError, match=r"ant/1.png` cannot be decoded"):
        images[1]
    with pytest.warns(UserWarning, match=r"^left out 2 of 6 pictures of .*1.png.*; .*4.png"):
        images = data.read_folder(broken, size=32, on_error="skip")
    assert [path.rpartition("/")[2] for path, _ in images.files] == [
        f"{i}.png" for i in (0, 2, 3, 5)
    ]
    assert images.labels.tolist() == [0, 0, 1, 1] and images.index.tolist() == [0, 1, 2, 3]
    assert len(images.skipped) == 2 and "2 of 6 pictures left out" in images.origin
    assert len(list(images)) == 4
    assert images.subset([1, 3]).skipped == images.skipped
    with pytest.raises(ValueError, match="`on_error` must be"):
        data.read_folder(broken, on_error="ignore")


def test_a_huge_picture_is_named_and_may_be_left_out(broken, monkeypatch):
    save(broken / "bee" / "huge.png", pictures(1, 64)[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)
    images = data.read_folder(broken, size=32)
    number = next(i for i, (path, _) in enumerate(images.files) if path.endswith("huge.png"))
    with pytest.raises(UnreadablePictureError, match=r"bee/huge.png` must have fewer pixels than"):
        images[number]
    with pytest.warns(UserWarning, match=r"^left out 3 of 7 .*huge.png"):
        assert len(data.read_folder(broken, size=32, on_error="skip")) == 4


def test_a_folder_of_which_nothing_can_be_read(tmp_path):
    save(tmp_path / "a" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 can .*x.png"):
        data.read_folder(tmp_path, on_error="skip")


def test_a_run_leaves_out_what_it_cannot_read_when_told_so(tmp_path, broken, monkeypatch, capsys):
    use_tiny_models(monkeypatch)
    arguments = ["--data", str(broken), "--corruptions", "clean"]
    (tmp_path / "classes.txt").write_text("".join(f"{c}\n" for c in ("ant", "bee", *"abcdefgh")))
    arguments += ["--classes", str(tmp_path / "classes.txt")]
    assert experiment(tmp_path, *arguments)[0] == 1
    assert "error: " in (text := capsys.readouterr().err) and ".png` cannot be decoded" in text
    with pytest.warns(UserWarning, match="left out 2 of 6"):
        status, folders = experiment(tmp_path, *arguments, "--on-error", "skip", "--fresh")
    assert status == 0
    header = next(h for h in map(read_header, folders) if h["config"]["on_error"] == "skip")
    assert "2 of 6 pictures left out" in header["data"]["origin"]
    broken.rename(tmp_path / "d")
    (tmp_path / "domains").mkdir()
    (tmp_path / "d").rename(tmp_path / "domains" / "photo")
    arguments[1:4] = [str(tmp_path / "domains")]
    with pytest.warns(UserWarning, match=r"left out 2 of 6 .*domains/photo"):
        status, folders = experiment(tmp_path, *arguments, "--on-error", "skip", "--name", "stored")
    stored = next(h for h in map(read_header, folders) if h["name"] == "stored")
    assert status == 0 and "domains (2 pictures left out" in stored["data"]["origin"]


# Items and arrays of any kind


def first(dataset, **arguments):
    stream = tta.streams.build("sorted", dataset, ["clean"], **{"batch_size": 4, **arguments})
    return next(iter(stream))


class FileOfArrays:
    """An array in a file with the rules of HDF5 for indices: ascending, and each once."""

    def __init__(self, array):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __len__(self):
        return len(self._array)

    def __getitem__(self, index):
        if isinstance(index, np.ndarray) and (np.diff(index) <= 0).any():
            raise TypeError("Indexing elements must be in increasing order")
        return self._array[index]

    def __array__(self, dtype=None, copy=None):
        return np.array(self._array, dtype=dtype)


@pytest.mark.parametrize("scenario", ["continual", "sorted", "dirichlet", "mixed"])
def test_files_of_arrays_are_read_in_any_order(scenario):
    images, labels = pictures(40, 8), np.arange(40) % 4
    arguments = {"domains": ["clean"], "batch_size": 8, "seed": 1}
    options = {"delta": 0.1} if scenario == "dirichlet" else {}
    for shape in (images, images.transpose(0, 3, 1, 2)):
        pair = FileOfArrays(shape), FileOfArrays(labels)
        found = tta.streams.build(scenario, pair, **arguments, **options)
        wanted = tta.streams.build(scenario, (images, labels), **arguments, **options)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_real_hdf5_files(tmp_path):
    h5py = pytest.importorskip("h5py", reason="reads real HDF5 files, for which h5py is needed")
    images, labels = pictures(12, 8), np.arange(12) % 3
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"], file["labels"] = images, labels
    with h5py.File(tmp_path / "x.h5") as file:
        found = first((file["images"], file["labels"]))
        assert torch.equal(found.images, first((images, labels)).images)
        with pytest.raises(TypeError, match=r"got a File with the keys images, labels"):
            first(file)


def test_rows_that_are_asked_for_twice_come_twice():
    source = tta.streams.sources.ImageSource((FileOfArrays(IMAGES), LABELS), "dataset")
    found = source.images(np.array([3, 0, 3]))
    assert torch.equal(found, source.images(np.array([0, 3]))[[1, 0, 1]])


IMAGES, LABELS = pictures(8, 8), np.arange(8) % 2
PAIRS = list(zip(IMAGES, LABELS.tolist(), strict=True))


@pytest.mark.parametrize(
    "keys",
    [("image", "label"), ("img", "label"), ("pixel_values", "labels"), ("img", "fine_label"),
     ("image", "target")],
)  # fmt: skip
def test_items_that_are_dictionaries(keys):
    dataset = [{"id": i, **dict(zip(keys, pair, strict=True))} for i, pair in enumerate(PAIRS)]
    found, wanted = first(dataset), first(PAIRS)
    assert torch.equal(found.images, wanted.images) and torch.equal(found.labels, wanted.labels)


def test_items_with_more_than_an_image_and_a_label():
    dataset = [(image, label, f"{i}.png") for i, (image, label) in enumerate(PAIRS)]
    assert torch.equal(first(dataset).images, first(PAIRS).images)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (None, r"got None for item \d: leave out"),
        ({"picture": 0, "label": 1}, r"keys image, img, .* got item \d with picture, label:"),
        ({}, r"got item \d with no key"),
        (7, r"got a int for item \d"),
        ((), r"got a tuple for item \d"),
    ],
    ids=["None", "another key", "no key", "number", "empty tuple"],
)
@pytest.mark.parametrize("labels", [None, [0] * 4], ids=["labels in items", "labels apart"])
def test_items_of_another_kind_are_said(item, words, labels):
    if labels is None and words.startswith("keys image"):
        words = ""  # it has a label, and the image is asked for later
    with pytest.raises(TypeError, match=r"^`dataset` must give .*" + words):
        first(Same(item, labels))


def test_lists_of_arrays_and_of_labels_are_a_pair():
    for labels in (LABELS.tolist(), list(LABELS)):
        found = first((list(IMAGES), labels))
        assert torch.equal(found.images, first((IMAGES, LABELS)).images)
        assert torch.equal(found.labels, first((IMAGES, LABELS)).labels)


@pytest.mark.parametrize("image", ["0.png", b"JFIF", {"bytes": b"JFIF", "path": None}])
def test_items_that_are_names_of_files_or_bytes_are_said(image):
    with pytest.raises(TypeError, match="got text, bytes or objects: open them in the dataset"):
        first([(image, 0)] * 4)


def test_labels_that_are_no_whole_numbers_are_refused():
    assert first([(IMAGES[0], 1.0)] * 4).labels.tolist() == [1] * 4
    with pytest.raises(TypeError, match=r"label cannot be read \(0.7 is no whole number\)"):
        first([(IMAGES[0], 0.7)] * 4)


class Same:
    """A dataset of one item again and again."""

    def __init__(self, item, targets=None):
        self.item, self.targets = item, targets

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.item


def test_items_without_labels_need_them_from_elsewhere():
    for item in (IMAGES[0], torch.from_numpy(IMAGES[0]), Image.fromarray(IMAGES[0]), (IMAGES[0],)):
        found = first(Same(item, [0, 1, 1, 0]))
        assert torch.equal(found.images[3], first([(IMAGES[0], 0)]).images[0])
        assert torch.equal(first(Same(item), labels=[0, 1, 1, 0]).labels, found.labels)
        with pytest.raises(TypeError, match=r"pairs \(image, label\).* for item 0: wrap"):
            first(Same(item))
    with pytest.raises(TypeError, match=r"keys label, labels, .* got item 0 with image:"):
        first(Same({"image": IMAGES[0]}))
    with pytest.raises(TypeError, match="label cannot be read"):
        first(Same({"image": IMAGES[0], "label": None}))


@pytest.mark.parametrize("kind", [dict, dict.fromkeys], ids=["arrays", "splits"])
def test_a_dictionary_is_no_dataset(kind):
    given = kind({"images": IMAGES, "labels": LABELS})
    with pytest.raises(TypeError, match=r"must be one dataset or a pair .* keys images, labels"):
        first(given)


def test_an_archive_of_numpy_is_no_dataset(tmp_path):
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=LABELS)
    with np.load(tmp_path / "x.npz") as file, pytest.raises(TypeError, match="got a NpzFile"):
        first(file)


def test_tensors_with_channels_last():
    dataset = [(torch.from_numpy(image), label) for image, label in PAIRS]
    assert torch.equal(first(dataset).images, first(PAIRS).images)
    # Three rows: a tensor has its channels first, an array has them last, as their users do.
    small = torch.rand(3, 5, 3)
    assert torch.equal(as_pixels(small), small)
    assert torch.equal(as_pixels(small.numpy()), small.permute(2, 0, 1))


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.03, 1.04, r"got -0.03..1.04; clamp them with clamp\(0, 1\)"),
        (0.0, 1 + 2**-20, r"got 0..1.000001; clamp"),
        (0.0, 255.0, "divide them by 255"),
        (-2.1, 2.6, "leave normalisation to the model"),
        (-1.0, 1.0, "leave normalisation to the model"),
        (float("nan"), 1.0, "not finite"),
        (0.0, float("inf"), "not finite"),
    ],
)
@pytest.mark.parametrize("paired", [False, True])
def test_pixels_outside_their_range_are_told_the_remedy(low, high, words, paired):
    images = np.full((4, 8, 8, 3), 0.5, dtype=np.float32)
    images[:, 0, 0, 0], images[:, 1, 0, 0] = low, high
    dataset = (images, LABELS[:4]) if paired else list(zip(images, [0] * 4, strict=True))
    with pytest.raises(ValueError, match=r"`dataset` must give pixels in \[0, 1\], .*" + words):
        first(dataset)


def test_bicubic_resizing_overshoots_and_clamping_mends_it():
    image = torch.from_numpy(IMAGES[:1]).permute(0, 3, 1, 2) / 255
    large = torch.nn.functional.interpolate(image, (16, 16), mode="bicubic")[0]
    with pytest.raises(ValueError, match=r"clamp\(0, 1\)"):
        first([(large, 0)])
    assert torch.equal(first([(large.clamp(0, 1), 0)]).images[0], large.clamp(0, 1))


def test_float_arrays_in_any_precision():
    for kind in (np.float16, np.float32, np.float64):
        images = (IMAGES / 255).astype(kind)
        for dataset in ((images, LABELS), list(zip(images, LABELS.tolist(), strict=True))):
            found = first(dataset).images
            assert found.dtype == torch.float32
            assert torch.allclose(found, first(PAIRS).images, atol=1e-3)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.bool_])
def test_whole_numbers_other_than_bytes_are_refused(kind):
    with pytest.raises(TypeError, match=r"must give uint8 or float images, got .*convert to uint8"):
        first([(IMAGES[0].astype(kind), 0)])


class Sizes:
    """Images of different sizes."""

    def __init__(self, *sides):
        self.sides, self.targets = sides, [0] * len(sides)

    def __len__(self):
        return len(self.sides)

    def __getitem__(self, i):
        return pictures(1, self.sides[i])[0], 0


def test_images_of_several_sizes_are_said_with_their_sizes():
    source = tta.streams.sources.ImageSource(Sizes(8, 8, 9), "dataset")
    words = r"one size in a batch, got 8 x 8 pixels for item 0 and 9 x 9 for item 2: resize"
    with pytest.raises(ValueError, match=words):
        source.images(np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="`dataset` must give images of one size in a batch"):
        list(tta.streams.build("continual", Sizes(8, 8, 9), ["clean"], batch_size=3))
    # One at a time they may differ, as a network may take any size.
    one_by_one = tta.streams.build("continual", Sizes(8, 9), ["clean"], batch_size=1)
    assert sorted(batch.images.shape[-1] for batch in one_by_one) == [8, 9]


def test_domains_of_several_sizes_are_said_where_they_meet():
    domains = {"a": Sizes(8, 8), "b": Sizes(9, 9)}
    with pytest.raises(ValueError, match=r"`domains` must give images of one size .*8 x 8"):
        list(tta.streams.build("mixed", None, domains, batch_size=4))
    with pytest.raises(ValueError, match=r"a window holds several, got 8 x 8 and 9 x 9|9 x 9 and"):
        list(tta.streams.build("single", Sizes(8, 9), ["clean"], window=2))
    assert len(list(tta.streams.build("continual", None, domains, batch_size=2))) == 2


def test_an_error_of_the_dataset_says_its_item(tmp_path):
    save(tmp_path / "a" / "x.png", pictures(1, 64)[0])
    path = save(tmp_path / "a" / "y.png", pictures(1, 64)[0])
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(OSError) as caught:
        first(datasets.ImageFolder(tmp_path))
    notes = getattr(caught.value, "__notes__", ["raised by `dataset` for its item 1"])
    assert notes == ["raised by `dataset` for its item 1"]


# Tuning on other domains


def test_tuning_on_domains_that_the_data_has(tmp_path, monkeypatch, capsys):
    use_tiny_models(monkeypatch)
    out, _ = write_cifar(tmp_path, 20, "--corruptions", "contrast", "fog", "snow")
    command = ["tune", "tent", "--grid", "lr=1e-3", "--output", str(tmp_path), "--device", "cpu"]
    command += ["--data", str(out), "--batch-size", "10"]
    assert cli.main(command) == 2
    text = capsys.readouterr().err
    assert "`held-out` must be domains of" in text and "(contrast fog snow), by --held-out" in text
    assert cli.main([*command, "--held-out", "snow"]) == 0
    path = tmp_path / "tune-tent" / "tuned.json"
    assert json.loads(path.read_text())["domains"] == ["snow"]
    command = ["--data", str(out), "--tuned", str(path), "--corruptions"]
    with pytest.warns(UserWarning, match=r"chosen with labels on snow, which this run shows"):
        assert experiment(tmp_path, *command, "fog", "snow")[0] == 0


# Settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('scenario = "mixed"', r"no setting `scenario`: it belongs below a line \[\[streams\]\]"),
        ("severity = 3", r"`severity`: it belongs below a line \[\[streams\]\]"),
        ("seeds = [1]", r"`seeds`: it belongs below a line \[sweep\]"),
        (
            '[[streams]]\nscenario = "mixed"\nmodel = "x"',
            r"`streams\[0\].model`: it belongs above the first \[\[streams\]\]",
        ),
        ('corruptions = ["fog"]', r"`corruptions`: it is called `domains` there"),
        ('[streams]\nscenario = "mixed"', r"write each below a line \[\[streams\]\]"),
        ('streams = ["mixed"]', r"write each below a line \[\[streams\]\]"),
        ("sweep = [1]", r"write its lists below a line \[sweep\]"),
        ("modle = 1", r"no setting `modle`: .*model"),
    ],
)
def test_a_setting_in_the_wrong_place_is_told_the_right_one(tmp_path, text, words):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_settings(tmp_path / "x.toml")


@pytest.mark.parametrize("key", ["match", "on_error"])
def test_choices_in_a_file_of_settings_are_checked(key):
    with pytest.raises(ValueError, match=rf"`{key.replace('_', '-')}` must be"):
        make_run({key: "maybe"}, {})


# Models on the command line


def test_checkpoints_of_other_names_are_loaded_in_order_when_told_so(tmp_path, monkeypatch):
    seen = []
    subject = importlib.import_module("experiments.run.subject")
    real = subject.models.load

    def load(name, **options):
        seen.append((name, options))
        return real(name.partition("@")[0])

    monkeypatch.setattr(subject.models, "load", load)
    arguments = ["--images", "10", "--corruptions", "clean", "--batch-size", "10"]
    model = "cifar10_resnet20_bn@port.pt"
    assert experiment(tmp_path, *arguments, "--model", model, "--match", "order")[0] == 0
    assert seen[-1] == (model, {"match": "order"})
    assert experiment(tmp_path, *arguments, "--model", "cifar10_resnet20_bn", "--fresh")[0] == 0
    assert seen[-1][1].get("match", "name") == "name"


def test_weights_that_cannot_be_fetched_are_said_on_the_command_line(tmp_path, monkeypatch, capsys):
    loading = importlib.import_module("tta.runtime.libraries")

    def create(*args, **keywords):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(loading, "_answers", lambda host: False)
    assert experiment(tmp_path, "--model", "timm:resnet10t")[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: `name`='timm:resnet10t' must have weights on this machine")
    assert line.endswith("timm:resnet10t@PATH.") and "pretrained=" not in line
