"""How a device's messages reach a cloud side, and what comes back; both are counted in bytes."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from tta.core.checks import LARGE, number, shown, string, told
from tta.runtime.server.limits import check_token

__all__ = ["MOST_BYTES", "CallUplink", "HttpUplink", "Uplink", "UplinkError", "as_uplink"]

MOST_BYTES = 64 << 20  # of an answer
PIECE = 1 << 16
UPLOADS = "/v1/uploads"
KIND = "application/octet-stream"


class UplinkError(RuntimeError):
    """No answer, or one that says that the message was refused."""


class Uplink:
    """Carries messages. A subclass defines ``exchange``.

    ``up`` and ``down`` count the bytes of messages and answers, without the headers of HTTP.
    """

    waits = False  # whether a device waits for the answer within its call, unless it is told

    def __init__(self) -> None:
        self.up = self.down = 0

    def exchange(self, message: bytes) -> bytes:
        """Send a message; return the answer, which is empty where there is nothing new.

        Raises:
            UplinkError: When there is no answer.
        """
        raise NotImplementedError  # pragma: no cover


class CallUplink(Uplink):
    """A cloud side in the same process.

    Args:
        function: Message to answer, both bytes.
    """

    waits = True

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def exchange(self, message: bytes) -> bytes:
        """Call the function."""
        self.up += len(message)
        try:
            answer = self._function(message)
        except Exception as error:
            raise UplinkError(told(error, 200)) from error
        if not isinstance(answer, bytes):
            raise UplinkError(
                f"`answer` must be bytes, got {type(answer).__name__}: give b'' for nothing new"
            )
        self.down += len(answer)
        return answer


class HttpUplink(Uplink):
    """A cloud side at an address, by :mod:`http.client`; nothing is followed, cached or retried.

    Args:
        address: Such as "http://192.168.0.2:8000"; https is checked against the system's
            authorities.
        token: What the cloud side asks for as ``Authorization: Bearer``; None for none.
        timeout: Seconds for a whole exchange.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: When there can be no such address or token.
    """

    def __init__(self, address: str, token: str | None = None, timeout: float = 30.0) -> None:
        super().__init__()
        try:
            parts = urlsplit(string("address", address))
            port = parts.port
        except ValueError:
            port, parts = None, urlsplit("")
        plain = address.isprintable() and " " not in address and parts.path.isascii()
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise ValueError(
                f"`address` must begin with http:// or https:// and name a host, without "
                f"spaces and with an ASCII path, got {shown(address, 60)}: pass what "
                "cloud.serve(...).address says."
            )
        self.address = address
        self._connect: Any = http.client.HTTPConnection
        if parts.scheme == "https":
            self._connect = http.client.HTTPSConnection
        self._host, self._port, self._path = parts.hostname, port, parts.path.rstrip("/") + UPLOADS
        self._timeout = number("timeout", timeout, 0, LARGE, above=True)
        self._headers = {"Content-Type": KIND, "Accept": KIND}
        check_token(token)
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def exchange(self, message: bytes) -> bytes:
        """Post the message."""
        end = time.monotonic() + self._timeout
        connection = self._connect(self._host, self._port, timeout=self._timeout)
        try:
            connection.request("POST", self._path, body=message, headers=self._headers)
            self.up += len(message)
            response = connection.getresponse()
            body = self._read(response, connection, end)
        except (OSError, http.client.HTTPException, ValueError) as error:
            text = told(error, 120) or type(error).__name__
            raise UplinkError(f"{self.address} does not answer ({text})") from error
        finally:
            connection.close()
        if response.status not in (200, 204):
            raise UplinkError(f"{self.address} says {response.status} ({_detail(body)})")
        return body

    def _read(self, response: Any, connection: Any, end: float) -> bytes:
        """The body, within the limits of time and size."""
        pieces, size = [], 0
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"not done within {self._timeout:g} s")
            if connection.sock is not None:
                connection.sock.settimeout(left)
            piece = response.read1(PIECE)
            size += len(piece)
            self.down += len(piece)
            if not piece:
                return b"".join(pieces)
            if size > MOST_BYTES:
                raise ValueError(f"`answer` must have at most {MOST_BYTES} bytes, got more")
            pieces.append(piece)


def _detail(body: bytes) -> str:
    """What an error of ours says."""
    try:
        return told(json.loads(body[:PIECE])["detail"], 120)
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{len(body)} bytes"


def as_uplink(given: Any) -> Uplink:
    """An uplink, from what a caller of :class:`Device` may pass.

    Raises:
        TypeError: When it is none of these.
    """
    if isinstance(given, Uplink):
        return given
    if isinstance(given, str):
        return HttpUplink(given)
    exchange: Any = getattr(given, "exchange", None)  # a cloud
    if callable(exchange):
        return CallUplink(exchange)
    if isinstance(address := getattr(given, "address", None), str):  # one that serves
        return HttpUplink(address)
    if callable(given):
        return CallUplink(given)
    raise TypeError(
        f"`uplink` must be an address, a Cloud, an Uplink or a function of bytes, got "
        f"{type(given).__name__}: pass what cloud.serve() gave, or the cloud itself."
    )
