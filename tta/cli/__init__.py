"""The console script ``tta``, also ``python -m tta``.

Each command is a module of this package with the command's name. It has
``add_arguments(parser)``, which adds its flags, and ``run(args) -> int``, which does the work and
returns the exit status. Only the module of the chosen command is imported, and with it torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from tta.core.checks import is_final, is_out_of_memory, sentence, told
from tta.version import __version__

__all__ = ["COMMANDS", "end_of_pipe", "in_words", "main"]

COMMANDS = {
    "methods": "list the components, or show all about one",
    "export": "write a model that adapts as a graph that runs without torch",
    "collect": "make source artefacts from a folder of pictures",
    "run": "predict the frames of folders, videos and cameras, and adapt to them",
    "bench": "time recipes on a model and a device, with memory and passes",
    "serve": "predict images of many streams over HTTP, each of which adapts by itself",
}
ABOUT = "Test-time adaptation of image classifiers."
BROKEN_PIPE, INTERRUPTED = 141, 130  # exit statuses that shells give for these two signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: Arguments without the program's name; None for those of this process.

    Returns:
        0 when all went well, 2 for a mistake in the arguments, which is printed in one sentence.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parse(arguments)
    if os.getcwd() not in sys.path:  # as it is for `python -m tta`
        sys.path.insert(0, os.getcwd())
    from tta.core.plugins import import_modules  # and torch, which help does without

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            import_modules(args.imports)
            status = args.run(args)
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        return end_of_pipe()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if (words := in_words(error)) is None:  # a mistake of the program, or of a model's
            raise
        print(f"error: {words}", file=sys.stderr)
        return 2


def end_of_pipe() -> int:
    """The exit status where the reader of the output, such as `head`, has what it wanted."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
    return BROKEN_PIPE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="tta", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"tta {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((text for text in arguments if not text.startswith("-")), None)
    for name, about in COMMANDS.items():
        command = commands.add_parser(
            name, help=about, description=f"{about[0].upper()}{about[1:]}."
        )
        if name == chosen:
            module = import_module(f"{__name__}.{name}")
            module.add_arguments(command)
            command.add_argument(
                "--import",
                dest="imports",
                action="append",
                default=[],
                metavar="MODULE",
                help="a module that registers components of your own; may be repeated",
            )
            command.set_defaults(run=module.run)
    return parser.parse_args(arguments)


def in_words(error: Exception) -> str | None:
    """What a user can mend, in one sentence; None for other errors."""
    if is_final(error):
        return sentence(error)
    if is_out_of_memory(error):
        return (
            f"`--batch-size` and images must leave room in memory, which has run out "
            f"({told(error, 100)}): choose fewer or smaller ones."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"`{told(error.filename, 120)}` must be a path that this command can use, but is not "
            f"({error.strerror}): check it."
        )
    known = isinstance(error, (ValueError, TypeError, OSError, ImportError))
    return sentence(error) if known else None


class _Parser(argparse.ArgumentParser):
    """A parser that says a mistake in one sentence, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    """Warn in one line, without the place in the code, which means nothing on a command line."""
    print(f"warning: {message}", file=sys.stderr)
