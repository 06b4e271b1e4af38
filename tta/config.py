"""Configs: one frozen dataclass per component, to and from JSON, strict about names.

A config says *what* a component does and nothing about the model, so it can be written to a file
beside a result and read back. :class:`AdapterConfig` holds the configs of all slots together with
the arguments of ``wrap`` that change figures.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from tta.checks import channels, flag, nearest, number, one_of, seed, text, whole

__all__ = ["CIFAR_ADAM", "SLOTS", "AdapterConfig", "ComponentConfig", "UpdateConfig"]

SLOTS = ("norm", "update", "output")  # of an adapter

# What TENT's authors use on CIFAR, and the repositories of most methods after them.
CIFAR_ADAM: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "lr_batch_size": 200}

Self = TypeVar("Self", bound="ComponentConfig")
SelfUpdate = TypeVar("SelfUpdate", bound="UpdateConfig")


@dataclass(frozen=True, kw_only=True)
class ComponentConfig:
    """Base of all component configs; ``name`` is set when the component is registered."""

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Refuse flags and words of another kind; a subclass adds the checks of its numbers."""
        for field in dataclasses.fields(self):
            if field.type in ("bool", bool):
                flag(field.name, getattr(self, field.name))
            elif field.type in ("str", str):
                text(field.name, getattr(self, field.name))

    def to_dict(self) -> dict[str, Any]:
        """The component's name and every field, as JSON types."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name} | {
            key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ComponentConfig:
        """The inverse of :meth:`to_dict`; a field that is not there keeps its default.

        Raises:
            TypeError: When ``data`` is no dict, or a value of the wrong kind.
            ValueError: For an unknown or missing name, an unknown field, or the name of another
                component than that of the class this is called on.
        """
        from tta.registry import get_config  # the registry imports this module

        name = _mapping("a component's config", data).get("name")
        if name is None:
            raise ValueError(
                "`name` must be a key of a component's config and name the component, got the "
                f"keys {', '.join(map(str, data)) or 'none'}: pass what to_dict() gave."
            )
        config = get_config(name).replace(**{str(k): v for k, v in data.items() if k != "name"})
        if not isinstance(config, cls):
            raise ValueError(
                f"`name` must be {cls.name!r} for a {cls.__name__}, got {name!r}: use "
                f"{type(config).__name__}.from_dict."
            )
        return config

    def replace(self: Self, **changes: Any) -> Self:
        """A copy with some fields changed.

        Raises:
            ValueError: For an unknown field, naming the nearest one.
        """
        known = {f.name: f for f in dataclasses.fields(self)}
        for key in changes:
            if key not in known:
                raise ValueError(
                    f"`{key}` is not a field of {self.name or type(self).__name__}: "
                    + nearest(key, known)
                )
        changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(ComponentConfig):
    """Fields of every update that takes gradient steps."""

    lr: float = 2.5e-4  # learning rate
    lr_scaling: str = "none"  # how wrap(batch_size=) changes lr: "none", "linear" or "small_batch"
    lr_batch_size: int = 64  # batch size for which lr is given
    optimizer: str = "sgd"  # "sgd" or "adam"
    momentum: float = 0.9  # SGD only; dampening is 0
    betas: tuple[float, float] = (0.9, 0.999)  # Adam only; its eps is 1e-8
    weight_decay: float = 0.0
    nesterov: bool = False  # SGD only
    steps: int = 1  # (forward, update) cycles per batch; the last cycle's forward is returned
    params: str = "norm"  # what is trained: "norm", "weight_bias", "head", "all" or a regex
    official: bool = False  # reproduce the official code's known defects, see the method's page

    def __post_init__(self) -> None:
        super().__post_init__()
        number("lr", self.lr, 0)
        one_of("lr_scaling", self.lr_scaling, ("none", "linear", "small_batch"))
        whole("lr_batch_size", self.lr_batch_size, 1)
        one_of("optimizer", self.optimizer, ("sgd", "adam"))
        below_one = "use a value below 1"
        number("momentum", self.momentum, 0, 1, below=True, advice=below_one)
        if not isinstance(self.betas, tuple):
            raise TypeError(
                f"`betas` must be a pair of numbers, got {self.betas!r}; pass a tuple such as "
                "(0.9, 0.999)"
            )
        if len(self.betas) != 2:
            raise ValueError(
                f"`betas` must be a pair of numbers, got {self.betas!r}; pass two of them"
            )
        for beta in self.betas:
            number("betas", beta, 0, 1, below=True, advice=below_one)
        number("weight_decay", self.weight_decay, 0)
        whole("steps", self.steps, 1)
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "`momentum` must be above 0 with nesterov=True, got 0: set one of them"
            )

    def scaled(self: SelfUpdate, batch_size: int | None) -> SelfUpdate:
        """This config with ``lr`` made for ``batch_size``, once and for all.

        The rules are those of the authors' scripts (EATA and SAR repositories): "linear" for
        vision transformers, lr * B / reference; "small_batch" for ResNets, lr unchanged from 32
        images up and lr * 2 B / reference below; "none" elsewhere.
        """
        if batch_size is None or self.lr_scaling == "none":
            return self.replace(lr_scaling="none")
        share = batch_size / self.lr_batch_size
        if self.lr_scaling == "small_batch":
            share = 2 * share if batch_size < 32 else 1.0
        return self.replace(lr=self.lr * share, lr_batch_size=batch_size, lr_scaling="none")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter is made of; ``tta.wrap(model, config)`` makes its equal.

    ``source`` records which source artefacts were used, as words; the artefacts themselves are
    not part of a config.
    """

    norm: ComponentConfig | None = None
    update: ComponentConfig | None = None
    output: ComponentConfig | None = None
    batch_size: int | None = None
    seed: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        for slot in SLOTS:
            _check_slot(slot, getattr(self, slot))
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", whole("batch_size", self.batch_size, 1))
        object.__setattr__(self, "seed", seed("seed", self.seed))
        if self.source is not None:
            text("source", self.source)
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"`mean` and `std` must be given together, got mean={self.mean!r} and "
                f"std={self.std!r}: pass both."
            )
        if self.mean is None:
            return
        mean, std = channels("mean", self.mean), channels("std", self.std, above=0)
        if len(mean) != len(std) and 1 not in (len(mean), len(std)):
            raise ValueError(
                f"`mean` and `std` must have one value, or one for each channel, got {len(mean)} "
                f"and {len(std)} values: pass as many of both."
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @property
    def label(self) -> str:
        """The components in one word, such as "bn+eata"; "source" for none."""
        chosen = (self.norm, self.update, self.output)
        return "+".join(c.name for c in chosen if c is not None) or "source"

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON types."""
        result: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, ComponentConfig):
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
        for key, value in _mapping("an adapter's config", data).items():
            if key not in known:
                raise ValueError(
                    f"`{key}` is not a key of an adapter config: " + nearest(key, known)
                )
            if isinstance(value, Mapping):
                value = ComponentConfig.from_dict(value)
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
            data = json.loads(text)
        except TypeError:
            raise TypeError(
                f"`text` must be a string of JSON, got {type(text).__name__}: pass what to_json() "
                "gave."
            ) from None
        except ValueError as error:
            raise ValueError(
                f"`text` must be JSON, got something else ({error}): pass what to_json() gave."
            ) from None
        return cls.from_dict(data)


def _mapping(what: str, data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise TypeError(
            f"`data` must be a dict of {what}, got {type(data).__name__}: pass what to_dict() gave."
        )
    return data


def _check_slot(slot: str, value: Any) -> None:
    from tta.registry import component  # the registry imports this module

    if value is None:
        return
    if not isinstance(value, ComponentConfig):
        raise TypeError(
            f"`{slot}` must be a component's config or None, got {value!r}: pass what "
            "tta.get_config returns."
        )
    actual = component(value.name).slot
    if actual != slot:
        where = f"{actual}={value.name!r}" if actual else f"{slot}=None"
        raise ValueError(
            f"`{slot}` must be a component of that slot, got {value.name!r}, which belongs to "
            f"{actual or 'none'}: pass {where}."
        )
