"""`python -m corruptions`: written data sets, resumption after a kill, contact sheets."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import corruptions
from corruptions import layouts, manifest
from corruptions.commands import main

ROOT = Path(__file__).parents[1]


def pixels(count, height, width, seed=0):
    """Smooth pictures, (count, height, width, 3) uint8."""
    fresh = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=fresh)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).to(torch.uint8).movedim(1, -1).numpy()


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "cifar.npz"
    np.savez(path, test_images=pixels(30, 32, 32), test_labels=np.arange(30) % 10)
    return path


@pytest.fixture
def tree(tmp_path):
    """Two classes, pictures of different sizes and formats."""
    root = tmp_path / "tree"
    for k, name in enumerate(("cat/a.JPEG", "cat/b.png", "dog/a.jpg", "dog/b.JPEG")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels(1, 40 + 8 * (k % 2), 64, k)[0]).save(path)
    return root


def content(folder):
    """All files of a data set but the order of its checksums."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    sums = set(files.pop(manifest.SUMS).read_text().splitlines())
    return {name: path.read_bytes() for name, path in files.items()}, sums


@pytest.mark.slow
def test_cifar10_layout(npz, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["write", "cifar10", str(npz), str(out), "--corruptions", "fog", "contrast"]
    assert main([*command, "--processes", "1"]) == 0
    fog = np.load(out / "fog.npy")
    assert fog.shape == (150, 32, 32, 3) and fog.dtype == np.uint8
    assert np.load(out / "labels.npy").tolist() == [i % 10 for i in range(30)] * 5
    images = torch.from_numpy(np.load(npz)["test_images"]).movedim(-1, 1).contiguous()
    contrast = np.load(out / "contrast.npy")
    for severity in range(1, 6):
        rows = contrast[(severity - 1) * 30 : severity * 30]
        expected = corruptions.corrupt(images, "contrast", severity, seeds=range(30))
        assert np.array_equal(rows, expected.movedim(1, -1).numpy())
    sheet = PIL.Image.open(out / "contact-sheet.png")
    assert sheet.size == (130 + 6 * 100, 16 + 2 * 100)
    assert main(["verify", str(out)]) == 0
    again = tmp_path / "again"
    assert main([*command[:3], str(again), *command[4:], "--processes", "2"]) == 0
    assert content(out) == content(again)
    assert "look at" in capsys.readouterr().out


def test_dataset_gives_what_is_written(npz, tmp_path):
    out = tmp_path / "out"
    command = ["write", "cifar10", str(npz), str(out), "--corruptions", "gaussian_noise"]
    assert main([*command, "--seed", "3", "--processes", "1", "--quiet"]) == 0
    images = torch.from_numpy(np.load(npz)["test_images"]).movedim(-1, 1)
    rows = torch.from_numpy(np.load(out / "gaussian_noise.npy")).movedim(-1, 1)
    data = corruptions.CorruptedDataset(images, "gaussian_noise", 4, seed=3)
    assert all(torch.equal(data[i], rows[90 + i]) for i in range(30))


def test_torchvision_folder_is_read(tmp_path, monkeypatch):
    class Data:
        base_folder = "cifar-10-batches-py"

        def __init__(self, root, train):
            assert not train
            self.data, self.targets = pixels(4, 32, 32), [0, 1, 2, 3]

    (tmp_path / Data.base_folder).mkdir()
    monkeypatch.setattr(layouts.datasets, "CIFAR10", Data)
    for path in (tmp_path, tmp_path / Data.base_folder):
        images, labels = layouts.read_cifar10(path)
        assert images.shape == (4, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3]


def test_imagenet_layout(tree, tmp_path):
    out = tmp_path / "out"
    command = ["write", "imagenet", str(tree), str(out), "--corruptions", "contrast", "fog"]
    assert main([*command, "--processes", "1", "--quiet"]) == 0
    for name in ("cat/a.JPEG", "cat/b.png.JPEG", "dog/a.JPEG", "dog/b.JPEG"):
        for severity in range(1, 6):
            picture = PIL.Image.open(out / "fog" / str(severity) / name)
            assert picture.format == "JPEG" and picture.size == (224, 224)
    # The JPEG's tables are those of quality 85, and its content is ours up to that step.
    source = layouts.load_picture(tree / "cat/a.JPEG", 256, 224)
    batch = torch.from_numpy(source.copy()).movedim(-1, 0)[None]
    expected = corruptions.corrupt(batch, "contrast", 3, seeds=[0])[0].movedim(0, -1).numpy()
    PIL.Image.fromarray(expected).save(tmp_path / "expected.jpg", quality=85)
    written = PIL.Image.open(out / "contrast/3/cat/a.JPEG")
    reference = PIL.Image.open(tmp_path / "expected.jpg")
    assert written.quantization == reference.quantization
    assert np.array_equal(np.asarray(written), np.asarray(reference))


def test_crop_is_that_of_torchvision(tree):
    from torchvision.transforms import v2

    path = tree / "dog/b.JPEG"
    usual = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    expected = usual(PIL.Image.open(path).convert("RGB"))
    assert np.array_equal(layouts.load_picture(path, 256, 224), np.asarray(expected))


def test_folder_layout_keeps_sizes(tree, tmp_path):
    out = tmp_path / "out"
    command = ["write", "folder", str(tree), str(out), "--corruptions", "fog", "--severities", "2"]
    assert main([*command, "--processes", "1", "--quiet"]) == 0
    assert PIL.Image.open(out / "fog/2/cat/a.JPEG").size == (64, 40)
    assert PIL.Image.open(out / "fog/2/cat/b.png.JPEG").size == (64, 48)


def start(command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "corruptions", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["cifar10", "folder"])
def test_resumes_after_kills(layout, tmp_path):
    """Killed again and again, the result has the bytes of an undisturbed run."""
    if layout == "cifar10":
        data = tmp_path / "cifar.npz"
        np.savez(data, test_images=pixels(400, 32, 32), test_labels=np.arange(400) % 10)
    else:
        data = tmp_path / "tree"
        for k, image in enumerate(pixels(60, 64, 64)):
            path = data / f"class{k % 3}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image).save(path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    names = ["gaussian_noise", "motion_blur", "jpeg_compression"]
    rest = ["--corruptions", *names, "--quiet", "--processes"]
    assert main(["write", layout, str(data), str(whole), *rest, "1"]) == 0
    command = ["write", layout, str(data), str(killed), *rest, "2"]
    chance = random.Random(0)
    finished_at = {}
    kills = 0
    while kills < 2:
        process = start(command)
        # From the first file on, so that the kill falls into the work and not before it.
        seen = len(manifest.finished(killed)) if killed.exists() else 0
        while process.poll() is None and (
            not killed.exists() or len(manifest.finished(killed)) <= seen
        ):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        for name, when in finished_at.items():
            assert (killed / name).stat().st_mtime_ns == when, f"{name} was written twice"
        finished_at = {n: (killed / n).stat().st_mtime_ns for n in manifest.finished(killed)}
    assert kills > 0
    last = start(command)
    output = last.communicate()
    assert last.returncode == 0, output
    files, sums = content(whole)
    files_again, sums_again = content(killed)
    assert {n: b for n, b in files_again.items() if not n.endswith(".part")} == files
    assert sums_again == sums
    assert main(["verify", str(killed)]) == 0


@pytest.mark.slow
def test_a_killed_process_is_reported(tmp_path):
    """The system may kill a writing process; the command must end and say so."""
    data = tmp_path / "cifar.npz"
    np.savez(data, test_images=pixels(3000, 32, 32), test_labels=np.arange(3000) % 10)
    process = start(["write", "cifar10", str(data), str(tmp_path / "out"), "--processes", "2"])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("the processes are found in /proc, which this system does not have")
    while process.poll() is None and len(manifest.finished(tmp_path / "out")) < 1:
        time.sleep(0.05)
    for child in children.read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
            break
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 2
    assert "a writing process was killed" in error


def test_finished_files_stay_and_lost_ones_come_back(npz, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["write", "cifar10", str(npz), str(out), "--corruptions", "fog", "contrast"]
    command += ["--processes", "1"]
    assert main(command) == 0
    before = content(out)
    when = (out / "fog.npy").stat().st_mtime_ns
    (out / "contrast.npy").unlink()
    (out / "contrast.npy.1.part").write_bytes(b"half")
    assert main(["verify", str(out)]) == 1
    assert "contrast.npy is missing" in capsys.readouterr().out
    assert main(command) == 0
    assert "2 of 3 files were finished before" in capsys.readouterr().err
    assert (out / "fog.npy").stat().st_mtime_ns == when
    assert content(out) == before
    with (out / "fog.npy").open("r+b") as file:
        file.seek(500)
        file.write(b"x")
    assert main(["verify", str(out)]) == 1
    assert "fog.npy has changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed", "1"], "seed = 0 in place of 1"),
        (["--images", "7"], "images = 30 in place of 7"),
        (["--corruptions", "fogg"], "did you mean 'fog'"),
        (["--processes", "0"], "`processes` must be at least 1, got 0"),
        (["--frost-pictures", "/no/such"], "existing folder"),
    ],
)
def test_write_errors(npz, tmp_path, capsys, change, words):
    out = tmp_path / "out"
    command = ["write", "cifar10", str(npz), str(out), "--corruptions", "contrast"]
    command += ["--severities", "1", "--processes", "1", "--quiet"]
    assert main(command) == 0
    assert main([*command, *change]) == 2
    assert words in capsys.readouterr().err


def test_errors_about_folders(npz, tree, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "none").mkdir()
    (tree / "cat" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "settings.json").write_bytes(b"{")
    cases = [
        (["cifar10", str(npz), str(tmp_path / "file")], "`output` must be a folder that can be"),
        (["cifar10", str(npz), str(tmp_path / "begun")], "whose settings.json cannot be read"),
        (["cifar10", str(npz), str(tmp_path / "full")], "'notes.txt'"),
        (["cifar10", str(tmp_path / "none"), str(tmp_path / "o")], "cifar-10-batches-py"),
        (["cifar10", str(tmp_path / "gone"), str(tmp_path / "o")], "must exist"),
        (["folder", str(tmp_path / "none"), str(tmp_path / "o")], "without any"),
        (["folder", str(tree), str(tmp_path / "p"), "--processes", "1"], "not a whole picture"),
    ]
    for arguments, words in cases:
        assert main(["write", *arguments, "--quiet"]) == 2
        assert words in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert main(["show", str(tmp_path / "gone.png")]) == 2


def test_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PIL.Image.fromarray(pixels(1, 32, 32)[0]).save("small.png")
    PIL.Image.fromarray(pixels(1, 300, 400)[0]).save("large.png")
    assert main(["show", "small.png", "--corruptions", "fog", "--severities", "1", "5"]) == 0
    assert PIL.Image.open("small-corruptions.png").size == (130 + 3 * 100, 16 + 100)
    command = ["show", "large.png", "out.png", "--corruptions", "contrast", "pixelate"]
    assert main([*command, "--severities", "3"]) == 0
    assert PIL.Image.open("out.png").size == (130 + 2 * 228, 16 + 2 * 228)


@pytest.mark.parametrize("arguments", [[], ["write"], ["verify"], ["show"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    assert "usage: python -m corruptions" in capsys.readouterr().out
