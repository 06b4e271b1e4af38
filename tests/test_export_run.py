"""The script beside an exported graph: pictures as they come, and a state that it goes on from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from tta.core.pictures import as_rgb
from tta.export import run

META = {"mean": "[0.4, 0.5, 0.6]", "std": "[0.2, 0.3, 0.4]", "activation": "softmax"}
SHAPE = (3, 24, 32)
Y, X = np.mgrid[0:48, 0:64]
PICTURE = Image.fromarray(np.stack([X * 4, Y * 5, X + Y], -1).astype(np.uint8))


def pictures(folder: Path) -> Path:
    """Whole pictures of many modes, named by them."""
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    PICTURE.rotate(90, expand=True).save(folder / "exif.jpg", exif=turned, quality=95)
    PICTURE.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    for mode in ("RGB", "L", "LA", "1", "P"):
        PICTURE.convert(mode).save(folder / f"{mode}.png")
    PICTURE.convert("P").save(folder / "transparent.PNG", transparency=0)
    clear = PICTURE.convert("RGBA")
    clear.putalpha(Image.fromarray((X * 4).astype(np.uint8)))
    clear.save(folder / "RGBA.png")
    Image.fromarray(np.asarray(PICTURE.convert("L"), np.uint16) * 257).save(folder / "deep.png")
    PICTURE.save(folder / "moving.webp", save_all=True, append_images=[PICTURE.rotate(180)])
    return folder


def test_pictures_are_read_as_the_other_commands_read_them(tmp_path):
    for file in sorted(pictures(tmp_path / "in").iterdir()):
        found = run.read(file, SHAPE, np.float32, META)
        rgb = ImageOps.fit(as_rgb(Image.open(file), "image"), (32, 24))
        mean, std = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
        wanted = ((np.asarray(rgb) / 255 - mean) / std).transpose(2, 0, 1)
        assert found.dtype == np.float32 and found.shape == SHAPE
        assert np.abs(found - wanted).max() < 1e-5, file.name


def test_models_of_one_channel_and_of_levels(tmp_path):
    PICTURE.save(tmp_path / "0.png")
    grey = run.read(tmp_path / "0.png", (1, 24, 32), np.float32, {"mean": "[0.0]", "std": "[1.0]"})
    wanted = np.asarray(ImageOps.fit(PICTURE.convert("L"), (32, 24)))
    assert grey.shape == (1, 24, 32) and np.abs(grey[0] * 255 - wanted).max() < 1e-3
    levels = run.read(tmp_path / "0.png", SHAPE, np.uint8, META)
    assert levels.dtype == np.uint8
    assert np.array_equal(levels.transpose(1, 2, 0), np.asarray(ImageOps.fit(PICTURE, (32, 24))))


class _Session:
    """A graph whose state counts images; each one's class is its brightest channel."""

    def __init__(self, _: str) -> None:
        pass

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map=META | {"mean": "[0]", "std": "[1]"})

    def get_inputs(self):
        kind = {"images": "tensor(float)", "reset": "tensor(bool)", "state_in_0": "tensor(int64)"}
        shapes = {"images": ["s", *SHAPE], "reset": [1], "state_in_0": [1]}
        return [SimpleNamespace(name=n, type=kind[n], shape=shapes[n]) for n in kind]

    def run(self, _, feeds):
        images = feeds["images"]
        count = np.where(feeds["reset"], 0, feeds["state_in_0"]) + len(images)
        return [images.mean((2, 3)), count]


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs the script on a folder; gives what it wrote, by line, and its errors."""
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=_Session))
    monkeypatch.setattr(run, "HERE", tmp_path)
    np.savez(tmp_path / "state.npz", state_in_0=np.zeros(1, np.int64))

    def call(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        run.main()
        out, err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()], err

    return call


def test_a_picture_that_cannot_be_read_leaves_the_state(script, tmp_path):
    folder = pictures(tmp_path / "in")
    whole = (folder / "RGB.png").read_bytes()
    (folder / "z.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="truncated"):
        script(folder, "--batch", 1, "--state", tmp_path / "s")
    assert np.load(tmp_path / "s")["state_in_0"] == 11


def test_what_is_no_picture_and_what_has_no_prediction(script, tmp_path):
    folder = tmp_path / "in"
    (folder / "old.png").mkdir(parents=True)
    (folder / "._a.png").write_bytes(b"what another system keeps beside a.png")
    for name, value in {"a": 3.0, "b": float("nan"), "c": -2.0}.items():
        np.save(
            folder / f"{name}.npy", np.full(SHAPE, value) * np.array([0, 0.5, 1])[:, None, None]
        )
    rows, _ = script(folder, "--batch", 3)
    assert [row["file"] for row in rows] == ["a.npy", "b.npy", "c.npy"]
    assert [row["class"] for row in rows] == [2, None, 0]
    assert [row["probability"] for row in rows] == [0.7856, None, 0.6652]


def test_a_probability_is_that_of_the_model_s_activation(script, tmp_path, monkeypatch):
    monkeypatch.setitem(META, "activation", "sigmoid")
    folder = tmp_path / "in"
    folder.mkdir()
    for name, value in {"a": 3.0, "b": float("nan"), "c": -2.0}.items():
        np.save(folder / f"{name}.npy", np.full(SHAPE, value))
    rows, _ = script(folder)
    assert [row["probability"] for row in rows] == [0.9526, None, 0.1192]


def test_it_goes_on_from_a_state_of_whatever_name(script, tmp_path):
    folder, state = pictures(tmp_path / "in"), tmp_path / "camera"
    for runs in (1, 2):
        rows, _ = script(folder, "--batch", 3, "--state", state)
        assert dict(np.load(state)) == {"state_in_0": runs * len(rows)} and len(rows) == 11


@pytest.mark.parametrize("other", ["junk", "keys"])
def test_a_state_that_is_none_of_the_graph_stays_as_it_is(script, tmp_path, capsys, other):
    folder, state = pictures(tmp_path / "in"), tmp_path / "camera"
    if other == "junk":
        state.write_bytes(b"junk")
    else:
        with state.open("wb") as file:
            np.savez(file, state_in_1=np.zeros(2, np.int64))
    before = state.read_bytes()
    with pytest.raises(Exception, match="pickled" if other == "junk" else "state_in_"):
        script(folder, "--state", state)
    assert not capsys.readouterr().out
    if other == "junk":
        assert state.read_bytes() == before


def test_what_cannot_be_is_refused_before_anything_is_predicted(script, tmp_path, capsys):
    folder = pictures(tmp_path / "in")
    for arguments, text in [
        ((folder, "--batch", 0), "--batch 1 or more"),
        ((folder / "RGB.png",), "images must be a folder"),
        ((folder, "--state", tmp_path / "none" / "state"), "--state in one"),
    ]:
        with pytest.raises(SystemExit):
            script(*arguments)
        said = capsys.readouterr()
        assert not said.out and text in said.err
