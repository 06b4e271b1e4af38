"""From a server's application to one of Ray Serve, and a run of it until a signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection
from typing import Any

from tta.core.checks import LARGE, number, told, whole_number
from tta.runtime.extras import needed
from tta.runtime.ray.front import Front
from tta.runtime.ray.replica import Replica
from tta.runtime.server.gate import is_loopback
from tta.runtime.server.limits import Limits, check_access
from tta.runtime.server.running import GRACE, bound, log

__all__ = ["application", "run"]

ROUTER = "ray.serve.experimental.consistent_hash_router"
STREAMS = "streams"  # the deployment of replicas, within an application
REQUESTS = 2000  # at a time; what waits for a model is bounded by its server
HEALTH_S = 2.0  # between two looks whether a replica lives
NAME = "tta"


def application(
    make: Callable[[], Any],
    *,
    replicas: int = 2,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Collection[str] | None = (),
    cpus: float = 1.0,
    gpus: float = 0.0,
    grace: float = GRACE,
) -> Any:
    """Make an application of Ray Serve, for ``serve run``, ``serve.run`` or :func:`run`.

    It answers what the server's application answers. A request of several streams becomes one for
    each of them; lists, metrics and events are those of all replicas.

    Args:
        make: Is called in each replica; returns what :func:`tta.runtime.server.application` made,
            with a pool that shares its folder, ``hosts=None`` and no token. Must be picklable, as
            functions of modules are that all machines have.
        replicas: Processes with a model each.
        limits: Of what is refused in front of the replicas; give ``make`` the same ones.
        token: That requests must bear; None for none.
        hosts: Names under which it may be asked, as for the server.
        cpus: Of each replica, as Ray counts them.
        gpus: Of each replica; may be a share of one.
        grace: Seconds in which a replica that is to stop answers and writes its streams.

    Returns:
        A ``ray.serve.Application``.

    Raises:
        ImportError: When the extra is not installed: ``pip install "tta-vision[ray]"``.
        TypeError: When ``make`` is no function.
        ValueError: When a number is out of its range.
    """
    serve = needed("ray.serve", "ray")
    needed(ROUTER, "ray")
    if not callable(make):
        raise TypeError(
            f"`make` must be a function that returns a server's application, got "
            f"{type(make).__name__}: pass one, as in docs/deployment.md."
        )
    limits = check_access(token, hosts, limits)
    wanted = {
        "num_cpus": number("cpus", cpus, 0, LARGE),
        "num_gpus": number("gpus", gpus, 0, LARGE),
    }
    seconds = number("grace", grace, 0, LARGE)
    streams = serve.deployment(
        Replica,
        name=STREAMS,
        num_replicas=whole_number("replicas", replicas, 1, 10_000),
        ray_actor_options=wanted,
        max_ongoing_requests=REQUESTS,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=seconds + 10,
        graceful_shutdown_wait_loop_s=0.1,
        request_router_config={
            "request_router_class": f"{ROUTER}.ConsistentHashRouter",
            # A replica that is busy is waited for: another one has not got the stream.
            "request_router_kwargs": {"num_fallback_replicas": 0},
        },
    )

    def front() -> Any:
        handle = serve.get_deployment_handle(STREAMS, serve.get_replica_context().app_name)
        return Front(handle, limits, token, hosts).application()

    shown = serve.deployment(
        serve.ingress(front)(),
        name="front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=REQUESTS,
    )
    return shown.bind(streams.bind(make))


def run(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    address: str | None = None,
    on_ready: Callable[[str], Any] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; replicas write their streams before this returns.

    Args:
        app: What :func:`application` made.
        host: The address; by default this machine alone can reach it.
        port: Where Ray Serve listens, unless it runs in the cluster already; 0 for any.
        address: Of a Ray cluster, or "auto". None starts Ray on this machine, unless this process
            has done so.
        on_ready: Is told the address once requests are taken.

    Raises:
        ImportError: When the extra is not installed.
        ConnectionError: When there is no cluster at the address.
        OSError: When the address is taken.
        ValueError: When replicas do not start.
    """
    ray, serve = needed("ray", "ray"), needed("ray.serve", "ray")
    stopped = threading.Event()
    before = {}
    ours = not ray.is_initialized()
    if not is_loopback(host):
        log.warning("%s can be reached from other machines: use a token, and TLS in front", host)
    try:
        if ours and address is None:
            with bound(host, port) as free:  # or an error in words
                port = free.getsockname()[1]
        if ours:
            _start(ray, address)
        if threading.current_thread() is threading.main_thread():  # after Ray, which has its own
            for one in (signal.SIGINT, signal.SIGTERM):
                before[one] = signal.signal(one, lambda *_: stopped.set())
        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(app, name=NAME)
        except RuntimeError as error:
            raise ValueError(
                "`app` must be one whose replicas start, but they do not: "
                f"{told(_reason(serve) or error, 200)}"
            ) from error
        if on_ready is not None:
            on_ready(f"http://{host}:{port}")
        while not stopped.wait(1):  # without an end, signals would wait for it on some systems
            pass
    finally:
        if ray.is_initialized():
            try:
                serve.delete(NAME)  # waits for the replicas
                if ours and address is None:
                    serve.shutdown()
            except Exception as error:
                log.error("Ray Serve did not end well (%s)", told(error))
            if ours:
                ray.shutdown()
        for one, handler in before.items():
            signal.signal(one, handler)


def _reason(serve: Any) -> str:
    """The last line that a replica said before it ended."""
    application = serve.status().applications.get(NAME)
    deployments = {} if application is None else application.deployments
    said = deployments[STREAMS].message if STREAMS in deployments else ""
    return ([line.strip() for line in said.splitlines() if line.strip()] or [""])[-1]


def _start(ray: Any, address: str | None) -> None:
    """Start Ray on this machine, or join a cluster; never one that nobody has named."""
    if address is not None:
        ray.init(address=address, log_to_driver=False)
        return
    # Workers find modules where this process does.
    places = os.pathsep.join(dict.fromkeys(filter(None, [os.getcwd(), *sys.path])))
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": places}},
    )
