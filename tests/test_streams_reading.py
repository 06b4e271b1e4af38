"""Images that are read ahead by threads are the ones that are read when they are asked for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import corruptions
import tta
from tta.streams.reading import read_ahead

ROOT = Path(__file__).parents[1]
COUNT = 40


class Files:
    """Items that may differ in size, and remember which threads read them."""

    def __init__(self, broken=None, size=None) -> None:
        self.targets = [i % 4 for i in range(COUNT)]
        self.broken, self.size = broken, size
        self.read_here, self.readers = 0, set()

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i):
        if i == self.broken:
            raise OSError(f"image {i} cannot be decoded")
        self.readers.add(threading.current_thread())
        self.read_here += threading.current_thread() is threading.main_thread()
        size = self.size or 8 + i % 3
        picture = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        return picture, self.targets[i]


def same(stream, other) -> bool:
    pairs = zip(stream, other, strict=True)
    return all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and (a.window is None or torch.equal(a.window, b.window))
        for a, b in pairs
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"scenario": "continual", "batch_size": 16},
        {"scenario": "mixed", "batch_size": 16},
        {"scenario": "single", "window": 4, "num_samples": 8},
    ],
    ids=lambda arguments: arguments["scenario"],
)
def test_the_same_batches_wherever_they_are_read(arguments) -> None:
    files = Files(size=8)
    stream = tta.streams.build(
        dataset=files,
        domains=["fog", "clean", "gaussian_noise"],
        transform=corruptions.corrupt,
        **arguments,
    )
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    ahead = stream.prefetch(2)
    read = list(ahead)
    assert files.read_here == 0
    assert same(stream, read) and same(stream.from_step(2), ahead.from_step(2))
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert ahead.config == stream.config


def test_images_of_different_sizes_are_joined_here() -> None:
    stream = tta.streams.build(
        "continual",
        Files(),
        domains=["clean"],
        batch_size=16,
        before=corruptions.CropAndFlip(8),
    )
    assert same(stream, stream.prefetch(1))


def test_arrays_are_read_here_and_files_beside_them_there() -> None:
    files = Files(size=8)
    images = torch.rand(COUNT, 3, 8, 8)
    domains = {"files": files, "array": (images, torch.arange(COUNT) % 4)}
    stream = tta.streams.build("mixed", None, domains, batch_size=16)
    assert same(stream, stream.prefetch(1))
    assert files.read_here == COUNT  # once without
    array = tta.streams.build("continual", domains["array"], ["clean"], batch_size=16)
    assert same(array, array.prefetch(3))


def test_a_file_that_cannot_be_read_is_said_as_without() -> None:
    stream = tta.streams.build("continual", Files(broken=30, size=8), ["clean"], batch_size=8)
    for readers in (0, 2):
        with pytest.raises(OSError, match=r"^image 30 cannot be decoded"):
            list(stream.prefetch(readers))


@pytest.mark.parametrize("leave", ["break", "error", "end"])
def test_threads_end_with_the_loop(leave) -> None:
    files = Files(size=8)
    stream = tta.streams.build("continual", files, ["clean"], batch_size=2).prefetch(3)
    try:
        for batch in stream:
            if leave == "break" and batch.step == 1:
                break
            if leave == "error" and batch.step == 1:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    deadline = time.monotonic() + 20
    while any(reader.is_alive() for reader in files.readers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert files.readers and not any(reader.is_alive() for reader in files.readers)


def test_the_clock_of_a_stream_is_its_own() -> None:
    stream = tta.streams.build("continual", Files(size=8), ["clean"], clock={"measured": True})
    assert stream.prefetch(1).stopwatch is not stream.stopwatch


@pytest.mark.parametrize("threads", [-1, 1.5, "2"])
def test_a_number_of_threads_that_cannot_be(threads) -> None:
    stream = tta.streams.build("continual", Files(size=8), ["clean"])
    with pytest.raises((ValueError, TypeError), match="`threads` must be a whole number"):
        stream.prefetch(threads)


SCRIPT = """
import threading, torch
from tta.streams.reading import read_ahead
torch.set_num_threads(2)
start, made = threading.Thread.start, []
def fail(self):
    made.append(self.name.startswith("reader"))
    if sum(made) == 3:
        raise {error}
    start(self)
threading.Thread.start = fail
try:
    list(read_ahead(range(5), abs, 4))
except (RuntimeError, KeyboardInterrupt) as found:
    print(type(found).__name__)
threading.Thread.start = start
fresh = threading.Thread(target=lambda: print(torch.get_num_threads()))
fresh.start()
fresh.join()
assert [found for _, found in read_ahead(range(5), abs, 4)] == [0, 1, 2, 3, 4]
"""


@pytest.mark.parametrize("error", ['RuntimeError("can\'t start new thread")', "KeyboardInterrupt"])
def test_threads_that_cannot_start_hold_nothing_up(error) -> None:
    command = [sys.executable, "-c", SCRIPT.format(error=error)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [error.partition("(")[0], "2"]


def test_streams_in_several_threads_leave_torchs_threads_alone() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(lambda _: [list(read_ahead(range(3), abs, 2)) for _ in range(10)], "abcd")
            )
        seen = []
        fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        assert torch.get_num_threads() == 2 and seen == [2]
    finally:
        torch.set_num_threads(threads)
