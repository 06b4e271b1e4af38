"""Method strings of the command line: ``"eata"``, ``"eata.cifar10"``, ``"unmix_tns+eata+lame"``.

A string stands for keywords of `tta.wrap`. Every component goes to the slot that it belongs to, so
the order of components does not matter. A component without a preset gets the one that was made for
the model's number of classes, if it has one. Fields are set in brackets:
``"eata[lr=1e-3, entropy_margin=0.3]+lame"``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

import tta
from experiments.run.subject import Subject
from tta.core.checks import nearest, shown
from tta.core.component import Component
from tta.core.config import SLOTS
from tta.core.registry import PRESET_CLASSES, component
from tta.core.resolve import host_update

__all__ = ["Method", "check_labels", "parse_method", "parse_methods"]

PLUS = re.compile(r"\+(?![^\[]*\])")  # but not inside of brackets
SOURCE = "source"  # the model as it is, the one name that is joined to nothing
PRESET_OF_CLASSES = {classes: preset for preset, classes in PRESET_CLASSES.items()}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        label: What the user wrote, for tables.
        slots: Component of each filled slot, as a name with its preset or as a config; empty for
            the source model.
        overrides: Fields of the components that are set to other values.
        further: More arguments of `tta.wrap`, such as ``logits`` and ``health``.
    """

    label: str
    slots: dict[str, str | tta.ComponentConfig] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    further: dict[str, Any] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        """Rough cost of a batch in forward passes of the plain model, to foretell the time left."""
        return 1.0 + sum(_component(choice).cost for choice in self.slots.values())

    def wrap(self, model: nn.Module, **arguments: Any) -> tta.Adapter:
        """Wrap `model`; `arguments` are those of `tta.wrap`."""
        if not self.slots:
            return tta.wrap(model, SOURCE, **arguments)
        fields = self._authors_rate() | self.overrides
        return tta.wrap(model, **self.slots, **fields, **arguments)  # type: ignore[arg-type]

    def _authors_rate(self) -> dict[str, Any]:
        """What keeps the learning rate of the preset where the method's authors do not scale it.

        Tables compare methods as they were published. The rates that ``tta.wrap`` makes for small
        batches are there for ``tent.cifar10[lr_scaling='linear_below']``.
        """
        update = self.slots.get("update")
        if update is None or not {"lr", "lr_scaling"}.isdisjoint(self.overrides):
            return {}
        config = tta.get_config(update) if isinstance(update, str) else update
        ours = config.to_dict().get("lr_scaling") == "linear_below"
        return {"lr_scaling": "none"} if ours else {}

    def wrap_subject(self, subject: Subject, batch_size: int, seed: int) -> tta.Adapter:
        """Wrap a subject's model, with its source artefacts and the scale of its pixels."""
        return self.wrap(
            subject.model,
            source=subject.source,
            batch_size=batch_size,
            seed=seed,
            mean=subject.info.mean or None,
            std=subject.info.std or None,
            **self.further,
        )

    @contextmanager
    def applied(self, subject: Subject, batch_size: int, seed: int) -> Iterator[tta.Adapter]:
        """Give the subject's model wrapped, for as long as a ``with`` block runs."""
        adapter = self.wrap_subject(subject, batch_size, seed)
        try:
            yield adapter
        finally:
            adapter.unwrap()

    def warm_up(self, subject: Subject, images: Tensor) -> None:
        """Do what torch sets up on first forward passes, for which no method should pay.

        Args:
            subject: Its model is run without any method, and keeps the values of its buffers.
            images: (B, 3, H, W) in [0, 1].
        """
        kept = [(buffer, buffer.clone()) for buffer in subject.model.buffers()]
        try:
            subject.warm_up(images)
        finally:
            for buffer, value in kept:
                if not buffer.equal(value):  # of a model that changes them itself
                    buffer.copy_(value)


def parse_method(text: str, classes: int) -> Method:
    """Read one method string.

    Args:
        text: Component names joined by ``+``, each with or without ``.preset``.
        classes: The model's number of classes, which chooses presets that are not given.

    Raises:
        ValueError: For an unknown component or preset (with the nearest name), or two components
            of one slot.
    """
    label = text.strip()
    if label == SOURCE:
        return Method(label)
    slot_of = {name: slot for slot in SLOTS for name in tta.list_methods(slot=slot)}
    slots: dict[str, str | tta.ComponentConfig] = {}
    overrides: dict[str, Any] = {}
    for part in PLUS.split(label):
        name, fields = _fields(part.strip())
        overrides |= fields
        base, _, preset = name.partition(".")
        if base == SOURCE:
            raise ValueError(
                f"`methods` has {shown(label)}, but source means no adaptation and is joined to "
                "nothing: leave it out"
            )
        if base not in slot_of:
            raise ValueError(
                f"`methods` must be names of components, got {shown(base)}: "
                + nearest(base, [*slot_of, SOURCE])
            )
        slot = slot_of[base]
        if slot in slots:
            raise ValueError(
                f"`methods` has {shown(label)}, where {slots[slot]} and {name} are both {slot} "
                "components: keep one for each of norm, update and output"
            )
        default = PRESET_OF_CLASSES.get(classes)
        if not preset and f"{base}.{default}" in tta.list_methods(f"{base}.*"):
            name = f"{base}.{default}"
        tta.get_config(name, **fields)  # raises for an unknown preset or field
        slots[slot] = name
    host = host_update(slots.get("guard"))
    if host is not None and "update" not in slots:
        slots["update"] = host  # of the recipe that has the guard's name
    return Method(label, slots, overrides)


def _fields(part: str) -> tuple[str, dict[str, Any]]:
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
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ValueError(
            f"`methods` must set fields as in tent[lr=1e-3, steps=2], got {shown(part)}"
        ) from error


def _component(choice: str | tta.ComponentConfig) -> type[Component]:
    name = choice if isinstance(choice, str) else choice.name
    return component(name.partition(".")[0])


def parse_methods(texts: Sequence[str], classes: int, health: bool = False) -> list[Method]:
    """Read all method strings; see `parse_method` and `check_labels`.

    Args:
        texts: The strings.
        classes: The model's number of classes.
        health: Whether all have health figures, and not only those with a guard.
    """
    methods = [parse_method(text, classes) for text in texts]
    check_labels(methods)
    return [replace(method, further={"health": True}) for method in methods] if health else methods


def check_labels(methods: Sequence[Method]) -> None:
    """Reject methods of which one is there twice, and none at all."""
    labels = [method.label for method in methods]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"`methods` must name each method once, got {', '.join(twice)} twice")
    if not methods:
        raise ValueError("`methods` must name at least one method, got none: such as source tent")
