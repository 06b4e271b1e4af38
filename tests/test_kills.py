"""Processes that are killed (kill -9) at random: what they wrote is whole, and they go on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch

import tta
from experiments.run.folder import is_finished
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.processes import CLEAN
from tests.helpers.results import figures
from tests.helpers.soak import RESULT, Share, shares
from tta.core.files import leftovers_of
from tta.core.state_dict import checksum

ROOT = RESULT.parents[2]

# Saves


def _fingerprint(adapter: tta.Adapter) -> str:
    state = adapter.state()
    names = zlib.crc32("\n".join(state).encode())
    return f"{names:08x}{checksum(state.values()):08x}"


def _go_on_saving(folder: Path) -> None:
    """Load, and call and save in turn, until killed."""
    torch.set_num_threads(1)
    adapter = tta.load(tiny("bn"), folder)
    while True:
        adapter(images(0))
        tta.save(adapter, folder)


def _go_on_reading(folder: Path, found: Path, stop: Path) -> None:
    """Load again and again, and write down what was found, until told to stop."""
    torch.set_num_threads(1)
    net = tiny("bn")
    with found.open("w") as file:
        while not stop.exists():
            try:
                adapter = tta.load(net, folder)
            except Exception as error:
                file.write(f"{type(error).__name__}: {error}\n")
                return
            file.write(_fingerprint(adapter) + "\n")
            adapter.unwrap()


class _Chain:
    """The states that one adapter has after 0, 1, 2, ... calls, made when they are asked for."""

    def __init__(self) -> None:
        self.adapter = tta.wrap(tiny("bn"), "rdumb.cifar10", seed=3)
        self.states = [_fingerprint(self.adapter)]

    def position(self, state: str, after: int, limit: int = 10_000) -> int:
        """The number of calls after which the state is that one; -1 if it never is."""
        for number in range(after, after + limit):
            while len(self.states) <= number:
                self.adapter(images(0))
                self.states.append(_fingerprint(self.adapter))
            if self.states[number] == state:
                return number
        return -1


@shares(sample=6, total=200, parts=5)
def test_saves_that_are_killed(share: Share, soak_seed, tmp_path: Path, record_property) -> None:
    """Each save goes on from the one before; two readers find whole states, none older than before.

    A kill counts where it has left unfinished files, and so hit a save that was going on.
    """
    chance = random.Random(f"{soak_seed} {share.number}")
    folder, stop = tmp_path / "saved", tmp_path / "stop"
    chain = _Chain()
    tta.save(tta.wrap(tiny("bn"), "rdumb.cifar10", seed=3), folder)
    found = [tmp_path / f"reader-{n}" for n in range(2)]
    readers = [CLEAN.Process(target=_go_on_reading, args=(folder, file, stop)) for file in found]
    for reader in readers:
        reader.start()
    hits = kills = position = 0
    try:
        while hits < share.count and kills < 20 * share.count:
            before = (folder / "config.json").stat().st_mtime_ns
            writer = CLEAN.Process(target=_go_on_saving, args=(folder,))
            writer.start()
            while (folder / "config.json").stat().st_mtime_ns == before:  # its first save is done
                assert writer.is_alive()
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
            writer.kill()
            writer.join()
            kills += 1
            parts = [leftovers_of(folder / name) for name in ("adapter.safetensors", "config.json")]
            hits += any(parts)
            state = _fingerprint(tta.load(tiny("bn"), folder))
            position = chain.position(state, position)
            assert position >= 0, "a state that no save had"
    finally:
        stop.touch()
        for reader in readers:
            reader.join()
    loads = [file.read_text().splitlines() for file in found]
    for lines in loads:
        position = 0
        for line in lines:
            position = chain.position(line, position)
            assert position >= 0, line
    assert hits == share.count and all(loads)
    record_property("kills", kills)
    record_property("kills of a save that was going on", hits)
    record_property("loads", sum(map(len, loads)))
    tta.save(tta.load(tiny("bn"), folder), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "config.json"]


# Runs

COMMAND = [sys.executable, "-m", "experiments", "run", "--device", "cpu", "--images", "20"]
COMMAND += ["--corruptions", "fog", "contrast", "--batch-size", "4", "--quiet"]
COMMAND += ["--methods", "tent", "unmix_tns+eata+lame"]


def _start(output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, "--output", str(output)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _finished(output: Path) -> list[Path]:
    return [path for path in output.glob("*") if is_finished(path)]


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@shares(sample=2, total=50, parts=5)
def test_runs_that_are_killed(share: Share, soak_seed, tmp_path: Path, record_property) -> None:
    """The same command goes on, to the numbers and files of a run that was not killed."""
    chance = random.Random(f"{soak_seed} {share.number}")
    begun = time.monotonic()
    process = _start(tmp_path / "whole")
    while process.poll() is None and not (tmp_path / "whole").exists():
        time.sleep(0.01)
    imports = time.monotonic() - begun  # until then nothing is written
    assert process.wait() == 0
    seconds = time.monotonic() - begun
    (whole,) = _finished(tmp_path / "whole")
    kills = runs = 0
    while kills < share.count:
        output = tmp_path / str(runs)
        while not _finished(output):  # one that is killed in its last moments may be whole
            process = _start(output)
            limit = chance.uniform(0.9 * imports, seconds) if kills < share.count else None
            try:
                assert process.wait(limit) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                kills += process.wait() == -signal.SIGKILL
        runs += 1
        (folder,) = _finished(output)
        assert figures(folder) == figures(whole) and _files(folder) == _files(whole)
    record_property("kills", kills)
    record_property("runs", runs)
