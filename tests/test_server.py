"""The server: every route, every refusal, and what batches are made of."""

from __future__ import annotations

import json
import re
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused
from tests.helpers.served import npy, picture, png, safetensors, serving, to_tensor
from tests.helpers.threads import no_thread_left
from tta.runtime import StreamPool
from tta.runtime.server import Limits, application
from tta.runtime.server.batching import Batcher, Item
from tta.runtime.server.limits import Rate, RefusedError
from tta.runtime.server.running import bound
from tta.runtime.server.watch import StreamWatch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    with no_thread_left(within=10):  # a server has told them to end, and waits for none
        yield


def alone(method: str = "tent.cifar10") -> tta.Adapter:
    return tta.wrap(tiny("bn"), method, guard="watch")


def pixels(*seeds: int) -> Tensor:
    return torch.stack([torch.from_numpy(picture(s)).permute(2, 0, 1) / 255 for s in seeds])


def answer_of(adapter: tta.Adapter, *seeds: int) -> list[list[float]]:
    return adapter(pixels(*seeds)).softmax(1).tolist()


def test_a_stream_gets_what_an_adapter_of_its_own_gives() -> None:
    own = {"a": alone(), "b": alone()}
    with serving(class_names=[f"kind {i}" for i in range(10)]) as server:
        for number, name in enumerate("abbab"):
            told = server.predict(name, png(picture(number)))
            (wanted,) = own[name].__call__(pixels(number)).log_softmax(1).exp().tolist()
            assert told["probabilities"] == wanted
            assert told["stream"] == name and told["learned"] and 0 < told["latency"] < 60
            assert (
                told["label"] == int(np.argmax(wanted)) and told["class"] == f"kind {told['label']}"
            )
        assert told["index"] == 2 and server.pool.counts["created"] == 2


def test_pictures_and_tensors_of_one_image_are_one_image() -> None:
    raw, floats = picture(1), pixels(1)[0]
    bodies = [
        png(raw),
        npy(raw),
        npy(raw.transpose(2, 0, 1)),
        npy(np.asfortranarray(raw)),
        npy(floats.numpy()),
        npy(floats[None].double().numpy().astype(">f8")),
        safetensors(image=floats),
        safetensors(anything=torch.from_numpy(raw)),
    ]
    with serving(alone("source")) as server:
        found = [server.predict(f"s{i}", body)["probabilities"] for i, body in enumerate(bodies)]
        assert all(one == pytest.approx(found[0], abs=1e-6) for one in found)
        assert server.predict("jpeg", png(raw, "JPEG"))["label"] in range(10)
        grey = server.predict("grey", png(raw[..., 0]))["probabilities"]
        assert grey == pytest.approx(server.predict("g", npy(raw[..., 0]))["probabilities"])


def test_several_images_are_one_batch_of_each_stream() -> None:
    names = ["a", "b", "a", "a", "b"]
    with serving() as server:
        files = [(name, ("x.png", png(picture(i)))) for i, name in enumerate(names)]
        told = server.post("/v1/predict", params={"create": True}, files=files).json()
        assert [one["stream"] for one in told] == names
        assert [one["index"] for one in told] == [0, 0, 1, 2, 1]
        for name in "ab":
            rows = [i for i, other in enumerate(names) if other == name]
            wanted = alone()(pixels(*rows)).log_softmax(1).exp()
            assert [told[i]["probabilities"] for i in rows] == wanted.tolist()
        short = server.post("/v1/predict", params={"probabilities": False}, files=files).json()
        assert "probabilities" not in short[0] and "label" in short[0]


def test_streams_of_one_round_go_through_the_model_together() -> None:
    names = ["a", "b", "c"]
    with serving(max_wait=2.0) as server, ThreadPoolExecutor(6) as threads:
        for name in names:
            server.post(f"/v1/streams/{name}")
        server.post("/v1/streams/c/freeze")
        own = {name: alone() for name in names}
        own["c"].freeze()
        for number in range(2):
            sent = [(name, 10 * number + i) for i in range(2) for name in names]
            told = list(threads.map(lambda one: server.predict(one[0], png(picture(one[1]))), sent))
            for name in names:
                mine = [(seed, t) for (n, seed), t in zip(sent, told, strict=True) if n == name]
                mine.sort(key=lambda pair: pair[1]["index"])
                wanted = own[name](pixels(*(seed for seed, _ in mine))).softmax(1).tolist()
                assert [t["index"] for _, t in mine] == [2 * number, 2 * number + 1]
                for (_, t), row in zip(mine, wanted, strict=True):
                    assert t["probabilities"] == pytest.approx(row, abs=1e-4)
                    assert t["learned"] == (name != "c") and t["label"] == int(np.argmax(row))
        assert server.pool._beside.passes == 2
        assert "tta_batch_rows_count 2.0" in server.get("/metrics").text


def test_batches_form_across_requests_until_the_deadline() -> None:
    with serving(max_wait=20.0, batch_size=4) as server, ThreadPoolExecutor(4) as threads:
        bodies = [png(picture(i)) for i in range(4)]
        begun = time.monotonic()
        told = list(threads.map(lambda body: server.predict("a", body), bodies))
        assert time.monotonic() - begun < 15  # four are a batch, and wait no longer
        assert sorted(one["index"] for one in told) == [0, 1, 2, 3]
        assert server.pool.health("a")["entropy"] > 0
        text = server.get("/metrics").text
        assert "tta_batch_rows_sum 4.0" in text and "tta_batch_rows_count 1.0" in text


def test_a_stream_that_floods_holds_up_no_other() -> None:
    rounds: list[list[str]] = []

    def serve(items: list[Item]) -> None:
        rounds.append([item.stream for item in items])
        for item in items:
            item.future.set_result({})

    batcher = Batcher(serve, rows=2, max_wait=0.0, queue=8)
    gate = threading.Event()
    batcher.run(lambda: gate.wait(10))
    items = [Item(name, torch.zeros(1), False, 0.0) for name in "aaaaab"]
    batcher.submit(items)
    assert items[4].future.cancel()
    with pytest.raises(RefusedError, match="`queue`") as caught:
        batcher.submit(items[:3])
    assert caught.value.status == 429
    gate.set()
    batcher.stop()
    assert rounds == [["a", "a", "b"], ["a", "a"]]
    with pytest.raises(RefusedError, match="stopping"):
        batcher.submit(items)


def test_streams_are_made_listed_frozen_reset_saved_and_dropped(tmp_path) -> None:
    with serving(folder=tmp_path / "pool") as server:
        assert server.post("/v1/streams/a").status_code == 201
        assert server.post("/v1/streams", json={"stream": "b"}).status_code == 201
        assert server.post("/v1/streams/a").json() == {"stream": "a", "created": False}
        first = server.predict("a", png(picture(0)))
        assert server.post("/v1/streams/a/freeze").json()["frozen"] is True
        frozen = server.predict("a", png(picture(1)))
        assert not frozen["learned"]
        assert server.predict("a", png(picture(1)))["probabilities"] == frozen["probabilities"]
        assert server.post("/v1/streams/a/unfreeze").json()["frozen"] is False
        assert server.predict("a", png(picture(1)))["learned"]
        server.post("/v1/streams/a/reset")
        again = server.predict("a", png(picture(0)))
        assert again["probabilities"] == first["probabilities"] and again["index"] == 4
        assert server.post("/v1/streams/a/save").json()["written"] == 1
        assert server.post("/v1/streams/a/save").json()["written"] == 0
        listed = {one["stream"]: one for one in server.get("/v1/streams").json()["streams"]}
        assert set(listed) == {"a", "b"}
        assert listed["a"]["images"] == 5 and listed["a"]["learned"] == 3
        assert 0 < listed["a"]["latency"]["p50"] <= listed["a"]["latency"]["p99"]
        for path in ("/v1/streams/a", "/v1/streams/a/health"):
            told = server.get(path).json()
            assert told["health"]["entropy"] > 0 and told["health"]["agreement"] is None
            assert told["health"]["entropy"] == server.pool.health("a")["entropy"]
        small = server.get("/v1/streams/a/frames").json()["frames"]
        assert small[0]["index"] == 0 and small[0]["image"].startswith(
            "data:image/jpeg;base64,/9j/"
        )
        server.client.delete("/v1/streams/a")
        assert server.pool.streams() == ["b"]
        assert 'stream="a"' not in server.get("/metrics").text
        for method, path in [("get", "/v1/streams/a"), ("get", "/v1/streams/a/health"),
                             ("get", "/v1/streams/a/frames"), ("delete", "/v1/streams/a"),
                             ("post", "/v1/streams/a/reset"), ("post", "/v1/streams/a/save"),
                             ("post", "/v1/predict?stream=a")]:  # fmt: skip
            server.refused(404, "`stream` must be there", getattr(server.client, method)(path))
    assert StreamPool.open(tiny("bn"), tmp_path / "pool", interval=None).streams() == ["b"]


def test_what_is_no_image_is_refused_and_changes_nothing() -> None:

    def bomb(side: int) -> bytes:
        """A picture whose header claims another size."""
        head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        small = png(picture(0))
        return small[:12] + head + struct.pack(">I", zlib.crc32(head)) + small[33:]

    whole = png(picture(0, (64, 64)))
    claims = npy(np.zeros((3, 32, 32), np.float32))
    bad: list[tuple[int, str, bytes]] = [
        (422, "empty body", b""),
        (422, "begin with", b"GIF89a" + bytes(40)),
        (422, "damaged picture (image file is truncated", whole[: len(whole) // 2]),
        (422, "damaged picture", whole[:60] + bytes(200) + whole[260:]),
        (413, "pixels, got 81000000", bomb(9_000)),
        (413, "must be smaller", bomb(30_000)),
        (413, "pixels, got", npy(np.zeros((400, 400), np.uint8))),
        (422, ".npy file", claims.replace(b"(3, 32, 32)", b"(3, 99, 32)")),
        (422, ".npy file", claims[:-1]),
        (422, ".npy file", npy(np.array([print], dtype=object), allow_pickle=True)),
        (422, ".npy file", npy(np.zeros(3, np.complex64))),
        (422, ".npy file", b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118),
        (422, "of shape ()", npy(np.float32(1))),
        (422, "of shape (2, 3, 32, 32)", npy(np.zeros((2, 3, 32, 32), np.float32))),
        (422, "where the model takes (3, 32, 32)", npy(np.zeros((3, 31, 32), np.float32))),
        (422, "not finite", npy(np.full((3, 32, 32), np.nan, np.float32))),
        (422, "uint8 values", npy(np.zeros((5, 7, 9), np.uint8))),
        (422, "damaged safetensors", safetensors(a=torch.zeros(3, 32, 32))[:-8]),
        (422, "2 tensors", safetensors(a=torch.zeros(1), b=torch.zeros(1))),
        (422, "torch.int64", safetensors(a=torch.zeros(3, 32, 32, dtype=torch.int64))),
        (413, "`body` must have at most", bytes(1_000_001)),
    ]  # fmt: skip
    limits = Limits(pixels=100_000, body=1_000_000)
    with serving(limits=limits) as server:
        server.predict("a", png(picture(0)))
        before = server.pool.stream("a").state()
        for status, words, body in bad:
            server.refused(status, words, server.post("/v1/predict?stream=a", content=body))
        for path, words in [
            ("/v1/predict", "`stream` must say"),
            ("/v1/predict?stream=", "`stream` must be a name"),
            ("/v1/predict?stream=" + "a" * 201, "`stream` must be a name"),
            ("/v1/predict?stream=%0A&create=true", "`stream` must be a name"),
            ("/v1/predict?stream=%ff&create=true", "printable characters in UTF-8"),
            ("/v1/predict?stream=..&create=true", "other than . and .."),
            ("/v1/predict?stream=a&create=perhaps", "`create` must be"),
        ]:
            server.refused(422, words, server.post(path, content=png(picture(0))))
        server.refused(404, "`path` must be one that this server has, got '/v2'", server.get("/v2"))
        other = server.client.put("/v1/predict")
        server.refused(405, "`method` must be one that this server has, got PUT", other)
        assert other.headers["allow"] == "POST"
        many = server.get("/v1/events?after=" + "9" * 5000)
        server.refused(422, "`after` must be the number of an event", many)
        for files, words in [
            ({"a": ("x", b"nothing")}, "image 0: `image`"),
            ({"a": (None, b"text")}, "field without a file name"),
        ]:
            server.refused(422, words, server.post("/v1/predict", files=files))
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        for body in (b"", b"--x\r\n", b"rubbish", b"--x\r\nContent-Disposition: form-data\r\n\r\n"):
            answer = server.post("/v1/predict", content=body, headers=kind)
            server.refused(422, "`body` must", answer)
        part = b"--x\r\nContent-Disposition: form-data; name=a; filename=b\r\n\r\n%s\r\n"
        cut = part % png(picture(0)) + (part % png(picture(1)))[:-9]
        answer = server.post("/v1/predict", content=cut, headers=kind)
        server.refused(422, "`body` must end with its closing boundary", answer)
        for body in (b"", b"[", b"[]", b'{"stream": 3}', b"[" * 100_000, b"\xff"):
            server.refused(422, "`body` must be JSON", server.post("/v1/streams", content=body))
        assert server.pool.streams() == ["a"]
        after = server.pool.stream("a").state()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert server.get("/v1/streams").json()["streams"][0]["images"] == 1


def test_limits_are_kept() -> None:
    limits = Limits(streams=2, images=3, rate=2.0, listeners=1)
    with serving(limits=limits) as server:
        one = png(picture(0))
        many = [("a", ("x", one))] * 4
        server.refused(413, "at most 3 files", server.post("/v1/predict", files=many))
        assert server.post("/v1/streams/a").status_code == 201
        server.predict("b", one)
        server.refused(429, "at most 2", server.post("/v1/streams/c"))
        answer = server.post("/v1/predict?stream=c&create=1", content=one)
        server.refused(429, "at most 2", answer)
        assert server.client.delete("/v1/streams/a").status_code == 200
        before = server.get("/v1/streams").json()
        several = [(name, ("x", one)) for name in "bcd"]
        answer = server.post("/v1/predict?create=1", files=several)
        server.refused(429, "got 2 new ones", answer)
        assert server.get("/v1/streams").json() == before  # neither c nor an image of b
        answers = [server.post("/v1/predict?stream=b", content=one) for _ in range(8)]
        late = next(a for a in answers if a.status_code != 200)
        server.refused(429, "at most 2 images a second", late)
        assert int(late.headers["retry-after"]) >= 1
        with server.client.stream("GET", "/v1/events") as events:
            lines = events.iter_lines()
            assert next(lines) == "retry: 2000"
            server.refused(429, "`events`", server.get("/v1/events"))


def test_rates_are_counted_by_stream() -> None:
    now = [100.0]
    rate = Rate(2.0, lambda: now[0])
    rate.take({"a": 4})
    with pytest.raises(RefusedError, match=r"0\.5 s"):
        rate.take({"a": 1})
    with pytest.raises(RefusedError):
        rate.take({"b": 1, "a": 1})  # all or none
    rate.take({"b": 4})
    now[0] += 0.5
    rate.take({"a": 1})
    with pytest.raises(RefusedError):
        rate.take({"a": 1})
    Rate(None).take({"a": 10**9})


class Picky(nn.Module):
    """Refuses images that are all black, and fails otherwise on white ones."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")

    def forward(self, x: Tensor) -> Tensor:
        if bool((x.flatten(1).amax(1) == 0).any()):
            raise ValueError("`images` must not be black, got one: switch on a light.")
        if bool((x.flatten(1).amin(1) == 1).any()):
            raise RuntimeError("out of everything")
        return self.net(x)


def test_an_image_that_fails_does_so_alone() -> None:
    good, black, white = png(picture(0)), npy(np.zeros((3, 32, 32), np.float32)), None
    white = npy(np.ones((3, 32, 32), np.float32))
    with serving(tta.wrap(Picky(), "tent.cifar10", guard="watch"), max_wait=0.3) as server:
        server.predict("a", good)
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(
                lambda body: server.post("/v1/predict?stream=a", content=body),
                [good, black, good, white],
            ))  # fmt: skip
        assert [one.status_code for one in found] == [200, 422, 200, 500]
        assert sorted(found[i].json()["index"] for i in (0, 2)) == [1, 2]
        server.refused(422, "switch on a light", found[1])
        assert "out of everything" in found[3].json()["detail"]
        assert 'tta_failed_total{stream="a"} 2.0' in server.get("/metrics").text
        assert server.get("/readyz").status_code == 200


def test_a_stream_with_another_owner_is_refused() -> None:
    with serving() as server:
        server.predict("a", png(picture(0)))
        with server.pool.stream("a"):
            for answer in (
                server.post("/v1/predict?stream=a", content=png(picture(1))),
                server.client.delete("/v1/streams/a"),
                server.post("/v1/streams/a/reset"),
            ):
                server.refused(409, "`stream` 'a' must be free", answer)
        server.predict("a", png(picture(1)))


def test_files_that_cannot_be_read_or_written_are_said(tmp_path) -> None:
    folder = tmp_path / "pool"
    with serving(folder=folder) as server:
        server.predict("a", png(picture(0)))
        server.post("/v1/streams/a/save")
    (path,) = folder.glob("streams/*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    pool = StreamPool.open(tiny("bn"), folder, interval=None)
    adapter = pool.adapter
    pool.close(save=False)
    with serving(adapter) as server:
        answer = server.post("/v1/streams/a/save")
        server.refused(404, "`stream`", answer)
        server.predict("a", png(picture(0)))
        server.refused(409, "--folder", server.post("/v1/streams/a/save"))
    app = application(StreamPool.open(tiny("bn"), folder, interval=None), to_tensor)
    service = app.state.service
    item = Item("a", pixels(0), False, 0.0)
    service.submit([item])
    with pytest.raises(RefusedError, match="`folder` must hold whole files") as caught:
        item.future.result(20)
    assert caught.value.status == 409
    service.drop("a")
    path.parent.rmdir()
    path.parent.write_text("in the way")
    service.create("a")
    item = Item("a", pixels(0), False, 0.0)
    service.submit([item])
    assert item.future.result(20)["index"] == 0
    with pytest.raises(RefusedError, match="make room") as caught:
        service.control("a", "save")
    assert caught.value.status == 507
    with pytest.raises(RefusedError, match="written to") as caught:
        service.drop("a")
    assert caught.value.status == 507
    for _ in range(2):  # said again to who asks again
        with pytest.raises(OSError, match="make room"):
            service.close()
    assert service.pool.closed


def test_a_cancelled_request_harms_nothing() -> None:
    with serving(max_wait=0.4) as server:
        server.predict("a", png(picture(0)))
        before = server.pool.stream("a").state()
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                server.post("/v1/predict?stream=a", content=png(picture(1)), timeout=0.15)
        time.sleep(0.6)
        after = server.pool.stream("a").state()
        assert all(torch.equal(before[key], after[key]) for key in before)  # it was not begun
        own = alone()
        own(pixels(0))
        wanted = own(pixels(2)).log_softmax(1).exp().tolist()[0]
        told = server.predict("a", png(picture(2)))
        assert told["probabilities"] == wanted and told["index"] == 1
        assert 'status="499"} 3.0' in server.get("/metrics").text


def test_who_may_ask() -> None:
    with serving(token="secret") as server:
        for path in ("/", "/healthz", "/readyz"):
            assert server.get(path).status_code == 200
        for path in ("/v1/streams", "/metrics", "/openapi.json", "/v1/events", "/v1/predict"):
            for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
                answer = server.get(path, headers=headers)
                server.refused(401, "`Authorization`", answer)
                assert answer.headers["www-authenticate"] == "Bearer"
        mine = {"Authorization": "Bearer secret", "Host": "anything.example"}
        assert server.get("/v1/streams", headers=mine).status_code == 200
    with serving(hosts=["cams.example"]) as server:
        for host in ("cams.example", "cams.example:80", "localhost:1", "[::1]:8000", "10.0.0.9"):
            assert server.get("/healthz", headers={"Host": host}).status_code == 200, host
            head = server.client.head("/healthz", headers={"Host": host})
            assert head.status_code == 200 and not head.content
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
            server.refused(403, "`Host`", server.get("/healthz", headers={"Host": host}))
        mine = server.address
        assert server.post("/v1/streams/a", headers={"Origin": mine}).status_code == 201
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
            answer = server.post("/v1/streams/a/reset", headers={"Origin": origin})
            server.refused(403, "`Origin`", answer)


def test_what_is_no_number_of_an_event_is_refused() -> None:
    with serving() as server:
        for after in ("x", "-1", "\u00b2"):
            server.refused(422, "`after`", server.get("/v1/events", params={"after": after}))


def test_events_are_heard_while_and_after_they_happen() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", guard=tta.get_config("periodic", every=2))
    with serving(adapter) as server:
        server.post("/v1/streams/a")
        with server.client.stream("GET", "/v1/events?after=0") as stream:
            lines = stream.iter_lines()
            assert next(lines) == "retry: 2000"
            for number in range(3):
                server.predict("a", png(picture(number)))
            heard = []
            while '"action": "reset"' not in "".join(heard):
                heard.append(next(lines))
        kinds = [line.partition(": ")[2] for line in heard if line.startswith("event")]
        assert kinds == ["stream", "health", "guard"]
        told = json.loads(next(x for x in heard if '"what"' in x).partition(": ")[2])
        assert told["what"] == "created" and told["stream"] == "a"
        with server.client.stream("GET", "/v1/events?after=1") as stream:
            later = [line for line, _ in zip(stream.iter_lines(), range(5), strict=False)]
        assert "id: 2" in later and "event: guard" in later  # health is not kept
        data = json.loads(later[-1].partition(": ")[2])
        assert data["action"] == "reset" and data["reason"] and data["figures"]["entropy"] > 0
        assert server.get("/v1/streams/a").json()["events"][0]["action"] == "reset"
        assert (
            'tta_guard_actions_total{action="reset",stream="a"} 1.0' in server.get("/metrics").text
        )


def test_metrics_are_those_that_prometheus_reads() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with serving() as server, serving() as other:  # registries do not meet
        for number in range(3):
            server.predict('with "quotes"', png(picture(number)))
        other.predict("b", png(picture(0)))
        text = server.get("/metrics").text
        found = {
            (sample.name, sample.labels.get("stream")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert found["tta_images_total", 'with "quotes"'] == 3
        assert found["tta_learned_total", 'with "quotes"'] == 3
        assert 0 < found["tta_entropy", 'with "quotes"'] < 2.31
        assert found["tta_latency_seconds_count", None] == 3
        assert found["tta_streams", None] == 1 and found["process_resident_memory_bytes", None] > 0
        assert ("tta_images_total", "b") not in found


def test_the_schema_names_every_route_with_examples() -> None:
    with serving() as server:
        schema = server.get("/openapi.json").json()
        routes = {(m, path) for path, methods in schema["paths"].items() for m in methods}
        served = {
            (m.lower(), route.path)
            for route in server.app.routes
            if getattr(route, "include_in_schema", False)
            for m in route.methods
        }
        assert routes == served and len(routes) >= 13
        for methods in schema["paths"].values():
            for about in methods.values():
                for status, answer in about["responses"].items():
                    for content in answer.get("content", {}).values():
                        assert "example" in content or status == "200", (about["summary"], status)
        predict = schema["paths"]["/v1/predict"]["post"]
        assert set(predict["requestBody"]["content"]) >= {"image/jpeg", "multipart/form-data"}
        assert {"404", "409", "413", "422", "429", "503"} <= set(predict["responses"])


def test_the_page_loads_nothing_from_elsewhere() -> None:
    with serving() as server:
        answer = server.get("/")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.findall(r"\b(?:src|href)=.(?!data:)|@import|: url\(", answer.text)
        assert set(re.findall(r"https?://[^\"' ]+", answer.text)) == {"http://www.w3.org/2000/svg"}


def test_what_is_remembered_of_a_stream_is_bounded() -> None:
    watch = StreamWatch("a", 2)
    answer = {"index": 0, "label": 1, "class": "b", "learned": True, "latency": 0.5}
    for number in range(2000):
        watch._point_at = watch._frame_at = -np.inf  # as if a second had gone by
        watch.note([({**answer, "index": number}, b"jpeg")], {"entropy_average": np.nan})
    assert len(watch.history()) == 240 and watch.history()[-1][1:] == [None] * 5
    assert [frame["index"] for frame in watch.frames()] == [1998, 1999]
    assert watch.summary()["images"] == 2000 and watch.summary()["latency"]["p99"] == 0.5
    watch.note([(answer, b"jpeg")], {})
    assert len(watch.frames()) == 2  # and at most one a second
    assert watch.frames()[-1]["index"] == 1999


def test_stopping_finishes_what_waits() -> None:
    with serving(max_wait=0.5) as server:
        server.predict("a", png(picture(0)))
        with ThreadPoolExecutor(1) as threads:
            late = threads.submit(lambda: server.predict("a", png(picture(1))))
            while not server.service._batcher.waiting:
                time.sleep(0.005)
            server.service.stopping = True
            answer = server.post("/v1/predict?stream=a", content=png(picture(2)))
            assert "stopping" in server.refused(503, "stopping", answer)
            assert server.get("/readyz").status_code == 503
            assert server.get("/healthz").status_code == 200
            assert late.result()["index"] == 1


def test_arguments_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with StreamPool(alone()) as pool:
        refused(TypeError, "`pool` must be", lambda: application(tiny("bn")))
        refused(ValueError, "`class_names`", lambda: application(pool, class_names=["a"]))
        refused(ValueError, "`token`", lambda: application(pool, token=""))
        refused(ValueError, "`batch_size`", lambda: application(pool, batch_size=0))
        refused(ValueError, "`workers`", lambda: application(pool, workers=0))
        refused(ValueError, "`rate`", lambda: Limits(rate=0.0))
        refused(ValueError, "`body`", lambda: Limits(body=0))
        refused(ValueError, "`host` must be a name or an address", lambda: bound("", 0))
        for package in ("fastapi", "prometheus_client", "python_multipart", "PIL"):
            with monkeypatch.context() as patch:
                for name in [n for n in sys.modules if n.split(".")[0] == package]:
                    patch.delitem(sys.modules, name)
                patch.setitem(sys.modules, package, None)
                with pytest.raises(ImportError, match=r'pip install "tta-vision\[serve\]"'):
                    application(pool)


def test_a_server_without_a_transform_takes_tensors_alone() -> None:
    with serving(transform=None, thumbnails=0) as server:
        answer = server.post("/v1/predict?stream=a&create=1", content=png(picture(0)))
        server.refused(422, "no transform", answer)
        server.predict("a", npy(pixels(0)[0].numpy()))
        assert server.get("/v1/streams/a/frames").json()["frames"] == []
