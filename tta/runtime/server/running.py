"""Runs the application by uvicorn until a signal: stop taking, finish, write, end."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from tta.core.checks import shown, string, told, whole_number
from tta.runtime.extras import needed
from tta.runtime.server.gate import is_loopback

__all__ = ["GRACE", "bound", "run"]

log = logging.getLogger("tta.runtime.server")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 30  # seconds for requests that are being answered
CONNECTIONS = 2000
LARGEST_PORT = 65535


def run(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    grace: int = GRACE,
    on_ready: Callable[[str], Any] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then close the pool.

    Args:
        app: What :func:`application` made.
        host: The address; by default this machine alone can reach it.
        port: 0 for any that is free.
        grace: Seconds for the requests that are being answered when a signal comes.
        on_ready: Is told the address once requests are taken.

    Raises:
        ImportError: When the extra is not installed.
        TypeError: When an argument is of the wrong kind.
        OSError: When the address is taken, or a stream could not be written in the end.
    """
    uvicorn = needed("uvicorn", "serve")
    service = getattr(getattr(app, "state", None), "service", None)
    if service is None:
        raise TypeError(
            f"`app` must be what application() made, got {shown(app)}: pass "
            "tta.runtime.server.application(pool)."
        )
    if on_ready is not None and not callable(on_ready):
        raise TypeError(f"`on_ready` must be a function, got {shown(on_ready)}: pass one.")
    grace = whole_number("grace", grace, 0)
    _check_place(host, port)
    try:
        opened = bound(host, port)
        address = _address(opened)
        if not is_loopback(host):
            log.warning(
                "%s can be reached from other machines: use a token, and TLS in front", host
            )

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: Any) -> None:
                service.stopping = True  # the loop ends what listens; a signal must not wait
                super().handle_exit(sig, frame)

            async def main_loop(self) -> None:
                if on_ready is not None:
                    on_ready(address)
                await super().main_loop()
                service.stop()

        config = uvicorn.Config(
            app, lifespan="on", log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=grace, limit_concurrency=CONNECTIONS, ws="none",
        )  # fmt: skip
        server = app.state.server = Server(config)  # whose `should_exit` ends it from a thread
        with opened, _quiet_signals():
            server.run(sockets=[opened])
    finally:
        service.close()  # where the server has not come to it


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine.

    Raises:
        OSError: When it is taken, or no such address.
    """
    _check_place(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
    except (OSError, OverflowError) as error:
        opened.close()
        raise OSError(
            f"`port` must be free at an address of this machine, but {host}:{port} is not "
            f"({told(getattr(error, 'strerror', None) or error)}): pass another, or 0 for any."
        ) from error
    return opened


def _check_place(host: Any, port: Any) -> None:
    if not string("host", host):  # which would be all addresses of the machine
        raise ValueError("`host` must be a name or an address, got an empty one: leave it out.")
    whole_number("port", port, 0, LARGEST_PORT)


def _address(bound: socket.socket) -> str:
    host, port = map(str, bound.getsockname()[:2])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _quiet_signals() -> Any:
    """Let uvicorn, which sends itself the signal again in the end, not die of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
