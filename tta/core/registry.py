"""Names: which components exist, in which slot, with which presets.

A component class declares its ``slot``, its ``Config`` and its ``PRESETS``; the decorator adds the
name. A preset is asked for as ``"eata.cifar10"``; the bare name means the ImageNet preset, which is
what most papers tune. The first look-up of a name imports what installed packages add
(:mod:`tta.core.plugins`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any, TypeVar

from tta.core.checks import mapping, nearest, one_of, shown, string, told
from tta.core.component import Component
from tta.core.config import SLOTS, ComponentConfig
from tta.core.plugins import load_components, load_own

__all__ = ["component", "config_from_dict", "get_config", "list_methods", "register"]

_COMPONENTS: dict[str, type[Component]] = {}
DEFAULT_PRESET = "imagenet"
PRESET_CLASSES = {"imagenet": 1000, "cifar100": 100, "cifar10": 10}  # what presets are made for

C = TypeVar("C", bound=type[Component])


def register(name: str) -> Callable[[C], C]:
    """Class decorator: make a component known under ``name``.

    Raises:
        ValueError: When the name is taken or not an identifier.
        TypeError: When the name is no string, the class has no slot or shares its ``Config`` with
            another component.

    Example:
        >>> @register("my_method")  # doctest: +SKIP
        ... class MyMethod(Update): ...
    """
    load_own()  # so that none of their names is taken by another
    if not string("name", name).isidentifier():
        raise ValueError(f"`name` must be an identifier, got {shown(name)}: rename the component.")

    def add(cls: C) -> C:
        if not isinstance(cls, type) or not issubclass(cls, Component):
            raise TypeError(
                f"`{name}` must be a class with a slot, got {shown(cls)}: subclass tta.NormRule, "
                "tta.Update, tta.Output or tta.Guard."
            )
        other = _COMPONENTS.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"`name` must be new, got {shown(name)}, which {other.__module__} has: "
                "choose another name."
            )
        if cls.slot not in SLOTS and not cls.empties_slots:
            raise TypeError(
                f"`slot` must be 'input', 'norm', 'update', 'output' or 'guard', got "
                f"{shown(cls.slot)}: subclass Input, NormRule, Update, Output or Guard."
            )
        _check_config(name, cls)
        _check_methods(name, cls)
        cls.name = name
        cls.Config.name = name
        _COMPONENTS[name] = cls
        return cls

    return add


def _check_config(name: str, cls: type[Component]) -> None:
    """Refuse a class whose config is not its own, or cannot be made, written or preset."""
    kind = next(b.Config for b in cls.__mro__[1:] if vars(b).get("slot") == cls.slot)
    config = cls.Config
    if not (isinstance(config, type) and issubclass(config, kind)) or config is kind:
        raise TypeError(
            f"`Config` of {shown(name)} must be a dataclass of its own that is made from "
            f"{kind.__name__}, got {shown(getattr(config, '__name__', config))}: write one with "
            "the "
            "fields of the component."
        )
    if "name" in vars(config) and config.name != name:
        raise TypeError(
            f"`Config` of {shown(name)} must be its own, got that of {shown(config.name)}: "
            "subclass it."
        )
    try:
        json.dumps(config().to_dict())
    except TypeError as error:
        raise TypeError(
            f"`Config` of {shown(name)} must have a default for every field, of a kind that JSON "
            "knows, "
            f"got one that has not ({told(error)}): correct it."
        ) from None
    for tag, fields in cls.PRESETS.items():
        try:
            config().replace(**fields)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"`PRESETS` of {shown(name)} must hold fields of its config, got preset "
                f"{shown(tag)}: {told(error)}"
            ) from None


def _check_methods(name: str, cls: type[Component]) -> None:
    """Refuse a class that leaves out what its slot asks for."""
    for method in cls.must_define:
        if getattr(cls, method).__module__.startswith("tta.core."):
            raise TypeError(
                f"`{name}` must define {method}(), got a component without it: write it."
            )


def component(name: str, slot: str | None = None) -> type[Component]:
    """The class registered under ``name``.

    Args:
        name: Of a component.
        slot: The argument that it was given as; an error names those of this slot alone.

    Raises:
        TypeError: When ``name`` is no string.
        ValueError: For an unknown name, naming the nearest one.
    """
    string("name", name)
    load_components()
    if name not in _COMPONENTS:
        known = sorted(n for n, cls in _COMPONENTS.items() if slot in (None, cls.slot))
        what = "unknown method" if slot is None else f"`{slot}` must name a component of it, got"
        raise ValueError(f"{what} {shown(name)}: " + nearest(name, known))
    return _COMPONENTS[name]


def list_methods(pattern: str = "*", slot: str | None = None) -> list[str]:
    """Names of the registered components, sorted.

    Args:
        pattern: Shell-style pattern; one with a dot (``"eata.*"``) lists presets.
        slot: Only components of this slot: "input", "norm", "update",
            "output" or "guard".

    Raises:
        TypeError: When ``pattern`` is no string.
        ValueError: For an unknown slot.

    Example:
        >>> list_methods("*bn", slot="norm")
        ['adaptive_bn', 'alpha_bn', 'bn', 'iabn', 'robust_bn']
    """
    string("pattern", pattern)
    if slot is not None:
        one_of("slot", slot, SLOTS)
    load_components()
    chosen = {n: c for n, c in _COMPONENTS.items() if slot is None or c.slot == slot}
    names = [f"{n}.{tag}" for n, c in chosen.items() for tag in c.PRESETS]
    return sorted(n for n in (names if "." in pattern else chosen) if fnmatch(n, pattern))


def get_config(name: str, **overrides: Any) -> ComponentConfig:
    """The config of a component, from ``"name"`` or ``"name.preset"``, with some fields changed.

    An explicit ``lr`` is taken as it is and never scaled for batch size.

    Raises:
        TypeError: When ``name`` is no string, or a value of the wrong kind.
        ValueError: For an unknown name, preset or field, naming the nearest one.

    Example:
        >>> get_config("alpha_bn", source_weight=0.7).source_weight
        0.7
    """
    base, _, tag = string("name", name).partition(".")
    cls = component(base)
    if tag and tag not in cls.PRESETS:
        known = nearest(tag, cls.PRESETS) if cls.PRESETS else "it has none."
        raise ValueError(f"unknown preset {shown(tag)} of {shown(base)}: {known}")
    return cls.Config().replace(**cls.PRESETS.get(tag or DEFAULT_PRESET, {})).override(**overrides)


def config_from_dict(data: Mapping[str, Any]) -> ComponentConfig:
    """The config that ``to_dict`` was called on; a field that is not there keeps its default.

    Raises:
        TypeError: When ``data`` is no dict, or a value of the wrong kind.
        ValueError: For an unknown or missing name, or an unknown field.
    """
    name = mapping("data", "a component's config", data).get("name")
    if name is None:
        raise ValueError(
            "`name` must be a key of a component's config and name the component, got the keys "
            f"{told(', '.join(map(str, data))) or 'none'}: pass what to_dict() gave."
        )
    return get_config(name).replace(**{str(k): v for k, v in data.items() if k != "name"})
