"""Two replicas on Ray Serve, one of which is killed; Ray is started for this, and ended."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.own_models import net
from tests.helpers.served import METHOD, MODEL, Process, Reference, frame, npy
from tta.runtime import StreamPool

NAMES = [f"camera-{number}" for number in range(12)]  # on two replicas, surely
Sent = tuple[list[Any], str]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of Ray's own, whose processes end with it; its sockets need a short name."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield folder
    for number in processes_of(folder):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(place: Path, having: str = "") -> list[int]:
    """Processes that have files open below a folder, with a word in the name of one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            files = [os.readlink(link) for link in (process / "fd").iterdir()]
            if any(file.startswith(str(place)) and having in file for file in files):
                found.append(int(process.name))
    return found


def send(http: httpx.Client, name: str, number: int) -> Sent:
    """The answers to four images, a batch of their stream; and the replica that gave them."""
    files = [(name, ("x", npy(image.numpy()))) for image in frame(number)]
    end = time.monotonic() + 60
    while True:
        answer = http.post("/v1/predict", params={"create": True}, files=files)
        if answer.status_code == 200 or time.monotonic() > end:
            break
        assert answer.status_code == 503 and "has died" in answer.json()["detail"], answer.text
        time.sleep(float(answer.headers["retry-after"]) / 4)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    where = http.get(f"/v1/streams/{name}/health").headers["x-replica"]
    return [(one["index"], one["probabilities"]) for one in found], where


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_replica_that_is_killed_leaves_its_streams_to_the_other(
    tmp_path: Path, place: Path, record_property: Any
) -> None:
    answers = Reference().answers
    wanted = [[(4 * n + i, row) for i, row in enumerate(answers[n])] for n in range(8)]
    folder = tmp_path / "streams"
    settings = ("--folder", str(folder), "--interval", "1000", "--ray", "2")
    env = {"RAY_TMPDIR": str(place), "RAY_USAGE_STATS_ENABLED": "0", "TTA_TOKEN": "abc"}
    with Process(MODEL, *METHOD, *settings, env=env) as process:
        http = process.client
        assert http.get("/v1/streams").status_code == 401
        http.headers["Authorization"] = "Bearer abc"
        for number in range(3):
            sent = {name: send(http, name, number) for name in NAMES}
            assert [rows for rows, _ in sent.values()] == [wanted[number]] * len(NAMES)
        homes = {name: where for name, (_, where) in sent.items()}
        assert len(set(homes.values())) == 2
        for name in NAMES:
            assert http.post(f"/v1/streams/{name}/save").status_code == 200
        assert send(http, NAMES[0], 3) == (wanted[3], homes[NAMES[0]])  # in no snapshot

        (victim,) = processes_of(place, homes[NAMES[0]])
        os.kill(victim, signal.SIGKILL)
        begun = time.monotonic()
        assert send(http, NAMES[0], 3)[0] == wanted[3]  # again, from the last snapshot
        record_property("seconds_without", round(time.monotonic() - begun, 2))
        for name in NAMES[1:]:
            assert send(http, name, 3)[0] == wanted[3]

        # A new replica comes, and takes its share of the streams from the one that lives.
        end = time.monotonic() + 120
        while http.get("/readyz").json() != {"status": "ok", "replicas": 2}:
            assert time.monotonic() < end
            time.sleep(0.2)
        time.sleep(2)  # until who routes knows, too
        moved = 0
        for name in NAMES:
            rows, where = send(http, name, 4)
            assert rows == wanted[4]
            moved += where not in homes.values()
        record_property("moved", moved)
        assert moved

        # One request with images of all streams: a batch of each.
        files = [(name, ("x", npy(image.numpy()))) for image in frame(5) for name in NAMES]
        found = http.post("/v1/predict", files=files).json()
        for name in NAMES:
            rows = [(one["index"], one["probabilities"]) for one in found if one["stream"] == name]
            assert rows == wanted[5]
        listed = http.get("/v1/streams").json()["streams"]
        assert [one["stream"] for one in listed] == sorted(NAMES)
        metrics = http.get("/metrics").text
        assert len({line.split('replica="')[1].split('"')[0] for line in metrics.splitlines()
                    if line.startswith("tta_images_total")}) == 2  # fmt: skip
        assert "/v1/events" in http.get("/").text and http.get("/healthz").status_code == 200
        process.signal(signal.SIGTERM)
        assert process.wait() == 0, process.log
    with StreamPool.open(net(), folder, interval=None) as pool:
        for name in NAMES:
            with pool.stream(name) as view:
                rows = view(frame(6)).log_softmax(1).exp().tolist()
                assert rows == answers[6]
    assert processes_of(place) == []
