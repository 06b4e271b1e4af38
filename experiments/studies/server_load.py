"""How fast ``tta serve`` answers under load: latency, errors and memory at a share of its capacity.

    python -m experiments load

starts the server on a bundled model, in several ways: the plain model, a recipe that is frozen, and
recipes that learn. The load generator `hey` (a package of Debian and others) sends one PNG at a
time to each of several streams; first as fast as answers come, which is the capacity, and then for
minutes at a share of it. A client beside it sends images of its own to a stream of its own, and
sends them again when the load is over: every row must be the same, up to the rounding of mixed
batches. It writes ``experiments/results/server_load.jsonl`` and the table in ``docs/serving.md``.
The same command goes on where it stopped; ``--again`` measures all anew.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.data.bundled import read_bundled
from experiments.records import markdown
from experiments.records.environment import describe_environment
from experiments.records.rows import Rows
from experiments.run.flags import amount
from experiments.run.method_strings import parse_method
from tta.core.checks import number, shown, whole_number

__all__ = ["WAYS", "ServerLoad", "add_flags", "percentiles", "render"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serving.md"
RESULTS = ROOT / "experiments" / "results" / "server_load.jsonl"
MARK = "load"  # of the page's generated part
MODEL = "cifar10_resnet20_bn"
WAYS = ("source", "auto, frozen", "auto", "tent", "tent+steady")
KEYS = ("model", "way")
CLOSE = 1e-3  # of probabilities: the rounding of mixed batches, learned from
EVERY_S = 0.25  # between images of the client that checks
HURRY_S = 20.0  # for the capacity
AT_ONCE = 2  # requests of a stream on their way


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``load`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default=MODEL, help="that tta serve takes (default: %(default)s)")
    add("--ways", nargs="+", metavar="WAY", default=WAYS,
        help="methods; ', frozen' behind one that does not learn (%(default)s)")  # fmt: skip
    add("--minutes", type=amount, default=5.0, help="of each load (default: %(default)s)")
    add("--share", type=float, default=0.8, help="of the capacity (default: %(default)s)")
    add("--streams", type=int, default=8, metavar="N", help="(default: %(default)s)")
    add("--again", action="store_true", help="measure rows again that are there")
    parser.set_defaults(
        prepare=lambda args: ServerLoad(
            args.model, args.ways, args.minutes, args.share, args.streams, args.again
        )
    )


class ServerLoad:
    """Measures a server.

    Args:
        model: That ``tta serve`` takes; it is sent PNG files of 32x32 pixels.
        ways: Methods, with ", frozen" behind those whose streams are frozen.
        minutes: Of each load.
        share: Of the capacity.
        streams: How many, with two clients each.
        again: Whether rows that are there are measured again.
        hurry: Seconds in which the capacity is measured.
        results: Where rows are kept.
        page: With the table.

    Raises:
        FileNotFoundError: When `hey` is not installed.
    """

    def __init__(
        self,
        model: str,
        ways: Sequence[str],
        minutes: float,
        share: float,
        streams: int,
        again: bool = False,
        *,
        hurry: float = HURRY_S,
        results: Path = RESULTS,
        page: Path = PAGE,
    ) -> None:
        if shutil.which("hey") is None:
            raise FileNotFoundError("`hey` must be installed, but is not: apt install hey")
        self.model, self.ways, self.hurry = model, tuple(ways), hurry
        for way in self.ways:
            parse_method(way.partition(", ")[0], 10)
        number("share", share, 0, 10, above=True)
        whole_number("streams", streams, 1, 1000)
        self.about = {"minutes": minutes, "share": share, "streams": streams}
        self.again, self.page = again, page
        self.rows = Rows(results, KEYS)

    def execute(self) -> Path:
        """Measure what is left, and write the page; returns it."""
        with self.rows.shown_on(self.page, MARK, render):
            keys = [{"model": self.model, "way": way} for way in self.ways]
            self.rows.fill(keys, self.about, self._measure, self.again)
        return self.page

    def _measure(self, key: Mapping[str, Any]) -> dict[str, Any]:
        method, _, frozen = key["way"].partition(", ")
        names = [f"camera-{number}" for number in range(self.about["streams"])]
        pictures = [_png(image) for image in read_bundled().images[::20]]
        with tempfile.TemporaryDirectory() as folder, _serving(self.model, method) as server:
            files = [Path(folder) / f"{name}.png" for name in names]
            for name, file, picture in zip(names, files, pictures, strict=False):
                file.write_bytes(picture)
                server.ask(f"/v1/streams/{name}", b"")
                if frozen:
                    server.ask(f"/v1/streams/{name}/freeze", b"")
            clients = list(zip(names, files, strict=True))
            hurried = _send(server.address, clients, self.hurry)
            capacity = len(hurried) / self.hurry
            rate = capacity * self.about["share"]
            with _checking(server, pictures) as seen, server.watched() as memory:
                found = _send(server.address, clients, 60 * self.about["minutes"], rate=rate)
            alone = [server.predict("alone", pictures[n % len(pictures)]) for n in range(len(seen))]
        third = len(memory) // 3  # the first one is for what is made once, and for allocators
        middle, last = (statistics.median(memory[n * third : (n + 1) * third]) for n in (1, 2))
        wrong = sum(np.abs(a - b).max() > CLOSE for a, b in zip(seen, alone, strict=True))
        return {
            "capacity": round(capacity, 1),
            "asked": round(rate * 60 * self.about["minutes"]),
            "requests": len(found),
            "errors": sum(status != 200 for _, status in (*hurried, *found)),
            **percentiles([seconds for seconds, _ in found]),
            "checked": len(seen),
            "wrong": int(wrong),
            "memory": round(last / 2**20),
            "growth": round((last - middle) / 2**20, 1),
            "load": round(os.getloadavg()[0], 1),
            "cpu": describe_environment()["hardware"]["cpu"],
        }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile and the largest value, in milliseconds."""
    values = [*np.quantile(seconds, (0.5, 0.95, 0.99)), max(seconds)]
    names = ("p50", "p95", "p99", "largest")
    return {name: round(1000 * float(v), 1) for name, v in zip(names, values, strict=True)}


def render(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table of ways, and what was measured."""
    rows = list(rows)
    if not rows:
        return ""
    first = rows[0]
    words = (
        f"`{first['model']}`, {first['streams']} streams of two clients each, PNG of 32x32 pixels, "
        f"at {100 * first['share']:.0f} % of the capacity; server and "
        f"clients on {first['cpu']}, 2 cores. Latency in ms, as a client sees it; a client waits "
        "for its answer before it sends again, so that fewer are sent than planned where answers "
        "take longer than the time between two. Rows that were "
        "checked are those of a client with images of its own, asked again without load:"
    )
    heads = ("method", "capacity, images/s", "minutes", "sent of planned", "errors", "p50", "p95",
             "p99", "largest", "rows checked", "wrong", "MB", "growth, MB")  # fmt: skip
    keys = ("errors", "p50", "p95", "p99", "largest", "checked", "wrong", "memory", "growth")
    cells = [
        [
            "plain model" if row["way"] == "source" else f"`{row['way']}`",
            f"{row['capacity']:g}",
            f"{row['minutes']:g}",
            f"{row['requests']:,} of {row['asked']:,}",
            *(f"{row[key]:,}" for key in keys),
        ]
        for row in rows
    ]
    return "\n".join([words, "", *markdown.table(heads, cells), ""])


class _Server:
    """A process of ``tta serve``."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address

    def ask(self, path: str, body: bytes) -> Any:
        """What it answers to a POST."""
        request = urllib.request.Request(self.address + path, body, method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def predict(self, stream: str, body: bytes) -> np.ndarray:
        """The probabilities of one image (C,)."""
        answer = self.ask(f"/v1/predict?create=true&stream={stream}", body)
        return np.array(answer["probabilities"])

    @contextmanager
    def watched(self) -> Iterator[list[int]]:
        """Its resident memory in bytes, each half second of the block."""
        found: list[int] = []
        ended = threading.Event()
        path = Path(f"/proc/{self.process.pid}/statm")

        def watch() -> None:
            while not ended.wait(0.5):
                found.append(int(path.read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            ended.set()
            thread.join()


@contextmanager
def _serving(model: str, method: str) -> Iterator[_Server]:
    command = [sys.executable, "-m", "tta", "serve", model, "--method", method, "--port", "0",
               "--device", "cpu", "--log-level", "warning"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("serving on "):
            raise RuntimeError(
                f"`model` and `ways` must be what tta serve takes, got {shown(model)} with "
                f"{shown(method)}: see what it said above"
            )
        yield _Server(process, line.split()[-1])
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


@contextmanager
def _checking(server: _Server, pictures: Sequence[bytes]) -> Iterator[list[np.ndarray]]:
    """Send images to a stream of its own during the block; the list has the answers."""
    seen: list[np.ndarray] = []
    ended = threading.Event()

    def check() -> None:
        while not ended.wait(EVERY_S):
            seen.append(server.predict("checked", pictures[len(seen) % len(pictures)]))

    thread = threading.Thread(target=check)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def _send(
    address: str,
    clients: Sequence[tuple[str, Path]],
    seconds: float,
    rate: float = 0.0,
) -> list[tuple[float, int]]:
    """Load the server: seconds and status of each request.

    Args:
        address: Of the server.
        clients: Streams, and the file that is sent to each.
        seconds: How long.
        rate: Requests a second of all together; 0 for as many as are answered.
    """
    each = rate / len(clients) / AT_ONCE
    sent = [
        subprocess.Popen(
            ["hey", "-z", f"{seconds}s", "-c", str(AT_ONCE), "-q", f"{each:.3f}", "-m", "POST",
             "-T", "image/png", "-D", str(file), "-t", "60", "-o", "csv",
             f"{address}/v1/predict?probabilities=false&stream={name}"],
            stdout=subprocess.PIPE, text=True,
        )
        for name, file in clients
    ]  # fmt: skip
    found: list[tuple[float, int]] = []
    for process in sent:
        said, _ = process.communicate()
        found += [
            (float(row["response-time"]), int(row["status-code"]))
            for row in csv.DictReader(io.StringIO(said))
        ]
    return found


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
