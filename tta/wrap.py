"""``wrap``: from names or configs in slots to an :class:`~tta.core.adapter.Adapter`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tta.core import norm_layers as surgery
from tta.core.adapter import Adapter
from tta.core.build import build, check_model
from tta.core.checks import nearest, whole
from tta.core.classifier import find_classifier, size_out
from tta.core.config import SLOTS, ComponentConfig, UpdateConfig
from tta.core.recipe import AdapterConfig
from tta.core.registry import DEFAULT_PRESET, PRESET_CLASSES, component, get_config
from tta.core.update import Update
from tta.core.warn import warn

__all__ = ["wrap"]

Choice = str | ComponentConfig | None


def wrap(
    model: nn.Module,
    recipe: str | ComponentConfig | AdapterConfig | None = None,
    *,
    norm: Choice = None,
    update: Choice = None,
    output: Choice = None,
    source: Any = None,
    batch_size: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Callable[[Tensor, int], Tensor] | None = None,
    restore_mask: Callable[[str, torch.Size], Tensor] | None = None,
    **overrides: Any,
) -> Adapter:
    """Make a classifier adapt while it predicts, in place.

    Args:
        model: Any classifier that takes a batch and returns logits (B, C). A compiled one runs
            without its graphs where features are read.
        recipe: A component name or ``"name.preset"`` (an update brings its default norm and output
            rules), a config, or a whole ``AdapterConfig``. A bare name means the ImageNet preset.
        norm: Replaces the norm slot: a name, a config, or "source" for running statistics.
        update: Replaces the update slot, likewise.
        output: Replaces the output slot, likewise; "source" for the plain logits.
        source: Source batches ``(images, labels)`` or a :class:`tta.SourceStatistics`, for
            methods that need something of the training data.
        batch_size: What the stream will have; learning rates are scaled for it once, unless
            given explicitly.
        seed: Seeds the adapter's own generator; the global one is never touched.
        mean: Channel means that turn pixels in [0, 1] into what the model takes, for methods
            that augment; 0 says that it takes raw pixels.
        std: Channel standard deviations, likewise; 1 for raw pixels. Without both, timm's
            ``pretrained_cfg`` is read.
        augment: For methods that augment, instead of their own random views: ``images, index ->
            images`` on pixels in [0, 1], ``index`` counting calls since wrap (a reset does not
            rewind it). Not part of the config, nor saved.
        restore_mask: For CoTTA and PETAL, instead of their own draws: ``parameter name, shape ->
            bool tensor``, True = back to source. Likewise.
        **overrides: Fields of the chosen components.

    Returns:
        The adapter. ``adapter.unwrap()`` gives the model back, bit for bit.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: For unknown names or fields, a model that a component cannot work on, missing
            source artefacts, or a model that is already wrapped. The model is left as it was.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
        ...                     nn.Linear(4 * 6 * 6, 10))
        >>> adapter = wrap(net, "tent", lr=1e-3, update="tent.cifar10")
        >>> adapter(torch.rand(8, 3, 8, 8)).shape
        torch.Size([8, 10])
    """
    if isinstance(recipe, AdapterConfig):
        given = {"norm": norm, "update": update, "output": output}
        others = (batch_size, mean, std)
        if overrides or seed != 0 or any(v is not None for v in (*given.values(), *others)):
            raise TypeError(
                "`recipe` as an AdapterConfig takes no other slots or fields: "
                "use dataclasses.replace on it."
            )
        return build(model, recipe, source, augment=augment, restore_mask=restore_mask)
    if batch_size is not None:
        batch_size = whole("batch_size", batch_size, 1)
    chosen = _choose(recipe, {"norm": norm, "update": update, "output": output})
    chosen = _override(chosen, overrides)
    configs: dict[str, ComponentConfig | None] = {slot: chosen.get(slot) for slot in SLOTS}
    if isinstance(configs["update"], UpdateConfig):
        configs["update"] = configs["update"].scaled(batch_size)
    if configs["norm"] is None and "norm" not in chosen and configs["update"] is not None:
        cls = component(configs["update"].name)
        default = cls.default_norm if issubclass(cls, Update) else None
        if (
            default is not None
            and isinstance(model, nn.Module)
            and surgery.batch_norm_layers(model)
        ):
            configs["norm"] = get_config(default)
    if configs["output"] is None and "output" not in chosen and configs["update"] is not None:
        brings = getattr(component(configs["update"].name), "default_output", None)
        configs["output"] = None if brings is None else get_config(brings)
    if (rule := configs["norm"]) is not None:
        if getattr(rule, "batch_size", 0) is None:
            configs["norm"] = rule.replace(batch_size=batch_size)
        update_lr = getattr(rule, "update_lr", None)
        named = isinstance(recipe if update is None else update, str) and "lr" not in overrides
        if update_lr is not None and named and isinstance(configs["update"], UpdateConfig):
            configs["update"] = configs["update"].replace(lr=update_lr)
    config = AdapterConfig(
        **configs,  # type: ignore[arg-type]
        batch_size=batch_size,
        seed=seed,
        mean=mean,  # type: ignore[arg-type]
        std=std,  # type: ignore[arg-type]
    )
    check_model(model)
    # A warning may be an error, so before anything is changed.
    names = [c for c in (recipe, norm, update, output) if isinstance(c, str)]
    classifier = find_classifier(model)
    _warn_of_preset(names, size_out(classifier))
    return build(
        model,
        config,
        source,
        classifier=classifier,
        augment=augment,
        restore_mask=restore_mask,
    )


def _choose(recipe: Any, slots: dict[str, Any]) -> dict[str, ComponentConfig | None]:
    """Configs of the slots that the caller named; a slot named "source" is there as None."""
    chosen: dict[str, ComponentConfig | None] = {}
    if recipe is None and all(v is None for v in slots.values()):
        raise ValueError(
            "`recipe` must name a method, or norm=, update= or output= must, got none: pass one, "
            "such as wrap(model, 'tent')."
        )
    if _is_source(recipe):
        chosen["norm"] = None
    elif recipe is not None:
        config = _as_config("recipe", recipe)
        chosen[component(config.name).slot] = config
    for slot, value in slots.items():
        if value is None:
            continue
        if _is_source(value):
            chosen[slot] = None
            continue
        config = _as_config(slot, value)
        actual = component(config.name).slot
        if actual != slot:
            raise ValueError(
                f"`{slot}` must be a component of that slot, got {config.name!r}, which belongs "
                f"to {actual}: pass {actual}={config.name!r}."
            )
        chosen[slot] = config
    return chosen


def _is_source(value: Any) -> bool:
    name = value.name if isinstance(value, ComponentConfig) else value
    return isinstance(name, str) and name == "source"


def _as_config(argument: str, value: Any) -> ComponentConfig:
    if isinstance(value, ComponentConfig):
        return value
    if isinstance(value, str):
        return get_config(value)
    raise TypeError(
        f"`{argument}` must be a name or a config, got {type(value).__name__}: pass a name from "
        "tta.list_methods() or what tta.get_config returns."
    )


def _override(
    chosen: dict[str, ComponentConfig | None], overrides: dict[str, Any]
) -> dict[str, ComponentConfig | None]:
    """Give each keyword to the one chosen component that has such a field."""
    for key, value in overrides.items():
        owners = [
            s for s, c in chosen.items() if c is not None and key in c.to_dict() and key != "name"
        ]
        if not owners:
            fields = {f for c in chosen.values() if c for f in c.to_dict()} - {"name"}
            arguments = ("source", "batch_size", "seed", "mean", "std", "augment", "restore_mask")
            raise ValueError(
                f"`{key}` is not a field of {_names(chosen)} and not an argument of wrap: "
                + nearest(key, [*sorted(fields), *arguments])
            )
        if len(owners) > 1:
            raise ValueError(
                f"`{key}` must belong to one component, but {_names(chosen)} share it: set it in "
                f"a config object, such as {owners[0]}=tta.get_config("
                f"{chosen[owners[0]].name!r}, {key}=...)."  # type: ignore[union-attr]
            )
        config = chosen[owners[0]]
        scales = key == "lr" and isinstance(config, UpdateConfig)
        extra = {"lr_scaling": "none"} if scales else {}
        chosen = chosen | {owners[0]: config.replace(**{key: value}, **extra)}  # type: ignore[union-attr]
    return chosen


def _names(chosen: dict[str, ComponentConfig | None]) -> str:
    return " + ".join(c.name for c in chosen.values() if c is not None) or "source"


def _warn_of_preset(names: list[str], classes: int) -> None:
    """Say so when figures made for another number of classes are about to be used."""
    for name in names:
        base, _, tag = name.partition(".")
        if base == "source":
            continue
        presets = component(base).PRESETS
        family = (tag or DEFAULT_PRESET).partition("_")[0]
        if not presets or family not in PRESET_CLASSES or PRESET_CLASSES[family] == classes:
            continue
        if (tag or DEFAULT_PRESET) not in presets:
            continue
        fitting = [
            f"{base}.{t}" for t in presets if PRESET_CLASSES.get(t.partition("_")[0]) == classes
        ]
        better = f"'{fitting[0]}' exists" if fitting else "set its fields for your data"
        warn(
            f"{name!r} uses the {family} preset, made for {PRESET_CLASSES[family]} classes, and "
            f"this model has {classes}: {better}."
        )
