"""Device and cloud: what is chosen, sent, learned and sent down, and what goes wrong between."""

from __future__ import annotations

import copy
import http.server
import math
import pickle
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused
from tta.parts.losses import entropy
from tta.runtime.cloud import (
    Budget,
    Cloud,
    Device,
    Downlink,
    HttpUplink,
    MessageError,
    UplinkError,
    Upload,
)
from tta.runtime.server import Limits

PIXELS: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
close = torch.testing.assert_close


def teacher() -> nn.Module:
    return tiny("gn", seed=3)


def small_cloud(**more: Any) -> Cloud:
    return Cloud(tiny("bn"), teacher(), **{"batch_size": 8, **more})


def wrapped(**more: Any) -> tta.Adapter:
    return tta.wrap(tiny("bn"), input="prompt", **PIXELS, **more)


def upload(seed: int = 0, count: int = 8, **more: Any) -> Upload:
    levels = (images(seed, count) * 255).round().to(torch.uint8)
    return Upload(levels, torch.full((count,), 0.5), **more)


def settle(device: Device) -> None:
    assert device.flush(20)


# What is chosen


def test_the_budget_is_the_quantile_of_the_last_images() -> None:
    values = torch.rand(3000, generator=torch.Generator().manual_seed(0))
    budget, chosen = Budget(0.1, window=500), []
    for start in range(0, 3000, 50):
        batch = values[start : start + 50]
        found = budget.choose(batch)
        last = values[max(0, start + 50 - 500) : start + 50].double()
        threshold = float(last.quantile(0.9))
        assert budget.threshold == pytest.approx(threshold)
        above = batch.double() > threshold
        assert not (found & ~above).any()  # others never; of these, as many as the sum allows
        if int(found.sum()) < int(above.sum()):
            assert sum(map(int, chosen)) + int(found.sum()) == int(0.1 * (start + 50) + 1e-9)
            assert batch[found].min() >= batch[above & ~found].max() if found.any() else True
        chosen.append(found.sum())
        assert sum(map(int, chosen)) <= 0.1 * (start + 50) + 1e-6
    assert 0.09 * 3000 < sum(map(int, chosen)) <= 300


def test_the_budget_holds_while_uncertainty_rises_and_falls() -> None:
    for share in (0.0, 0.03, 0.25, 1.0):
        for step in (1, 7, 64):
            budget, taken = Budget(share, window=100), 0
            for start in range(0, 600, step):
                rising = torch.arange(start, start + step).double().sub(300).abs() / 1000
                taken += int(budget.choose(rising).sum())
                assert taken <= share * (start + step) + 1e-6
            assert (taken > 0) == (share > 0)
    budget = Budget(0.1, window=100)  # what a quiet time has left over is bounded
    for _ in range(30):
        assert not budget.choose(torch.full((100,), 0.5)).any()
    assert int(budget.choose(torch.linspace(0.6, 0.9, 200)).sum()) <= 0.1 * 300


def test_all_and_none_and_no_numbers() -> None:
    x = torch.tensor([0.3, math.nan, 0.3, 0.0])
    assert Budget(1.0).choose(x).tolist() == [True, False, True, True]
    assert not Budget(0.0).choose(x).any()
    budget = Budget(0.5)
    assert not budget.choose(torch.tensor([math.nan])).any() and budget.largest == 0
    with pytest.raises(ValueError, match="`budget`"):
        Budget(1.5)


# What is sent


def test_messages_come_back_as_they_were() -> None:
    sent = upload(version=(7, 3))
    found = Upload.from_bytes(sent.to_bytes())
    assert torch.equal(found.images, sent.images) and found.version == (7, 3)
    assert torch.equal(found.uncertainty, sent.uncertainty)
    down = Downlink(torch.rand(3, 4, 4).half().float(), {"bn.weight": torch.rand(5)}, (7, 4))
    back = Downlink.from_bytes(down.to_bytes())
    assert torch.equal(back.prompt, down.prompt) and back.version == (7, 4)
    assert list(back.norms) == ["bn.weight"]
    assert torch.equal(back.norms["bn.weight"], down.norms["bn.weight"])
    assert len(down.to_bytes()) < 3 * 16 * 2 + 5 * 4 + 400  # halves, and a short header


def _saved(**tensors: Tensor) -> bytes:
    from safetensors.torch import save

    return save(tensors)


VERSION = torch.zeros(2, dtype=torch.int64)
HALF = torch.zeros(3, 4, 4).half()
LEVELS = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
RUBBISH: dict[str, bytes] = {
    "nothing": b"\0",
    "a page": b"<html>captive portal</html>" * 20,
    "a pickle": pickle.dumps({"prompt": [0.0]}),
    "a header without end": (2**40).to_bytes(8, "little") + b"{}",
    "a long claim": (60).to_bytes(8, "little")
    + b'{"prompt":{"dtype":"F16","shape":[9999999],"data_offsets":[0,2]}}'[:60],
    "another kind": _saved(prompt=HALF.float(), version=VERSION),
    "another rank": _saved(prompt=HALF[0], version=VERSION),
    "no version": _saved(prompt=HALF),
    "no prompt": _saved(version=VERSION),
    "more": _saved(prompt=HALF, version=VERSION, code=VERSION.clone()),
    "NaN": _saved(prompt=HALF * math.nan, version=VERSION),
    "large": _saved(prompt=HALF + 2, version=VERSION),
    "empty": _saved(prompt=HALF[:0], version=VERSION),
    "norms of another kind": _saved(
        **{"prompt": HALF, "version": VERSION, "norm/bn.weight": VERSION.clone()}
    ),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_is_refused_before_anything_is_used(name: str) -> None:
    text = refused(MessageError, "`", lambda: Downlink.from_bytes(RUBBISH[name]))
    assert len(text) <= 300
    refused(MessageError, "`", lambda: Upload.from_bytes(RUBBISH[name]))


@pytest.mark.parametrize(
    "tensors",
    [
        {"images": LEVELS.float()},
        {"images": LEVELS[0]},
        {"images": LEVELS[:0], "uncertainty": torch.zeros(0)},
        {"images": torch.zeros(1, 1, 1, 20_000, dtype=torch.uint8)},
        {"uncertainty": torch.zeros(2)},
        {"uncertainty": torch.full((1,), math.nan)},
        {"uncertainty": torch.full((1,), 1.5)},
        {"uncertainty": torch.zeros(1).double()},
        {"version": VERSION[:1].clone()},
    ],
)
def test_uploads_that_are_none(tensors: dict[str, Tensor]) -> None:
    good = {"images": LEVELS, "uncertainty": torch.zeros(1), "version": VERSION}
    Upload.from_bytes(_saved(**good))
    text = refused(MessageError, "`", lambda: Upload.from_bytes(_saved(**good | tensors)))
    assert len(text) <= 300
    cloud = small_cloud()
    with pytest.raises(MessageError):
        cloud.exchange(_saved(**good | tensors))
    assert cloud.counts == {"images": 0, "updates": 0, "refused": 1}


def test_damaged_messages_are_refused_or_whole() -> None:
    rng = random.Random(0)
    kinds: list[tuple[Any, bytes]] = [
        (Upload, upload(0, 2).to_bytes()),
        (Downlink, Downlink(torch.rand(3, 4, 4), {"bn.weight": torch.rand(5)}, (1, 2)).to_bytes()),
    ]
    refusals = 0
    for number in range(600):
        kind, message = kinds[number % 2]
        damaged = bytearray(message)
        for _ in range(rng.randint(1, 3)):
            # Most of a message is pixels, and the header is what a reader could trip over.
            damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        try:
            found = kind.from_bytes(bytes(damaged))
        except MessageError as error:
            refusals += 1
            assert len(str(error)) <= 300 and "\n" not in str(error)
        else:
            assert len(found.to_bytes()) <= len(message)
    assert refusals > 300


# The device


def test_a_device_predicts_as_its_adapter_and_sends_what_it_is_least_sure_of() -> None:
    sent: list[Upload] = []

    def keep(message: bytes) -> bytes:
        sent.append(Upload.from_bytes(message))
        return b""

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    adapter = tta.wrap(tiny("bn"), input="prompt", mean=MEAN, std=STD)
    other = tta.wrap(tiny("bn"), input="prompt", mean=MEAN, std=STD)
    device = Device(adapter, keep, budget=0.25)
    for t in range(6):
        x = (images(t, 16) * 255).round() / 255
        y = device((x - mean) / std)
        assert torch.equal(y, other((x - mean) / std))
        u = entropy(y) / math.log(10)
        close(device.report.uncertainty, u)
        chosen = device.report.chosen
        assert u[chosen].min() > device.report.threshold
        assert torch.equal(sent[-1].images, (x[chosen] * 255).round().to(torch.uint8))
        close(sent[-1].uncertainty, u[chosen])
    assert device.counts["images"] == 96 and 12 < device.counts["chosen"] <= 24
    assert device.counts["uploaded"] == device.counts["chosen"] == sum(len(u.images) for u in sent)
    assert device.bytes.up == sum(len(u.to_bytes()) for u in sent) and device.bytes.down == 0
    assert device.status == "ok"


def test_uncertainty_by_dropout() -> None:
    sent: list[Upload] = []

    def keep(message: bytes) -> bytes:
        sent.append(Upload.from_bytes(message))
        return b""

    adapter = wrapped()
    device = Device(adapter, keep, budget=1.0, uncertainty="mc", passes=3, dropout=0.5)
    plain, u = wrapped(), torch.zeros(0)
    for t in range(2):
        assert torch.equal(device(images(t)), plain(images(t)))
        u = device.report.uncertainty
        assert u.shape == (8,) and (u > 0).all() and (u < 1).all()
    assert float(sent[-1].uncertainty.max()) <= 1
    assert float(torch.cat([one.uncertainty for one in sent]).max()) == 1  # relative to the largest
    again = wrapped()
    other = Device(again, lambda m: b"", budget=1.0, uncertainty="mc", passes=3, dropout=0.5)
    for t in range(2):
        other(images(t))
    assert torch.equal(other.report.uncertainty, u)  # the adapter's own generator
    with adapter.frozen():
        device(images(2))
        first = device.report.uncertainty
        device(images(2))
        assert torch.equal(device.report.uncertainty, first)


def test_images_without_numbers_are_neither_counted_as_sure_nor_sent() -> None:
    sent: list[Upload] = []

    def keep(message: bytes) -> bytes:
        sent.append(Upload.from_bytes(message))
        return b""

    for measure in ("entropy", "mc"):
        device = Device(wrapped(), keep, budget=1.0, uncertainty=measure)
        x = images(0)
        x[3] = math.nan
        with pytest.warns(UserWarning, match="1 of 8"):
            y = device(x)
        assert (
            y[3].isnan().all()
            and device.report.chosen.tolist() == [True] * 3 + [False] + [True] * 4
        )
        assert len(sent.pop().images) == 7
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            device(x[3:4])
        assert not sent


def test_large_batches_go_up_in_parts() -> None:
    sizes: list[int] = []

    def keep(message: bytes) -> bytes:
        sizes.append(len(Upload.from_bytes(message).images))
        return b""

    Device(wrapped(), keep, budget=1.0)(images(0, 150))
    assert sizes == [64, 64, 22]


def test_what_comes_down_is_used_after_so_many_batches() -> None:
    prompt = torch.full((3, 32, 32), 0.25)
    for latency in (0, 2):
        adapter = wrapped()
        answers = iter([Downlink(prompt, {}, (1, 1)).to_bytes()])
        seen: list[tuple[int, int]] = []

        def answer(
            message: bytes, seen: list[Any] = seen, answers: Iterator[bytes] = answers
        ) -> bytes:
            seen.append(Upload.from_bytes(message).version)
            return next(answers, b"")

        device = Device(adapter, answer, budget=1.0, latency=latency)
        with torch.no_grad():
            plain, other = tiny("bn")(images(0)), tiny("bn")((images(0) + 0.25).clamp(0, 1))
        for batch in range(5):
            y = device(images(0))
            close(y, other if batch > latency else plain)
            assert device.counts["updates"] == (batch > latency)
        assert seen == [(0, 0)] + [(1, 1)] * 4  # it tells what it has
        adapter.reset()
        close(device(images(0)), plain)


def test_the_last_of_several_downlinks_counts() -> None:
    numbers = iter(range(1, 100))

    def answer(message: bytes) -> bytes:
        n = next(numbers)
        return Downlink(torch.full((3, 32, 32), n / 128), {}, (1, n)).to_bytes()

    adapter = wrapped()
    device = Device(adapter, answer, budget=1.0)
    device(images(0, 130))  # three messages, three answers
    device(images(1))
    assert float(adapter.state()["input/prompt"].max()) == 3 / 128
    assert device.counts["updates"] == 1


def test_norm_parameters_come_down_to_an_update_that_has_them() -> None:
    cloud = small_cloud(downlink="norms", norm_lr=0.05)
    tent = tta.get_config("tent", lr=0.0)
    adapter = wrapped(norm="source", update=tent)
    adapter.freeze()
    before = adapter.state()
    device = Device(adapter, cloud, budget=1.0)
    device(images(0))
    device(images(1))
    moved = {k for k, v in adapter.state().items() if not torch.equal(v, before[k])}
    assert {k.partition("/")[0] for k in moved} == {"input", "param"}
    cloud.exchange(upload().to_bytes())
    state = adapter.state()
    norms = Downlink.from_bytes(cloud.exchange(upload(count=1).to_bytes())).norms
    assert {f"param/{name}" for name in norms} == {k for k in state if k.startswith("param/")}
    net = adapter.unwrap()
    assert all(
        torch.equal(v, w) for v, w in zip(net.parameters(), tiny("bn").parameters(), strict=True)
    )
    bare = Device(wrapped(), cloud, budget=1.0)
    bare(images(0))
    with pytest.warns(UserWarning, match="`adapter` must have an update"):
        bare(images(1))
    assert bare.counts["refused"] == 1 and "update" in bare.status


# What goes wrong


@pytest.mark.parametrize("name", RUBBISH)
def test_a_device_goes_on_beside_rubbish_and_says_so(name: str) -> None:
    adapter, plain = wrapped(), wrapped()
    device = Device(adapter, lambda message: RUBBISH[name], budget=1.0, retry=0)
    with pytest.warns(UserWarning, match="predictions go on without") as caught:
        for t in range(3):
            assert torch.equal(device(images(t)), plain(images(t)))
    assert len(caught) == 1, "once until it is right again"
    assert device.status != "ok" and device.counts["failures"] == 3
    assert device.counts["lost"] == 24 and device.counts["uploaded"] == 0
    assert device.bytes.down == 3 * len(RUBBISH[name])
    state = adapter.state()
    assert all(torch.equal(v, plain.state()[k]) for k, v in state.items())


def test_a_prompt_of_another_size_is_refused() -> None:
    down = Downlink(torch.full((3, 8, 8), 0.1), {}, (1, 1)).to_bytes()
    adapter, plain = wrapped(), wrapped()
    device = Device(adapter, lambda message: down, budget=1.0)
    device(images(0))
    with pytest.warns(UserWarning, match="`prompt` must be of the images' shape"):
        assert torch.equal(device(images(1)), plain(images(1)))
    assert device.counts["refused"] == 1 and device.counts["updates"] == 0


def test_a_cloud_that_is_down_is_asked_ever_less_often() -> None:
    now, asked = [0.0], []

    def down(message: bytes) -> bytes:
        asked.append(now[0])
        raise ConnectionError("gone")

    device = Device(wrapped(), down, budget=1.0, retry=1.0)
    device._sender.clock = lambda: now[0]
    with pytest.warns(UserWarning, match="gone"):
        for t in range(200):
            now[0] = t / 2
            device(images(0, 2))
    assert asked == [0, 1, 3, 7, 15, 31, 63]
    assert device.counts["lost"] == 400 and device.counts["failures"] == 7
    device._sender.uplink = small_uplink = HttpUplinkStub()
    now[0] = 1000.0
    device(images(0, 2))
    assert device.status == "ok" and device.counts["uploaded"] == 2 and small_uplink.up


class HttpUplinkStub(tta.runtime.cloud.Uplink):
    """Takes everything and has nothing new."""

    waits = True

    def exchange(self, message: bytes) -> bytes:
        self.up += len(message)
        return b""


def test_a_slow_cloud_holds_no_prediction_up() -> None:
    go = threading.Event()

    def slow(message: bytes) -> bytes:
        assert go.wait(30)
        return Downlink(torch.full((3, 32, 32), 0.1), {}, (1, 1)).to_bytes()

    plain = wrapped()
    with Device(wrapped(), slow, budget=1.0, wait=False, backlog=2) as device:
        for t in range(8):
            assert torch.equal(device(images(t)), plain(images(t)))
        assert not device.flush(0.01)
        assert device.counts["uploaded"] == 0
        assert device.counts["lost"] in (40, 48)  # one under way or not yet, two wait
        go.set()
        settle(device)
        assert device.counts["uploaded"] == 64 - device.counts["lost"]
        y = device(images(0))
        assert not torch.equal(y, plain(images(0))) and device.counts["updates"] == 1
    again = device(images(0))  # closed: it predicts, and sends nothing
    assert torch.equal(again, y) and device.counts["uploaded"] + device.counts["lost"] == 80


@contextmanager
def answering(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server of anything on a loopback port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _page(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"<html>sign in</html>")


def _away(handler: Any) -> None:
    handler.send_response(302)
    handler.send_header("location", "http://127.0.0.1:1/")
    handler.end_headers()


def _breaks_off(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b"x")


def _no_http(handler: Any) -> None:
    handler.wfile.write(b"\x15\x03\x01\x00\x02\x02")


def _drips(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        try:
            handler.wfile.write(b"x")
        except OSError:
            return
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (_page, "`downlink` must be"),
        (_away, "says 302"),
        (_breaks_off, "must be|IncompleteRead"),
        (_no_http, "does not answer"),
        (_drips, "does not answer"),
    ],
)
def test_servers_that_are_no_cloud(answer: Any, words: str) -> None:
    plain = wrapped()
    with answering(answer) as address:
        uplink = HttpUplink(address, timeout=0.5)
        device = Device(wrapped(), uplink, budget=1.0, wait=True)
        with pytest.warns(UserWarning, match=words):
            assert torch.equal(device(images(0)), plain(images(0)))
    assert device.counts["failures"] == 1 and device.bytes.up > 0


def test_nobody_listens_and_somebody_does_later() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Device(wrapped(), f"http://127.0.0.1:{port}", budget=1.0, retry=0) as device:
        with pytest.warns(UserWarning, match="does not answer"):
            device(images(0))
            settle(device)
            device(images(1))
        assert device.bytes == (0, 0)
        settle(device)
        cloud = small_cloud()
        with cloud.serve("127.0.0.1", port) as serving:
            assert serving.address == f"http://127.0.0.1:{port}"
            device(images(2))
            settle(device)
            assert device.status == "ok"
            device(images(3))
        assert device.counts["updates"] == 1 and cloud.counts["updates"] >= 1


# The cloud


def _by_hand(x: Tensor, delta: Tensor, student: nn.Module, source_mean: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = student.get_submodule("fc").register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    z = student((x + delta).clamp(0, 1))
    handle.remove()
    with torch.no_grad():
        target = teacher()(x)
    sure = 1 - entropy(target) / math.log(10)
    supervised = (sure * -(target.softmax(1) * z.log_softmax(1)).sum(1)).mean()
    return supervised + 0.3 * (seen[0].mean(0) - source_mean).square().sum()


def test_an_update_is_the_step_of_the_definition() -> None:
    mean = torch.rand(tiny("bn").get_submodule("fc").in_features)  # type: ignore[arg-type]
    source = tta.SourceStatistics(feature_mean=mean)
    cloud = small_cloud(source=source, align_weight=0.3, rate=0.5, lr=0.02)
    student = tiny("bn")
    delta = nn.Parameter(torch.zeros(3, 32, 32))
    optimizer = torch.optim.Adam([delta], lr=0.02)
    average = torch.zeros(3, 32, 32)
    for t in range(3):
        sent = upload(t)
        back = Downlink.from_bytes(cloud.exchange(sent.to_bytes()))
        loss = _by_hand(sent.images / 255, delta, student, mean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average += 0.5 * 0.5 * (delta.detach() - average)  # rate times the mean uncertainty
        close(cloud.report.loss, float(loss.detach()), rtol=1e-4, atol=1e-5)
        assert cloud.prompt is not None
        # Adam divides by the size of a gradient, which may be next to nothing in a pixel.
        assert (cloud.prompt - average).abs().median() < 1e-5
        close(back.prompt, cloud.prompt, rtol=1e-3, atol=1e-6)
    assert cloud.counts == {"images": 24, "updates": 3, "refused": 0}


def test_uploads_wait_for_a_whole_batch() -> None:
    cloud = small_cloud()
    assert cloud.exchange(upload(0, 5).to_bytes()) == b"" and cloud.prompt is None
    answer = cloud.exchange(upload(1, 5).to_bytes())
    assert cloud.counts["updates"] == 1
    version = Downlink.from_bytes(answer).version
    assert cloud.exchange(upload(2, 1, version=version).to_bytes()) == b""
    assert cloud.exchange(upload(2, 1).to_bytes()) == answer  # to whom has it not
    cloud.exchange(upload(3, 20, version=version).to_bytes())
    assert cloud.counts == {"images": 32, "updates": 4, "refused": 0}
    other = small_cloud()  # another life: the same number is not the same prompt
    other.exchange(upload(0).to_bytes())
    assert other.exchange(upload(0, 1, version=version).to_bytes())


def test_the_models_are_left_as_they_were() -> None:
    net, large = tiny("bn").train(), teacher().train()
    before = [copy.deepcopy(m.state_dict()) for m in (net, large)]
    cloud = Cloud(net, large, batch_size=8, downlink="norms")
    assert not large.training
    cloud.exchange(upload().to_bytes())
    cloud.close()
    for module, state in zip((net, large), before, strict=True):
        assert module.training and all(p.requires_grad for p in module.parameters())
        assert all(p.grad is None for p in module.parameters())
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_learning_works_in_whatever_mode_the_device_is_called() -> None:
    found = []
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        cloud = small_cloud()
        device = Device(wrapped(), cloud, budget=1.0)
        with mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode is torch.no_grad):
            for t in range(2):
                device(images(t))
        assert cloud.counts["updates"] == 2 and device.counts["updates"] == 1
        found.append(cloud.prompt)
    assert torch.equal(found[1], found[2])


def test_teachers_of_several_kinds() -> None:
    def function(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10]

    normalised = teacher()
    normalised.pretrained_cfg = {"mean": MEAN, "std": STD}  # type: ignore[assignment]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    sent = upload()
    x = sent.images / 255
    adapting = tta.wrap(teacher(), "tent.cifar10", lr=0.1)
    small: Any = partial(F.interpolate, size=16)
    for given, transform, expected in (
        (function, None, function(x)),
        (normalised, None, teacher()((x - mean) / std)),
        (teacher(), small, teacher()(small(x))),
        (adapting, None, teacher()(x)),
    ):
        cloud = Cloud(tiny("bn"), given, batch_size=8, teacher_transform=transform)
        cloud.exchange(sent.to_bytes())
        doubt = float((entropy(expected.detach()) / math.log(10)).mean())
        assert float(cloud.report.teacher_uncertainty) == pytest.approx(doubt, abs=1e-5)
        cloud.close()
    assert adapting.report.stepped
    wrong = Cloud(tiny("bn"), lambda x: x.flatten(1)[:, :7], batch_size=8)
    refused(ValueError, "`teacher` must return", lambda: wrong.exchange(sent.to_bytes()))


def test_a_model_that_an_adapter_has_can_be_copied_without_norm_rules() -> None:
    net = tiny("bn")
    adapter = tta.wrap(net, input="prompt", output="t3a", **PIXELS)
    cloud = Cloud(net, teacher(), batch_size=8)
    cloud.exchange(upload().to_bytes())
    plain = small_cloud()
    plain.exchange(upload().to_bytes())
    assert torch.equal(cloud.prompt, plain.prompt)  # type: ignore[arg-type]
    adapter.unwrap()
    adapter = tta.wrap(net, norm="bn", input="prompt", **PIXELS)
    for given in (net, adapter):
        refused(ValueError, "`model` must not be wrapped", lambda g=given: Cloud(g, teacher()))


def test_models_in_half_precision() -> None:
    net = tiny("gn").to(torch.bfloat16)
    cloud = Cloud(net, teacher(), batch_size=8, downlink="norms")
    tent = tta.get_config("tent", lr=0.0)
    adapter = tta.wrap(copy.deepcopy(net), input="prompt", update=tent, **PIXELS)
    adapter.freeze()
    device = Device(adapter, cloud, budget=1.0)
    for t in range(3):
        assert device(images(t).to(torch.bfloat16)).dtype == torch.bfloat16
    assert device.counts["updates"] == 2 and device.status == "ok"
    beside = Cloud(net.float(), teacher(), batch_size=8, downlink="norms")
    for t in range(3):  # the copy learns in float32
        levels = (images(t).to(torch.bfloat16).float() * 255).round().to(torch.uint8)
        beside.exchange(Upload(levels, torch.full((8,), 0.5)).to_bytes())
    assert cloud.report.supervised == pytest.approx(float(beside.report.supervised), rel=1e-5)


def test_a_cloud_is_of_one_size_of_images() -> None:
    cloud = small_cloud()
    cloud.exchange(upload(0, 2).to_bytes())
    small = Upload(LEVELS, torch.zeros(1))
    refused(MessageError, "like those before", lambda: cloud.exchange(small.to_bytes()))
    other = small_cloud(mean=MEAN, std=STD)
    grey = Upload(LEVELS[:, :1], torch.zeros(1))
    refused(MessageError, r"\(3, H, W\)", lambda: other.exchange(grey.to_bytes()))
    cloud.exchange(upload(0, 6).to_bytes())
    refused(MessageError, "like those before", lambda: cloud.exchange(small.to_bytes()))
    assert cloud.counts == {"images": 8, "updates": 1, "refused": 2}


def test_losses_that_are_no_numbers_teach_nothing() -> None:
    cloud = Cloud(tiny("bn"), lambda x: x.flatten(1)[:, :10] * math.nan, batch_size=8)
    assert cloud.exchange(upload().to_bytes()) == b""
    assert cloud.counts["updates"] == 0 and not cloud.prompt.any()  # type: ignore[union-attr]


def test_refusals() -> None:
    adapter = wrapped()
    bare = tta.wrap(tiny("bn"), "tent.cifar10")
    refused(TypeError, "`adapter` must be", lambda: Device(tiny("bn"), "http://x"))  # type: ignore[arg-type]
    refused(ValueError, "`adapter` must have a prompt", lambda: Device(bare, "http://x"))
    refused(TypeError, "`uplink` must be", lambda: Device(adapter, 3))
    for address in ("ftp://x", "127.0.0.1:80", "http://", "http://x:99999"):
        refused(ValueError, "`address` must", lambda a=address: Device(adapter, a))
    for more in ({"budget": 2}, {"uncertainty": "margin"}, {"passes": 1}, {"latency": -1}):
        with pytest.raises(ValueError, match="must be"):
            Device(adapter, "http://x", **more)  # type: ignore[arg-type]
    features = tta.wrap(tiny("gn"), input="prompt", features=lambda m, x: x.flatten(1), **PIXELS)
    refused(ValueError, "`uncertainty`", lambda: Device(features, "http://x", uncertainty="mc"))
    refused(TypeError, "`teacher` must be", lambda: Cloud(tiny("bn"), None))
    refused(TypeError, "`model` must be", lambda: Cloud(None, teacher()))  # type: ignore[arg-type]
    for more in ({"downlink": "all"}, {"batch_size": 0}, {"rate": 2}, {"width": 0}):
        with pytest.raises(ValueError, match="must be"):
            small_cloud(**more)


def test_a_head_of_another_kind() -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3)
            self.kinds = nn.Parameter(torch.randn(10, 4))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.body(x).mean((2, 3))
            return {"scores": F.normalize(h, dim=1) @ F.normalize(self.kinds, dim=1).T}

    told: dict[str, Any] = {"logits": "scores", "num_classes": 10}
    cloud = Cloud(Cosine(), teacher(), batch_size=8, **told)
    adapter = tta.wrap(Cosine(), input="prompt", **told, **PIXELS)
    device = Device(adapter, cloud, budget=1.0)
    assert device(images(0))["scores"].shape == (8, 10)
    device(images(1))
    assert cloud.counts["updates"] == 2 and device.counts["updates"] == 1
    mean = tta.SourceStatistics(feature_mean=torch.zeros(4))
    by_function = Cloud(
        Cosine(), teacher(), batch_size=8, source=mean, **told,
        features=lambda model, x: model.get_submodule("body")(x).mean((2, 3)),
    )  # fmt: skip
    by_function.exchange(upload().to_bytes())
    assert by_function.report.align > 0


# Over HTTP


def test_a_device_and_a_cloud_over_http() -> None:
    cloud, beside = small_cloud(), small_cloud()
    with cloud.serve(port=0) as serving:
        with Device(wrapped(), serving.address, budget=0.5) as device:
            other = Device(wrapped(), beside, budget=0.5)
            for t in range(6):
                y, wanted = device(images(t)), other(images(t))
                settle(device)
                assert torch.equal(y, wanted)
            assert device.counts == other.counts and device.bytes == other.bytes
            assert device.bytes == cloud.bytes and device.counts["updates"] > 0
        client = httpx.Client(base_url=serving.address, trust_env=False)
        told = client.get("/v1/cloud").json()
        assert told["counts"] == cloud.counts and told["bytes"]["up"] == cloud.bytes.up
        assert told["report"]["loss"] == pytest.approx(float(cloud.report.loss))
        assert client.get("/healthz").json() == {"status": "ok"}
        bad = client.post("/v1/uploads", content=pickle.dumps([1]))
        assert bad.status_code == 422 and "`upload` must be" in bad.json()["detail"]
        foreign = client.get("/v1/cloud", headers={"host": "example.org"})
        assert foreign.status_code == 403
        client.close()
    with pytest.raises(OSError, match="`port` must be free"), socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        cloud.serve(port=taken.getsockname()[1])


def test_tokens_and_limits() -> None:
    cloud = small_cloud()
    limits = Limits(body=30_000)
    with cloud.serve(port=0, token="secret", limits=limits) as serving:
        with pytest.raises(UplinkError, match="401"):
            HttpUplink(serving.address, token="other").exchange(upload(0, 1).to_bytes())
        uplink = HttpUplink(serving.address, token="secret")
        assert uplink.exchange(upload(0, 1).to_bytes()) == b""
        with pytest.raises(UplinkError, match="413"):
            uplink.exchange(upload(0, 60).to_bytes())
        assert cloud.counts == {"images": 1, "updates": 0, "refused": 0}
    refused(ValueError, "`token` must be", lambda: cloud.serve(port=0, token=""))


def test_many_devices_of_one_cloud() -> None:
    cloud = small_cloud()
    with cloud.serve(port=0) as serving:
        devices = [Device(wrapped(), serving.address, budget=1.0, wait=True) for _ in range(3)]

        def stream(device: Device, seed: int) -> None:
            for t in range(4):
                device(images(10 * seed + t))

        threads = [
            threading.Thread(target=stream, args=(device, i)) for i, device in enumerate(devices)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert cloud.counts == {"images": 96, "updates": 12, "refused": 0}
    assert sum(d.bytes.up for d in devices) == cloud.bytes.up
    assert sum(d.bytes.down for d in devices) == cloud.bytes.down
    assert all(d.counts["uploaded"] == 32 and d.status == "ok" for d in devices)
