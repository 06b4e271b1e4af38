"""One paper, one file. Importing this package registers every component.

All files here are imported, so that a new one needs no other place; what several papers share is in
files that begin with an underscore.
"""

from importlib import import_module
from pkgutil import iter_modules


def _import_all() -> None:
    for found in iter_modules(__path__):
        import_module(f"{__name__}.{found.name}")


_import_all()
