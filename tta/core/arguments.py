"""What an adapter is called with: the images, and what else goes to the model."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn

__all__ = ["check_without_tensors", "split_arguments"]


def split_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split the arguments into the images and the model's other arguments.

    Raises:
        TypeError: When there are no images among them.
    """
    if args:
        return args[0], args[1:], kwargs
    parameters = list(signature(model.forward).parameters.values())
    name = parameters[0].name if parameters else "images"
    name = name if name in kwargs else "images"
    if name not in kwargs:
        raise TypeError(
            "`images` must be the first argument, or go by the name of the model's first "
            f"parameter, got {', '.join(kwargs) or 'nothing'}: pass adapter(images)."
        )
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def check_without_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse tensors beside the images, which images of earlier calls would not have."""
    if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        raise ValueError(
            "`images` must come without other tensors where a window shows the model earlier "
            "images, which have none, got some: wrap without window=, or put them into the model."
        )
