"""Servers on a free loopback port, in a thread or a process of their own, and what they get."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as to_safetensors
from torch import Tensor

import tta
from tests.helpers.nets import tiny
from tests.helpers.own_models import net
from tta.runtime import StreamPool
from tta.runtime.server import application, run

__all__ = [
    "METHOD", "MODEL", "Process", "Reference", "Server", "frame", "npy", "picture", "png",
    "safetensors", "serving", "to_tensor",
]  # fmt: skip

ROOT = Path(__file__).parents[2]
MODEL = "tests.helpers.own_models:named"
METHOD = ("--method", "tent.cifar10[lr=0.05]+watch", "--batch-size", "4")


def frame(number: int) -> Tensor:
    """Four images for ``MODEL``."""
    return torch.from_numpy(np.random.default_rng(number).random((4, 3, 16, 16), np.float32))


class Reference:
    """What a stream gives that nothing interrupts: frames 0, 1, ... by ``MODEL`` and ``METHOD``."""

    def __init__(self) -> None:
        adapter = tta.wrap(net(), "tent.cifar10", lr=0.05, guard="watch", batch_size=4)
        self.answers = [adapter(frame(n)).log_softmax(1).exp().tolist() for n in range(40)]


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Random pixels (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """A picture as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def npy(array: np.ndarray, **more: Any) -> bytes:
    """An array as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, **more)
    return file.getvalue()


def safetensors(**tensors: Tensor) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    return to_safetensors(tensors)


def to_tensor(picture: Any) -> Tensor:
    """Pixels (3, 32, 32) in [0, 1]; the transform of the servers here."""
    levels = np.asarray(picture.resize((32, 32)), dtype=np.float32)
    return torch.from_numpy(levels).permute(2, 0, 1) / 255


class Server:
    """A server that runs in a thread."""

    def __init__(self, app: Any, address: str) -> None:
        self.app, self.address = app, address
        self.service = app.state.service
        self.pool: StreamPool = self.service.pool
        self.client = httpx.Client(base_url=address, timeout=60, trust_env=False)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return self.client.post(path, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.client.get(path, **more)

    def predict(self, stream: str, body: bytes, **more: Any) -> Any:
        """The answer to one image, which must be there."""
        params = {"stream": stream, "create": True}
        answer = self.post("/v1/predict", params=params, content=body, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, status: int, words: str, answer: httpx.Response) -> str:
        """Check an error: its status, and one sentence about an argument."""
        assert answer.status_code == status, (answer.status_code, answer.text)
        text = answer.json()["detail"]
        assert words in text and "\n" not in text and len(text) <= 400, text
        return text


@contextmanager
def serving(
    adapter: tta.Adapter | None = None,
    folder: Path | None = None,
    shared: bool = False,
    **settings: Any,
) -> Iterator[Server]:
    """Serve a tiny network, or the adapter given."""
    if adapter is None:
        adapter = tta.wrap(tiny("bn"), "tent.cifar10", guard="watch")
    pool = StreamPool(adapter, folder=folder, interval=None, shared=shared)
    settings = {"transform": to_tensor, "shape": (3, 32, 32), "max_wait": 0.0} | settings
    app = application(pool, **settings)
    address: list[str] = []
    failed: list[BaseException] = []

    def go() -> None:
        try:
            run(app, port=0, on_ready=address.append, grace=5)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not address:
        assert thread.is_alive() and time.monotonic() < end, failed
        time.sleep(0.01)
    server = Server(app, address[0])
    try:
        yield server
    finally:
        server.client.close()
        app.state.server.should_exit = True
        thread.join(60)
        assert not thread.is_alive() and not failed, failed


class Process:
    """``tta serve`` as a process of its own; ends with the ``with`` block."""

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tta", "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, **more},
        )  # fmt: skip
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("serving on "):
            self.wait()
            raise AssertionError(self.log)
        self.client = httpx.Client(base_url=line.split()[-1], timeout=60, trust_env=False)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._process.kill()
        self.wait()

    @property
    def log(self) -> str:
        """What it has written to stderr."""
        return "".join(self._errors)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it, as nothing can hold up."""
        self._process.send_signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Wait for its end; return its exit status."""
        status = self._process.wait(60)
        self._reader.join(10)
        return status

    def predict(self, stream: str, body: bytes) -> Any:
        """The answer to one image, which must be there."""
        params = {"stream": stream, "create": True}
        answer = self.client.post("/v1/predict", params=params, content=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def _read(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(self._process.stderr)
