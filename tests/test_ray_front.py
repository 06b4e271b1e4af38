"""The front of replicas, over two of them in this process: Ray itself is not needed."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

import tta
from tests.helpers.nets import tiny
from tests.helpers.served import picture, png, to_tensor
from tta.cli import main
from tta.cli.serve import build
from tta.runtime import open_or_make
from tta.runtime.ray import application, front, replica
from tta.runtime.ray.front import Front
from tta.runtime.ray.replica import Replica
from tta.runtime.server import Limits
from tta.runtime.server import application as server_application

IMAGES = [png(picture(seed)) for seed in range(4)]


def adapter() -> tta.Adapter:
    return tta.wrap(tiny("bn"), "tent.cifar10", guard="watch", batch_size=4)


def expected(*batches: list[int]) -> list[Any]:
    """What a stream of its own gives for batches of these images."""
    import io

    import torch
    from PIL import Image

    alone, found = adapter(), []
    for rows in batches:
        opened = [to_tensor(Image.open(io.BytesIO(IMAGES[row]))) for row in rows]
        found += alone(torch.stack(opened)).log_softmax(1).exp().tolist()
    return found


CALL: ContextVar[str] = ContextVar("call", default="")


class RayError(Exception):
    """As Ray raises when an actor has died."""


class Handle:
    """What Ray Serve gives a deployment to reach others by, over objects of this process."""

    def __init__(self, replicas: dict[str, Replica], session: str = "") -> None:
        self.replicas, self.session = replicas, session
        self.of: dict[str, str] = {}  # which replica a stream is sent to
        self.dead: set[str] = set()
        self.ask = self

    def options(self, session_id: str) -> Handle:
        other = Handle(self.replicas, session_id)
        other.of, other.dead = self.of, self.dead
        return other

    def remote(self, asked: Any) -> Any:
        assert CALL.get() == ""  # Ray Serve confuses calls of one request, see the front

        async def go() -> Any:
            name = self.of.get(self.session, "one")
            if name in self.dead:
                raise RayError
            return await self.replicas[name].ask(asked)

        return asyncio.ensure_future(go())

    def broadcast(self, method: str, *arguments: Any) -> Any:
        async def results_async(timeout_s: float, return_exceptions: bool) -> list[Any]:
            calls = [
                RayError() if name in self.dead else await getattr(one, method)(*arguments)
                for name, one in self.replicas.items()
            ]
            return calls

        return types.SimpleNamespace(results_async=results_async)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """In place of Ray, the few names of it that replicas and the front use."""
    names = iter(("one", "two", "three"))

    def context() -> Any:
        return types.SimpleNamespace(replica_id=types.SimpleNamespace(unique_id=next(names)))

    for name, content in {
        "ray": {}, "ray.serve": {"get_replica_context": context},
        "ray.exceptions": {"RayError": RayError},
        "ray.serve.exceptions": {"RayServeException": RayError},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


class Running:
    """The front at a port, before two replicas."""

    def __init__(self, folder: Path, **door: Any) -> None:
        def make() -> Any:
            pool = open_or_make(adapter(), folder, shared=True, interval=None)
            return server_application(pool, to_tensor, max_wait=0.0, hosts=None)

        self.make = make
        self.handle = Handle({name: Replica(make) for name in ("one", "two")})
        self.handle.of.update(door="one", yard="two")
        limits = Limits(body=100_000, images=6)
        self.front = Front(self.handle, limits, door.get("token"), ())
        config = uvicorn.Config(self.front.application(), port=0, log_config=None, lifespan="on")
        self.server = uvicorn.Server(config)

        def go() -> None:
            CALL.set("a request")  # in the context of all that the front does
            self.server.run()

        self.thread = threading.Thread(target=go, daemon=True)
        self.thread.start()
        end = time.monotonic() + 60
        while not self.server.started:
            assert self.thread.is_alive() and time.monotonic() < end
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)

    def predict(self, *names: str, rows: tuple[int, ...] = (), **more: Any) -> httpx.Response:
        params = {"create": True} | more
        if len(names) == 1:
            params["stream"] = names[0]
            return self.http.post("/v1/predict", params=params, content=IMAGES[rows[0]])
        parts = [(name, ("x", IMAGES[row])) for name, row in zip(names, rows, strict=True)]
        return self.http.post("/v1/predict", params=params, files=parts)

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(60)
        for one in self.handle.replicas.values():
            one.__del__()


@pytest.fixture
def running(no_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(front, "POLL_S", 0.05)
    running = Running(tmp_path / "pool")
    yield running
    running.close()


def pools(running: Running) -> dict[str, Any]:
    return {name: one.service.pool for name, one in running.handle.replicas.items()}


def test_a_request_of_several_streams_is_one_batch_of_each(running: Running) -> None:
    names, rows = ("door", "yard", "door", "yard", "door"), (0, 1, 2, 3, 1)
    answer = running.predict(*names, rows=rows)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert [one["stream"] for one in found] == list(names)
    assert [one["index"] for one in found] == [0, 0, 1, 1, 2]
    for name, batch in (("door", [0, 2, 1]), ("yard", [1, 3])):
        mine = [one["probabilities"] for one in found if one["stream"] == name]
        assert mine == expected(batch)
    owned = {name: [s for s in ("door", "yard") if s in pool._store.owners]
             for name, pool in pools(running).items()}  # fmt: skip
    assert owned == {"one": ["door"], "two": ["yard"]}
    single = running.predict("yard", rows=(2,))
    assert single.json()["probabilities"] == expected([1, 3], [2])[2]
    assert single.headers["x-replica"] == "two"


def test_a_stream_follows_when_it_is_sent_elsewhere(running: Running, caplog) -> None:
    wanted = expected([0], [1], [2])
    assert running.predict("door", rows=(0,)).json()["probabilities"] == wanted[0]
    for row, replica_name in ((1, "two"), (2, "one")):  # the ring has changed, the owner lives
        running.handle.of["door"] = replica_name
        answer = running.predict("door", rows=(row,), create=False)
        assert answer.status_code == 200, answer.text
        assert answer.json()["probabilities"] == wanted[row] and answer.json()["index"] == row
        assert answer.headers["x-replica"] == replica_name


def test_a_stream_that_stays_elsewhere_is_refused_after_a_while(running, monkeypatch) -> None:
    monkeypatch.setattr(front, "PATIENCE_S", 0.3)
    running.predict("door", rows=(0,))
    with pools(running)["one"].stream("door"):  # in use
        running.handle.of["door"] = "two"
        answer = running.predict("door", "yard", rows=(1, 1))
        assert answer.status_code == 409 and answer.headers["retry-after"] == "1"
        text = answer.json()["detail"]
        assert text.startswith("stream 'door': `stream` 'door' must be free"), text
        assert text.endswith("process. Of the other streams in this request, 1 were predicted.")
    assert running.predict("yard", rows=(2,)).json()["index"] == 1


def test_a_dead_replica_is_said_and_the_other_goes_on(running: Running) -> None:
    wanted = expected([0], [1])
    running.predict("door", rows=(0,))
    assert running.http.post("/v1/streams/door/save").json()["written"] == 1
    running.handle.dead.add("one")
    answer = running.predict("door", rows=(1,))
    assert answer.status_code == 503 and "has died" in answer.json()["detail"]
    assert answer.headers["retry-after"] == "1"
    assert running.http.get("/readyz").json() == {"status": "ok", "replicas": 1}
    pools(running)["one"]._store.owners.close()  # as its process's end does
    running.handle.of["door"] = "two"
    answer = running.predict("door", rows=(1,)).json()
    assert (answer["probabilities"], answer["index"]) == (wanted[1], 1)
    running.handle.dead.add("two")
    for path in ("/readyz", "/v1/streams", "/metrics", "/openapi.json"):
        assert running.http.get(path).status_code == 503, path
    assert running.http.get("/healthz").status_code == 200


def test_what_is_about_all_replicas(running: Running) -> None:
    running.predict("door", "yard", "yard", rows=(0, 1, 2))
    running.http.post("/v1/streams", json={"stream": "gate"})
    listed = running.http.get("/v1/streams").json()["streams"]
    assert [(one["stream"], one["images"]) for one in listed] == [
        ("door", 1), ("gate", 0), ("yard", 2),
    ]  # fmt: skip
    running.handle.of["door"] = "two"
    running.predict("door", rows=(1,))
    listed = running.http.get("/v1/streams").json()["streams"]
    assert listed[0]["images"] == 1 and len(listed) == 3  # what the one that has it knows

    text = running.http.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    images = {(s.labels["stream"], s.labels["replica"]): s.value
              for s in families["tta_images"].samples}  # fmt: skip
    assert images == {("door", "one"): 1, ("door", "two"): 1, ("yard", "two"): 2,
                      ("gate", "one"): 0}  # fmt: skip
    rows = [s for s in families["tta_batch_rows"].samples if s.name.endswith("_sum")]
    assert {s.labels["replica"]: s.value for s in rows} == {"one": 1, "two": 3}
    assert text.count("# TYPE tta_batch_rows histogram") == 1

    assert running.http.get("/v1/streams/yard/health").json()["images"] == 2
    assert len(running.http.get("/v1/streams/yard/frames").json()["history"]) == 1
    assert "/v1/events" in running.http.get("/").text
    assert "/v1/predict" in running.http.get("/openapi.json").json()["paths"]
    assert running.http.delete("/v1/streams/yard").json()["dropped"]
    assert running.http.get("/v1/streams/yard").status_code == 404
    assert [one["stream"] for one in running.http.get("/v1/streams").json()["streams"]] == [
        "door", "gate",
    ]  # fmt: skip


def test_a_client_that_goes_takes_its_images_back(running: Running) -> None:
    running.predict("door", rows=(0,))
    service = running.handle.replicas["one"].service
    started, go_on = threading.Event(), threading.Event()

    def busy() -> None:
        started.set()
        go_on.wait(30)

    service._batcher.run(busy)
    assert started.wait(30)

    async def gone() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": IMAGES[1]}

        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": [],
                 "query_string": b"stream=door"}  # fmt: skip
        call = asyncio.ensure_future(running.front._ask("door", Request(scope, receive)))
        await asyncio.sleep(0.5)
        assert service._batcher.waiting == 1
        call.cancel()  # as Ray Serve does when the client has gone
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.sleep(0.1)

    asyncio.run(gone())
    go_on.set()
    assert running.predict("door", rows=(2,)).json()["index"] == 1


def test_events_of_all_replicas_are_one_list(running: Running) -> None:
    running.predict("door", "yard", rows=(0, 1))
    heard: list[tuple[int, dict[str, Any]]] = []
    with running.http.stream("GET", "/v1/events", params={"after": 0}) as answer:
        lines = answer.iter_lines()
        number = 0
        for line in lines:
            if line.startswith("id: "):
                number = int(line[4:])
            if line.startswith("data: {") and "what" in line:
                heard.append((number, json.loads(line[6:])))
            if len(heard) == 2:
                running.http.post("/v1/streams/door/freeze")
            if len(heard) == 3:
                break
    assert [number for number, _ in heard] == [1, 2, 3]
    assert {(e["stream"], e["what"]) for _, e in heard[:2]} == {
        ("door", "created"), ("yard", "created"),
    }  # fmt: skip
    assert heard[2][1]["what"] == "freeze"


def test_a_front_that_has_not_listened_for_long_misses_nothing(running, monkeypatch) -> None:
    one = running.handle.replicas["one"]
    events = one.service.events

    async def asked(who: str) -> list[str]:
        return [data["n"] for kind, data in await one.events(who) if kind == "stream"]

    async def go() -> list[list[str]]:
        events.publish("stream", {"n": 1})
        found = [await asked("a"), await asked("b"), await asked("a")]
        events.publish("stream", {"n": 2})
        monkeypatch.setattr(replica, "UNHEARD_S", -1.0)
        return [*found, await asked("a"), await asked("a"), await asked("b")]

    assert asyncio.run(go()) == [[1], [1], [], [2], [], [2]]
    assert events.listening <= 1


def test_refusals_are_those_of_the_server(running: Running) -> None:
    http = running.http
    for status, words, answer in [
        (404, "`stream` must be there", running.predict("door", rows=(0,), create=False)),
        (422, "`stream` must say whose image", http.post("/v1/predict", content=IMAGES[0])),
        (422, "must be one image", http.post("/v1/predict?stream=door&create=1", content=b"no")),
        (422, "`stream` must be a name", running.predict("a/b", rows=(0,))),
        (413, "at most 100000 bytes", http.post("/v1/predict?stream=a", content=b"x" * 200_000)),
        (413, "at most 6 files", running.predict(*"abcdefg", rows=(0,) * 7)),
        (422, "`body` must hold files", http.post("/v1/predict", files=[("a", (None, b"x"))])),
        (422, "must be JSON", http.post("/v1/streams", content=b"no")),
        (422, "`after` must be", http.get("/v1/events?after=x")),
        (404, "`action` must be one of", http.post("/v1/streams/door/fly")),
        (403, "`Host` must be", http.get("/v1/streams", headers={"Host": "elsewhere.example"})),
    ]:
        assert answer.status_code == status, (words, answer.status_code, answer.text)
        assert words in answer.json()["detail"], answer.text
    assert http.get("/nothing").status_code == 404
    assert http.put("/v1/streams/door").status_code == 405


def test_the_token_is_asked_for_in_front(no_ray: Any, tmp_path: Path) -> None:
    running = Running(tmp_path / "pool", token="abc")
    try:
        assert running.http.get("/v1/streams").status_code == 401
        assert running.predict("door", rows=(0,)).status_code == 401
        running.http.headers["Authorization"] = "Bearer abc"
        assert running.predict("door", rows=(0,)).status_code == 200
        assert running.http.get("/metrics").status_code == 200
    finally:
        running.close()


def test_what_is_wrong_is_said(no_ray: Any, tmp_path: Path, monkeypatch, capsys) -> None:
    def alone() -> Any:
        pool = tta.runtime.StreamPool(adapter(), folder=tmp_path / "alone")
        return server_application(pool, to_tensor)

    with pytest.raises(ValueError, match="`make` must return an application whose pool shares"):
        Replica(alone)
    open_or_make(adapter(), tmp_path / "pool").close()
    other = tta.wrap(tiny("bn"), "eta.cifar10")
    with pytest.raises(ValueError, match="`folder` must hold streams of"):
        open_or_make(other, tmp_path / "pool")
    for arguments, words in [
        ({}, "got no model"),
        ({"model": "x:y"}, "`folder` must be there with --ray"),
        ({"model": "x:y", "folder": "f", "fly": "1"}, "also --fly=1"),
        ({"model": "x:y", "folder": "f", "port": "a"}, "must be a whole number"),
    ]:
        with pytest.raises(ValueError, match=words):
            build(arguments)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray.serve")
    with pytest.raises(ImportError, match=r'pip install "tta-vision\[ray\]"'):
        application(alone)
    for flags, words in [
        (["--ray", "2"], "`folder` must be there with --ray"),
        (["--ray", "2", "--folder", str(tmp_path / "new")], 'pip install "tta-vision[ray]"'),
        (["--shared"], "`shared` must be False where `folder` is None"),
    ]:
        assert main(["serve", "tests.helpers.own_models:named", *flags]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
