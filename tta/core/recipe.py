"""What an adapter is made of: the configs of all slots, and the arguments of ``wrap``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tta.core.checks import (
    LARGEST,
    boolean,
    channels,
    mapping,
    nearest,
    one_of,
    parsed_json,
    seed,
    shown,
    string,
    told,
    whole_number,
)
from tta.core.config import SLOTS, ComponentConfig
from tta.core.outputs import GIVEN
from tta.core.registry import component, config_from_dict
from tta.core.setting import Setting

__all__ = ["MOST_BYTES", "AdapterConfig"]

MOST_BYTES = 2**53  # of a budget


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter is made of; ``tta.wrap(model, config)`` makes one like it.

    ``source`` records in words which source artefacts were used; the artefacts themselves are not
    part of a config.
    """

    input: ComponentConfig | str | None = None  # "given": a module
    norm: ComponentConfig | None = None
    update: ComponentConfig | None = None
    output: ComponentConfig | None = None
    guard: ComponentConfig | None = None
    batch_size: int | None = None
    seed: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    source: str | None = None
    logits: str | int | None = None  # place in what the model returns; "given": a function
    num_classes: int | None = None  # if the caller gave it
    features: str | None = None  # module that they go into; "given": a module or a function
    activation: str = "softmax"  # what the logits are for: "softmax" or "sigmoid"
    shadow: bool = False  # the source answers, while the rest learns beside it
    memory_budget: int | None = None  # bytes, in which the recipe was made to fit by these two
    micro_batch: int | None = None  # images that go through the model at once for an update
    checkpointing: bool = False  # blocks run again in the backward pass, so as to keep less
    setting: Setting | None = None  # how passes run on the device
    window: int | None = None  # images that a call runs the model on, if more than its own

    def __post_init__(self) -> None:
        for slot in SLOTS:
            _check_slot(slot, getattr(self, slot))
        if self.batch_size is not None:
            object.__setattr__(
                self, "batch_size", whole_number("batch_size", self.batch_size, 1, LARGEST)
            )
        object.__setattr__(self, "seed", seed("seed", self.seed))
        for name in ("source", "features"):
            if getattr(self, name) is not None:
                string(name, getattr(self, name))
        one_of("activation", self.activation, ("softmax", "sigmoid"))
        if self.num_classes is not None:
            whole_number("num_classes", self.num_classes, 1, LARGEST)
        self._check_activation()
        if self.window is not None:
            object.__setattr__(self, "window", whole_number("window", self.window, 2, LARGEST))
            self._check_window()
        boolean("shadow", self.shadow)
        boolean("checkpointing", self.checkpointing)
        for name, most in (("memory_budget", MOST_BYTES), ("micro_batch", LARGEST)):
            if getattr(self, name) is not None:
                whole = whole_number(name, getattr(self, name), 1, most)
                object.__setattr__(self, name, whole)
        if self.setting is not None and not isinstance(self.setting, Setting):
            raise TypeError(
                f"`setting` must be a tta.Setting, got {type(self.setting).__name__}: pass what "
                "tta.tune gave."
            )
        if self.shadow and self.guard is None:
            raise ValueError(
                "`shadow` must come with a guard, which sees both predictions, got none: pass "
                "guard=tta.get_config('watch')."
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"`mean` and `std` must be given together, got mean={shown(self.mean)} and "
                f"std={shown(self.std)}: pass both."
            )
        if self.mean is None:
            return
        mean, std = channels("mean", self.mean), channels("std", self.std, low=0, above=True)
        if len(mean) != len(std) and 1 not in (len(mean), len(std)):
            raise ValueError(
                f"`mean` and `std` must have one value, or one for each channel, got {len(mean)} "
                f"and {len(std)} values: pass as many of both."
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def _check_activation(self) -> None:
        for config in self.components.values():
            if self.activation == "softmax":
                continue
            if component(config.name).takes_softmax:
                raise ValueError(
                    f"`activation` must be 'softmax' for {config.name}, which takes a softmax of "
                    f"the logits, got {shown(self.activation)}: for a model whose classes do not "
                    "exclude each other, norm rules alone remain."
                )

    def _check_window(self) -> None:
        for config in self.components.values():
            if component(config.name).counts_images:
                raise ValueError(
                    f"`window` must be left out for {config.name}, which remembers or counts "
                    f"images and would be shown each of them again, got {self.window}: give it "
                    "single images without, or use another component."
                )

    @property
    def label(self) -> str:
        """The components in one word, such as "bn+eata"; "source" for none."""
        chosen = (getattr(self, slot) for slot in SLOTS)
        names = (c if isinstance(c, str) else c.name for c in chosen if c is not None)
        return "+".join(names) or "source"

    @property
    def components(self) -> dict[str, ComponentConfig]:
        """The configs of the slots that are filled, but for a module in the input slot."""
        found = {slot: getattr(self, slot) for slot in SLOTS}
        return {slot: c for slot, c in found.items() if isinstance(c, ComponentConfig)}

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON types."""
        result: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (ComponentConfig, Setting)):
                value = value.to_dict()
            result[field.name] = list(value) if isinstance(value, tuple) else value
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdapterConfig:
        """The inverse of :meth:`to_dict`; a key that is not there keeps its default.

        Raises:
            TypeError: When ``data`` is no dict, or a value of the wrong kind.
            ValueError: For an unknown key or component, naming the nearest one.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in mapping("data", "an adapter's config", data).items():
            if key not in known:
                raise ValueError(
                    f"`{told(key)}` is not a key of an adapter config: " + nearest(key, known)
                )
            if isinstance(value, Mapping):
                value = Setting.from_dict(value) if key == "setting" else config_from_dict(value)
            values[key] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    def to_json(self) -> str:
        """A JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> AdapterConfig:
        """The inverse of :meth:`to_json`.

        Raises:
            TypeError: When ``text`` is no string, or as for :meth:`from_dict`.
            ValueError: When it is not JSON, or as for :meth:`from_dict`.
        """
        try:
            data = parsed_json(text)
        except TypeError:
            raise TypeError(
                f"`text` must be a string of JSON, got {type(text).__name__}: pass what to_json() "
                "gave."
            ) from None
        except ValueError as error:
            raise ValueError(
                f"`text` must be JSON, got something else ({told(error)}): pass what to_json() "
                "gave."
            ) from None
        return cls.from_dict(data)


def _check_slot(slot: str, value: Any) -> None:
    if value is None or (slot == "input" and isinstance(value, str) and value == GIVEN):
        return
    if not isinstance(value, ComponentConfig):
        raise TypeError(
            f"`{slot}` must be a component's config or None, got {shown(value)}: pass what "
            "tta.get_config returns."
        )
    actual = component(value.name).slot
    if actual != slot:
        where = f"{actual}={value.name!r}" if actual else f"{slot}=None"
        raise ValueError(
            f"`{slot}` must be a component of that slot, got {shown(value.name)}, which belongs to "
            f"{actual or 'none'}: pass {where}."
        )
