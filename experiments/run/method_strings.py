"""Methods of a run, from strings; `tta.runtime.method_strings` says how these are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

import tta
from experiments.run.subject import Subject
from tta.core.component import Component
from tta.core.registry import component
from tta.runtime.method_strings import SOURCE, parse_method_string

__all__ = ["Method", "check_labels", "parse_method", "parse_methods"]


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
        (_, first), *others = self.slots.items()  # the first brings what the others leave open
        return tta.wrap(model, first, **dict(others), **fields, **arguments)  # type: ignore[arg-type]

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
    return Method(label, *parse_method_string(label, classes, "methods"))


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
