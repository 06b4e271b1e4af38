"""Logs as JSON, one object a line, for what collects them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

__all__ = ["JsonFormatter", "logging_to_stderr"]

PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Time, level, logger and message, and whatever a record was given by ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        about: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        about |= {key: value for key, value in vars(record).items() if key not in PLAIN}
        if record.exc_info:
            about["exception"] = self.formatException(record.exc_info)
        return json.dumps(about, default=str)


@contextmanager
def logging_to_stderr(style: str, level: str) -> Iterator[None]:
    """Let everything that this process logs within a ``with`` block go to stderr.

    Args:
        style: "text" or "json".
        level: Such as "info"; "debug" has a line for each request.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if style == "json" else text)
    root, ours = logging.getLogger(), logging.getLogger("tta")
    before = root.handlers[:], ours.level
    root.handlers[:] = [handler]
    ours.setLevel(level.upper())
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before[0]
        ours.setLevel(before[1])
