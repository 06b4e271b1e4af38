"""Where components come from: our own package, modules that a user names, and entry points.

A component registers itself when its module is imported, so all there is to do is to import the
module. A package that is installed can name its module in its own ``pyproject.toml``::

    [project.entry-points."tta.components"]
    my_rules = "my_package.my_rules"

It is imported when a component is looked up for the first time, not by ``import tta``; so are the
components of our own, which are there before any other is registered.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points

from tta.core.checks import shown, string, told
from tta.core.warn import warn

__all__ = ["GROUP", "import_modules", "load_components", "load_own"]

OWN = "tta.methods"  # by its name alone: the core knows no paper
GROUP = "tta.components"  # of entry points

_LOCK = threading.RLock()  # reentrant: a module that is being imported may look up a component
_loaded = False


def import_modules(names: Iterable[str]) -> None:
    """Import the modules that register components of a user's own.

    Args:
        names: Modules as ``import`` takes them, such as "my_rules" or "my_package.my_rules".

    Raises:
        TypeError: For a name that is no string.
        ValueError: For a name that no module can have, and for a module that is not found or cannot
            be imported.
    """
    for name in names:
        if not all(part.isidentifier() for part in string("import", name).split(".")):
            raise ValueError(
                f"`import` must be the name of a module, such as my_rules, got {shown(name)}: "
                "leave out "
                "the folder and .py, and put the folder on PYTHONPATH"
            )
        try:
            import_module(name)
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is not None and f"{name}.".startswith(f"{missing}."):
                raise ValueError(
                    f"`import` must be a module that Python finds, got {shown(name)}: put the "
                    "folder "
                    "that holds it on PYTHONPATH, or install it"
                ) from None
            raise ValueError(
                f"`import` must be a module that can be imported, got {shown(name)}, which raised "
                f"{type(error).__name__}: {told(error)}"
            ) from error


def load_own() -> None:
    """Import our own components; other threads wait for the one that does."""
    import_module(OWN)


def load_components() -> None:
    """Import, once, our own and those that installed packages name; warn of one that fails."""
    global _loaded
    load_own()
    if _loaded:
        return
    with _LOCK:
        if _loaded:
            return
        _loaded = True
        for point in entry_points(group=GROUP):
            try:
                point.load()
            except Exception as error:
                package = "an unknown package" if point.dist is None else point.dist.name
                warn(
                    f"the entry point {point.name!r} of {package} in the group {GROUP!r} is left "
                    f"out, because {point.value!r} raised {type(error).__name__}: {error}; mend or "
                    "uninstall that package."
                )
