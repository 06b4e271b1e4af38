"""A pool in a folder, whether or not there is one yet."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tta.core.adapter import Adapter
from tta.core.checks import path_like, told
from tta.runtime.owners import making
from tta.runtime.pool import StreamPool

__all__ = ["open_or_make"]


def open_or_make(
    adapter: Adapter,
    folder: str | Path,
    *,
    source: Any = None,
    shared: bool = False,
    **settings: Any,
) -> StreamPool:
    """Go on with the streams in a folder, or begin a pool there if it has none.

    Args:
        adapter: What new streams begin with; its model is wrapped anew where there is a pool.
        folder: As for :class:`StreamPool`.
        source: As for :func:`tta.load`.
        shared: As for the pool; of several processes that come at the same time, one makes it.
        **settings: More arguments of the pool.

    Returns:
        The pool, whose ``adapter`` may be another one than that given.

    Raises:
        ValueError: When the folder's streams are of another method, or have other settings.
        OSError: As for the pool.
    """
    place = path_like("folder", folder)
    with ExitStack() as alone:
        if shared:
            alone.enter_context(making(place))
        if not (place / "config.json").is_file():
            return StreamPool(adapter, folder=place, shared=shared, **settings)
    wanted, model = adapter.config, adapter.unwrap()
    pool = StreamPool.open(model, place, source=source, shared=shared, **settings)
    if pool.adapter.config != wanted:
        found = pool.adapter.config.label
        pool.close(save=False)
        pool.adapter.unwrap()
        raise ValueError(
            f"`folder` must hold streams of {told(wanted.label, 60)} with these settings, but "
            f"{told(place, 60)} has some of {told(found, 60)}: start with the settings of then, "
            "or choose another folder."
        )
    return pool
