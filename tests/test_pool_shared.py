"""Pools of several processes on one folder: a stream is one's at a time, and changes hands."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import multiprocessing
import os
import random
import signal
import threading
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
from tests.helpers.served import npy, serving
from tta.core import files
from tta.runtime import StreamPool, owners
from tta.runtime.owners import POLL, ElsewhereError, Owners, making

FORK = multiprocessing.get_context("fork")  # where the test is of what a fork inherits


def wrapped() -> tta.Adapter:
    return tta.wrap(tiny("bn"), "tent.cifar10", guard="watch")


def made(folder: Path) -> StreamPool:
    return StreamPool(wrapped(), folder=folder, interval=None, shared=True)


def another(folder: Path, **extra: Any) -> StreamPool:
    """A pool as another process has one: locks are those of the open file."""
    return StreamPool.open(tiny("bn"), folder, **{"interval": None, "shared": True, **extra})


def refuse(pool: StreamPool, name: str = "a", **extra: Any) -> None:
    with pytest.raises(ElsewhereError, match="another process has it") as caught:
        pool.stream(name, wait=False, **extra)
    assert len(str(caught.value)) <= 300


def test_a_stream_goes_from_hand_to_hand_bit_for_bit(tmp_path: Path) -> None:
    alone = wrapped()
    with made(tmp_path / "p") as one, another(tmp_path / "p", capacity=1) as two:
        refused_at_first = 0
        for number, pool in enumerate([one, two, two, one, two, one]):
            if number in (1, 3, 4, 5):  # the other one has it
                refuse(pool)
                refused_at_first += 1
            with pool.stream("a", create=True) as view:  # waits until it is handed over
                assert torch.equal(view(images(number)), alone(images(number)))
        assert refused_at_first == 4 and one.counts["handed_over"] == 2
        assert same(one.stream("a").state(), alone.state())
        assert one.streams() == two.streams() == ["a"]


def test_an_owner_within_its_block_is_let_finish(tmp_path: Path) -> None:
    with made(tmp_path / "p") as one, another(tmp_path / "p") as two:
        got: list[float] = []

        def take() -> None:
            with two.stream("a", create=True) as view:
                got.append(time.monotonic())
                view(images(1))

        with one.stream("a", create=True) as view:
            view(images(0))
            waiting = threading.Thread(target=take)
            waiting.start()
            time.sleep(4 * POLL)
            view(images(1))
            left = time.monotonic()
        waiting.join(30)
        assert got and got[0] > left
        refuse(one)
        for action in (one.reset, one.freeze, one.health, one.drop):
            with pytest.raises(ElsewhereError):
                action("a")


def _serve_and_hang(folder: Path, ready: Any) -> None:
    torch.set_num_threads(1)
    pool = another(folder)
    with pool.stream("a") as view:
        view(images(1))
        pool.snapshot()
        view(images(2))  # in no snapshot
        ready.send(os.getpid())
        time.sleep(60)


def test_a_killed_owner_leaves_its_streams_where_its_last_snapshot_was(tmp_path: Path) -> None:
    alone = wrapped()
    with made(tmp_path / "p") as one, one.stream("a", create=True) as view:
        view(images(0))
    alone(images(0))
    here, there = multiprocessing.Pipe()
    process = CLEAN.Process(target=_serve_and_hang, args=(tmp_path / "p", there), daemon=True)
    process.start()
    try:
        assert here.poll(60)
        with another(tmp_path / "p") as two:
            refuse(two)
            os.kill(here.recv(), signal.SIGKILL)
            process.join(30)
            alone(images(1))
            with two.stream("a", wait=False) as view:  # at once
                assert same(view.state(), alone.state())
                assert torch.equal(view(images(2)), alone(images(2)))
    finally:
        process.kill()


def _batch(name: str, number: int) -> torch.Tensor:
    return images(1000 * ord(name) + number, 4)


def _use_at_random(folder: Path, log: Path, seed: int, seconds: float) -> None:
    torch.set_num_threads(1)
    chance, end = random.Random(seed), time.monotonic() + seconds
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with another(folder, interval=0.2) as pool:
        while time.monotonic() < end:
            name = chance.choice("abc")
            with pool.stream(name, create=True) as view:
                number = int(view.state()["guard/monitor.batches"])
                rows = view(_batch(name, number)).numpy().tobytes()
            line = f"{name} {number} {hashlib.sha256(rows).hexdigest()} {seed}\n"
            os.write(handle, line.encode())  # one write, so that lines stay whole


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_processes_that_take_streams_from_each_other(killed: bool, tmp_path: Path) -> None:
    made(tmp_path / "p").close()
    log = tmp_path / "log"
    users = [
        CLEAN.Process(target=_use_at_random, args=(tmp_path / "p", log, seed, 5.0), daemon=True)
        for seed in range(3)
    ]
    for user in users:
        user.start()
    try:
        if killed:
            time.sleep(2.5)
            users[0].kill()
        for user in users:
            user.join(120)
        assert [user.exitcode for user in users] == [-signal.SIGKILL if killed else 0, 0, 0]
    finally:
        for user in users:
            user.kill()
    lines = [line.split() for line in log.read_text().splitlines()]
    for name in "abc":
        mine = [(int(number), digest, user) for one, number, digest, user in lines if one == name]
        numbers = [number for number, _, _ in mine]
        changes = sum(one[2] != next_[2] for one, next_ in itertools.pairwise(mine))
        assert changes >= 3, (name, changes)  # it did go round
        alone = wrapped()
        for number in range(max(numbers) + 1):
            digest = hashlib.sha256(alone(_batch(name, number)).numpy().tobytes()).hexdigest()
            assert {found for n, found, _ in mine if n == number} == {digest}, (name, number)
        if killed:  # a chain that goes on from a snapshot, once
            assert sum(one >= next_ for one, next_ in itertools.pairwise(numbers)) <= 1
        else:
            assert sorted(numbers) == list(range(len(numbers)))  # none twice


def test_a_forked_child_does_not_hold_what_its_parent_had(tmp_path: Path) -> None:
    mine = Owners(tmp_path)
    assert mine.claim("a")
    child = FORK.Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    try:
        other = Owners(tmp_path)
        assert not other.claim("a")
        mine.close()
        end = time.monotonic() + 30  # the child drops it as soon as it runs
        while not other.claim("a"):
            assert time.monotonic() < end
            time.sleep(0.02)
        with pytest.raises(OSError, match="gave all streams back"):
            mine.claim("b")
        other.close()
    finally:
        child.kill()


def test_who_asks_is_served_before_the_former_owner(tmp_path: Path, monkeypatch) -> None:
    one, two, three = Owners(tmp_path), Owners(tmp_path), Owners(tmp_path)
    assert one.claim("a") and one.claim("a") and one.claim("b") and one.wanted() == []
    assert not two.claim("a") and not three.claim("a")
    assert one.wanted() == ["a"] and two.wanted() == three.wanted() == []
    one.give("a")
    assert not one.claim("a") and not three.claim("a")  # two stands in the queue
    assert two.claim("a") and "a" in two and "a" not in one
    assert two.wanted() == []  # nobody stands behind it: refused ones ask again
    assert not one.claim("a") and two.wanted() == ["a"]
    monkeypatch.setattr(owners, "PATIENCE", -1.0)
    one.wanted()  # withdraws what it did not repeat
    assert two.wanted() == []
    for each in (one, two, three):
        each.close()


def test_streams_that_others_make_and_drop_are_known(tmp_path: Path) -> None:
    with made(tmp_path / "p") as one, another(tmp_path / "p") as two:
        with one.stream("a", create=True) as view:
            start = view.state()
        assert "a" in two and two.streams() == ["a"]  # it has a file from the first on
        refuse(two, create=True)
        with one.stream("b", create=True) as view:
            view(images(0))
        with pytest.raises(ElsewhereError):
            two.drop("b")
        one.drop("b")
        assert "b" not in two and two.streams() == ["a"]
        with pytest.raises(KeyError):
            two.stream("b")
        with two.stream("b", create=True) as view:  # a new one
            assert same(view.state(), start)
        logits = wrapped()(images(0))
        assert torch.equal(one.stream("b")(images(0)), logits)  # waits for it


def test_a_mixed_batch_with_a_stream_of_another_changes_nothing(tmp_path: Path) -> None:
    with made(tmp_path / "p") as one, another(tmp_path / "p") as two:
        for name in "ac":
            with one.stream(name, create=True) as view:
                view(images(0))
        with two.stream("a") as held:  # not handed over until the block ends
            before = one.stream("c").state()
            held(images(1))
            for batched in (True, False):
                one.batched = batched
                with pytest.raises(ElsewhereError):
                    one.run_each(
                        {"c": 0, "a": 0}, lambda adapter, _: adapter(images(1)), wait=False
                    )
            assert same(one.stream("c").state(), before)


def test_a_stream_that_cannot_be_written_is_not_handed_over(tmp_path, monkeypatch, caplog) -> None:
    with made(tmp_path / "p") as one, another(tmp_path / "p") as two:
        with one.stream("a", create=True) as view:
            view(images(0))
            state = view.state()

        def full(path: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(files, "_new_part", full)
            refuse(two)
            time.sleep(3 * POLL)
            refuse(two)
            assert one.counts["failed"] > 0 and one.counts["handed_over"] == 0
        with two.stream("a") as view:
            assert same(view.state(), state)


def test_a_system_without_locks_is_refused_and_nothing_is_made(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="`shared` must be False"):
        StreamPool(wrapped(), shared=True)

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    for patched, value in (("fcntl", None), ("fcntl.fcntl", no_locks)):
        with monkeypatch.context() as patch:
            patch.setattr(f"tta.runtime.owners.{patched}", value)
            adapter = wrapped()
            with pytest.raises(OSError, match="`folder` must be on a file system with locks"):
                StreamPool(adapter, folder=tmp_path / "p", shared=True)
            assert not (tmp_path / "p" / "config.json").exists()
            adapter(images(0))  # nobody has it


def test_one_of_two_makes_the_pool(tmp_path: Path) -> None:
    order: list[str] = []

    def make(name: str) -> None:
        with making(tmp_path):
            order.append(f"{name} in")
            time.sleep(0.05)
            order.append(f"{name} out")

    threads = [threading.Thread(target=make, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [word.split()[1] for word in order] == ["in", "out", "in", "out"]


def test_a_server_refuses_a_stream_of_another_until_it_has_it(tmp_path: Path) -> None:
    alone, image = wrapped(), images(0, 1)
    body = npy(image[0].numpy())
    first = alone(image).log_softmax(1).exp()[0].tolist()
    second = alone(image).log_softmax(1).exp()[0].tolist()
    with serving(folder=tmp_path / "p", shared=True) as server, another(tmp_path / "p") as other:
        assert server.predict("a", body)["probabilities"] == first
        with other.stream("a"):  # it was handed over
            answer = server.post("/v1/predict", params={"stream": "a"}, content=body)
            server.refused(409, "another process has it", answer)
            assert answer.headers["retry-after"] == "1"
            answer = server.post("/v1/predict", files=[("a", ("x", body)), ("a", ("x", body))])
            server.refused(409, "another process has it", answer)
        end = time.monotonic() + 30
        while answer.status_code == 409:
            assert time.monotonic() < end
            time.sleep(0.1)
            answer = server.post("/v1/predict", params={"stream": "a"}, content=body)
        assert answer.json()["probabilities"] == second and answer.json()["index"] == 1


def test_a_stream_that_another_drops_is_made_anew(tmp_path: Path) -> None:
    with made(tmp_path / "p") as one, another(tmp_path / "p") as two:
        one.stream("a", create=True)(images(0))
        one.snapshot()
        view = two.stream("a")
        one.drop("a")
        with pytest.raises(KeyError, match="was dropped"):
            view(images(1))
        assert "a" not in two and "a" not in one
        again = two.stream("a", create=True)
        assert torch.equal(again(images(1)), wrapped()(images(1)))


def test_a_mixed_call_that_fails_drops_no_stream_that_another_has_made(tmp_path: Path) -> None:
    """It looks for the streams first, and may wait for one of them long after."""
    failed: list[BaseException] = []
    with made(tmp_path / "p") as one, another(tmp_path / "p") as two:

        def call() -> None:
            try:
                two(torch.rand(4, 1, 8, 8), ["a", "a", "b", "b"], create=True)
            except BaseException as error:
                failed.append(error)

        with one.stream("a", create=True) as view:
            view(images(0))
            thread = threading.Thread(target=call)
            thread.start()
            time.sleep(20 * POLL)  # it waits for "a" by now
            one.stream("b", create=True)(images(1))
            one.snapshot()
        thread.join()
        assert len(failed) == 1 and isinstance(failed[0], (ValueError, RuntimeError))
        assert one.streams() == ["a", "b"]


def test_a_folder_that_cannot_hold_locks_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "owners.lock").symlink_to(tmp_path / "file")
    for name in ("file", "linked"):
        with pytest.raises(OSError, match="`folder` must be one that can be written to"):
            made(tmp_path / name)
    with pytest.raises(TypeError, match="`shared`"):
        StreamPool(wrapped(), folder=tmp_path / "p", shared="yes")  # type: ignore[arg-type]
    assert not (tmp_path / "p").exists()
