"""Method strings of the command line: ``"eata"``, ``"eata.cifar10"``, ``"unmix_tns+eata+lame"``.

A string stands for keywords of `tta.wrap`. Every component goes to the slot that it belongs to, so
the order of components does not matter. A component without a preset gets the one that was made for
the model's number of classes, if it has one. Fields are set in brackets:
``"eata[lr=1e-3, entropy_margin=0.3]+lame"``.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from tta.core.checks import nearest, shown
from tta.core.config import SLOTS, ComponentConfig
from tta.core.registry import PRESET_CLASSES, get_config, list_methods
from tta.core.resolve import host_update

__all__ = ["PLUS", "SOURCE", "Choice", "parse_method_string"]

Choice = str | ComponentConfig
PLUS = re.compile(r"\+(?![^\[]*\])")  # but not inside of brackets
SOURCE = "source"  # the model as it is, the one name that is joined to nothing
PRESET_OF_CLASSES = {classes: preset for preset, classes in PRESET_CLASSES.items()}


def parse_method_string(
    text: str, classes: int, argument: str = "method"
) -> tuple[dict[str, Choice], dict[str, Any]]:
    """Read one method string.

    Args:
        text: Component names joined by ``+``, each with or without ``.preset``.
        classes: The model's number of classes, which chooses presets that are not given.
        argument: What errors call the string.

    Returns:
        The component of each filled slot, in the order of the string, and fields that are set; both
        empty for the source model.

    Raises:
        ValueError: For an unknown component or preset (with the nearest name), or two components
            of one slot.
    """
    label = text.strip()
    if label == SOURCE:
        return {}, {}
    slot_of = {name: slot for slot in SLOTS for name in list_methods(slot=slot)}
    slots: dict[str, Choice] = {}
    overrides: dict[str, Any] = {}
    for part in PLUS.split(label):
        name, fields = _fields(part.strip(), argument)
        overrides |= fields
        base, _, preset = name.partition(".")
        if base == SOURCE:
            raise ValueError(
                f"`{argument}` has {shown(label)}, but source means no adaptation and is joined to "
                "nothing: leave it out"
            )
        if base not in slot_of:
            raise ValueError(
                f"`{argument}` must be names of components, got {shown(base)}: "
                + nearest(base, [*slot_of, SOURCE])
            )
        slot = slot_of[base]
        if slot in slots:
            raise ValueError(
                f"`{argument}` has {shown(label)}, where {slots[slot]} and {name} are both {slot} "
                "components: keep one for each of norm, update and output"
            )
        default = PRESET_OF_CLASSES.get(classes)
        if not preset and f"{base}.{default}" in list_methods(f"{base}.*"):
            name = f"{base}.{default}"
        get_config(name, **fields)  # raises for an unknown preset or field
        slots[slot] = name
    host = host_update(slots.get("guard"))
    if host is not None and "update" not in slots:
        slots["update"] = host  # of the recipe that has the guard's name
    return slots, overrides


def _fields(part: str, argument: str) -> tuple[str, dict[str, Any]]:
    """Split ``name[field=value, ...]`` into the name and the fields."""
    name, bracket, inside = part.partition("[")
    if not bracket:
        return part, {}
    try:
        call = ast.parse(f"f({inside.removesuffix(']')})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args and part.endswith("]")
        fields = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        assert len(fields) == len(call.keywords)  # none given twice
        return name.strip(), fields
    except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"`{argument}` must set fields as in tent[lr=1e-3, steps=2], got {shown(part)}"
        ) from error
