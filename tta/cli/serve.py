"""``tta serve MODEL``: predictions of many streams over HTTP, each adapting by itself."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tta.cli.common import add_method, add_model, open_from, source_from, whole, wrap_from
from tta.core.checks import told

if TYPE_CHECKING:
    from tta.runtime.model_strings import OpenedModel
    from tta.runtime.pool import StreamPool

__all__ = ["add_arguments", "pool_from", "run"]

TOKEN = "TTA_TOKEN"  # environment variable; a flag would show it to every user of the machine
MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_model(parser)
    add_method(parser)
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
    from tta.runtime.server import Limits, application
    from tta.runtime.server import run as serve

    limits = Limits(
        body=args.max_body * MIB,
        waiting_bytes=max(256, 2 * args.max_body) * MIB,
        pixels=args.max_pixels,
        streams=args.max_streams,
        queue=args.max_queue,
        rate=args.rate,
    )
    token = _token(args.token_file)
    with logging_to_stderr(args.log, args.log_level):
        opened = open_from(args)
        pool = pool_from(args, opened)
        pool.batched = not args.one_by_one
        app = application(
            pool,
            opened.transform,
            opened.class_names,
            batch_size=args.batch_size,
            max_wait=args.max_wait,
            workers=args.workers,
            limits=limits,
            token=token,
            hosts=None if "*" in args.allow_host else args.allow_host,
            thumbnails=args.frames,
        )
        serve(app, args.host, args.port, grace=args.grace, on_ready=_say)
    return 0


def pool_from(args: argparse.Namespace, opened: OpenedModel) -> StreamPool:
    """A pool over a model, which goes on with the streams in ``--folder``, if there are any.

    Raises:
        ValueError: When these are of another method.
    """
    from tta.runtime.pool import StreamPool

    more: dict[str, Any] = {"capacity": args.capacity, "interval": args.interval}
    adapter = wrap_from(args, opened, health=True)
    if args.folder is None or not (Path(args.folder) / "config.json").is_file():
        return StreamPool(adapter, folder=args.folder, **more)
    wanted, model = adapter.config, adapter.unwrap()
    pool = StreamPool.open(model, args.folder, source=source_from(args, opened), **more)
    if pool.adapter.config != wanted:
        found = pool.adapter.config.label
        pool.close(save=False)
        raise ValueError(
            f"`folder` must hold streams of {told(wanted.label, 60)} with these settings, but "
            f"{told(args.folder, 60)} has some of {told(found, 60)}: start with the flags of then, "
            "or choose another folder."
        )
    return pool


def _token(path: str | None) -> str | None:
    """The token that requests must bear, if one was set."""
    token = os.environ.get(TOKEN, "") if path is None else Path(path).read_text().strip()
    if path is not None and not token:
        raise ValueError(f"`token-file` must hold a token, but {told(path)} is empty: write one.")
    return token or None


def _say(address: str) -> None:
    print(f"serving on {address}", flush=True)
