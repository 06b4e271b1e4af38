"""What goes beside predictions on a device is handed over in order; no GPU is needed for that."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tta
from tests.helpers.faults import same
from tests.helpers.nets import tiny
from tta.runtime import Pipeline, lanes
from tta.runtime.lanes import CudaLanes, Given, Lanes, lanes_on

FRAMES = torch.rand(22, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Noted(Lanes):
    """Notes each call with the thread that made it, and takes only what was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.here = threading.local()

    def note(self, call: str, given: Any = None) -> None:
        thread = threading.current_thread().name.split("_")[0]
        lane = "learning" if getattr(self.here, "learning", False) else thread
        self.calls.append((call, lane, given))

    def upload(self, image: Tensor) -> Any:
        given = Given(image, "upload")
        self.note("upload", given)
        return given

    def give(self, value: Any) -> Any:
        kind = {Tensor: "images", list: "adapter"}.get(type(value), "state")
        given = Given(value, kind)
        self.note("give", given)
        return given

    def take(self, given: Any) -> Any:
        assert isinstance(given, Given)
        self.note("take", given)
        return given.value

    @contextmanager
    def learning(self) -> Iterator[None]:
        self.here.learning = True
        try:
            yield
        finally:
            self.here.learning = False


@pytest.fixture
def noted(monkeypatch) -> Noted:
    found = Noted()
    monkeypatch.setattr(lanes, "lanes_on", lambda device: found)
    return found


def adapter() -> tta.Adapter:
    return tta.wrap(tiny("bn"), "tent.cifar10")


def check_pairs(calls: list[tuple[str, str, Any]]) -> None:
    """Whatever is taken was given before, once each, and everything comes to somebody."""
    given: list[Any] = []
    for call, _, what in calls:
        if call == "take":
            assert what in given
        else:
            given.append(what)


def test_frames_are_uploaded_where_they_are_decoded_and_waited_for_where_they_are_used(noted):
    one, own = adapter(), adapter()
    results = list(Pipeline(one, FRAMES, batch_size=4, workers=2))
    expected = torch.cat([torch.log_softmax(own(b), 1).exp() for b in FRAMES.split(4)])
    assert torch.equal(torch.stack([r.probabilities for r in results]), expected)
    check_pairs(noted.calls)
    assert [lane for call, lane, _ in noted.calls if call == "upload"] == ["tta-decode"] * 22
    taken = [(lane, what) for call, lane, what in noted.calls if call == "take"]
    assert len(taken) == 22 and {lane for lane, _ in taken} == {"MainThread"}
    assert all(torch.equal(what.value, f) for (_, what), f in zip(taken, FRAMES, strict=True))


def test_the_learner_waits_for_images_and_predictions_for_its_state(noted):
    one = adapter()
    results = list(Pipeline(one, FRAMES, batch_size=4, staleness=2))
    assert len(results) == 22
    check_pairs(noted.calls)
    rest = [(c, lane, w.ready) for c, lane, w in noted.calls if w.ready != "upload"]
    learner = [(c, kind) for c, lane, kind in rest if lane == "learning"]
    # The adapter, then images and state of each of 6 batches, and the adapter back.
    steps = [("take", "images"), ("give", "state")] * 6
    assert learner == [("take", "adapter"), *steps, ("give", "adapter")]
    own = [(c, kind) for c, lane, kind in rest if lane == "MainThread"]
    assert own[0] == ("give", "adapter") and own[-1] == ("take", "adapter")
    assert own.count(("give", "images")) == 6
    assert 1 <= own.count(("take", "state")) <= 6
    seen = adapter()
    for batch in FRAMES.split(4):
        seen(batch)
    assert same(one.state(), seen.state())


def test_images_that_stay_behind_are_brought_along(noted, monkeypatch):
    """Where there is no memory for an upload, the image is still on the CPU."""
    monkeypatch.setattr(Noted, "upload", lambda self, image: image)
    monkeypatch.setattr(Noted, "take", lambda self, given: given)
    assert len(list(Pipeline(adapter(), FRAMES, batch_size=4))) == 22


def test_nothing_happens_on_a_cpu():
    here, image = lanes_on(torch.device("cpu")), FRAMES[0]
    assert type(here) is Lanes
    assert here.upload(image) is image and here.take(here.give(image)) is image
    with here.learning():
        pass


class Stream:
    """In place of a stream of CUDA: notes what it is to wait for."""

    def __init__(self, device: Any = None) -> None:
        self.waits: list[Any] = []

    def record_event(self) -> Any:
        return SimpleNamespace(of=self)

    def wait_event(self, event: Any) -> None:
        self.waits.append(event.of)


@pytest.fixture
def streams(monkeypatch) -> Any:
    """What ``torch.cuda`` does with streams, on a device that is not there."""
    current = [Stream()]

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    return current


class Fake:
    """In place of a tensor: notes the streams that use it."""

    def __init__(self, kind: str) -> None:
        self.device, self.recorded = torch.device(kind), []

    def is_pinned(self) -> bool:
        return False

    def pin_memory(self) -> Fake:
        return self

    def to(self, device: torch.device, non_blocking: bool) -> Fake:
        assert non_blocking
        return Fake(str(device))

    def record_stream(self, stream: Stream) -> None:
        self.recorded.append(stream)


def test_streams_of_a_gpu_wait_for_each_other(streams, monkeypatch):
    """By the calls that are made; ``tests/test_cuda.py`` looks at results on a GPU."""
    monkeypatch.setattr(lanes, "_tensors", lambda v: [v] if isinstance(v, Fake) else v.values())
    device = torch.device("cuda:0")
    gpu = CudaLanes(device)
    image: Any = Fake("cpu")
    given = gpu.upload(image)
    assert given.value.device == device and given.ready.of is gpu._uploads
    taken = gpu.take(given)
    assert streams[0].waits == [gpu._uploads] and taken.recorded == [streams[0]]
    handed = gpu.give(taken)
    with gpu.learning():
        assert gpu.take(handed) is taken
        state = gpu.give({"weight": Fake("cuda:0"), "rng": Fake("cpu")})
    assert gpu._learner.waits == [streams[0]] and taken.recorded[-1] is gpu._learner
    found = gpu.take(state)
    assert streams[0].waits[-1] is gpu._learner
    assert found["weight"].recorded == [streams[0]] and found["rng"].recorded == []
    there: Any = Fake("cuda:0")
    assert gpu.upload(there).ready.of is streams[0]

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Fake, "to", full)
    assert gpu.upload(image) is image and gpu.take(image) is image
