"""Frames in, predictions out: order, batches, what is late, what fails, and how it ends."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images
from tests.helpers.faults import same
from tests.helpers.nets import tiny
from tests.helpers.threads import no_thread_left
from tests.helpers.videos import SIZE, folder, picture, video
from tta.runtime import Pipeline, Source, StreamPool, open_source
from tta.runtime.frames import Failure, Frame
from tta.runtime.model_strings import Pixels

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FRAMES = torch.rand(37, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
METHOD = "tent.cifar10"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    with no_thread_left():
        yield


def adapter(method: str = METHOD, **extra) -> tta.Adapter:
    return tta.wrap(tiny("bn"), method, **extra)


def alone(frames: Tensor, size: int = 8, method: str = METHOD) -> tuple[Tensor, tta.Adapter]:
    """What a plain loop gives, and the adapter afterwards."""
    own = adapter(method)
    found = [torch.log_softmax(own(batch), 1).exp() for batch in frames.split(size)]
    return torch.cat(found), own


def probabilities(results) -> Tensor:
    return torch.stack([result.probabilities for result in results])


@pytest.mark.parametrize("kind", ["tensor", "list", "generator", "named"])
@pytest.mark.parametrize("workers", [1, 3])
def test_outputs_are_those_of_a_loop_bit_for_bit(kind, workers):
    sources = {
        "tensor": FRAMES,
        "list": list(FRAMES),
        "generator": (frame for frame in FRAMES),
        "named": (("door", frame) for frame in FRAMES),
    }
    one = adapter()
    pipeline = Pipeline(one, sources[kind], max_wait=60, workers=workers)
    results = list(pipeline)
    expected, own = alone(FRAMES)
    assert torch.equal(probabilities(results), expected)
    assert same(one.state(), own.state())
    assert [result.index for result in results] == list(range(37))
    assert {result.stream for result in results} == {"door" if kind == "named" else "0"}
    assert [result.label for result in results] == expected.argmax(1).tolist()
    assert all(result.learned and result.latency > 0 for result in results)
    assert pipeline.counts == {
        "frames": 37, "learned": 37, "skipped": 0, "dropped": 0, "failed": 0
    }  # fmt: skip
    assert 0 < pipeline.latencies["p50"] <= pipeline.latencies["p99"]


@pytest.mark.parametrize(("queue", "together"), [(1, False), (64, False), (64, True)])
def test_each_stream_of_a_pool_gets_what_it_gets_alone(queue, together):
    """However the streams come mixed, in full batches."""
    chance = np.random.default_rng(0)
    own = {name: FRAMES[n : n + 24] for n, name in enumerate("abc")}
    order = chance.permutation([name for name in own for _ in range(24)])
    places = dict.fromkeys(own, 0)
    mixed = []
    for name in order:
        mixed.append((name, own[name][places[name]]))
        places[name] += 1
    with StreamPool(adapter()) as pool:
        pipeline = Pipeline(pool, mixed, batch_size=4, queue=queue, workers=2, together=together)
        results = list(pipeline)
        assert (pool._beside.passes > 0) == together and pipeline.counts["learned"] == 72
        for name, frames in own.items():
            mine = [result for result in results if result.stream == name]
            assert [result.index for result in mine] == list(range(24))
            expected, one = alone(frames, 4)
            if together:
                assert (probabilities(mine) - expected).abs().max() < 1e-4
                assert torch.equal(probabilities(mine).argmax(1), expected.argmax(1))
                continue
            assert torch.equal(probabilities(mine), expected), name
            assert same(pool.stream(name).state(), one.state())


def test_many_streams_with_few_frames_each_do_not_wait_for_full_batches():
    with StreamPool(adapter("source")) as pool:
        mixed = [(f"camera {n}", FRAMES[n]) for n in range(30)] * 2
        results = list(Pipeline(pool, mixed, batch_size=64, queue=8))
    assert sorted(r.index for r in results) == [0] * 30 + [1] * 30


def test_a_live_batch_goes_when_its_first_frame_has_waited():
    def slowly() -> Iterator[Tensor]:
        for number, frame in enumerate(FRAMES[:6]):
            if number in (3, 5):
                time.sleep(0.4)
            yield frame

    seen = []
    one = adapter("source")
    handle = one.model.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    results = list(Pipeline(one, slowly(), max_wait=0.1))
    handle.remove()
    assert seen == [3, 2, 1]
    assert all(result.latency < 0.35 for result in results)


def test_nothing_is_read_ahead_of_the_queue():
    read = itertools.count()
    pipeline = Pipeline(adapter("source"), map(lambda f: (next(read), f)[1], FRAMES), queue=10,
                        batch_size=4, max_wait=60)  # fmt: skip
    results = iter(pipeline)
    next(results)
    time.sleep(0.2)
    assert next(read) <= 4 + 10 + 2
    results.close()


class Paced(Source):
    """Frames that come together when they are let go."""

    live = True

    def __init__(self, frames: Tensor) -> None:
        self.frames, self.go = frames, threading.Event()

    def __iter__(self) -> Iterator[Frame | Failure]:
        yield Frame("x", self.frames[0])
        self.go.wait(10)
        for frame in self.frames[1:]:
            yield Frame("x", frame)

    def close(self) -> None:
        self.go.set()


def late(policy: str, count: int, queue: int = 8) -> tuple[list, Pipeline, tta.Adapter]:
    """A burst of frames while the first one is dealt with."""
    source = Paced(torch.cat([FRAMES] * 3)[:count])
    one = adapter()
    pipeline = Pipeline(one, source, batch_size=4, queue=queue, late=policy, max_wait=0.01)
    found = []
    for result in pipeline:
        found.append(result)
        if len(found) == 1:
            source.go.set()
            time.sleep(0.3)
    return found, pipeline, one


@pytest.mark.parametrize("policy", ["skip", "drop"])
def test_streams_that_fill_a_batch_each_are_not_late(policy):
    """The queue has room for these, however short it is said to be."""

    class Several(Paced):
        def __iter__(self) -> Iterator[Frame | Failure]:
            yield Frame("x", self.frames[0])
            self.go.wait(10)
            for frame in self.frames[1:4]:
                for stream in "abcdef":
                    yield Frame(stream, frame)

    source = Several(FRAMES)
    pool = StreamPool(adapter(), capacity=8)
    pipeline = Pipeline(pool, source, batch_size=4, queue=4, late=policy, max_wait=0.01)
    for count, result in enumerate(pipeline):
        assert result.learned
        if count == 0:
            source.go.set()
            time.sleep(0.3)
    assert pipeline.counts["dropped"] == pipeline.counts["skipped"] == 0
    assert pipeline.counts["learned"] == 19


def test_late_frames_are_predicted_without_learning():
    results, pipeline, one = late("skip", 41)
    assert [result.index for result in results] == list(range(41))
    learned = [result.learned for result in results]
    assert learned[0] and not learned[1] and learned[-1]
    counts = pipeline.counts
    assert counts["learned"] == sum(learned) and counts["skipped"] == 41 - sum(learned) >= 8
    assert counts["dropped"] == counts["failed"] == 0
    assert one.session.learning
    own = adapter()  # what was skipped has taught nothing
    frames = torch.cat([FRAMES] * 3)[:41]
    own(frames[:1])
    for start in range(1, 41, 4):
        if results[start].learned:
            own(frames[start : start + 4])
    assert same(own.state(), one.state())


@pytest.mark.parametrize("policy", ["skip", "drop"])
@pytest.mark.parametrize("queue", [1, 4])
def test_a_queue_of_one_batch_has_late_frames_too(queue, policy):
    """One that is shorter is raised to a batch."""
    results, pipeline, _ = late(policy, 41, queue)
    assert not results[1].learned and results[-1].learned
    assert pipeline.counts["skipped"] >= 4


def test_the_oldest_frames_are_dropped():
    results, pipeline, _ = late("drop", 61)
    counts = pipeline.counts
    assert counts["dropped"] == 60 - 16
    assert [result.index for result in results] == [0, *range(61 - 16, 61)]
    assert counts["frames"] == 61 == sum(n for key, n in counts.items() if key != "frames")
    assert counts["skipped"] >= 4 and results[-1].learned


def test_waiting_loses_nothing_and_learns_from_all():
    results, pipeline, _ = late("wait", 61)
    assert len(results) == 61 and pipeline.counts["learned"] == 61


class Broken(Source):
    def __init__(self, *items) -> None:
        self.items = items

    def __iter__(self):
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item


def test_what_fails_is_counted_and_the_rest_goes_on(tmp_path, caplog):
    place = folder(tmp_path / "x", 5)
    (place / "0001.png").write_bytes(b"damaged")
    one = adapter("source")
    pipeline = Pipeline(one, open_source(place, follow=0), batch_size=3)
    results = list(pipeline)
    assert [result.index for result in results] == [0, 2, 3, 4]
    assert results[1].source == str(place / "0002.png")
    assert pipeline.counts["failed"] == 1 and "0001.png cannot be used" in caplog.text

    odd = [FRAMES[0], torch.full_like(FRAMES[0], math.nan), "text", FRAMES[1], None, (FRAMES, 3),
           torch.rand(5, SIZE, SIZE), torch.rand(3, 2 * SIZE, SIZE), FRAMES[2]]  # fmt: skip
    pipeline = Pipeline(one, odd, batch_size=4)
    assert [result.index for result in pipeline] == [0, 3, 7, 8]
    assert pipeline.counts["failed"] == 5

    def generator() -> Iterator[Tensor]:
        yield FRAMES[0]
        raise RuntimeError("the cable is out")

    pipeline = Pipeline(one, generator())
    assert len(list(pipeline)) == 1 and pipeline.counts["failed"] == 1
    assert "the cable is out" in caplog.text
    lost = Broken(
        Frame("x", FRAMES[0]), Failure("x", "broke off"), Frame("x", FRAMES[1]), OSError()
    )
    pipeline = Pipeline(one, lost)
    assert len(list(pipeline)) == 2 and pipeline.counts["failed"] == 2


def test_a_transform_that_fails_or_gives_nothing_fails_frame_by_frame():
    def transform(given):
        if bool(given[0, 0, 0] > 0.5):
            raise KeyError("none")
        return given

    pipeline = Pipeline(adapter("source"), FRAMES, transform=transform)
    bad = int((FRAMES[:, 0, 0, 0] > 0.5).sum())
    assert len(list(pipeline)) == 37 - bad and pipeline.counts["failed"] == bad > 5
    pipeline = Pipeline(adapter("source"), FRAMES[:3], transform=lambda given: 7)
    assert list(pipeline) == [] and pipeline.counts["failed"] == 3


def test_pictures_arrays_and_tensors_are_the_same_image():
    shot = picture(5)
    given = [shot, np.asarray(shot), Pixels()(shot), shot.convert("RGBA")]
    results = list(Pipeline(adapter("source"), given))
    assert all(torch.equal(r.probabilities, results[0].probabilities) for r in results)
    grown = Pipeline(adapter("source"), [picture(0, 64)] * 2, transform=Pixels((SIZE, SIZE)))
    assert len(list(grown)) == 2


def test_several_sources_are_read_side_by_side(tmp_path):
    place = folder(tmp_path / "yard", 6)
    clip = video(tmp_path / "door.mp4", 9, 16)
    with StreamPool(adapter()) as pool:
        results = list(Pipeline(pool, open_source([place, clip], follow=0), batch_size=4))
        assert sorted(pool.streams()) == ["door", "yard"]
        for given in ([place, str(clip)], {"yard": place, "door": clip}):
            parts = Pipeline(pool, given)._source.parts()
            assert [part.name for part in parts] == ["yard", "door"]
    for name, count in (("yard", 6), ("door", 9)):
        mine = [r for r in results if r.stream == name]
        assert [r.index for r in mine] == list(range(count))
    own = adapter()
    shots = torch.stack([Pixels()(picture(n)) for n in range(6)])
    expected = torch.cat([torch.log_softmax(own(b), 1).exp() for b in shots.split(4)])
    assert torch.equal(probabilities([r for r in results if r.stream == "yard"]), expected)


def test_results_go_to_a_callback():
    found: list = []
    pipeline = Pipeline(adapter(), FRAMES, on_result=found.append)
    assert pipeline.run()["learned"] == 37 == len(found)
    with pytest.raises(RuntimeError, match="iterated before"):
        iter(pipeline)


def test_probabilities_are_read_as_the_component_says():
    source = tta.SourceStatistics(
        features=torch.rand(20, 12), feature_labels=torch.arange(20) % 10, prototypes=None
    )
    del source
    one = adapter("source", activation="sigmoid")
    (result,) = Pipeline(one, FRAMES[:1])
    assert torch.equal(result.probabilities, one(FRAMES[:1])[0].sigmoid())
    assert not result.learned  # nothing moves
    one = adapter("lame")
    results = list(Pipeline(one, FRAMES[:8]))
    assert torch.allclose(probabilities(results).sum(1), torch.ones(8), atol=1e-5)


def test_a_frozen_stream_learns_nothing():
    with StreamPool(adapter()) as pool:
        pool.stream("a", create=True)
        pool.freeze("a")
        results = list(Pipeline(pool, [(n, f) for f in FRAMES[:8] for n in "ab"], batch_size=4))
        assert {(r.stream, r.learned) for r in results} == {("a", False), ("b", True)}
        assert same(pool.stream("a").state(), adapter().state())


def test_a_batch_that_a_guard_keeps_from_learning_is_not_learned():
    one = adapter("auto")
    results = list(Pipeline(one, FRAMES[:16]))
    assert all(result.learned for result in results)
    one.guard.hold.fill_(2)
    results = list(Pipeline(one, FRAMES[:8]))
    assert not any(result.learned for result in results)


# Staleness


def test_a_model_that_keeps_tensors_of_a_pass_with_their_graph_can_lag():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.kept = tiny("bn"), []

        def forward(self, x):
            logits = self.net(x)
            self.kept = [logits]
            return logits

    one = tta.wrap(Keeping(), "tent.cifar10", num_classes=10)
    one(FRAMES[:4])
    assert not one.model.kept[0].is_leaf
    assert len(list(Pipeline(one, FRAMES[:16], batch_size=4, staleness=1))) == 16


def test_a_pipeline_that_lags_may_be_read_in_inference_mode():
    found = []
    for mode in (False, True):
        one = adapter()
        with torch.inference_mode(mode):
            count = len(list(Pipeline(one, FRAMES, batch_size=4, staleness=2)))
        found.append((count, torch.cat([p.detach().flatten() for p in one.parameters()])))
    assert found[0][0] == found[1][0] == 37 and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("staleness", [1, 3])
def test_predictions_lag_behind_by_no_more_than_the_bound(staleness):
    """The learner is held up; predictions go on to the bound, and in the end all is learned."""
    go, one = threading.Event(), adapter()
    served = 0

    def hold(*_):
        if threading.current_thread().name.startswith("tta-learn"):
            go.wait(20)

    handle = one.model.register_forward_pre_hook(hold)
    pipeline = Pipeline(one, FRAMES[:32], batch_size=4, staleness=staleness)
    results, found = iter(pipeline), []
    for _ in range(4 * (staleness + 1)):  # the first batch, and as many as may lag
        found.append(next(results))
    waiting = threading.Thread(target=lambda: found.extend(results))
    waiting.start()
    time.sleep(0.3)
    served = len(found)
    go.set()
    waiting.join()
    handle.remove()
    assert served == 4 * (staleness + 1) and len(found) == 32
    _, own = alone(FRAMES[:32], 4)
    assert same(one.state(), own.state())
    first = adapter()
    first.freeze()
    expected = torch.log_softmax(first(FRAMES[:4]), 1).exp()
    assert torch.equal(probabilities(found[:4]), expected)
    assert pipeline.counts["learned"] == 32


def test_what_is_learned_becomes_visible_behind_the_bound():
    one = adapter(lr=1.0)
    results = list(Pipeline(one, torch.cat([FRAMES[:8]] * 4), staleness=1))
    first = adapter()
    first.freeze()
    fixed = torch.log_softmax(first(FRAMES[:8]), 1).exp()
    assert torch.equal(probabilities(results[:8]), fixed)
    assert not torch.allclose(probabilities(results[24:]), fixed, atol=1e-3)


def test_a_guard_watches_what_a_copy_predicts_and_its_source_answers_there():
    one = tta.wrap(tiny("bn"), "bn", guard="steady")  # nothing but the guard moves
    results = list(Pipeline(one, torch.cat([FRAMES[:8]] * 8), staleness=1))
    assert int(one.guard.monitor.batches) == 8 and not any(r.learned for r in results)
    one.guard.runs_seen.fill_(True)
    results = list(Pipeline(one, FRAMES[:8], staleness=1))
    expected = torch.log_softmax(tiny("bn")(FRAMES[:8]), 1).exp()
    assert torch.equal(probabilities(results), expected)


def test_a_window_fills_beside_a_copy_where_nothing_learns():
    one, other = (tta.wrap(tiny("bn"), "bn", window=4) for _ in range(2))
    results = list(Pipeline(one, FRAMES[:8], batch_size=1, staleness=1))
    for frame in FRAMES[:8]:
        other(frame[None])
    assert same(one.state(), other.state()) and not any(r.learned for r in results)
    plain = torch.log_softmax(tiny("bn")(FRAMES[7:8]), 1).exp()
    assert not torch.allclose(probabilities(results[7:]), plain, atol=1e-3)


def test_an_error_of_the_learner_reaches_the_caller():
    one = adapter()

    def fail(*_):
        if threading.current_thread().name.startswith("tta-learn"):
            raise MemoryError("full")

    handle = one.model.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="full"):
        list(Pipeline(one, FRAMES, staleness=1))
    handle.remove()
    assert same(one.state(), adapter().state())


# The end


def test_leaving_early_ends_all_threads():
    """The fixture looks."""
    for _ in Pipeline(adapter(), itertools.cycle(FRAMES), workers=3):
        break
    results = iter(Pipeline(adapter(), itertools.cycle(FRAMES), staleness=2))
    next(results)
    results.close()
    assert list(results) == []


def test_an_exception_ends_all_threads(tmp_path):
    def stop(result):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Pipeline(adapter(), itertools.cycle(FRAMES), on_result=stop).run()
    with pytest.raises(KeyError, match="mine"):
        for _ in Pipeline(adapter(), open_source(folder(tmp_path, 3), follow=math.inf)):
            raise KeyError("mine")


def test_an_error_of_the_model_is_not_swallowed():
    one = adapter()
    handle = one.model.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(MemoryError("full"))
    )
    with pytest.raises(MemoryError, match="full"):
        list(Pipeline(one, FRAMES))
    handle.remove()


def test_a_pipeline_is_closed_from_another_thread(tmp_path):
    pipeline = Pipeline(adapter(), open_source(folder(tmp_path, 3), follow=math.inf), max_wait=0.01)
    threading.Timer(0.6, pipeline.close).start()
    with pipeline:
        found = list(pipeline)
    assert len(found) <= 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"max_wait": -1}, ValueError, "`max_wait`"),
        ({"workers": 0}, ValueError, "`workers`"),
        ({"workers": 1.5}, TypeError, "`workers`"),
        ({"queue": 0}, ValueError, "`queue`"),
        ({"late": "never"}, ValueError, "`late` must be one of"),
        ({"staleness": -1}, ValueError, "`staleness`"),
        ({"graphs": True}, ValueError, "`graphs` must be False on cpu, got True: CUDA graphs need"),
        ({"graphs": 1}, TypeError, "`graphs`"),
        ({"transform": 3}, TypeError, "`transform` must be a function"),
        ({"on_result": "x"}, TypeError, "`on_result` must be a function"),
        ({"source": 1.5}, TypeError, "`source` must be an iterable"),
        ({"source": {"a": None}}, TypeError, "`source` must be a folder, a file, the number of"),
        ({"source": "gone"}, FileNotFoundError, "`source` must be there"),
        ({"adapter_or_pool": 7}, TypeError, "`adapter_or_pool` must be"),
    ],
)
def test_arguments_are_checked(change, error, message):
    arguments = {"adapter_or_pool": adapter(), "source": FRAMES, **change}
    with pytest.raises(error, match=message) as caught:
        Pipeline(arguments.pop("adapter_or_pool"), arguments.pop("source"), **arguments)
    assert len(str(caught.value)) <= 300


def test_a_pool_does_not_lag():
    with (
        StreamPool(adapter()) as pool,
        pytest.raises(ValueError, match="`staleness` must be 0 for a pool, got 1"),
    ):
        Pipeline(pool, FRAMES, staleness=1)


def test_half_precision_and_batches_of_one():
    one = tta.wrap(tiny("bn").to(torch.bfloat16), "tent.cifar10")
    assert len(list(Pipeline(one, FRAMES[:3], batch_size=1))) == 3
    assert images(0).dtype == torch.float32
