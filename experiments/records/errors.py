"""Errors that end a command; light to import, so that the command line can know them."""

from __future__ import annotations

__all__ = ["CannotGoOn"]


class CannotGoOn(RuntimeError):
    """A command ends here, for a reason that its user can do something about."""
