"""Images that are read ahead by other processes are the ones that are read here."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

import corruptions
import tta

COUNT = 40


class Files:
    """Items of different sizes that take a process to read, and say which one did."""

    def __init__(self, broken=None, deadly=None, size=None) -> None:
        self.targets = [i % 4 for i in range(COUNT)]
        self.broken, self.deadly, self.size = broken, deadly, size
        self.parent = os.getpid()
        self.read_here = 0

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i):
        if i == self.broken:
            raise OSError(f"image {i} cannot be decoded")
        if os.getpid() == self.parent:
            self.read_here += 1
        elif i == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
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
    before = torch.get_rng_state()
    ahead = stream.prefetch(2)
    assert same(stream, ahead)
    here = files.read_here
    assert len(list(ahead)) == len(stream) and files.read_here == here
    assert same(stream.from_step(2), ahead.from_step(2))
    assert torch.equal(torch.get_rng_state(), before)
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
        with pytest.raises(OSError, match=r"^image 30 cannot be decoded$"):
            list(stream.prefetch(readers))


def test_a_process_that_dies_is_said() -> None:
    stream = tta.streams.build("continual", Files(deadly=5, size=8), ["clean"], batch_size=8)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(stream.prefetch(1))


@pytest.mark.parametrize("workers", [-1, 1.5, "2"])
def test_a_number_of_processes_that_cannot_be(workers) -> None:
    stream = tta.streams.build("continual", Files(size=8), ["clean"])
    with pytest.raises((ValueError, TypeError), match="`workers` must be a whole number"):
        stream.prefetch(workers)
