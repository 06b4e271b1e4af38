"""What every request passes before it reaches a route, and every answer on its way out.

It is plain ASGI, as what wraps requests in tasks of its own would hide that a client has gone.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tta.core.checks import shown
from tta.runtime.server.limits import STOPPING, Limits, RefusedError

__all__ = ["ClientGoneError", "Gate", "Load", "is_loopback"]

log = logging.getLogger("tta.runtime.server")
Message = dict[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Any]

PUBLIC = {"/", "/healthz", "/readyz"}  # without a token; nothing of a stream is in them
WATCHED = {"/healthz", "/readyz", "/metrics"}  # until the very end
LINGER_S, LINGER_BYTES = 2.0, 1 << 28  # of a refused body that are read and thrown away
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
]


@dataclass
class Load:
    """Bytes of the requests that are being served."""

    size: int = 0


class ClientGoneError(Exception):
    """The client closed its connection before its request was whole."""


class Gate:
    """Middleware: token, origin, sizes and times; counts and logs what was answered.

    Args:
        app: What is behind it.
        limits: Of sizes and times.
        token: That requests must bear; None for none.
        hosts: Names under which the server may be asked, besides localhost and addresses; None for
            any.
        stopping: Whether nothing new is taken.
        count: Is told the route and the status of each answer.
        load: Where bytes are counted.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        token: str | None,
        hosts: Collection[str] | None,
        stopping: Callable[[], bool],
        count: Callable[[str, int], None],
        load: Load,
    ) -> None:
        self.app, self.limits, self.hosts = app, limits, hosts
        self.stopping, self.count = stopping, count
        self.token = None if token is None else token.encode()
        self.load = load

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Serve one connection, as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD" and scope["path"] in PUBLIC | WATCHED:
            scope = scope | {"method": "GET"}  # what runs the server leaves out the body
        call = _Call(self, scope, receive, send)
        try:
            self._admit(scope)
            await self.app(scope, call.receive, call.send)
        except RefusedError as refusal:
            await call.refuse(refusal)
        except ClientGoneError:
            call.status = 499  # nobody is there to read an answer
        except Exception as error:
            log.exception("%s %s failed", scope["method"], shown(scope["path"], 100))
            await call.refuse(RefusedError(500, f"the server failed ({type(error).__name__})."))
        finally:
            self.load.size -= call.size
            call.finish()

    def _admit(self, scope: Message) -> None:
        """Refuse who may not ask, before anything of the body is read."""
        if self.stopping() and scope["path"] not in WATCHED:
            raise RefusedError(503, STOPPING, 5.0)
        headers = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, value)
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if self.hosts is not None and not self._is_known(host):
            raise RefusedError(
                403,
                f"`Host` must be a name of this server, got {shown(host, 60)}: ask by its address, "
                "or start it with --allow-host.",
            )
        if origin and origin.partition("://")[2] != host:
            # A page from elsewhere, open in a browser that can reach this server.
            raise RefusedError(
                403,
                f"`Origin` must be this server, got {shown(origin, 60)}: pages of others may not "
                "ask it.",
            )
        if self.token is not None and scope["path"] not in PUBLIC:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.token):
                raise RefusedError(
                    401,
                    "`Authorization` must be 'Bearer' and this server's token, got something else "
                    "or nothing: send the header.",
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit():
            self.check_size(int(length))

    def check_size(self, size: int) -> None:
        """Refuse a body that is too large."""
        if size > self.limits.body:
            raise RefusedError(
                413,
                f"`body` must have at most {self.limits.body} bytes, got more: send a smaller "
                "picture, or fewer at a time.",
            )

    def _is_known(self, host: str) -> bool:
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        # An address is what was typed; a foreign page needs a name that leads here.
        return name.lower() == "localhost" or bool(_address(name)) or name in (self.hosts or ())


class _Call:
    """One request and its answer."""

    def __init__(self, gate: Gate, scope: Message, receive: Any, send: Any) -> None:
        self.gate, self.scope, self._receive, self._send = gate, scope, receive, send
        self.size = 0  # bytes of the body so far
        self.status: int | None = None  # of the answer, once it has begun
        self.begun = time.monotonic()
        self._whole = False  # whether the body has come in

    async def receive(self) -> Message:
        """Receive as the server does, within the limits of size and time."""
        if self._whole:
            return await self._receive()
        left = self.begun + self.gate.limits.receive_s - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except asyncio.TimeoutError:
            raise RefusedError(
                408,
                f"`body` must come in within {self.gate.limits.receive_s:g} s, and has not: send "
                "it faster.",
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        size = len(message.get("body", b""))
        self.size += size
        self.gate.load.size += size
        self.gate.check_size(self.size)
        if self.gate.load.size > self.gate.limits.waiting_bytes:
            raise RefusedError(
                429, "`body` must find room, but the server holds too many: try again later.", 1.0
            )
        self._whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send as the server does, with our headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = [*message.get("headers", ())]
            names = {name.lower() for name, _ in given}
            given += [header for header in HEADERS if header[0] not in names]
            message = {**message, "headers": given}
        await self._send(message)

    async def refuse(self, refusal: RefusedError) -> None:
        """Answer with an error in words, unless the answer has begun."""
        if self.status is not None:
            return
        headers = [(b"content-type", b"application/json")]
        if refusal.retry_after is not None:
            headers.append((b"retry-after", str(max(1, round(refusal.retry_after))).encode()))
        if refusal.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if not self._whole:
            headers.append((b"connection", b"close"))
        body = json.dumps({"detail": refusal.detail}).encode()
        headers.append((b"content-length", str(len(body)).encode()))
        start = {"type": "http.response.start", "status": refusal.status, "headers": headers}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        # A connection that is closed on what the client still sends takes the answer with it.
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._read_off(), LINGER_S)
        await self.send({"type": "http.response.body"})

    async def _read_off(self) -> None:
        size = 0
        while not self._whole and size < LINGER_BYTES:
            message = await self._receive()
            size += len(message.get("body", b""))
            self._whole = message["type"] != "http.request" or not message.get("more_body", False)

    def finish(self) -> None:
        """Count and log it."""
        status, scope = self.status or 499, self.scope
        route = getattr(scope.get("route"), "path", None) or "other"
        self.gate.count(route, status)
        level = logging.WARNING if status in (500, 507) else logging.DEBUG
        seconds = time.monotonic() - self.begun
        if log.isEnabledFor(level):
            log.log(
                level, "%s %s: %d in %.3f s", scope["method"], shown(scope["path"], 100), status,
                seconds, extra={"route": route, "status": status, "seconds": round(seconds, 6)},
            )  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
