"""Pools that are killed (kill -9) at random go on from at most the interval before."""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.faults import same
from tests.helpers.nets import tiny
from tests.helpers.processes import CLEAN
from tests.helpers.soak import Share, shares
from tta.core import files
from tta.runtime import StreamPool

NAMES = ("a", "b", "c")
INTERVAL = 0.6  # seconds
SERVED = "guard/monitor.batches"  # in a state: how many batches there were


def _wrapped() -> tta.Adapter:
    return tta.wrap(tiny("bn"), "tent.cifar10", guard="watch")


def _batch(name: str, number: int) -> torch.Tensor:
    return images(1000 * NAMES.index(name) + number % 1000, 4)


class _Log(logging.Handler):
    """Lines in a file that a killed process leaves whole."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def line(self, *words: Any) -> None:
        os.write(self.file, (" ".join(map(str, words)) + "\n").encode())

    def emit(self, record: logging.LogRecord) -> None:
        self.line("warned", record.getMessage())


def _fail(disk: str) -> None:
    """Let later writes fail as on a full disk (some bytes are written), or on a read-only one."""
    real_open, real_write = os.open, Path.write_bytes

    def open_(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real_open(path, flags, *more)

    def write_bytes(path: Path, data: bytes) -> int:
        real_write(path, data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if disk == "read-only":
        files.os.open = open_
    elif disk == "full":
        Path.write_bytes = write_bytes  # type: ignore[method-assign]


def _go_on_serving(folder: Path, log: Path, seed: int, disk: str) -> None:
    """Serve the streams from where they are, until killed."""
    torch.set_num_threads(1)
    said, chance = _Log(log), random.Random(seed)
    logging.getLogger("tta.runtime").handlers = [said]
    logging.getLogger("tta.runtime").propagate = False
    pool = StreamPool.open(tiny("bn"), folder, capacity=chance.choice([2, 3]), interval=INTERVAL)
    at = {name: int(pool.stream(name).state()[SERVED]) for name in NAMES}
    said.line("opened", *at.values())
    _fail(disk)
    while True:
        name = chance.choice(NAMES)
        with pool.stream(name) as view:
            view(_batch(name, at[name]))
        at[name] += 1
        said.line("served", name, at[name], time.monotonic())
        time.sleep(0.01)


class _Chain:
    """The states of a stream that is served alone."""

    def __init__(self, name: str) -> None:
        self.name, self.adapter = name, _wrapped()
        self.at = 0

    def holds(self, state: dict[str, torch.Tensor]) -> bool:
        """Whether a state is what this many batches lead to; asked in rising order."""
        while self.at < int(state[SERVED]):
            self.adapter(_batch(self.name, self.at))
            self.at += 1
        return same(self.adapter.state(), state)


@pytest.mark.timeout(3600)
@shares(sample=5, total=200, parts=5)
def test_pools_that_are_killed(share: Share, soak_seed, tmp_path: Path, record_property) -> None:
    """With a disk that is full or read-only for every fourth life of the pool."""
    chance = random.Random(f"{soak_seed} {share.number}")
    folder = tmp_path / "pool"
    with StreamPool(_wrapped(), folder=folder, interval=None) as pool:
        for name in NAMES:
            pool.stream(name, create=True)
    chains = {name: _Chain(name) for name in NAMES}
    late = failing = 0
    for kill in range(share.count):
        disk = ("fine", "fine", "fine", "full", "fine", "fine", "fine", "read-only")[(kill + 3) % 8]
        log = tmp_path / f"{kill}.log"
        arguments = (folder, log, chance.randrange(1 << 30), disk)
        life = CLEAN.Process(target=_go_on_serving, args=arguments)
        life.start()
        while not log.exists() or "served" not in log.read_text():
            assert life.is_alive()
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 2.5 * INTERVAL))
        assert life.is_alive()  # whatever the disk does, streams go on
        life.kill()
        life.join()
        killed = time.monotonic()
        lines = [line.split() for line in log.read_text().splitlines()]
        warned = [line for line in lines if line[0] == "warned"]
        late += any("more than half" in " ".join(line) for line in warned)
        failing += disk != "fine"
        (opened,) = (line[1:] for line in lines if line[0] == "opened")
        due = dict(zip(NAMES, map(int, opened), strict=True))  # that must be on disk
        served = dict(due)
        for line in lines:
            if line[0] == "served":
                name, number, when = line[1], int(line[2]), float(line[3])
                served[name] = number
                if disk == "fine" and not warned and when < killed - INTERVAL:
                    due[name] = number
        pool = StreamPool.open(tiny("bn"), folder, interval=None)
        for name, chain in chains.items():
            state = pool.stream(name).state()
            assert due[name] <= int(state[SERVED]) <= served[name], (kill, name)
            assert chain.holds(state), (kill, name)
        pool.close(save=False)
    record_property("kills", share.count)
    record_property("kills while the disk failed", failing)
    record_property("kills after a late round", late)
    StreamPool.open(tiny("bn"), folder, interval=None).close()
    left = [path.name for path in folder.rglob("*.part")]
    assert len(left) <= len(NAMES)
    with StreamPool.open(tiny("bn"), folder, interval=None) as pool:
        for name in NAMES:
            pool.stream(name)(images(0))
    assert not list(folder.rglob("*.part"))  # the next save of each has removed them
