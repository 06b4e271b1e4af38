"""``tta serve`` as a process: restarts, kills, many clients, hostile requests, the page."""

from __future__ import annotations

import json
import random
import re
import resource
import signal
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import tta
from experiments.studies.live import CAMERAS, Live
from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.own_models import net, to_pixels
from tests.helpers.served import (
    METHOD,
    MODEL,
    Process,
    Reference,
    frame,
    npy,
    picture,
    png,
    safetensors,
    serving,
)
from tests.helpers.soak import Share, shares
from tta.cli import main
from tta.runtime.server import Limits


def batch(process: Process, number: int) -> list[Any]:
    """The answers to four images in one request: a batch of their stream."""
    files = [("a", ("x", npy(image.numpy()))) for image in frame(number)]
    answer = process.client.post("/v1/predict", params={"create": True}, files=files)
    assert answer.status_code == 200, answer.text
    return [one["probabilities"] for one in answer.json()]


@pytest.mark.slow
def test_a_restart_goes_on_bitwise(tmp_path, capsys) -> None:
    folder, wanted = ("--folder", str(tmp_path / "pool")), Reference().answers
    with Process(MODEL, *METHOD, *folder, "--log", "json", env={"TTA_TOKEN": "abc"}) as process:
        assert process.client.get("/v1/streams").status_code == 401
        process.client.headers["Authorization"] = "Bearer abc"
        assert [batch(process, n) for n in range(3)] == wanted[:3]
        assert process.client.get("/v1/streams/a").json()["health"]["estimator"] != ""
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        records = [json.loads(line) for line in process.log.splitlines()]
        assert any(r.get("event") == "created" and r["stream"] == "a" for r in records)
    with Process(MODEL, *METHOD, *folder) as process:
        assert [batch(process, n) for n in range(3, 6)] == wanted[3:6]
        assert process.predict("a", npy(frame(6)[0].numpy()))["index"] == 24
        process.signal(signal.SIGINT)
        assert process.wait() == 0
    assert main(["serve", MODEL, "--method", "eta", *folder, "--port", "0"]) == 2
    assert "`folder` must hold streams of bn" in capsys.readouterr().err


@shares(sample=1, total=16, parts=4)
def test_a_kill_loses_at_most_the_interval(share: Share, tmp_path, soak_seed) -> None:
    wanted = Reference().answers
    for number in range(share.count):
        chance = random.Random(f"{soak_seed} {share.number} {number}")
        folder = ("--folder", str(tmp_path / str(number)))
        with Process(MODEL, *METHOD, *folder, "--interval", "0.4") as process:
            done = chance.randrange(2, 5)
            assert [batch(process, n) for n in range(done)] == wanted[:done]
            time.sleep(1.5)  # on a busy machine too, all of these are written
            for late in range(done, done + chance.randrange(4)):
                batch(process, late)
            process.kill()
        with Process(MODEL, *METHOD, *folder) as process:
            answer = batch(process, done + 3)
        # Bit for bit, whatever of the last three it still knows.
        states = [n for n in range(done, done + 4) if answer == _after(n, done + 3)]
        assert len(states) == 1, states


def _after(seen: int, last: int) -> Any:
    """The answer to a batch by a stream that has seen so many of those before."""
    adapter = tta.wrap(net(), "tent.cifar10", lr=0.05, guard="watch", batch_size=4)
    for number in range(seen):
        adapter(frame(number))
    return adapter(frame(last)).log_softmax(1).exp().tolist()


def test_mistakes_on_the_command_line_are_said_in_a_sentence(tmp_path, capsys) -> None:
    empty = tmp_path / "token"
    empty.write_text("\n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = str(taken.getsockname()[1])
    for arguments, words in [
        ([MODEL, "--token-file", str(empty)], "`token-file` must hold"),
        ([MODEL, "--token-file", str(tmp_path / "none")], "No such file"),
        ([MODEL, "--token-file", str(binary)], "`token` must be 1 to 1000 printable ASCII"),
        ([MODEL, "--token-file", "/dev/zero"], "`token` must be 1 to 1000 printable ASCII"),
        ([MODEL, "--method", "nothing"], "nothing"),
        ([MODEL, "--port", port], "`port` must be free"),
        ([MODEL, "--host", "256.0.0.1", "--port", "0"], "`port` must be free"),
        ([MODEL, "--rate", "-1"], "`rate` must be"),
        ([MODEL, "--max-wait", "nan"], "`max_wait` must be"),
        ([MODEL, "--interval", "0"], "`interval` must be"),
    ]:
        assert main(["serve", *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said and said.startswith("error: "), said
    taken.close()


# Checksums -------------------------------------------------------------------------------------


class Checksum(torch.nn.Module):
    """The class is the sum of an image's pixels, modulo the number of classes."""

    def __init__(self, classes: int = 251) -> None:
        super().__init__()
        self.classes = classes
        self.norm = torch.nn.BatchNorm2d(3)
        self.head = torch.nn.Linear(classes, classes)
        with torch.no_grad():
            self.head.weight.copy_(50 * torch.eye(classes))
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sums = (x * 255).round().flatten(1).sum(1).long() % self.classes
        one_hot = torch.nn.functional.one_hot(sums, self.classes).float()
        return self.head(one_hot + 0 * self.norm(x).mean())


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def checksum_run(clients: int, streams: int, seconds: float) -> tuple[int, list[int]]:
    """Let clients send images at random, and check every row.

    Returns:
        How many rows there were; and the memory of clients and server every half second.
    """
    adapter = tta.wrap(Checksum(), "tent", lr=1e-6, guard="watch")
    seen: dict[str, list[int]] = {f"s{i}": [] for i in range(streams)}
    lock = threading.Lock()
    with serving(adapter, max_wait=0.005, limits=Limits(queue=10_000)) as server:
        end = time.monotonic() + seconds

        def client(seed: int) -> None:
            chance = random.Random(seed)
            with httpx.Client(base_url=server.address, timeout=60, trust_env=False) as http:
                while time.monotonic() < end:
                    name = f"s{chance.randrange(streams)}"
                    images = [picture(chance.randrange(10**9)) for _ in range(chance.randint(1, 3))]
                    files = [(name, ("x", png(image))) for image in images]
                    params = {"create": True, "probabilities": False}
                    if chance.random() < 0.05:  # gone before the answer
                        try:
                            http.post("/v1/predict", params=params, files=files, timeout=0.004)
                        except httpx.TimeoutException:
                            continue
                        continue
                    answer = http.post("/v1/predict", params=params, files=files)
                    assert answer.status_code == 200, answer.text
                    for image, told in zip(images, answer.json(), strict=True):
                        assert told["label"] == int(image.sum(dtype=np.int64)) % 251
                        assert told["stream"] == name
                        with lock:
                            seen[name].append(told["index"])

        with ThreadPoolExecutor(clients) as threads:
            sent = [threads.submit(client, seed) for seed in range(clients)]
            memory = [resident()]
            while time.monotonic() < end:
                time.sleep(0.5)
                memory.append(resident())
            for done in sent:
                done.result()
        for name, indices in seen.items():
            assert len(set(indices)) == len(indices), name  # no image was counted twice
    return sum(map(len, seen.values())), memory


@pytest.mark.slow
def test_64_clients_on_16_streams_get_their_own_rows(record_property) -> None:
    rows, _ = checksum_run(64, 16, 4.0)
    record_property("rows", rows)
    assert rows > 64


@pytest.mark.soak
def test_64_clients_on_16_streams_for_a_minute(record_property) -> None:
    rows, memory = checksum_run(64, 16, 60.0)
    record_property("rows", rows)
    third = len(memory) // 3  # the first one is for what is made once, and for allocators
    middle, last = (statistics.median(memory[n * third : (n + 1) * third]) for n in (1, 2))
    record_property("growth", round((last - middle) / 2**20, 1))
    assert last - middle < 8 * 2**20, (middle, last)


# Hostile requests ------------------------------------------------------------------------------


NAMES = ["a", "a", "a", "b", "new", "", "x" * 300, "a/b", "%00", "\u202e", "é", "..", "a b", "?",
         "#", "a%2Fb"]  # fmt: skip
PARAMETERS = {"create": ["1", "0", "perhaps", "", "true"], "probabilities": ["0", "null", "1"],
              "stream": ["a", ""]}  # fmt: skip
KINDS = ["image/png", "application/json", "multipart/form-data", "multipart/form-data; boundary=x",
         "multipart/form-data; boundary=" + "x" * 300, "application/x-www-form-urlencoded", b"\xff",
         ""]  # fmt: skip
FRAME = b"POST /v1/predict?stream=a HTTP/1.1\r\nHost: localhost\r\n"


def body_of(chance: random.Random) -> bytes:
    """An image, whole or not."""
    pixels = picture(chance.randrange(1000), (chance.randint(1, 40), chance.randint(1, 40)))
    floats = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(chance.randrange(99)))
    body = chance.choice([
        lambda: png(pixels),
        lambda: png(pixels, "JPEG"),
        lambda: npy(floats.numpy()),
        lambda: npy(chance.choice([pixels, pixels.astype("O"), pixels.astype("M8[s]"),
                                   np.zeros(chance.choice([(), (0,), (3, 0, 2), (1,) * 9])),
                                   np.full((3, 16, 16), chance.choice([np.nan, np.inf, 1e38]))])),
        lambda: safetensors(x=floats),
        lambda: safetensors(**{f"t{i}": floats + i for i in range(chance.randint(1, 3))}),
        lambda: (1 << chance.randrange(64)).to_bytes(8, "little") + b'{"x":{"dtype":"F32"}}',
        lambda: b"\x80\x04\x95" + chance.randbytes(30),  # as a pickle begins
        lambda: chance.randbytes(chance.randrange(2000)),
        lambda: b"",
    ])()  # fmt: skip
    how = chance.randrange(4)
    if how == 0 and body:
        body = body[: chance.randrange(len(body))]
    elif how == 1 and body:
        hurt = bytearray(body)
        for _ in range(chance.randint(1, 8)):
            hurt[chance.randrange(min(len(hurt), 200))] = chance.randrange(256)
        body = bytes(hurt)
    return body


def request_of(chance: random.Random) -> dict[str, Any]:
    """A request to some route, mostly wrong in some way."""
    name = chance.choice(NAMES)
    path = chance.choice([
        "/v1/predict", "/v1/predict", "/v1/predict", "/v1/predict", "/v1/streams",
        f"/v1/streams/{name}", f"/v1/streams/{name}/health", f"/v1/streams/{name}/frames",
        f"/v1/streams/{name}/{chance.choice(['freeze', 'unfreeze', 'save', 'x', ''])}",
        "/metrics", "/healthz", "/", "/openapi.json", f"/{name}", "/v1/../v1/streams",
    ])  # fmt: skip
    asked: dict[str, Any] = {"stream": name}
    for key, values in PARAMETERS.items():
        if chance.random() < 0.3:
            asked[key] = chance.choice(values)
    request: dict[str, Any] = {
        "method": chance.choice(["POST"] * 6 + ["GET", "DELETE", "PUT", "HEAD", "OPTIONS", "ODD"]),
        "url": path, "params": asked, "headers": {"Content-Type": chance.choice(KINDS)},
    }  # fmt: skip
    how = chance.randrange(4)
    if how == 0:
        del request["headers"]["Content-Type"]
        request["files"] = [
            (chance.choice(["a", "b", name or "n"]),
             (chance.choice(["f", None, "a/../b"]), body_of(chance)))
            for _ in range(chance.randint(1, 6))
        ]  # fmt: skip
    elif how == 1:
        mark = b'--x\r\nContent-Disposition: form-data; name="a"; filename="f"\r\n\r\n'
        body = mark + body_of(chance) + chance.choice([b"\r\n--x--\r\n", b"\r\n--x", b""])
        request["content"] = body[chance.choice([0, 0, 3]):]  # fmt: skip
    else:
        request["content"] = chance.choice([
            lambda: body_of(chance),
            lambda: json.dumps(chance.choice([{}, [], {"stream": name}, {"stream": 1}])).encode(),
        ])()  # fmt: skip
    return request


def raw_of(chance: random.Random) -> bytes:
    """Bytes that are hardly HTTP."""
    return chance.choice([
        b"GET / HTTP/9.9\r\n\r\n",
        FRAME + b"Content-Length: 99999999999\r\n\r\n",
        FRAME + b"Content-Length: -1\r\n\r\n",
        FRAME + b"Content-Length: 500\r\n\r\nshort",
        FRAME + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n" + chance.randbytes(50),
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        chance.randbytes(200),
    ])  # fmt: skip


@shares(sample=500, total=12_000, parts=8)
def test_hostile_requests_are_refused_in_words(share: Share, soak_seed, record_property) -> None:
    adapter = tta.wrap(net(), "tent", guard="watch")
    limits = Limits(body=200_000, pixels=10_000, streams=6, images=5, receive_s=0.5)
    with serving(adapter, transform=to_pixels, shape=(3, 16, 16), limits=limits) as server:
        for name in ("a", "b"):
            server.post(f"/v1/streams/{name}")
            server.post(f"/v1/streams/{name}/freeze")
        start = {n: server.pool.stream(n).state() for n in ("a", "b")}
        statuses: dict[int, int] = {}
        for number in range(share.count):
            chance = random.Random(f"{soak_seed} {share.number} {number}")
            if chance.random() < 0.05:
                host, port = server.address.removeprefix("http://").split(":")
                with socket.create_connection((host, int(port)), 10) as raw:
                    raw.sendall(raw_of(chance))
                    raw.settimeout(0.05)
                    with suppress(OSError):
                        raw.recv(100)
                continue
            request = request_of(chance)
            answer = server.client.request(**request)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (number, answer.text)
            if answer.status_code >= 400 and request["method"] != "HEAD":
                kind = answer.headers["content-type"]
                if kind != "application/json":  # what uvicorn itself refuses
                    assert answer.status_code == 400, (number, answer.text)
                    continue
                text = answer.json()["detail"]
                assert isinstance(text, str) and text and "Traceback" not in text, (number, text)
            if "unfreeze" in request["url"] or request["method"] == "DELETE":
                for name in ("a", "b"):
                    server.post(f"/v1/streams/{name}")
                    server.post(f"/v1/streams/{name}/freeze")
        assert {200, 404, 413, 422} <= statuses.keys(), statuses
        assert server.get("/readyz").status_code == 200 and server.service.load.size == 0
        for name, before in start.items():
            after = server.pool.stream(name).state()
            moved = [k for k in before if not torch.equal(before[k], after[k])]
            assert not moved, moved
    record_property("requests", share.count)


# The page --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_shows_streams_live(tmp_path: Path) -> None:
    with serving(token="secret") as server, Browser(tmp_path) as page:
        server.client.headers["Authorization"] = "Bearer secret"
        server.predict("door", png(picture(0)))
        for width in (1280, 390):
            page.open(server.address, width, 900)
            page.wait_for("document.title === 'Streams'")
            if width == 1280:
                page.wait_for("!document.getElementById('ask').hidden")
                page.value("document.getElementById('token').value = 'secret'")
                page.value("document.getElementById('ask').requestSubmit()")
            page.wait_for("document.querySelector('article h2')?.textContent === 'door'")
            assert page.value("document.documentElement.scrollWidth") == width
        server.predict("<b>yard", png(picture(1)))
        page.wait_for("document.querySelectorAll('article').length === 2")
        page.wait_for("document.querySelectorAll('figure img').length === 2")
        assert page.value("document.querySelectorAll('article b b').length") == 0
        assert page.value(
            "[...document.querySelectorAll('h2')].some(h => h.textContent === '<b>yard')"
        )
        time.sleep(1.1)  # health is told at most once a second
        server.predict("door", png(picture(2)))
        page.wait_for("/images\\s*2/.test(document.querySelector('[data-stream=door]').innerText)")
        page.value("document.querySelector('[data-stream=door] button').click()")
        page.wait_for("/frozen/.test(document.querySelector('[data-stream=door]').innerText)")
        assert server.get("/v1/streams/door").json()["frozen"] is True
        server.client.delete("/v1/streams/door")
        page.wait_for("document.querySelectorAll('article').length === 1")
        page.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        errors = [text for text in page.said if '"level": "error"' in text and "401" not in text]
        assert not errors and not any("exceptionDetails" in text for text in page.said), page.said


@pytest.mark.slow
def test_the_live_demo_runs(capsys) -> None:
    right = Live("auto", 0, None, 8.0).execute()
    assert set(right) == set(CAMERAS) and right["hall"] > 0.5, right
    assert re.search(r"the page: http://127.0.0.1:\d+/", capsys.readouterr().out)
