"""From names in slots to a complete config: what the caller chose, and what comes with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tta.core.checks import LARGEST, boolean, nearest, shown, told, whole_number
from tta.core.config import SLOTS, ComponentConfig
from tta.core.denoiser import Diffusion
from tta.core.guard import DEFAULT_GUARD, PLAIN_GUARD, Guard
from tta.core.head import find_head
from tta.core.input_rule import DEFAULT_INPUT
from tta.core.norm_rule import NormRule
from tta.core.outputs import GIVEN, LogitsReader
from tta.core.recipe import AdapterConfig
from tta.core.registry import DEFAULT_PRESET, PRESET_CLASSES, component, get_config, list_methods
from tta.core.update import Update
from tta.core.warn import warn

__all__ = ["Request", "host_update", "resolve"]

# Arguments of wrap besides the recipe and the slots.
ARGUMENTS = (
    "source",
    "batch_size",
    "seed",
    "mean",
    "std",
    "augment",
    "restore_mask",
    "draws",
    "logits",
    "num_classes",
    "features",
    "activation",
    "health",
    "shadow",
    "window",
    "setting",
    "memory_budget",
    "on_event",
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of ``wrap``, as the caller gave them.

    Args:
        recipe: A name, a component's config, an ``AdapterConfig``, or None.
        slots: What was given for each slot: a name, a config, or None; for the guard also True or
            False, for the input a module or a Diffusion.
        overrides: Fields of the chosen components.
        batch_size: Batch size of the stream.
        seed: Seed of the adapter's generator.
        mean: Channel means.
        std: Channel standard deviations.
        logits: How to take logits out of what the model returns.
        num_classes: Number of classes, where no linear layer of the model shows it.
        features: The module that features go into, or a function that gives them.
        activation: What the logits are for, "softmax" or "sigmoid".
        health: Whether to fill ``health`` without a guard.
        shadow: Whether the source answers.
        window: Images that a call runs the model on.
        setting: How passes run on the device.
    """

    recipe: Any = None
    slots: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    batch_size: Any = None
    seed: Any = 0
    mean: Any = None
    std: Any = None
    logits: Any = None
    num_classes: Any = None
    features: Any = None
    activation: Any = "softmax"
    health: Any = False
    shadow: Any = False
    window: Any = None
    setting: Any = None

    @property
    def fixed(self) -> dict[str, Any]:
        """The arguments that describe the model, in the form that a config holds."""
        reader = LogitsReader(self.logits)
        module = self.features is None or isinstance(self.features, str)
        return {
            "mean": self.mean,
            "std": self.std,
            "logits": GIVEN if callable(reader.spec) else reader.spec,
            "num_classes": self.num_classes,
            "features": self.features if module else GIVEN,
            "activation": self.activation,
            "shadow": boolean("shadow", self.shadow),
            "window": self.window,
            "setting": self.setting,
        }


def resolve(model: nn.Module, request: Request) -> AdapterConfig:
    """The config that a request means for this model.

    Args:
        model: The classifier, checked and unwrapped.
        request: What was asked for.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: For unknown names or fields.
    """
    if isinstance(request.recipe, AdapterConfig):
        return _check_slots(_given_config(request), model)
    batch_size = request.batch_size
    if batch_size is not None:
        batch_size = whole_number("batch_size", batch_size, 1, LARGEST)
    chosen = _with_companions(_with_guard(_choose(request), request), request, model)
    named = {key: v for key, v in request.overrides.items() if _owners(chosen, key)}
    others = {key: v for key, v in request.overrides.items() if key not in named}
    # A field that what the caller named does not have may be one of what that brings.
    complete = _override(_complete(_override(chosen, named), model), others)
    chosen = {
        slot: None if config is None else config.for_batch_size(batch_size)
        for slot, config in _adjust(complete, request).items()
    }
    module = isinstance(request.slots.get("input"), nn.Module)
    config = AdapterConfig(
        **chosen | ({"input": GIVEN} if module else {}),  # type: ignore[arg-type]
        batch_size=batch_size,
        seed=request.seed,
        **request.fixed,
    )
    _check_slots(config, model)
    reader = LogitsReader(request.logits)
    head = find_head(model, reader, request.num_classes, request.features)
    _warn_of_preset(request, head.num_classes)  # a warning may raise: nothing has changed yet
    return config


Chosen = dict[str, ComponentConfig | None]


def _fills(slot: str, value: Any, config: AdapterConfig) -> bool:
    """Whether a value is what a config says was given: a module, or a denoiser for its rule."""
    if slot != "input":
        return False
    if isinstance(value, Diffusion):
        return isinstance(config.input, ComponentConfig)
    return isinstance(value, nn.Module) and config.input == GIVEN


def _given_config(request: Request) -> AdapterConfig:
    said = request.fixed | dict.fromkeys(("logits", "features", "activation"))
    slots = {k: v for k, v in request.slots.items() if not _fills(k, v, request.recipe)}
    others = (*slots.values(), request.batch_size, request.health, *said.values())
    given = any(value is not None and value is not False for value in others)
    if request.overrides or request.seed != 0 or given:
        raise TypeError(
            "`recipe` as an AdapterConfig takes no other slots or fields: use dataclasses.replace "
            "on it."
        )
    return request.recipe


def _choose(request: Request) -> Chosen:
    """Configs of the slots that the caller named; a slot named "source" is there as None."""
    chosen: Chosen = {}
    recipe, slots = request.recipe, request.slots
    if isinstance(slots.get("input"), Diffusion):
        diffusion = slots["input"]
        slots = {**slots, "input": diffusion.config or get_config(DEFAULT_INPUT)}
    if recipe is None and all(value in (None, True, False) for value in slots.values()):
        raise ValueError(
            "`recipe` must name a method, or input=, norm=, update=, output= or guard= must, got "
            "none: pass one, such as wrap(model, 'tent')."
        )
    if isinstance(recipe, str) and "+" in recipe:
        raise ValueError(
            f"`recipe` must name one component, got {shown(recipe)}: give each its slot, as in "
            f"wrap(model, {_by_slot(recipe)})."
        )
    if _is_source(recipe):
        chosen["norm"] = None
    elif recipe is not None:
        config = _as_config("recipe", recipe)
        chosen[component(config.name).slot] = config
        if (host := host_update(recipe)) is not None:
            chosen["update"] = host
    for slot, value in slots.items():
        if value is None or (slot == "guard" and value is True):  # see `_with_guard`
            continue
        if slot == "input" and isinstance(value, nn.Module):  # see `resolve`
            continue
        if _is_source(value, slot) or (slot == "guard" and value is False):
            chosen[slot] = None
            continue
        config = _as_config(slot, value)
        actual = component(config.name).slot
        if actual != slot:
            raise ValueError(
                f"`{slot}` must be a component of that slot, got {shown(config.name)}, which "
                "belongs "
                f"to {actual}: pass {actual}={shown(config.name)}."
            )
        chosen[slot] = config
    return chosen


def _by_slot(label: str) -> str:
    """Keywords of wrap for what the command line writes as ``norm+update``."""
    names = [part.strip() for part in label.split("+")]
    found = {
        component(base).slot: name
        for name in names
        if (base := name.partition(".")[0]) in list_methods()
    }
    if len(found) < len(names):
        found = {"norm": "unmix_tns", "update": "eata", "output": "lame"}
    return ", ".join(f"{slot}='{name}'" for slot, name in found.items())


def _host(recipe: Any) -> str | None:
    """Name of the update that a guard's recipe has, with the preset of the guard's name."""
    name = recipe.name if isinstance(recipe, ComponentConfig) else recipe
    base, _, preset = name.partition(".") if isinstance(name, str) else ("", "", "")
    cls = component(base) if base else None
    if cls is None or not issubclass(cls, Guard) or cls.host is None:
        return None
    return f"{cls.host}.{preset}" if preset in component(cls.host).PRESETS else cls.host


def host_update(recipe: Any) -> ComponentConfig | None:
    """Return the update of a recipe that has a guard's name; None where there is none."""
    host = _host(recipe)
    if host is None:
        return None
    cls: Any = component((recipe if isinstance(recipe, str) else recipe.name).partition(".")[0])
    return get_config(host).replace(**cls.host_fields)


def _with_companions(chosen: Chosen, request: Request, model: nn.Module) -> Chosen:
    """Add what the recipe of a guard has in slots that the caller left open."""
    recipe = request.recipe
    if recipe is None or _is_source(recipe):
        return chosen
    cls = component(_as_config("recipe", recipe).name)
    named = cls.companions if issubclass(cls, Guard) else {}
    more = {slot: get_config(name) for slot, name in named.items() if component(name).suits(model)}
    return more | chosen


def _with_guard(chosen: Chosen, request: Request) -> Chosen:
    """Add the guard that the caller asked for without naming it."""
    asked = request.slots.get("guard") is True
    watched = boolean("health", request.health) or boolean("shadow", request.shadow)
    if chosen.get("guard") is not None or not (asked or watched):
        return chosen
    if not asked:
        return chosen | {"guard": get_config(PLAIN_GUARD)}
    update = chosen.get("update")
    cls = Update if update is None else component(update.name)
    return chosen | {"guard": get_config(getattr(cls, "default_guard", DEFAULT_GUARD))}


def _is_source(value: Any, slot: str | None = None) -> bool:
    """Whether what was given for a slot names the source model, which leaves it empty."""
    name = value.name if isinstance(value, ComponentConfig) else value
    return isinstance(name, str) and component(name.partition(".")[0], slot).empties_slots


def _as_config(argument: str, value: Any) -> ComponentConfig:
    if isinstance(value, ComponentConfig):
        return value
    if isinstance(value, str):
        return get_config(value)
    raise TypeError(
        f"`{argument}` must be a name or a config, got {type(value).__name__}: pass a name from "
        "tta.list_methods() or what tta.get_config returns."
    )


def _fields(config: ComponentConfig | None) -> set[str]:
    return set() if config is None else set(config.to_dict()) - {"name"}


def _owners(chosen: Chosen, key: str) -> list[str]:
    """The slots whose components have a field."""
    return [slot for slot, config in chosen.items() if key in _fields(config)]


def _override(chosen: Chosen, overrides: Mapping[str, Any]) -> Chosen:
    """Give each keyword to the one chosen component that has such a field."""
    changes: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        owners = _owners(chosen, key)
        if not owners:
            known = sorted(set().union(*(_fields(c) for c in chosen.values())))
            raise ValueError(
                f"`{told(key, 40)}` is not a field of {_label(chosen)} and not an argument of "
                "wrap: " + nearest(key, [*known, *ARGUMENTS], room=120)
            )
        if len(owners) > 1:
            config = chosen[owners[0]]
            assert config is not None
            raise ValueError(
                f"`{key}` must belong to one component, but {_label(chosen)} share it: set it in a "
                f"config object, such as {owners[0]}=tta.get_config({shown(config.name)}, "
                f"{key}=...)."
            )
        changes.setdefault(owners[0], {})[key] = value
    for slot, fields in changes.items():
        config = chosen[slot]
        assert config is not None
        # All at once: fields that are checked together may only fit together.
        chosen = chosen | {slot: config.override(**fields)}
    return chosen


def _complete(chosen: Chosen, model: nn.Module) -> Chosen:
    """All slots, with what the chosen components bring for those that the caller left open."""
    complete: Chosen = {slot: chosen.get(slot) for slot in SLOTS}
    for config in [chosen[slot] for slot in SLOTS if slot in chosen]:
        brought = {} if config is None else component(config.name).brings(config)
        for slot, value in brought.items():
            part = get_config(value) if isinstance(value, str) else value
            if slot not in chosen and component(part.name).suits(model):
                complete[slot] = part
    return complete


def _check_slots(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """Return the config, unless something in a slot does not go with the rest."""
    slots = {slot: config.components.get(slot) for slot in SLOTS}
    for part in slots.values():
        if part is not None:
            component(part.name).check_slots(part, slots, model)
    return config


def _adjust(chosen: Chosen, request: Request) -> Chosen:
    """Give an update that was named without a learning rate the one for its norm rule."""
    norm, update = chosen["norm"], chosen["update"]
    value = request.slots.get("update") or request.recipe
    named = isinstance(value, str) and "lr" not in request.overrides
    if norm is None or update is None or not named:
        return chosen
    rule = component(norm.name)
    assert issubclass(rule, NormRule)
    known = update.to_dict()
    fields = {key: v for key, v in rule.update_fields(norm).items() if key in known}
    if "lr_scaling" in fields and known["lr_scaling"] == "none":
        fields |= {"lr_scaling": "none"}  # the caller's choice, or the preset's
    return chosen | {"update": update.replace(**fields)}


def _label(chosen: Chosen) -> str:
    return " + ".join(c.name for c in chosen.values() if c is not None) or "source"


def _warn_of_preset(request: Request, classes: int) -> None:
    """Warn when a preset made for another number of classes is about to be used."""
    for name in (request.recipe, _host(request.recipe), *request.slots.values()):
        if not isinstance(name, str):
            continue
        base, _, tag = name.partition(".")
        presets = component(base).PRESETS
        tag = tag or DEFAULT_PRESET
        family = tag.partition("_")[0]
        if tag not in presets or PRESET_CLASSES.get(family, classes) == classes:
            continue
        fitting = [
            f"{base}.{t}" for t in presets if PRESET_CLASSES.get(t.partition("_")[0]) == classes
        ]
        better = f"'{fitting[0]}' exists" if fitting else "set its fields for your data"
        warn(
            f"{name!r} uses the {family} preset, made for {PRESET_CLASSES[family]} classes, and "
            f"this model has {classes}: {better}."
        )
