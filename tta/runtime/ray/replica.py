"""A replica: the application of a server, which is asked by calls in place of a socket."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tta.core.checks import told
from tta.runtime.extras import needed
from tta.runtime.server.routes import PARTS

__all__ = ["Answer", "Asked", "Replica"]

log = logging.getLogger("tta.runtime.server")
UNHEARD_S = 10.0  # after which nobody is taken to listen any more


@dataclass(kw_only=True)
class Asked:
    """A request, as the front hands it on.

    Args:
        method: Of HTTP.
        path: With its escapes undone.
        query: As it came.
        kind: Of the body, by its header.
        body: The whole of it.
        parts: Streams and bodies of a request that was split; its ``body`` is empty.
    """

    method: str
    path: str
    query: bytes = b""
    kind: bytes = b""
    body: bytes = b""
    parts: list[tuple[str, bytes]] | None = None


@dataclass(kw_only=True)
class Answer:
    """What a replica answers.

    Args:
        status: Of HTTP.
        headers: As ASGI has them.
        body: The whole of it.
        replica: Who answers.
    """

    status: int = 500
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    replica: str = ""

    @property
    def retry(self) -> bool:
        """Whether the stream is another replica's, or somebody else's, for the moment."""
        return self.status == 409 and any(name == b"retry-after" for name, _ in self.headers)

    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


class Replica:
    """What Ray Serve runs in each process.

    Args:
        make: Returns the application.

    Raises:
        ValueError: When its pool does not share its folder.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.name = needed("ray.serve", "ray").get_replica_context().replica_id.unique_id
        self.app = make()
        self.service = self.app.state.service
        if not self.service.pool.shared:
            raise ValueError(
                "`make` must return an application whose pool shares its folder with other "
                "replicas, got one that does not: make the pool with shared=True."
            )
        self._ears: dict[str, tuple[Any, float]] = {}  # with when they were asked last
        self._heard: dict[str, int] = {}  # the last event that each front was told

    async def ask(self, asked: Asked) -> Answer:
        """Answer a request; one that is cancelled is taken back."""
        answer = Answer(replica=self.name)
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if given:
                await asyncio.Event().wait()  # the client's end cancels the call
            given = True
            return {"type": "http.request", "body": asked.body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.headers = message["status"], list(message["headers"])
            else:
                answer.body += message.get("body", b"")

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
            "method": asked.method, "path": asked.path, "raw_path": asked.path.encode(),
            "query_string": asked.query, "root_path": "", "client": None, "server": None,
            "headers": [(b"content-type", asked.kind)] if asked.kind else [], PARTS: asked.parts,
        }  # fmt: skip
        await self.app(scope, receive, send)
        return answer

    async def events(self, front: str) -> list[tuple[str, dict[str, Any]]]:
        """What has happened since this front asked last: kinds and what is told."""
        events, now = self.service.events, time.monotonic()
        for name, (ear, at) in list(self._ears.items()):
            if now > at + UNHEARD_S:
                events.leave(ear)
                del self._ears[name]
        ear = (
            self._ears[front][0] if front in self._ears else events.enter(self._heard.get(front, 0))
        )
        self._ears[front] = ear, now
        found = []
        for text in ear.take():
            fields = dict(line.split(": ", 1) for line in text.strip().split("\n"))
            self._heard[front] = int(fields.get("id", self._heard.get(front, 0)))
            found.append((fields["event"], json.loads(fields["data"])))
        return found

    def check_health(self) -> None:
        """Raise where the thread that has the model is gone, so that Ray replaces this replica."""
        if not self.service.alive:
            raise RuntimeError("the thread that has the model has ended")

    def __del__(self) -> None:
        """End as a server does: finish what waits, and write the streams."""
        service = self.__dict__.get("service")
        if service is not None:
            try:
                service.close()
            except OSError as error:
                log.error("%s", told(error, 300))
