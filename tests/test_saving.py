"""Adapters on disk: damaged folders are refused, and a crash leaves a whole pair."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tta
import tta.saving as disk
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused
from tta.core.files import replacing

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapter = tta.wrap(tiny("bn"), "eata.cifar10", source=source_batches())
    adapter(images(0))
    tta.save(adapter, tmp_path / "saved")
    return tmp_path / "saved"


def _edit(folder: Path, **changes: Any) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | changes))


DAMAGE = [
    (r"config.json is cut off", lambda f: (f / "config.json").write_text('{"format": 1, "con')),
    (r"config.json is cut off", lambda f: (f / "config.json").write_text("[1]")),
    (r"config.json is cut off", lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00")),
    (r"config.json is cut off", lambda f: _edit(f, config=None)),
    (r"config.json is cut off", lambda f: _edit(f, model="big")),
    (r"must be of format 1, got 2", lambda f: _edit(f, format=2)),
    (r"config of this version.*`updaet`", lambda f: _edit(f, config={"updaet": None})),
    (r"config of this version.*`seed`", lambda f: _edit(f, config={"seed": "a"})),
    (r"saved together", lambda f: _edit(f, pair="another")),
    (r"is cut off", lambda f: (f / "adapter.safetensors").write_bytes(b"junk" * 50)),
    (
        r"is cut off",
        lambda f: (f / "adapter.safetensors").write_bytes(
            (f / "adapter.safetensors").read_bytes()[:-9]
        ),
    ),
    (
        r"is cut off",
        lambda f: save_file({"other:x": torch.ones(2)}, f / "adapter.safetensors"),
    ),
]


@pytest.mark.parametrize(("words", "damage"), DAMAGE)
def test_load_of_damaged_folders(saved: Path, words, damage) -> None:
    damage(saved)
    net = tiny("bn")
    assert "`folder`" in refused(ValueError, words, lambda: tta.load(net, saved))
    tta.wrap(net, "source")


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (r"constants of eata.*'fisher.layer1.1.bias' is missing", None),
        (r"constants of eata.*size", torch.ones(9)),
    ],
)
def test_load_of_other_constants(saved: Path, words, change) -> None:
    from safetensors import safe_open

    with safe_open(str(saved / "adapter.safetensors"), "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        about = {"pair": file.metadata()["pair"]}  # without a checksum, as 0.1.0 wrote it
    key = "constant:update/fisher.layer1.1.bias"
    del tensors[key]
    tensors |= {} if change is None else {key: change}
    save_file(tensors, saved / "adapter.safetensors", about)
    net = tiny("bn")
    refused(ValueError, words, lambda: tta.load(net, saved))
    tta.wrap(net, "source")


def test_folders_that_are_none(saved: Path) -> None:
    load: Any = tta.load
    for folder in (None, 3):
        refused(TypeError, r"`folder` must be a path, got", lambda f=folder: load(tiny("bn"), f))
    for folder in (saved / "no", saved.parent):
        refused(FileNotFoundError, r"`folder`.*missing", lambda f=folder: load(tiny("bn"), f))
    file = saved / "config.json"
    adapter = tta.wrap(tiny("bn"), "source")
    for call in (lambda: load(tiny("bn"), file), lambda: tta.save(adapter, file)):
        refused(NotADirectoryError, r"`folder` must be a folder, got the file", call)
    refused(TypeError, r"`folder` must be a path", lambda: tta.save(adapter, None))  # type: ignore[arg-type]
    adapter.unwrap()
    with pytest.raises(RuntimeError, match="unwrapped"):
        tta.save(adapter, saved / "new")
    assert not (saved / "new").exists()
    (saved / "adapter.safetensors").unlink()
    refused(FileNotFoundError, r"is missing", lambda: load(tiny("bn"), saved))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dies_at", range(4))
def test_a_process_that_dies_while_saving_leaves_a_whole_pair(
    tmp_path: Path, monkeypatch, dies_at: int, first: bool
) -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    old = adapter.state()
    if not first:
        tta.save(adapter, tmp_path)
    adapter(images(0))
    adapter.config = tta.AdapterConfig.from_dict(adapter.config.to_dict() | {"seed": 9})
    done = 0

    def step(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if done == dies_at:
                raise KeyboardInterrupt
            done += 1
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(disk, "to_bytes", step(disk.to_bytes))
        patch.setattr(Path, "write_text", step(Path.write_text))
        patch.setattr("os.replace", step(os.replace))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a dead process tidies nothing up
        with pytest.raises(KeyboardInterrupt):
            tta.save(adapter, tmp_path)
    if first and dies_at < 3:
        refused(FileNotFoundError, "missing", lambda: tta.load(tiny("bn"), tmp_path))
        return
    loaded = tta.load(tiny("bn"), tmp_path)
    expected, seed = (adapter.state(), 9) if dies_at == 3 else (old, 0)
    assert loaded.config.seed == seed
    assert all(torch.equal(expected[k], v) for k, v in loaded.state().items())
    tta.save(adapter, tmp_path)
    assert tta.load(tiny("bn"), tmp_path).config.seed == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]


class Dead(BaseException):
    """The process is no more."""


def _die_at(monkeypatch: pytest.MonkeyPatch, step: int, adapter: tta.Adapter, folder: Path) -> bool:
    """Save as a process does that is killed before its n-th step on the disk; say if it was."""
    steps = 0

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            if steps >= step:
                raise Dead
            steps += 1
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("open", "fsync", "replace", "unlink"):
            patch.setattr(f"os.{name}", counted(getattr(os, name)))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(Path, "write_bytes", counted(Path.write_bytes))
        patch.setattr(Path, "write_text", counted(Path.write_text))
        try:
            tta.save(adapter, folder)
        except Dead:
            return True
    return False


@pytest.mark.slow
def test_a_save_that_dies_after_another_one_has(tmp_path: Path, monkeypatch) -> None:
    """At any two steps: what the first left for :func:`tta.load`, the second must not remove."""
    adapter = tta.wrap(tiny("bn"), "source")

    def save(seed: int, step: int, folder: Path) -> bool:
        """Save another config, and so two other files; see `_die_at`."""
        adapter.config = tta.AdapterConfig.from_dict(adapter.config.to_dict() | {"seed": seed})
        return _die_at(monkeypatch, step, adapter, folder)

    first = 0
    while True:
        second, died = 0, True
        while died:
            folder = tmp_path / f"{first}-{second}"
            tta.save(adapter, folder)
            first_died = save(2 * first, first, folder)
            tta.load(tiny("bn"), folder)
            died = save(2 * second + 1, second, folder)
            tta.load(tiny("bn"), folder)
            tta.save(adapter, folder)
            names = sorted(path.name for path in folder.iterdir())
            assert names == ["adapter.safetensors", "config.json"]
            second += 1
        if not first_died:
            break
        first += 1
    assert first > 8


def test_a_save_that_fails_leaves_no_parts(tmp_path: Path, monkeypatch) -> None:
    adapter = tta.wrap(tiny("bn"), "source")
    tta.save(adapter, tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="disk full"):
            tta.save(adapter, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]
    tta.load(tiny("bn"), tmp_path)


OF_0_1_0 = sorted(path for path in (Path(__file__).parent / "golden" / "saved-0.1.0").glob("*/"))


@pytest.mark.parametrize("folder", OF_0_1_0, ids=lambda path: path.name)
def test_adapters_saved_by_the_first_version_go_on(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    net = tiny("gn" if about["config"]["norm"] is None else "bn")
    adapter = tta.load(net, folder)
    expected = load_file(folder / "next.safetensors")["logits"]
    torch.testing.assert_close(adapter(images(2)), expected)
    adapter.reset()
    assert adapter.report.resets == 0


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    """Of the payload and of the header; a sample of both."""
    file = saved / "adapter.safetensors"
    good = file.read_bytes()
    places = torch.randint(8, len(good), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="`folder` must hold"):
            tta.load(tiny("bn"), saved)
    file.write_bytes(good)
    tta.load(tiny("bn"), saved)


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(saved: Path) -> None:
    adapter = tta.load(tiny("bn"), saved)
    dead = [saved / "adapter.safetensors.part", saved / "config.json.1f2e3d4c.part"]
    for path in dead:
        path.write_text("{")
    with replacing(saved / "adapter.safetensors") as living:
        living.write_text("being written")
        tta.save(adapter, saved)
        assert living.is_file() and not any(path.exists() for path in dead)
        shutil.copy(saved / "adapter.safetensors", living)
    assert sorted(path.name for path in saved.iterdir()) == ["adapter.safetensors", "config.json"]
    tta.load(tiny("bn"), saved)


def test_links_are_replaced_and_permissions_follow_the_umask(saved: Path, tmp_path: Path) -> None:
    adapter = tta.load(tiny("bn"), saved)
    elsewhere = tmp_path / "precious.txt"
    elsewhere.write_text("mine")
    (saved / "config.json").unlink()
    (saved / "config.json").symlink_to(elsewhere)
    before = os.umask(0o027)
    try:
        tta.save(adapter, saved)
    finally:
        os.umask(before)
    assert elsewhere.read_text() == "mine" and not (saved / "config.json").is_symlink()
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o640}


@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/there", "/proc/there", "x" * 300])
def test_folders_that_cannot_be_written_to(folder: str, tmp_path: Path) -> None:
    adapter = tta.wrap(tiny("bn"), "source")
    with pytest.raises(OSError, match="`folder` must be") as caught:
        tta.save(adapter, tmp_path / folder)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_former_adapter(saved: Path, monkeypatch) -> None:
    adapter = tta.load(tiny("bn"), saved)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "to_bytes", full)
    with pytest.raises(OSError, match=r"`folder` must be .*No space left"):
        tta.save(adapter, saved)
    monkeypatch.undo()
    assert sorted(path.name for path in saved.iterdir()) == ["adapter.safetensors", "config.json"]
    tta.load(tiny("bn"), saved)


def _save_again_and_again(folder: Path, seed: int, times: int) -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", seed=seed)
    for t in range(times):
        adapter(images(t))
        tta.save(adapter, folder)


def test_two_writers_and_three_readers_of_one_folder(tmp_path: Path) -> None:
    """Every reader finds a whole adapter, and so does who comes after the last writer."""
    _save_again_and_again(tmp_path, 0, 1)
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_save_again_and_again, args=(tmp_path, seed, 15)) for seed in (0, 1)
    ]
    for writer in writers:
        writer.start()
    failures: list[Exception] = []
    making = threading.Lock()
    loads = 0

    def read() -> None:
        nonlocal loads
        while any(writer.is_alive() for writer in writers):
            with making:  # its weights come from torch's one generator
                net = tiny("bn")
            try:
                tta.load(net, tmp_path)
                loads += 1
            except Exception as error:
                failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for each in (*readers, *writers):
        each.join()
    assert not failures and loads > 0 and [w.exitcode for w in writers] == [0, 0]
    tta.load(tiny("bn"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter.safetensors",
        "config.json",
    ]
