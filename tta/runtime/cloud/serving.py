"""A cloud side behind HTTP.

Annotations of the functions below are read when they are defined, as FastAPI is imported in the
function around them, so this module has no postponed ones.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from tta.runtime.cloud.uplink import KIND, UPLOADS
from tta.runtime.cloud.wire import MessageError
from tta.runtime.extras import needed
from tta.runtime.server.gate import Gate, Load
from tta.runtime.server.limits import Limits, RefusedError, check_access
from tta.runtime.server.running import run
from tta.version import __version__

__all__ = ["Serving", "application"]

log = logging.getLogger("tta.runtime.cloud")
STARTING_S = 60.0


class _Service:
    """What :func:`tta.runtime.server.run` asks of an application."""

    stopping = False

    def stop(self) -> None:
        self.stopping = True

    def close(self) -> None:
        self.stopping = True


class Serving:
    """A cloud side that is served by a thread; made by ``cloud.serve()``.

    Args:
        cloud: Answers.
        host: The address.
        port: 0 for any that is free.
        token: As for :meth:`Cloud.serve`.
        hosts: Likewise.
        limits: Likewise.
    """

    def __init__(
        self,
        cloud: Any,
        host: str,
        port: int,
        *,
        token: str | None,
        hosts: Collection[str] | None,
        limits: Limits | None,
    ) -> None:
        self.address = ""
        self._app = application(cloud, limits=limits, token=token, hosts=hosts)
        self._failed: BaseException | None = None
        began = threading.Event()

        def say(address: str) -> None:
            self.address = address
            began.set()

        def go() -> None:
            try:
                run(self._app, host, port, grace=5, on_ready=say)
            except BaseException as error:
                self._failed = error
            finally:
                began.set()

        self._thread = threading.Thread(target=go, daemon=True, name="tta-cloud")
        self._thread.start()
        began.wait(STARTING_S)
        if self._failed is not None:
            raise self._failed
        if not self.address:
            raise TimeoutError(
                f"`port` must be served within {STARTING_S:g} s, but {host}:{port} is not yet: try "
                "again when the machine is less busy."
            )

    def wait(self, timeout: float | None = None) -> None:
        """Return when it has ended, or after so many seconds."""
        self._thread.join(timeout)

    def close(self) -> None:
        """Finish what is being answered, and end."""
        server = getattr(self._app.state, "server", None)
        if server is not None:
            server.should_exit = True
        self._thread.join(STARTING_S)

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def application(
    cloud: Any,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Collection[str] | None = (),
) -> Any:
    """Make the application of a cloud side, for uvicorn or any other ASGI server.

    ``POST /v1/uploads`` takes an upload and gives a downlink, or 204 where the device has the last
    one; ``GET /v1/cloud`` has counts, bytes and the figures of the last update as JSON;
    ``GET /healthz`` says that it lives.

    Args:
        cloud: Answers.
        limits: What is refused.
        token: That requests must bear; None for none.
        hosts: Names under which it may be asked without a token; None for any.

    Raises:
        ImportError: When the extra ``[serve]`` is not installed.
        ValueError: When the token cannot be one.
    """
    fastapi = needed("fastapi", "serve")
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response

    limits, service = check_access(token, hosts, limits), _Service()
    # Updates take turns; others wait here, and not in the loop that receives.
    threads = ThreadPoolExecutor(4, thread_name_prefix="tta-cloud-answer")

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        threads.shutdown(wait=False)

    app = fastapi.FastAPI(
        title="tta cloud", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = service
    app.add_middleware(
        Gate, limits=limits, token=token, hosts=None if token is not None else hosts,
        stopping=lambda: service.stopping, count=lambda route, status: None, load=Load(),
    )  # fmt: skip

    def answer(body: bytes) -> bytes:
        try:
            return cloud.exchange(body)
        except MessageError as error:
            raise RefusedError(422, str(error)) from None

    @app.post(UPLOADS)
    async def upload(request: Request) -> Response:
        body = await request.body()
        found = await asyncio.get_running_loop().run_in_executor(threads, answer, body)
        return Response(found, media_type=KIND) if found else Response(status_code=204)

    @app.get("/v1/cloud")
    async def figures() -> Response:
        report = {name: float(value) for name, value in cloud.report.items()}
        told = {"counts": cloud.counts, "bytes": cloud.bytes._asdict(), "report": report}
        return JSONResponse(told)

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    return app
