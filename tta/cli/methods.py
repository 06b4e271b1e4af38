"""``tta methods``: the components by slot, the presets of some, or all about one."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tta.core.checks import nearest, shown
from tta.core.component import Component
from tta.core.config import SLOTS, ComponentConfig
from tta.core.registry import component, get_config, list_methods

__all__ = ["add_arguments", "field_meanings", "papers", "run"]

TITLES = {
    "input": "input rules: what the model is given in place of the images",
    "norm": "norm rules: where a BatchNorm layer takes its statistics from",
    "update": "updates: how parameters move",
    "output": "output rules: what is returned in the end",
    "guard": "guards: what is kept of what was learned, and who answers",
    "": "without a slot",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        metavar="NAME",
        help="a component, about which all is shown, or a pattern in quotation marks such as "
        "'*bn', or 'eata.*' for presets (default: all components)",
    )
    parser.add_argument("--slot", choices=SLOTS, help="only the components of this slot")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for.

    Raises:
        ValueError: When no component has such a name.
    """
    found = list_methods(args.pattern, args.slot)
    if not found:
        where = "" if args.slot is None else f" in the slot {args.slot}"
        known = list_methods("*.*" if "." in args.pattern else "*", args.slot)
        raise ValueError(
            f"`NAME` must be that of a component{where}, got {shown(args.pattern)}: "
            + nearest(args.pattern, known)
        )
    if found == [args.pattern] and "." not in args.pattern:
        lines = _details(args.pattern)
    elif "." in args.pattern:
        lines = _table({name: _values(_preset(name)) or "the defaults" for name in found})
    else:
        lines = _overview(found)
    print("\n".join(lines))
    return 0


def field_meanings(config: type[ComponentConfig]) -> dict[str, str]:
    """What each field of a config means: the comment behind it, in the class or in a base.

    Args:
        config: A class of configs.

    Returns:
        By field. Fields without a comment have an empty text; a class whose source code cannot be
        read gives none of its own.
    """
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        try:
            lines, _ = inspect.getsourcelines(cls)
        except (OSError, TypeError):  # typed into an interpreter, or compiled
            continue
        (body,) = ast.parse(textwrap.dedent("".join(lines))).body
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                _, _, comment = lines[(node.end_lineno or node.lineno) - 1].partition("#")
                found[node.target.id] = comment.strip() or found.get(node.target.id, "")
    return found


def papers(cls: type[Component]) -> list[str]:
    """The arXiv numbers in the docstring of a component's module, in order, each once."""
    return list(dict.fromkeys(re.findall(r"arXiv:?\s*(\d{4}\.\d{4,5})", _about(cls))))


def _overview(names: Sequence[str]) -> Iterator[str]:
    """The components by slot, with what each is and the names of its presets."""
    for slot in (*SLOTS, ""):
        chosen = [component(name) for name in names if component(name).slot == slot]
        if not chosen:
            continue
        yield f"{TITLES[slot]}:"
        rows = {}
        for cls in chosen:
            presets = f" [{', '.join(cls.PRESETS)}]" if cls.PRESETS else ""
            rows[cls.name] = _summary(cls) + presets
        yield from (f"  {line}" for line in _table(rows, indent=2))
    yield ""
    yield "Presets are in brackets. `tta methods NAME` shows the fields and papers of one."


def _details(name: str) -> Iterator[str]:
    """All about one component."""
    cls = component(name)
    config = get_config(name)
    yield f"{name} ({f'slot {cls.slot}' if cls.slot else 'no slot'}): {_summary(cls)}"
    yield ""
    yield _about(cls).strip() or "Its module has no docstring."
    if numbers := papers(cls):
        yield ""
        yield "papers: " + ", ".join(f"arXiv {number}" for number in numbers)
    meanings = field_meanings(cls.Config)
    fields = {
        f"{f.name} = {getattr(config, f.name)!r}": meanings.get(f.name, "")
        for f in dataclasses.fields(config)
    }
    if fields:
        yield ""
        yield f"fields, with the values that get_config({name!r}) gives:"
        yield from (f"  {line}" for line in _table(fields, indent=2))
    if cls.PRESETS:
        yield ""
        yield "presets, with the fields that they set:"
        rows = {f"{name}.{tag}": _values(v) or "the defaults" for tag, v in cls.PRESETS.items()}
        yield from (f"  {line}" for line in _table(rows, indent=2))


def _about(cls: type[Component]) -> str:
    """The docstring of the module that a component is defined in."""
    return inspect.getdoc(sys.modules[cls.__module__]) or ""


def _summary(cls: type[Component]) -> str:
    """The first line of a component's own docstring."""
    return (vars(cls).get("__doc__") or "").strip().partition("\n")[0]


def _preset(name: str) -> Mapping[str, Any]:
    base, _, tag = name.partition(".")
    return component(base).PRESETS[tag]


def _values(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in fields.items())


def _table(rows: Mapping[str, str], indent: int = 0) -> Iterator[str]:
    """Names and texts in two columns; a long text goes on below itself."""
    width = max(map(len, rows))
    room = max(30, shutil.get_terminal_size().columns - indent - width - 2)
    for name, text in rows.items():
        first, *rest = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        yield f"{name:<{width}}  {first}".rstrip()
        yield from (" " * (width + 2) + line for line in rest)
