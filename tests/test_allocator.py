"""Memory that a call frees is there for the next one, where a setting says so."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tta.core import allocator

SCRIPT = """
import resource, sys, torch, tta

keeps = sys.argv[1] == "True"
torch.set_num_threads(1)
net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10),
).eval()
adapter = tta.wrap(net, "tent.cifar10", setting=tta.Setting(keep_memory=keeps))
images = torch.rand(8, 3, 160, 160)

for _ in range(6):
    adapter(images)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    adapter(images)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keeps: bool) -> int:
    """Pages that the system had to give for two calls."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(keeps)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(found.stdout)


@pytest.mark.skipif(allocator._function("malloc_trim") is None, reason="the C library is not glibc")
def test_kept_memory_is_not_asked_for_again() -> None:
    given_back, kept = faults(False), faults(True)
    assert given_back > 5_000  # pages of 4 KiB; the layer's output has 6,200
    assert kept < given_back / 10


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_freed_memory()
    allocator.give_back_freed_memory()
    adapter = tta.wrap(tiny("bn"), "bn", setting=tta.Setting(keep_memory=True))
    assert torch.equal(adapter(images(0)), tta.wrap(tiny("bn"), "bn")(images(0)))


def test_after_a_block_memory_is_kept_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, ...]] = []

    def function(name: str) -> object:
        return lambda *wish: told.append(wish) or 1

    monkeypatch.setattr(allocator, "_function", function)
    monkeypatch.setattr(allocator, "_keeps", False)
    with allocator.as_before():
        pass
    assert not told
    with allocator.as_before():
        assert allocator.keep_freed_memory()
    assert told[-1] == (0,)  # malloc_trim
    allocator.keep_freed_memory()
    count = len(told)
    with allocator.as_before():
        allocator.keep_freed_memory()
    assert len(told) == count + 3 and told[-1] != (0,)
