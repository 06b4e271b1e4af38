"""Files of a pool: whole or refused, on any machine; and disks that fail."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tta
from tests.helpers.batches import images
from tests.helpers.faults import same
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused, state_of
from tta.core import files
from tta.runtime import StreamPool
from tta.runtime.stream_files import StreamFiles

ROOT = Path(__file__).parents[1]
METHOD = "tent.cifar10"


def wrapped(method: str = METHOD, **extra: Any) -> tta.Adapter:
    return tta.wrap(tiny("bn"), method, **extra)


def reopened(folder: Path, **extra: Any) -> StreamPool:
    return StreamPool.open(tiny("bn"), folder, **{"interval": None, **extra})


def written(folder: Path, names: str = "ab", served: int = 2) -> dict[str, Any]:
    """A folder of streams, and the state of each."""
    states = {}
    with StreamPool(wrapped(guard="watch"), folder=folder, interval=None) as pool:
        for number, name in enumerate(names):
            with pool.stream(name, create=True) as view:
                for call in range(served):
                    view(images(10 * number + call))
                states[name] = view.state()
    return states


def file_of(folder: Path, name: str) -> Path:
    return StreamFiles(folder, {}).place(name)


def test_a_folder_goes_on_elsewhere_in_another_process(tmp_path: Path) -> None:
    states = written(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    code = (
        "import sys, torch; from tests.test_pool_files import *\n"
        "pool = reopened(Path(sys.argv[1]))\n"
        "for name in pool.streams():\n"
        "    with pool.stream(name) as view: view(images(77))\n"
        "pool.close()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    pool = reopened(tmp_path / "there")
    assert sorted(pool.streams()) == sorted(states)
    for name, state in states.items():
        own = wrapped(guard="watch")
        own.load_state(state)
        expected = own(images(77)), own(images(78))
        with pool.stream(name) as view:
            assert same(view.state() | {"rng": state["rng"]}, view.state())
            assert torch.equal(view(images(78)), expected[1])


def test_what_is_no_tensor_goes_on_too(tmp_path: Path) -> None:
    adapter = wrapped("sar.cifar10", guard="periodic", seed=5)
    adapter(images(0))
    first = repr((adapter.report, adapter.health, adapter.parameters_adapted.keys()))
    pool = StreamPool(adapter, folder=tmp_path / "pool", interval=None)
    with pool.stream("a", create=True) as view:
        view(images(1, 5))
        view.freeze()
        shown = repr((view.report, view.health, view.events, view.parameters_adapted.keys()))
    pool.close()
    again = reopened(tmp_path / "pool")
    with again.stream("a") as view:
        found = repr((view.report, view.health, view.events, view.parameters_adapted.keys()))
        assert found == shown and not view.session.learning
    with again.stream("new", create=True) as view:  # where the adapter was
        assert repr((view.report, view.health, view.parameters_adapted.keys())) == first
        assert same(view.state(), adapter.state()) and view.session.learning


@pytest.mark.parametrize("name", ["", "../../x", "a/b", "é\udcff", "x" * 5000, "A", "a", "."])
def test_a_stream_may_have_any_name(name: str, tmp_path: Path) -> None:
    with StreamPool(wrapped(), 1, tmp_path / "pool", interval=None) as pool:
        for one in (name, name + "2"):
            with pool.stream(one, create=True) as view:
                view(images(len(one)))
    again = reopened(tmp_path / "pool")
    assert sorted(again.streams()) == sorted([name, name + "2"])
    again.drop(name)
    assert reopened(tmp_path / "pool").streams() == [name + "2"]
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    written(tmp_path / "pool", "a")
    one, other = reopened(tmp_path / "pool"), reopened(tmp_path / "pool")
    with one.stream("new", create=True) as view:
        view(images(3))
        state = view.state()
    with pytest.raises(KeyError):
        other.stream("new")
    one.snapshot()
    with other.stream("new") as view:
        assert same(view.state(), state)


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "pool")
    adapter = wrapped()
    refused(ValueError, "`folder` must hold no", lambda: StreamPool(adapter, 2, tmp_path / "pool"))
    assert adapter(images(0)).shape == (8, 10)  # it was left alone
    tta.save(adapter, tmp_path / "single")
    net = tiny("bn")
    before = repr(state_of(net))

    def open_(folder: Path) -> Callable[[], Any]:
        return lambda: StreamPool.open(net, folder)

    refused(FileNotFoundError, "`folder`", open_(tmp_path / "nothing"))
    refused(FileNotFoundError, "hold a pool", open_(tmp_path / "single"))
    start = tmp_path / "pool" / "start.safetensors"
    start.write_bytes(start.read_bytes()[:-9])
    refused(ValueError, "cut off", open_(tmp_path / "pool"))
    assert repr(state_of(net)) == before
    other = tiny("bn", seed=1)
    written(tmp_path / "other")
    refused(ValueError, "`model`", lambda: StreamPool.open(other, tmp_path / "other"))


def _again(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Write a file with another content and a right checksum, as somebody hostile would."""
    folder = path.parents[2]
    about = json.loads(_header(path)["stream"])
    tensors = load_file(path)
    name, fingerprint = about["name"], about["fingerprint"]
    change(tensors, about)
    store = StreamFiles(folder, about.get("fingerprint", fingerprint))
    store.write(path, about.pop("name", name), (tensors, about))


def _header(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def _attribute(key: str, value: Any) -> Callable[[Path], None]:
    """A file in which every component has this attribute."""
    return lambda path: _again(
        path, lambda _, about: [held.update({key: value}) for held in about["attributes"]]
    )


BAD: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("a camera"),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "length": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "flipped value": lambda path: _flip(path, -100),
    "flipped header": lambda path: _flip(path, 40),
    "without header": lambda path: save_file({"x": torch.zeros(2)}, path),
    "huge": lambda path: os.truncate(path, 1 << 33),
    "newer": lambda path: _again(path, lambda _, about: about.update(format=2)),
    "other method": lambda path: _again(path, lambda _, a: a["fingerprint"].update(method="x")),
    "other stream": lambda path: _again(path, lambda _, about: about.update(name="b")),
    "fewer": lambda path: _again(path, lambda tensors, _: tensors.pop("state:rng")),
    "more": lambda path: _again(path, lambda t, _: t.update({"state:x": torch.zeros(3)})),
    "other kind": lambda path: _again(path, lambda t, _: t.update({"x": torch.zeros(3)})),
    "shape": lambda path: _again(path, lambda t, _: t.update({"state:rng": torch.zeros(9)})),
    "flags": lambda path: _again(path, lambda _, about: about.update(asking=[True])),
    "learning": lambda path: _again(path, lambda _, about: about.update(learning=3)),
    "no attributes": lambda path: _again(path, lambda _, about: about.pop("attributes")),
    "attributes": lambda path: _again(path, lambda _, about: about.update(attributes=[{}])),
    "type": _attribute("report", 3),
    "unknown data": _attribute("report", {"call": "os.system"}),
    "missing tensor": _attribute("report", {"tensor": 99}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_and_the_others_go_on(kind: str, tmp_path: Path) -> None:
    states = written(tmp_path / "pool")
    path = file_of(tmp_path / "pool", "a")
    pool = reopened(tmp_path / "pool")
    BAD[kind](path)
    with pool.stream("b") as view:
        for _ in range(2):
            refused(ValueError, "`folder` must hold", lambda: pool.stream("a").state())
            assert same(view.state(), states["b"])
    pool.drop("a")
    assert not path.exists()
    with pool.stream("a", create=True) as view:
        assert view(images(0)).shape == (8, 10)


def test_attributes_that_components_do_not_have_are_left_alone(tmp_path: Path) -> None:
    written(tmp_path / "pool")
    path = file_of(tmp_path / "pool", "a")
    for key in ("network", "config", "optimizer", "_buffers", "forward", "given"):
        _attribute(key, "hostile")(path)
    pool = reopened(tmp_path / "pool")
    with pool.stream("a") as view:
        assert view(images(0)).shape == (8, 10)


def test_links_are_not_followed(tmp_path: Path) -> None:
    written(tmp_path / "pool")
    path = file_of(tmp_path / "pool", "a")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    pool = reopened(tmp_path / "pool")
    assert pool.streams() == ["b"]
    with pytest.raises(OSError, match="`folder` must hold files that can be read"):
        pool.stream("a").state()
    shutil.move(tmp_path / "pool" / "streams", tmp_path / "moved")
    (tmp_path / "pool" / "streams").symlink_to(tmp_path / "moved")
    with pool.stream("c", create=True) as view:
        view(images(0))
    refused(OSError, "link", pool.snapshot)
    pool.close(save=False)


class _Disk:
    """Fails when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: int | None = None
        real = os.open

        def open_(path: Any, flags: int, *more: Any) -> int:
            if self.error is not None and flags & os.O_CREAT:
                raise OSError(self.error, os.strerror(self.error))
            return real(path, flags, *more)

        monkeypatch.setattr(files.os, "open", open_)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_streams_go_on_while_the_disk_fails(error: int, tmp_path, monkeypatch, caplog) -> None:
    disk = _Disk(monkeypatch)
    pool = StreamPool(wrapped(), 2, tmp_path / "pool", interval=None)
    own = {name: wrapped() for name in "abcd"}

    def serve(number: int) -> None:
        for name, alone in own.items():
            with pool.stream(name, create=True) as view:
                assert torch.equal(view(images(number)), alone(images(number))), (name, number)

    serve(0)
    assert pool.counts["failed"] == 0 and pool.failure is None
    disk.error = error
    with caplog.at_level(logging.WARNING, "tta.runtime"):
        serve(1), serve(2)
    failed = pool.counts["failed"]
    assert failed > 0 and os.strerror(error) in str(pool.failure)
    assert len(caplog.records) == failed and os.strerror(error) in caplog.text
    with pytest.raises(OSError, match="`folder` must be one that can be written to"):
        pool.snapshot()
    with pytest.raises(OSError, match="the streams go on"):
        pool.close()
    serve(3)
    disk.error = None
    serve(4)
    assert "2 in memory" in repr(pool)
    pool.close()
    again = reopened(tmp_path / "pool")
    for name, alone in own.items():
        with again.stream(name) as view:
            assert same(view.state(), alone.state())


def test_a_pool_that_cannot_write_its_folder_is_refused(tmp_path, monkeypatch) -> None:
    disk = _Disk(monkeypatch)
    disk.error = errno.EROFS
    adapter = wrapped()
    refused(OSError, "`folder`", lambda: StreamPool(adapter, 2, tmp_path / "pool"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="`folder`"):
        StreamPool(adapter, 2, tmp_path / "file")
    assert adapter(images(0)).shape == (8, 10)


def test_snapshots_are_made_while_a_stream_is_busy(tmp_path: Path) -> None:
    """The stream gives its turn to a copy, though it never pauses."""
    pool = StreamPool(wrapped(guard="watch"), 2, tmp_path / "pool", interval=0.2)
    served, batch = 0, images(0, 2)
    with pool.stream("a", create=True) as view:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            view(batch)
            served += 1
    assert pool.counts["snapshots"] >= 3
    pool.close(save=False)
    with reopened(tmp_path / "pool").stream("a") as view:
        saved = int(view.state()["guard/monitor.batches"])
    assert served / 2 < saved <= served


def test_a_snapshot_is_of_one_instant(tmp_path: Path, monkeypatch) -> None:
    """The stream learns on between the copy and the file, in memories too that are not copied."""
    adapter = wrapped("rotta.cifar10", mean=(0.0,) * 3, std=(1.0,) * 3)
    pool = StreamPool(adapter, folder=tmp_path / "pool", interval=None)
    names = ("in the adapter", "in memory")
    for name in names[::-1]:
        for number in range(3):
            pool.stream(name, create=True)(images(number))
    states = {name: pool.stream(name).state() for name in names[::-1]}
    write = StreamFiles.write

    def late(self: Any, path: Path, name: str, content: Any) -> None:
        pool.stream(name)(images(7))
        write(self, path, name, content)

    monkeypatch.setattr(StreamFiles, "write", late)
    assert pool.snapshot() == 2
    again = reopened(tmp_path / "pool")
    for name in names:
        assert same(again.stream(name).state(), states[name]), name
        assert not same(pool.stream(name).state(), states[name])


def test_a_pool_without_an_interval_writes_only_when_asked(tmp_path: Path) -> None:
    before = threading.active_count()
    pool = StreamPool(wrapped(), 5, tmp_path / "pool", interval=None)
    assert threading.active_count() == before
    with pool.stream("a", create=True) as view:
        view(images(0))
    assert not file_of(tmp_path / "pool", "a").exists()
    assert pool.snapshot() == 1 and pool.snapshot() == 0
    pool.health("a")  # looking changes nothing
    assert pool.snapshot() == 0
    pool.reset("a")
    assert pool.snapshot() == 1
    pool.drop("a")
    pool.close()
    assert reopened(tmp_path / "pool").streams() == []


def test_a_pool_that_nobody_keeps_ends_its_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    pool = StreamPool(wrapped(), 5, tmp_path / "pool", interval=0.05)
    assert threading.active_count() == before + 1
    del pool
    end = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.02)
    assert threading.active_count() == before


@pytest.mark.slow
def test_files_with_random_changes_are_refused(tmp_path: Path) -> None:
    states = written(tmp_path / "pool", "a")
    path = file_of(tmp_path / "pool", "a")
    whole, chance = path.read_bytes(), random.Random(0)
    pool = reopened(tmp_path / "pool", capacity=1)
    with pool.stream("b", create=True) as view:
        before = view.state()
    for number in range(300):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3, 100])):
            data[chance.randrange(len(data) if number % 2 else 3000)] = chance.randrange(256)
        cut = data[: chance.randrange(len(data))] if number % 5 == 0 else data
        path.write_bytes(cut)
        if bytes(cut) == whole:
            continue
        refused(ValueError, "`folder` must hold", lambda: pool.stream("a").state())
        with pool.stream("b") as view:
            assert same(view.state(), before), number
    path.write_bytes(whole)
    with pool.stream("a") as view:
        assert same(view.state(), states["a"])
