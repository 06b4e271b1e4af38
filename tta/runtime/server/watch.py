"""What a server remembers of each stream, for its page, its events and its health."""

from __future__ import annotations

import base64
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["FIGURES", "StreamWatch", "plain", "words_of"]

FIGURES = ("estimated_accuracy", "entropy", "concentration", "agreement", "distance")
LATENCIES = 512  # of the last images, for percentiles
POINTS = 240  # of the history that the page draws
EVERY = 1.0  # seconds between two points, and between two thumbnails
PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


class StreamWatch:
    """The last of everything of one stream. Safe to read while it is written.

    Args:
        name: The stream's.
        thumbnails: How many are kept; 0 for none.
    """

    def __init__(self, name: str, thumbnails: int) -> None:
        self.name = name
        self.images = self.learned = self.failed = 0  # since this server began
        self.frozen: bool | None = None  # None: not known before its first batch
        self.actions: dict[str, int] = {}  # of the guard, how often
        self.health: dict[str, Any] = {}  # of the last batch
        self.seen_at: float | None = None  # seconds since 1970
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._points: deque[list[float | None]] = deque(maxlen=POINTS)
        self._frames: deque[dict[str, Any]] = deque(maxlen=thumbnails)
        self._point_at = self._frame_at = -math.inf
        self._lock = threading.Lock()

    def wants_thumbnail(self) -> bool:
        """Whether the last one is old enough for another."""
        return bool(self._frames.maxlen) and time.monotonic() >= self._frame_at + EVERY

    def note(
        self, answers: Iterable[tuple[Mapping[str, Any], bytes | None]], health: Mapping[str, Any]
    ) -> bool:
        """Remember a batch.

        Args:
            answers: What each image was told, with a thumbnail if one was made.
            health: Of the batch.

        Returns:
            Whether a point was added to the history, which is at most once a second.
        """
        now = time.monotonic()
        with self._lock:
            self.health, self.seen_at = dict(health), time.time()
            for answer, thumbnail in answers:
                self.images += 1
                self.learned += bool(answer["learned"])
                self._latencies.append(answer["latency"])
                if thumbnail is not None and self.wants_thumbnail():
                    self._frame_at = now
                    told = {key: answer[key] for key in ("index", "label", "class")}
                    data = base64.b64encode(thumbnail).decode()
                    self._frames.append(told | {"image": f"data:image/jpeg;base64,{data}"})
            action = health.get("action", "learn")
            if action != "learn":
                self.actions[action] = self.actions.get(action, 0) + 1
            if now < self._point_at + EVERY:
                return False
            self._point_at = now
            figures = [_number(health.get(f"{key}_average", math.nan)) for key in FIGURES]
            self._points.append([round(self.seen_at, 1), *figures])
            return True

    def summary(self) -> dict[str, Any]:
        """What lists and the page show, as JSON can hold it."""
        with self._lock:
            ordered = sorted(self._latencies)
            latency = {
                name: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
                for name, share in PERCENTILES.items()
                if ordered
            }
            return {
                "stream": self.name,
                "images": self.images,
                "learned": self.learned,
                "frozen": self.frozen,
                "seen_at": self.seen_at,
                "latency": latency,
                "actions": dict(self.actions),
                "health": plain(self.health),
            }

    def history(self) -> list[list[float | None]]:
        """Points [seconds since 1970, then averages in the order of ``FIGURES``]."""
        with self._lock:
            return list(self._points)

    def frames(self) -> list[dict[str, Any]]:
        """Thumbnails of the last images, with what was predicted."""
        with self._lock:
            return list(self._frames)


def plain(value: Any) -> Any:
    """As JSON holds it: what is not finite becomes None, and a tensor a list."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return _number(value)
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def words_of(error: BaseException) -> str:
    """The sentence of an error; ``str`` of a KeyError would put it into quotes."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
