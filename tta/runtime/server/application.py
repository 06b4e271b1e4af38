"""The application: a pool of streams behind HTTP."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import torch
from torch import Tensor

from tta.core.checks import is_iterable, shown, told, whole_number
from tta.runtime.extras import needed
from tta.runtime.pool import StreamPool
from tta.runtime.server.decoding import Decoder
from tta.runtime.server.gate import Gate
from tta.runtime.server.limits import Limits, RefusedError, check_access
from tta.runtime.server.openapi import DESCRIPTION
from tta.runtime.server.service import Service
from tta.version import __version__

__all__ = ["application"]

log = logging.getLogger("tta.runtime.server")


def application(
    pool: StreamPool,
    transform: Callable[[Any], Tensor] | None = None,
    class_names: Sequence[str] | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    batch_size: int = 8,
    max_wait: float = 0.01,
    workers: int = 2,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Collection[str] | None = (),
    thumbnails: int = 4,
) -> Any:
    """Make the application, to be run by uvicorn or any other ASGI server.

    It has the pool from now on, and closes it when the server ends. All routes and their answers
    are in its schema, ``/openapi.json``, and in docs/server.md.

    Args:
        pool: The streams.
        transform: From a picture of Pillow in RGB to what the model takes, without a batch axis.
            None takes tensors alone.
        class_names: In the order of labels; None calls classes by their numbers.
        shape: Of one image as the model takes it, such as (3, 224, 224); others are refused. None
            lets the model decide.
        batch_size: Images of one stream in a batch, at most.
        max_wait: Seconds that an image waits for others, once the model is free.
        workers: Threads that decode pictures.
        limits: What is refused; None for the defaults of :class:`Limits`.
        token: That requests must bear as ``Authorization: Bearer``; None for none.
        hosts: Names in ``Host`` under which the server may be asked, besides localhost and
            addresses. Without a token this keeps pages on other sites from reaching a server on a
            loopback address through their visitors' browsers. None for any.
        thumbnails: Small pictures of its last images that are kept of each stream, for the page.

    Returns:
        A ``fastapi.FastAPI``; its ``state.service`` is what is behind it.

    Raises:
        ImportError: When the extra is not installed: ``pip install "tta-vision[serve]"``.
        TypeError: When an argument is of the wrong kind.
        ValueError: When it is out of its range, or names and classes differ in number.
    """
    fastapi = needed("fastapi", "serve")
    needed("python_multipart", "serve")
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    from tta.runtime.server.routes import add_routes

    if not isinstance(pool, StreamPool):
        raise TypeError(
            f"`pool` must be a StreamPool, got {type(pool).__name__}: pass "
            "tta.runtime.StreamPool(adapter)."
        )
    limits = check_access(token, hosts, limits)
    if transform is not None and not callable(transform):
        raise TypeError(f"`transform` must be a function, got {shown(transform)}: pass one.")
    names, shape = _names(class_names), _shape(shape)
    threads = ThreadPoolExecutor(whole_number("workers", workers, 1, 256), "tta-server-decode")
    # What waits for the model is apart from what decodes, so that neither holds the other up.
    waiters = ThreadPoolExecutor(8, "tta-server-wait")
    decoder = Decoder(transform, shape, _dtype(pool), limits)
    service = Service(pool, names, limits, batch_size, max_wait, thumbnails)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        try:
            yield
        finally:
            threads.shutdown(wait=False)
            try:
                service.close()
            except OSError as error:
                log.error("%s", error)
            finally:
                waiters.shutdown(wait=False)  # last: closing the service answers who waits

    app = fastapi.FastAPI(
        title="tta serve", version=__version__, description=DESCRIPTION, lifespan=lifespan,
        docs_url=None, redoc_url=None,  # these load scripts from elsewhere
    )  # fmt: skip
    app.state.service = service

    def count(route: str, status: int) -> None:
        service.metrics.requests.labels(route, str(status)).inc()

    checked = None if token is not None else hosts
    app.add_middleware(
        Gate, limits=limits, token=token, hosts=checked, stopping=lambda: service.stopping,
        count=count, load=service.load,
    )  # fmt: skip

    @app.exception_handler(fastapi.exceptions.RequestValidationError)
    async def say(_: Any, error: Any) -> Any:
        first = error.errors()[0]
        name = first["loc"][-1]
        raise RefusedError(
            422, f"`{told(name, 40)}` must be of another kind: {told(first['msg'], 100)}."
        )

    @app.exception_handler(HTTPException)
    async def say_where(request: Any, error: Any) -> Any:
        asked = {404: "path", 405: "method"}.get(error.status_code, "request")
        got = request.method if asked == "method" else shown(request.url.path, 60)
        words = f"`{asked}` must be one that this server has, got {got}: see /openapi.json."
        return JSONResponse({"detail": words}, error.status_code, error.headers)

    add_routes(app, service, decoder, threads, waiters)
    return app


def _names(given: Any) -> list[str] | None:
    """Names of classes, in the order of labels."""
    if given is None:
        return None
    if isinstance(given, str) or not is_iterable(given):
        raise TypeError(
            f"`class_names` must be a list of names or None, got {shown(given)}: pass a list."
        )
    return list(map(str, given))


def _shape(given: Any) -> tuple[int, ...] | None:
    """The shape of an image."""
    if given is None:
        return None
    if isinstance(given, str) or not is_iterable(given):
        raise TypeError(
            f"`shape` must be that of an image or None, got {shown(given)}: pass a tuple such as "
            "(3, 224, 224)."
        )
    return tuple(whole_number("shape", size, 1) for size in given)


def _dtype(pool: StreamPool) -> torch.dtype:
    """What the model takes: the dtype of its first floating-point parameter."""
    found = (p.dtype for p in pool.adapter.model.parameters() if p.is_floating_point())
    return next(found, torch.float32)
