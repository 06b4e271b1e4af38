"""``tta serve MODEL``: predictions of many streams over HTTP, each adapting by itself."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from tta.cli.common import (
    add_folder,
    add_method,
    add_model,
    open_from,
    source_from,
    whole,
    wrap_from,
)
from tta.core.checks import is_final, path_like, told

if TYPE_CHECKING:
    from tta.runtime.model_strings import OpenedModel
    from tta.runtime.pool import StreamPool
    from tta.runtime.server import Limits

__all__ = ["add_arguments", "application_from", "build", "pool_from", "run"]

TOKEN = "TTA_TOKEN"  # environment variable; a flag would show it to every user of the machine
LONGEST_FILE = 1 << 16  # bytes that are read of one that is to hold a token
MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_model(parser)
    add_method(parser)
    add_folder(parser, "in memory alone")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address (default: this machine alone)")
    server.add_argument("--port", type=whole(0, 65535), default=8000, help="0 for any (8000)")
    server.add_argument(
        "--token-file",
        metavar="FILE",
        help=f"holds the token that requests must bear (default: the variable {TOKEN}, or none)",
    )
    server.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name, besides localhost and addresses, under which to ask without a token; "
        "may be repeated; * for any",
    )
    server.add_argument(
        "--max-wait", type=float, default=0.01, metavar="S",
        help="seconds that an image waits for others to join its batch (0.01)",
    )  # fmt: skip
    server.add_argument(
        "--one-by-one", action="store_true",
        help="run the model for each stream by itself, for results that are bit for bit its own",
    )  # fmt: skip
    server.add_argument(
        "--workers", type=whole(1, 256), default=2, metavar="N", help="threads that decode (2)"
    )
    server.add_argument(
        "--frames", type=whole(0, 100), default=4, metavar="N",
        help="small pictures of its last images that are kept of each stream; 0 for none (4)",
    )  # fmt: skip
    server.add_argument(
        "--grace", type=whole(0, 3600), default=30, metavar="S",
        help="seconds for what is being answered when the server is told to stop (30)",
    )  # fmt: skip
    server.add_argument("--log", choices=("text", "json"), default="text", help="form of the log")
    server.add_argument(
        "--log-level", choices=("debug", "info", "warning"), default="info",
        help="debug has a line for each request (info)",
    )  # fmt: skip
    pool = parser.add_argument_group("streams")
    pool.add_argument(
        "--capacity", type=whole(1), default=1000, metavar="N",
        help="streams in memory; others are in --folder (1000)",
    )  # fmt: skip
    pool.add_argument(
        "--interval", type=float, default=10.0, metavar="S",
        help="seconds of learning that a killed server loses at most (10)",
    )  # fmt: skip
    pool.add_argument(
        "--shared", action="store_true",
        help="other servers have the same --folder; a stream is one server's at a time",
    )  # fmt: skip
    ray = parser.add_argument_group("replicas, by Ray Serve")
    ray.add_argument(
        "--ray", type=whole(1, 10_000), metavar="N",
        help="serve by N processes that share --folder; one that dies leaves its streams to others",
    )  # fmt: skip
    ray.add_argument(
        "--ray-address", metavar="ADDRESS",
        help="of a Ray cluster, or auto (default: Ray is started on this machine)",
    )  # fmt: skip
    ray.add_argument(
        "--ray-gpus", type=float, default=0.0, metavar="N",
        help="GPUs of each replica, or a share of one (0)",
    )  # fmt: skip
    limits = parser.add_argument_group("limits, beyond which requests are refused")
    limits.add_argument(
        "--max-body", type=whole(1, 4096), default=16, metavar="MIB", help="of a request (16)"
    )
    limits.add_argument(
        "--max-pixels", type=whole(1), default=25_000_000, metavar="N",
        help="of a picture (25 million)",
    )  # fmt: skip
    limits.add_argument(
        "--max-streams", type=whole(1), default=1000, metavar="N", help="in all (1000)"
    )
    limits.add_argument(
        "--max-queue", type=whole(1), default=256, metavar="N", help="images that wait (256)"
    )
    limits.add_argument(
        "--rate", type=float, metavar="N", help="images a second of one stream (default: any)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from tta.runtime.extras import needed
    from tta.runtime.server.logs import logging_to_stderr

    for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "PIL"):
        needed(package, "serve")  # before a large model is loaded
    from tta.runtime.server import run as serve

    door = _door(args)
    with logging_to_stderr(args.log, args.log_level):
        if args.ray is not None:
            _serve_on_ray(args, door)
        else:
            app = application_from(args, **door)
            serve(app, args.host, args.port, grace=args.grace, on_ready=_say)
    return 0


def application_from(args: argparse.Namespace, **door: Any) -> Any:
    """The server's application.

    Args:
        args: What was parsed.
        **door: Its token and hosts.
    """
    from tta.runtime.server import application

    limits = _limits(args)  # what is refused, is so before a large model is loaded
    opened = open_from(args)
    pool = pool_from(args, opened)
    pool.batched = not args.one_by_one
    return application(
        pool,
        opened.transform,
        opened.class_names,
        batch_size=args.batch_size,
        max_wait=args.max_wait,
        workers=args.workers,
        limits=limits,
        thumbnails=args.frames,
        **door,
    )


def build(arguments: Mapping[str, str]) -> Any:
    """What ``serve run tta.cli.serve:build model=timm:resnet50 folder=/shared replicas=2`` runs.

    Args:
        arguments: The model, and flags by their names, without dashes; ``ray`` or ``replicas``
            says how many. Switches are "true" or "false".

    Returns:
        A ``ray.serve.Application``.

    Raises:
        ValueError: For a flag that is none, or without a model or a folder.
    """
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    parser.add_argument("--import", dest="imports", action="append", default=[])
    given = {key.replace("_", "-"): str(value) for key, value in arguments.items()}
    given["ray"] = given.pop("replicas", given.get("ray", "2"))
    words = [given.pop("model", "")]
    for key, value in given.items():
        if value.lower() in ("true", "false"):
            words += [f"--{key}"] * (value.lower() == "true")
        else:
            words += [f"--{key}={value}"]
    try:
        args, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(f"`arguments` must be those of tta serve, got {told(error)}.") from error
    if unknown or not args.model:
        what = f"also {told(unknown[0], 60)}" if unknown else "no model"
        raise ValueError(
            f"`arguments` must be model= and flags of tta serve, got {what}: see tta serve --help."
        )
    return _ray_application(args, _door(args))


def _ray_application(args: argparse.Namespace, door: dict[str, Any]) -> Any:
    from tta.runtime.ray import application

    if args.folder is None:
        raise ValueError(
            "`folder` must be there with --ray, as replicas hand streams over by it: pass --folder "
            "with one that all machines reach."
        )
    args.shared, args.folder = True, os.path.abspath(args.folder)
    return application(
        partial(_in_replica, args), replicas=args.ray, limits=_limits(args), gpus=args.ray_gpus,
        grace=args.grace, **door,
    )  # fmt: skip


def _in_replica(args: argparse.Namespace) -> Any:
    from tta.core.plugins import import_modules

    import_modules(args.imports)
    return application_from(args, hosts=None)  # the front has looked at these


def _serve_on_ray(args: argparse.Namespace, door: dict[str, Any]) -> None:
    from tta.runtime.ray import run as serve

    app = _ray_application(args, door)
    serve(app, args.host, args.port, address=args.ray_address, on_ready=_say)


def _limits(args: argparse.Namespace) -> Limits:
    from tta.runtime.server import Limits

    return Limits(
        body=args.max_body * MIB,
        waiting_bytes=max(256, 2 * args.max_body) * MIB,
        pixels=args.max_pixels,
        streams=args.max_streams,
        queue=args.max_queue,
        rate=args.rate,
    )


def pool_from(args: argparse.Namespace, opened: OpenedModel) -> StreamPool:
    """A pool over a model, which goes on with the streams in ``--folder``, if there are any.

    Raises:
        ValueError: When these are of another method.
    """
    from tta.runtime.opening import open_or_make
    from tta.runtime.pool import StreamPool

    more: dict[str, Any] = {"capacity": args.capacity, "interval": args.interval}
    more["shared"] = args.shared
    adapter = wrap_from(args, opened, health=True)
    if args.folder is None:
        return StreamPool(adapter, **more)
    return open_or_make(adapter, args.folder, source=source_from(args, opened), **more)


def _door(args: argparse.Namespace) -> dict[str, Any]:
    """Who is let in: the token, and the names that the server is called by."""
    hosts = None if "*" in args.allow_host else args.allow_host
    return {"token": _token(args.token_file), "hosts": hosts}


def _token(path: str | None) -> str | None:
    """The token that requests must bear, if one was set."""
    if path is None:
        return os.environ.get(TOKEN) or None
    try:
        with path_like("token-file", path).open("rb") as file:  # which may be a device, or no text
            token = file.read(LONGEST_FILE).decode("utf-8", "replace").strip()
    except OSError as error:
        if is_final(error):
            raise
        raise type(error)(
            f"`token-file` must be a file that can be read, but {told(path)} is not "
            f"({told(error.strerror or error)}): check the path."
        ) from error
    if not token:
        raise ValueError(f"`token-file` must hold a token, but {told(path)} is empty: write one.")
    return token


def _say(address: str) -> None:
    print(f"serving on {address}", flush=True)
