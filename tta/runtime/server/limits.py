"""What a server takes: sizes, numbers and rates beyond which it refuses in words."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from tta.core.checks import LARGE, LARGEST, number, shown, string, whole_number

__all__ = [
    "STOPPING",
    "Limits",
    "Rate",
    "RefusedError",
    "check_access",
    "check_token",
    "with_others",
]

STOPPING = "the server is stopping and takes nothing more: send it again to the next one."
LONGEST_TOKEN = 1000
REMEMBERED = 10_000  # streams whose rate is known; of more, the least recent begin anew


class RefusedError(Exception):
    """A request that is answered with an error.

    Args:
        status: The status code of HTTP.
        detail: Why, in a sentence, and what to do.
        retry_after: Seconds after which it may be tried again.
    """

    def __init__(self, status: int, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused, with the status code in brackets.

    Args:
        body: Bytes of a request [413].
        waiting_bytes: Bytes of all requests that are being received or decoded [429].
        pixels: Of a picture, told by its header before it is decoded [413].
        images: In one request [413].
        streams: That may be created [429].
        rate: Images a second of one stream, averaged over two seconds [429]; None for any.
        queue: Images that wait for the model [429].
        receive_s: Seconds in which a request must have come in [408].
        listeners: Clients that follow events at a time [429].
    """

    body: int = 16 << 20
    waiting_bytes: int = 256 << 20
    pixels: int = 25_000_000
    images: int = 64
    streams: int = 1000
    rate: float | None = None
    queue: int = 256
    receive_s: float = 30.0
    listeners: int = 32

    def __post_init__(self) -> None:
        for name in ("body", "waiting_bytes", "pixels", "images", "streams", "queue", "listeners"):
            whole_number(name, getattr(self, name), 1, LARGEST)
        number("receive_s", self.receive_s, 0, LARGE, above=True)
        if self.rate is not None:
            number("rate", self.rate, 0, LARGE, above=True)


class Rate:
    """Counts images of streams; a stream may be ahead of its rate by two seconds.

    Args:
        rate: Images a second; None for any.
        clock: Seconds.
    """

    def __init__(self, rate: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self._clock = rate, clock
        self._free: OrderedDict[str, float] = OrderedDict()  # when all that was taken is paid for

    def take(self, wanted: dict[str, int]) -> None:
        """Count images of several streams, all or none.

        Args:
            wanted: How many, by stream.

        Raises:
            RefusedError: When a stream is above its rate.
        """
        if self.rate is None:
            return
        now, window = self._clock(), max(2.0, 1 / self.rate)
        later = {
            name: max(now, self._free.get(name, now)) + count / self.rate
            for name, count in wanted.items()
        }
        for name, free in later.items():
            # A first request of many images is let through: it alone can never fit otherwise.
            if free > now + window and self._free.get(name, now) > now:
                wait = free - now - window
                raise RefusedError(
                    429,
                    f"`stream` must send at most {self.rate:g} images a second, got more: send the "
                    f"next one in {wait:.1f} s.",
                    wait,
                )
        for name, free in later.items():
            self._free[name] = free
            self._free.move_to_end(name)
        while len(self._free) > REMEMBERED:
            self._free.popitem(last=False)


def with_others(words: str, others: int, what: str) -> str:
    """A refusal's sentence, and what has become of the rest of the request."""
    return f"{words.rstrip('.')}. Of the other {what} in this request, {others} were predicted."


def check_access(token: Any, hosts: Any, limits: Any) -> Limits:
    """Check who is let in and how much; return the limits, or the defaults.

    Args:
        token: As of :func:`tta.runtime.server.application`.
        hosts: Likewise.
        limits: Likewise.
    """
    check_token(token)
    # In a string, every part of it would be a name.
    if hosts is not None and (isinstance(hosts, str) or not isinstance(hosts, Collection)):
        raise TypeError(
            f"`hosts` must be a list of names or None, got {shown(hosts)}: pass a list."
        )
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(
            f"`limits` must be tta.runtime.server.Limits or None, got {shown(limits)}: pass "
            "Limits(...)."
        )
    return Limits() if limits is None else limits


def check_token(token: str | None) -> None:
    """Refuse what no header can carry."""
    if token is None:
        return
    string("token", token)
    plain = token.isascii() and token.isprintable() and token == token.strip()
    if not 0 < len(token) <= LONGEST_TOKEN or not plain:
        raise ValueError(
            f"`token` must be 1 to {LONGEST_TOKEN} printable ASCII characters without spaces "
            f"around them, got {len(token)}{'' if plain else ', of which some are others'}: make "
            "one by `openssl rand -hex 32`."
        )
