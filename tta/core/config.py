"""Configs: one frozen dataclass per component, to and from JSON, strict about names.

A config says *what* a component does and nothing about the model, so it can be written to a file
beside a result and read back. :class:`~tta.core.recipe.AdapterConfig` holds the configs of all
slots together with the arguments of ``wrap`` that change results.
"""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from tta.core.checks import (
    LARGE,
    LARGEST,
    boolean,
    nearest,
    number,
    one_of,
    shown,
    string,
    told,
    whole_number,
)

__all__ = ["CIFAR_ADAM", "LR_SCALINGS", "SLOTS", "ComponentConfig", "UpdateConfig", "lr_share"]

SLOTS = ("input", "norm", "update", "output", "guard")  # of an adapter
OPTIMIZERS = ("sgd", "adam", "adamw")
LR_SCALINGS = ("none", "linear", "linear_below", "small_batch")

# TENT's settings on CIFAR, which the repositories of most later methods use too.
CIFAR_ADAM: dict[str, Any] = {
    "optimizer": "adam",
    "lr": 1e-3,
    "lr_scaling": "linear_below",
    "lr_batch_size": 200,
}

Self = TypeVar("Self", bound="ComponentConfig")
SelfUpdate = TypeVar("SelfUpdate", bound="UpdateConfig")


@dataclass(frozen=True, kw_only=True)
class ComponentConfig:
    """Base of all component configs; ``name`` is set when the component is registered."""

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the types of booleans and strings; a subclass adds the checks of its numbers.

        Numbers of numpy become those of Python, which JSON knows.
        """
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
            if field.type in ("bool", bool):
                boolean(field.name, getattr(self, field.name))
            elif field.type in ("str", str):
                string(field.name, getattr(self, field.name))

    def to_dict(self) -> dict[str, Any]:
        """The component's name and every field, as JSON types."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name} | {
            key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()
        }

    def for_batch_size(self: Self, batch_size: int | None) -> Self:
        """Return this config with everything decided that depends on the stream's batch size."""
        return self

    def override(self: Self, **changes: Any) -> Self:
        """Replace fields that the caller of ``wrap`` or ``get_config`` names."""
        return self.replace(**changes)

    def replace(self: Self, **changes: Any) -> Self:
        """Return a copy with some fields changed.

        Raises:
            ValueError: For an unknown field, naming the nearest one.
        """
        known = {f.name: f for f in dataclasses.fields(self)}
        for key in changes:
            if key not in known:
                raise ValueError(
                    f"`{told(key)}` is not a field of {self.name or type(self).__name__}: "
                    + nearest(key, known)
                )
        changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        return dataclasses.replace(self, **changes)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(ComponentConfig):
    """Fields of every update that takes gradient steps."""

    lr: float = 2.5e-4  # learning rate
    lr_scaling: str = "none"  # of lr by batch_size: "none", "linear", "linear_below", "small_batch"
    lr_batch_size: int = 64  # batch size for which lr is given
    optimizer: str = "sgd"  # "sgd", "adam" or "adamw"
    momentum: float = 0.9  # SGD only; dampening is 0
    betas: tuple[float, float] = (0.9, 0.999)  # Adam and AdamW only; their eps is 1e-8
    weight_decay: float = 0.0  # of what is trained, added to gradients (AdamW: apart from them)
    nesterov: bool = False  # SGD only
    steps: int = 1  # (forward, update) cycles per batch; the last cycle's forward is returned
    params: str = "norm"  # trained: "norm", "weight_bias", "head", "body", "all" or a regex
    official: bool = False  # reproduce the official code's known defects, see the method's page

    def __post_init__(self) -> None:
        super().__post_init__()
        number("lr", self.lr, 0, LARGE)
        one_of("lr_scaling", self.lr_scaling, LR_SCALINGS)
        whole_number("lr_batch_size", self.lr_batch_size, 1, LARGEST)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        below_one = "use a value below 1"
        number("momentum", self.momentum, 0, 1, below=True, advice=below_one)
        if not isinstance(self.betas, tuple):
            raise TypeError(
                f"`betas` must be a pair of numbers, got {shown(self.betas)}; pass a tuple such as "
                "(0.9, 0.999)"
            )
        if len(self.betas) != 2:
            raise ValueError(
                f"`betas` must be a pair of numbers, got {shown(self.betas)}; pass two of them"
            )
        betas = tuple(number("betas", b, 0, 1, below=True, advice=below_one) for b in self.betas)
        object.__setattr__(self, "betas", betas)  # torch takes no pair of an int and a float
        number("weight_decay", self.weight_decay, 0, LARGE)
        whole_number("steps", self.steps, 1, 10**6)
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "`momentum` must be above 0 with nesterov=True, got 0: set one of them"
            )

    def override(self: SelfUpdate, **changes: Any) -> SelfUpdate:
        """Replace fields; a learning rate that the caller names is never scaled."""
        return self.replace(**({"lr_scaling": "none"} if "lr" in changes else {}) | changes)

    def for_batch_size(self: SelfUpdate, batch_size: int | None) -> SelfUpdate:
        """Return this config with ``lr`` scaled for ``batch_size``, once and for all.

        The reference is ``lr_batch_size``. Two rules are those of the EATA and SAR repositories'
        scripts: "linear" for vision transformers, lr * B / reference; "small_batch" for ResNets, lr
        unchanged from 32 images up and lr * 2 B / reference below. Other authors do not scale
        ("none"), and their rates ruin the model where batches are much smaller than theirs; so
        their presets say "linear_below" here, which is lr * B / reference below the batch size of
        the preset and lr from there up.
        """
        if batch_size is None or self.lr_scaling == "none":
            return self.replace(lr_scaling="none")
        share = lr_share(self.lr_scaling, batch_size, self.lr_batch_size)
        return self.replace(lr=self.lr * share, lr_batch_size=batch_size, lr_scaling="none")


def lr_share(rule: str, batch_size: int, reference: int) -> float:
    """What a rule of ``LR_SCALINGS`` multiplies a learning rate by.

    Args:
        rule: See :meth:`UpdateConfig.for_batch_size`.
        batch_size: Of the stream.
        reference: Batch size for which the rate is given.
    """
    share = batch_size / reference
    if rule == "small_batch":
        return 2 * share if batch_size < 32 else 1.0
    if rule == "linear_below":
        return min(share, 1.0)
    return share if rule == "linear" else 1.0
