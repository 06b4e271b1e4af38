"""One stream of a pool, as its owner sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from tta.core.adapter import Adapter
from tta.core.checks import shown

__all__ = ["StreamView"]

Run = Callable[[Callable[[Adapter], Any], bool], Any]
Result = TypeVar("Result")
# What only looks; anything else that is called may change the stream.
LOOKS = {"state", "reset_point", "constants", "state_dict", "get_extra_state", "parameters"}
LOOKS |= {"named_parameters", "buffers", "named_buffers", "modules", "named_modules"}
NOT_HERE = {"unwrap", "begin", "turns", "to", "cuda", "cpu", "half", "float", "double", "bfloat16"}


class StreamView:
    """A stream, called and read like an adapter of its own; made by ``pool.stream``.

    It has the methods and attributes of :class:`tta.Adapter` but ``unwrap`` and moves to other
    devices and dtypes. A ``with`` block is the stream's owner until it ends; outside of one, every
    call is an owner by itself.

    Args:
        name: The stream's.
        run: Runs a function of the adapter while the adapter holds the stream; also takes whether
            that may change the stream.
        own: Makes a view the owner, which may wait.
        release: Ends the ownership of a view, if it has it.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        own: Callable[[StreamView], None],
        release: Callable[[StreamView], None],
    ) -> None:
        self.name = name
        self._run_in_pool, self._own, self._release = run, own, release
        self._entered = self._left = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Predict a batch of this stream, and learn from it unless frozen; as ``Adapter``."""
        return self._run(lambda adapter: adapter(*args, **kwargs))

    def run(self, action: Callable[[Adapter], Result], changes: bool = True) -> Result:
        """What a function of the adapter does while that holds this stream.

        So ``view.run(lambda adapter: tta.save(adapter, folder), changes=False)`` saves one stream.

        Args:
            action: What to do; it must not keep the adapter.
            changes: Whether it may change the stream.
        """
        return self._run(action, changes)

    @contextmanager
    def frozen(self) -> Iterator[StreamView]:
        """Freeze within a ``with`` block, and restore what was before at its end."""
        learning = self._run(lambda adapter: adapter.session.learning, False)
        self._run(lambda adapter: adapter.freeze())
        try:
            yield self
        finally:
            if learning:
                self._run(lambda adapter: adapter.unfreeze())

    def __enter__(self) -> StreamView:
        self._check()
        try:
            self._own(self)
            self._entered = True
        except BaseException:  # a signal, which may have come after it was owned
            self._release(self)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        try:
            self._release(self)
        except BaseException:  # a signal, before it was given back
            self._release(self)
            raise

    def __del__(self) -> None:
        if "_release" in self.__dict__:  # what a signal has kept from ending is ended here
            self._release(self)

    def __getattr__(self, name: str) -> Any:
        """What the adapter has under this name, while it holds this stream."""
        if name.startswith("_") or name in NOT_HERE:
            raise AttributeError(
                f"`stream` must be asked for what it shares with an adapter, got {shown(name)}: "
                "close the pool, and ask its adapter."
            )
        found = self._run(lambda adapter: getattr(adapter, name), False)
        if not callable(found) or isinstance(found, nn.Module):
            return found

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            def run(adapter: Adapter) -> Any:
                result = getattr(adapter, name)(*args, **kwargs)
                return self if result is adapter else result

            return self._run(run, name not in LOOKS)

        return call

    def __repr__(self) -> str:
        return f"StreamView({self.name!r}{', given back' if self._left else ''})"

    def _run(self, action: Callable[[Adapter], Result], changes: bool = True) -> Result:
        self._check()
        if self._entered:
            return self._run_in_pool(action, changes)
        try:
            self._own(self)
            result = self._run_in_pool(action, changes)
            self._release(self)
            return result
        except BaseException:  # also a signal that came while it was given back
            self._release(self)
            raise

    def _check(self) -> None:
        if self._left:
            raise RuntimeError(
                f"`stream` {shown(self.name, 60)} was given back to its pool: ask for it again by "
                "pool.stream()."
            )
