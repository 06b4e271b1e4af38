"""The routes of the server.

Annotations of the functions below are read when they are defined, as FastAPI is imported in the
function around them, so this module has no postponed ones.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from tta.core.checks import shown, told
from tta.runtime.server import openapi
from tta.runtime.server.batching import Item
from tta.runtime.server.decoding import Decoder
from tta.runtime.server.gate import ClientGoneError
from tta.runtime.server.limits import Rate, RefusedError, with_others
from tta.runtime.server.page import PAGE, POLICY
from tta.runtime.server.service import Service

__all__ = ["PARTS", "add_routes", "after_of", "name_of", "parts_of"]

ACTIONS = ("freeze", "unfreeze", "reset", "save")
LONGEST_NUMBER = 18  # digits
PARTS = "tta.parts"  # in a request's scope: what :func:`parts_of` has taken from it elsewhere


def add_routes(
    app: Any,
    service: Service,
    decoder: Decoder,
    workers: ThreadPoolExecutor,
    waiters: ThreadPoolExecutor,
) -> None:
    """Add all routes to an application.

    Args:
        app: Of FastAPI.
        service: Does the work.
        decoder: Of images.
        workers: Threads that decode.
        waiters: Threads that wait for the model.
    """
    from fastapi import Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

    rate = Rate(service.limits.rate)

    async def blocking(function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(waiters, function, *args)

    async def decode(name: str, body: bytes, create: bool, arrived: float) -> Item:
        def work() -> Item:
            image, small = decoder(body, service.wants_thumbnail(name))
            return Item(name, image, create, arrived, small)

        return await asyncio.get_running_loop().run_in_executor(workers, work)

    async def check(names: Sequence[str], create: bool) -> None:
        for name in dict.fromkeys(names):
            await blocking(service.check_stream, name, create)
        if create:
            await blocking(service.check_room, names)  # before the first of them is served
        rate.take({name: names.count(name) for name in names})

    async def answers(request: Request, items: Sequence[Item]) -> list[Any]:
        """Wait for predictions, or why there are none; if the client goes, take back what waits."""
        service.submit(items)
        waiting = asyncio.gather(
            *(asyncio.wrap_future(item.future) for item in items), return_exceptions=True
        )
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ClientGoneError
            return waiting.result()
        finally:
            for task in (waiting, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
            for item in items:
                item.future.cancel()

    @app.post("/v1/predict", **openapi.PREDICT)
    async def predict(
        request: Request,
        stream: str | None = None,
        create: bool = False,
        probabilities: bool = True,
    ) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        several = kind == "multipart/form-data"
        if several:
            parts = await parts_of(request, service.limits.images)
            await check([name for name, _ in parts], create)
        elif stream is None:
            raise RefusedError(
                422,
                "`stream` must say whose image it is, got nothing: add ?stream=ID, or send "
                "multipart with the streams as names of its fields.",
            )
        else:
            await check([stream], create)  # before the body is read
            parts = [(stream, await request.body())]
        arrived = time.monotonic()
        items = []
        for number, (name, body) in enumerate(parts):
            try:
                items.append(await decode(name, body, create, arrived))
            except RefusedError as refusal:
                if several:
                    refusal.detail = f"image {number}: {refusal.detail}"
                raise
        found = await answers(request, items)
        _raise_refused(found, several)
        if not probabilities:
            found = [{k: v for k, v in one.items() if k != "probabilities"} for one in found]
        return JSONResponse(found if several else found[0])

    @app.get("/v1/streams", **openapi.LIST)
    async def list_streams() -> Response:
        return JSONResponse({"streams": await blocking(service.list)})

    @app.post("/v1/streams", **openapi.CREATE)
    async def create_named(request: Request) -> Response:
        return await create_stream(await name_of(request))

    @app.post("/v1/streams/{name}", **openapi.CREATE_BY_ID)
    async def create_stream(name: str) -> Response:
        made = await blocking(service.create, name)
        return JSONResponse({"stream": name, "created": made}, 201 if made else 200)

    @app.get("/v1/streams/{name}", **openapi.HEALTH)
    @app.get("/v1/streams/{name}/health", **openapi.HEALTH)
    async def health(name: str) -> Response:
        return JSONResponse(await blocking(service.health, name))

    @app.get("/v1/streams/{name}/frames", **openapi.FRAMES)
    async def frames(name: str) -> Response:
        return JSONResponse(await blocking(service.frames, name))

    @app.delete("/v1/streams/{name}", **openapi.DROP)
    async def drop(name: str) -> Response:
        await blocking(service.drop, name)
        return JSONResponse({"stream": name, "dropped": True})

    @app.post("/v1/streams/{name}/{action}", **openapi.CONTROL)
    async def control(name: str, action: str) -> Response:
        if action not in ACTIONS:
            raise RefusedError(
                404, f"`action` must be one of {', '.join(ACTIONS)}, got {shown(action, 30)}."
            )
        return JSONResponse(await blocking(service.control, name, action))

    @app.get("/v1/events", **openapi.EVENTS)
    async def events(request: Request) -> Response:
        listener = service.events.enter(after_of(request))
        return StreamingResponse(service.events.listen(listener), media_type="text/event-stream")

    @app.get("/metrics", **openapi.METRICS)
    async def metrics() -> Response:
        body, kind = await blocking(service.metrics.text)
        return Response(body, media_type=kind)

    @app.get("/healthz", **openapi.HEALTHZ)
    async def healthz() -> Response:
        alive = service.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/readyz", **openapi.READYZ)
    async def readyz() -> Response:
        ready = service.ready
        return JSONResponse({"status": "ok" if ready else "stopping"}, 200 if ready else 503)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE, headers={"content-security-policy": POLICY})


def _raise_refused(found: Sequence[Any], several: bool) -> None:
    """Refuse a request of which an image was refused, and say what has become of the others."""
    bad = [number for number, one in enumerate(found) if isinstance(one, BaseException)]
    if not bad:
        return
    first = found[bad[0]]
    if not several or not isinstance(first, RefusedError):
        raise first
    words = first.detail
    if words.startswith("`image"):  # else it is the stream, or the server, that is named
        words = f"image {bad[0]}: {words}"
    if good := len(found) - len(bad):
        words = with_others(words, good, "images")
    raise RefusedError(first.status, words, first.retry_after)


async def name_of(request: Any) -> str:
    """The stream that is to be created, from the body."""
    try:
        name = (await request.json())["stream"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name = None
    if not isinstance(name, str):
        raise RefusedError(
            422, '`body` must be JSON like {"stream": "door"}, got something else: correct it.'
        )
    return name


def after_of(request: Any) -> int | None:
    """The last event that a listener has heard; None for what is new alone."""
    last = request.headers.get("last-event-id", request.query_params.get("after", ""))
    if last and not (last.isascii() and last.isdecimal() and len(last) <= LONGEST_NUMBER):
        raise RefusedError(
            422,
            f"`after` must be the number of an event, got {shown(last, 30)}: pass 0 for all "
            "that are kept.",
        )
    return int(last) if last else None


async def parts_of(request: Any, most: int) -> list[tuple[str, bytes]]:
    """The streams and bodies of a request of several images, in their order."""
    from starlette.exceptions import HTTPException

    if request.scope.get(PARTS) is not None:
        return request.scope[PARTS]
    whole = await request.body()
    try:
        form = await request.form(max_files=most, max_fields=1)
    except HTTPException as error:
        raise RefusedError(
            413 if "many" in str(error.detail) else 422,
            f"`body` must be multipart of at most {most} files whose fields are named by their "
            f"streams, got something else ({told(error.detail)}): correct it.",
        ) from None
    try:
        parts = form.multi_items()
        if not _is_closed(whole, request.headers["content-type"]):
            raise RefusedError(  # or what follows the cut would be missing from the answers
                422,
                "`body` must end with its closing boundary, got one that is cut off: send "
                "it whole.",
            )
        if not parts or any(isinstance(value, str) for _, value in parts):
            raise RefusedError(
                422,
                "`body` must hold files, got none, or a field without a file name: send it as "
                "`curl -F ID=@image.jpg` does.",
            )
        return [(name, await value.read()) for name, value in parts]
    finally:
        await form.close()


def _is_closed(body: bytes, content_type: str) -> bool:
    """Whether a multipart body has its last boundary, which the parser does not ask for."""
    from python_multipart.multipart import parse_options_header

    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    return b"--" + boundary + b"--" in body


async def _until_gone(request: Any) -> None:
    """Wait until the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
