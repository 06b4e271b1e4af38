"""What stands in front of the replicas: finds whose a request is, hands it on, merges."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from typing import Any

from tta.core.checks import shown
from tta.runtime.extras import needed
from tta.runtime.ray.replica import Answer, Asked
from tta.runtime.server.events import Events
from tta.runtime.server.gate import Gate, Load
from tta.runtime.server.limits import Limits, RefusedError, with_others
from tta.runtime.server.page import PAGE, POLICY
from tta.runtime.server.routes import after_of, name_of, parts_of

__all__ = ["Front", "merged_metrics", "newest"]

PATIENCE_S = 20.0  # for a stream that is being handed over from one replica to another
RETRY_S = 0.1
ALL_S = 30.0  # for what all replicas are asked
POLL_S = 1.0  # between two looks for events, while somebody follows them
MULTIPART = "multipart/form-data"


class Front:
    """The application that Ray Serve has at its door.

    Args:
        streams: A handle of the deployment of :class:`Replica`.
        limits: Of requests.
        token: That they must bear.
        hosts: Under which they may come.
    """

    def __init__(
        self, streams: Any, limits: Limits, token: str | None, hosts: Collection[str] | None
    ) -> None:
        self.streams, self.limits = streams, limits
        self.token, self.hosts = token, hosts
        self.name = secrets.token_hex(8)
        self.events = Events(limits.listeners)

    def application(self) -> Any:
        """What Ray Serve runs, as ASGI."""
        starlette = needed("starlette.applications", "ray")
        route = needed("starlette.routing", "ray").Route

        @asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[None]:
            following = asyncio.ensure_future(self._follow())
            yield
            self.events.close()
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following

        any_method = ["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"]
        gate = needed("starlette.middleware", "ray").Middleware(
            Gate, limits=self.limits, token=self.token,
            hosts=None if self.token is not None else self.hosts,
            stopping=lambda: False, count=lambda route, status: None, load=Load(),
        )  # fmt: skip
        return starlette.Starlette(
            routes=[
                route("/v1/predict", self.predict, methods=["POST"]),
                route("/v1/streams", self.list_streams, methods=["GET"]),
                route("/v1/streams", self.create_named, methods=["POST"]),
                route("/v1/streams/{name}", self.of_stream, methods=any_method),
                route("/v1/streams/{name}/{action}", self.of_stream, methods=any_method),
                route("/v1/events", self.follow, methods=["GET"]),
                route("/metrics", self.metrics, methods=["GET"]),
                route("/healthz", self.alive, methods=["GET"]),
                route("/readyz", self.ready, methods=["GET"]),
                route("/", self.page, methods=["GET"]),
                route("/{path:path}", self.anybody, methods=any_method),
            ],
            middleware=[gate],
            lifespan=lifespan,
        )

    # Of one stream ---------------------------------------------------------------------------

    async def predict(self, request: Any) -> Any:
        """Hand one image, or those of each stream, to the replica that has the stream."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != MULTIPART:
            return _told(await self._ask(request.query_params.get("stream", ""), request))
        parts = await parts_of(request, self.limits.images)
        rows: dict[str, list[int]] = {}
        for row, (name, _) in enumerate(parts):
            rows.setdefault(name, []).append(row)
        answers = await asyncio.gather(
            *(self._ask(name, request, [parts[row] for row in rows[name]]) for name in rows),
            return_exceptions=True,
        )
        found: list[Any] = [None] * len(parts)
        bad: list[tuple[str, Answer | BaseException]] = []
        for name, answer in zip(rows, answers, strict=True):
            if isinstance(answer, Answer) and answer.status == 200:
                for row, one in zip(rows[name], answer.json(), strict=True):
                    found[row] = one
            else:
                bad.append((name, answer))
        if not bad:
            return _json(found)
        for _, answer in bad:
            if not isinstance(answer, (Answer, RefusedError)) and isinstance(answer, BaseException):
                raise answer
        name, answer = bad[0]
        refusal = answer if isinstance(answer, RefusedError) else _refusal(answer)
        if len(rows) > 1:
            words = f"stream {shown(name, 40)}: {refusal.detail}"
            refusal.detail = with_others(words, len(rows) - len(bad), "streams")
        raise refusal

    async def create_named(self, request: Any) -> Any:
        """Create the stream that the body names."""
        name = await name_of(request)
        return _told(await self._ask(name, request))

    async def of_stream(self, request: Any) -> Any:
        """Hand on what is about a stream that the path names."""
        return _told(await self._ask(request.path_params["name"], request))

    async def anybody(self, request: Any) -> Any:
        """Let any replica answer."""
        return _told(await self._ask("", request))

    async def _ask(
        self, stream: str, request: Any, parts: list[tuple[str, bytes]] | None = None
    ) -> Answer:
        """Ask the replica that a stream belongs to, until it has the stream.

        Raises:
            RefusedError: 503 when the replica dies meanwhile.
        """
        asked = Asked(
            method=request.method,
            path=_path(request),
            query=request.scope["query_string"],
            kind=request.headers.get("content-type", "").encode("latin-1"),
            body=b"" if parts is not None else await request.body(),
            parts=parts,
        )
        handle = self.streams.options(session_id=stream) if stream else self.streams
        end = time.monotonic() + PATIENCE_S
        while True:
            answer = await _call(handle, asked)
            # Another replica hands the stream over, now that it was asked to.
            if not answer.retry or time.monotonic() > end:
                return answer
            await asyncio.sleep(RETRY_S)

    # Of all replicas -------------------------------------------------------------------------

    async def list_streams(self, request: Any) -> Any:
        """The streams of all replicas; of each, what the one knows that served it last."""
        answers = await self._ask_all(request)
        return _json({"streams": newest(a.json()["streams"] for a in answers if a.status == 200)})

    async def metrics(self, request: Any) -> Any:
        """The figures of all replicas, with their names as a label."""
        answers = await self._ask_all(request)
        text = merged_metrics({a.replica: a.body.decode() for a in answers if a.status == 200})
        kind = needed("prometheus_client", "ray").CONTENT_TYPE_LATEST
        return needed("starlette.responses", "ray").Response(text, media_type=kind)

    async def alive(self, request: Any) -> Any:
        """That the front answers."""
        return _json({"status": "ok"})

    async def ready(self, request: Any) -> Any:
        """Whether a replica takes images."""
        answers = await self._ask_all(request)
        ready = sum(a.status == 200 for a in answers)
        return _json({"status": "ok" if ready else "stopping", "replicas": ready},
                     200 if ready else 503)  # fmt: skip

    async def follow(self, request: Any) -> Any:
        """Events of all replicas, with numbers of their own."""
        listener = self.events.enter(after_of(request))
        responses = needed("starlette.responses", "ray")
        text = self.events.listen(listener)
        return responses.StreamingResponse(text, media_type="text/event-stream")

    async def page(self, request: Any) -> Any:
        """The page, which asks for the rest."""
        responses = needed("starlette.responses", "ray")
        return responses.HTMLResponse(PAGE, headers={"content-security-policy": POLICY})

    async def _ask_all(self, request: Any) -> list[Answer]:
        asked = Asked(method="GET", path=_path(request))
        return await self._from_all("ask", asked)

    async def _from_all(self, method: str, *arguments: Any) -> list[Any]:
        """What replicas say that are there to say something.

        Raises:
            RefusedError: 503 where none is.
        """
        call = self.streams.broadcast(method, *arguments)
        found = await _unless_dead(call.results_async(timeout_s=ALL_S, return_exceptions=True))
        there = [one for one in found if not isinstance(one, BaseException)]
        if not there:
            raise _dead()
        return there

    async def _follow(self) -> None:
        """Gather events while somebody listens."""
        while True:
            await asyncio.sleep(POLL_S)
            if not self.events.listening:
                continue
            with suppress(RefusedError):  # no replica is there; one will be
                for events in await self._from_all("events", self.name):
                    for kind, data in events:
                        self.events.publish(kind, data, keep=kind != "health")


def newest(lists: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One summary of each stream: that of the replica which served it last."""
    found: dict[str, dict[str, Any]] = {}
    for one in (one for each in lists for one in each):
        known = found.setdefault(one["stream"], one)
        if (one["seen_at"] or 0) > (known["seen_at"] or 0):
            found[one["stream"]] = one
    return [found[name] for name in sorted(found)]


def merged_metrics(texts: dict[str, str]) -> bytes:
    """Figures of several servers as one text, with the label ``replica``."""
    client = needed("prometheus_client", "ray")
    parse = needed("prometheus_client.parser", "ray").text_string_to_metric_families
    families: dict[str, Any] = {}
    for replica, text in texts.items():
        for family in parse(text):
            kept = families.setdefault(family.name, family)
            samples = [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
            kept.samples = samples if kept is family else kept.samples + samples

    class All:
        def collect(self) -> Any:
            return families.values()

    return client.generate_latest(All())


async def _call(handle: Any, asked: Asked) -> Answer:
    """Let a replica answer; a call that nobody waits for any more is taken back."""
    # All calls that Ray Serve sees within one request have its number, by which the router tells
    # them apart: of several that wait at a time, it would serve one, and by another's replica.
    response = Context().run(handle.ask.remote, asked)
    try:
        return await _unless_dead(response)
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _unless_dead(waiting: Any) -> Any:
    """What a call of Ray's gives, or a refusal where nobody is there to answer it."""
    exceptions = needed("ray.exceptions", "ray")
    dead = (exceptions.RayError, needed("ray.serve.exceptions", "ray").RayServeException)
    try:
        return await waiting
    except (*dead, TimeoutError) as error:
        raise _dead() from error


def _path(request: Any) -> str:
    """The path below the application's prefix."""
    return request.scope["path"].removeprefix(request.scope.get("root_path", ""))


def _dead() -> RefusedError:
    return RefusedError(
        503,
        "the replica of this stream has died, or none is there yet: send it again; the stream goes "
        "on from its last snapshot.",
        1.0,
    )


def _refusal(answer: Any) -> RefusedError:
    """What a replica refused, to be said by the front."""
    after = dict(answer.headers).get(b"retry-after")
    return RefusedError(
        answer.status, answer.json()["detail"], None if after is None else float(after)
    )


def _told(answer: Answer) -> Any:
    """A replica's answer, with its name."""
    response = needed("starlette.responses", "ray").Response(answer.body, answer.status)
    response.raw_headers = [*answer.headers, (b"x-replica", answer.replica.encode())]
    return response


def _json(value: Any, status: int = 200) -> Any:
    return needed("starlette.responses", "ray").Response(
        json.dumps(value), status, media_type="application/json"
    )
