"""The blocks of a network, found by structure: what is stacked, and what goes in and out of it.

Blocks are modules of one class, side by side in a container, each called once in a forward pass:
the layers of a vision transformer, the residual blocks of a stage. One pass on the ``meta`` device
shows which are called and with what shapes; no class or network is known by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tta.core.checks import nearest, shown
from tta.core.classifier import CONVOLUTIONS, dry_run
from tta.core.norm_layers import AdaptiveNorm, with_statistics
from tta.core.outputs import LogitsReader

__all__ = ["Block", "block_names", "channel_axis", "find_blocks", "sole_tensor"]

CONTAINERS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Block:
    """A block, as one pass of two images shows it.

    Args:
        name: In the model.
        images: Shape of the images (2, ...).
        taken: Shape of what it takes.
        given: Shape of what it gives.
        norm: Name of the module inside it that takes first what the block takes, if it normalises;
            None where there is none.
    """

    name: str
    images: tuple[int, ...]
    taken: tuple[int, ...]
    given: tuple[int, ...]
    norm: str | None = None

    @property
    def is_sequence(self) -> bool:
        """Whether it takes a sequence (B, N, D) and gives one of the same shape."""
        return len(self.taken) == 3 and self.taken == self.given


@dataclass(frozen=True)
class _Call:
    name: str
    taken: Tensor | None
    given: Tensor | None


def find_blocks(
    model: nn.Module, reader: LogitsReader, names: Sequence[str] | None = None
) -> list[Block]:
    """The outermost blocks of a model, in the order of their calls.

    Args:
        model: A classifier; its norm layers may be wrapped.
        reader: Takes logits out of what it returns.
        names: Modules that are to be taken as its blocks, in any order; None to find them.

    Returns:
        The blocks; none where there are none, or where no dry run succeeds.

    Raises:
        ValueError: When one of ``names`` is no module, or is not called once with one tensor.
    """
    images, calls = _calls(model, reader)
    by_name: dict[str, list[_Call]] = {}
    for call in calls:
        by_name.setdefault(call.name, []).append(call)

    def serves(name: str) -> bool:
        found = by_name.get(name, [])
        whole = len(found) == 1 and found[0].taken is not None and found[0].given is not None
        return whole and found[0].given.ndim in (3, 4)  # type: ignore[union-attr]

    if names is None:
        chosen = _stacked(model, serves)
    else:
        chosen = set(names)
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules or not name:
                raise ValueError(
                    f"`blocks` must name modules of the model, got {shown(name)}: "
                    + nearest(name, [key for key in modules if key], limit=10)
                )
            if not serves(name):
                raise ValueError(
                    "`blocks` must name modules that are called once in a pass, with one tensor, "
                    f"got {shown(name)}, which is not: name the blocks themselves."
                )
    # A module is noted when it returns, so what is inside it comes first.
    return [
        _block(call, calls[:i], model, images)
        for i, call in enumerate(calls)
        if call.name in chosen
    ]


def block_names(name: str, value: Any) -> None:
    """Refuse a field of a config that is neither None nor names of modules."""
    names = () if value is None else value
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"`{name}` must be names of modules, got {shown(value)}: pass such as "
            "('blocks.0', 'blocks.1')."
        )
    if value is not None and len(set(names)) != max(len(names), 1):
        raise ValueError(
            f"`{name}` must name at least one module, and each once, got {shown(value)}: pass None "
            "to have them found."
        )


def channel_axis(block: Block, module: nn.Module) -> int:
    """Where the channels are in what a block gives: last in sequences, mostly second in maps.

    The two other axes of a map are as long as the images are high and wide, in proportion. Where
    all three could be, maps (B, H, W, D) come from blocks without convolutions, as those of Swin
    transformers.
    """
    if len(block.given) == 3:
        return 2
    if len(block.given) == 4 and len(block.images) == 4:
        second, third, last = block.given[1:]
        channels_second = _in_proportion(third, last, block.images)
        if channels_second != _in_proportion(second, third, block.images):
            return 1 if channels_second else 3
    inside = (part for part in module.modules() if part is not module)
    return 1 if any(isinstance(part, (*CONVOLUTIONS, AdaptiveNorm)) for part in inside) else 3


def _in_proportion(height: int, width: int, images: Sequence[int]) -> bool:
    """Whether a map of this size may be of images (B, C, H, W), by one place more or less."""
    long = max(images[-2:])
    return abs(height * images[-1] - width * images[-2]) <= long


def sole_tensor(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The first argument of a module, by place or by name, if it is a tensor."""
    values = args or tuple(kwargs.values())
    return values[0] if values and isinstance(values[0], Tensor) else None


def _calls(model: nn.Module, reader: LogitsReader) -> tuple[tuple[int, ...], list[_Call]]:
    """Shape of the images of a dry run, and its calls of modules in the order of their ends."""
    calls: list[_Call] = []
    shapes: list[tuple[int, ...]] = []

    def start(module: nn.Module, args: Any) -> None:
        shapes.append(tuple(args[0].shape))

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = output[0] if isinstance(output, tuple) and len(output) == 1 else output
            given = given if isinstance(given, Tensor) else None
            calls.append(_Call(name, sole_tensor(args, kwargs), given))

        return hook

    handles = [model.register_forward_pre_hook(start)]
    handles += [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    wrappers = [m for m in model.modules() if isinstance(m, AdaptiveNorm)]
    try:
        with with_statistics(wrappers, lambda x, base: x):
            done = dry_run(model, reader, calls.clear) is not None
            return (shapes[-1], calls) if done else ((), [])
    finally:
        for handle in handles:
            handle.remove()


def _stacked(model: nn.Module, serves: Any) -> set[str]:
    """Names of the modules of one class in each of the outermost containers."""
    found: set[str] = set()
    inside: tuple[str, ...] = ()
    for prefix, container in model.named_modules():
        children = dict(container.named_children())
        if prefix.startswith(inside) or not _alike(container, list(children.values())):
            continue
        names = {f"{prefix}.{name}" if prefix else name for name in children}
        if all(map(serves, names)):
            found |= names
            inside = (*inside, *(f"{name}." for name in names))
    return found


def _alike(container: nn.Module, children: list[nn.Module]) -> bool:
    kinds = {type(child) for child in children}
    several = len(children) > (0 if isinstance(container, CONTAINERS) else 1)
    whole = all(
        not isinstance(child, (*CONTAINERS, AdaptiveNorm)) and next(child.children(), None)
        for child in children
    )
    return several and len(kinds) == 1 and whole


def _block(call: _Call, before: list[_Call], model: nn.Module, images: tuple[int, ...]) -> Block:
    assert call.taken is not None and call.given is not None
    inside = [c for c in before if c.name.startswith(f"{call.name}.")]
    first = next((c.name for c in inside if c.taken is call.taken), None)
    normalises = first is not None and "norm" in type(model.get_submodule(first)).__name__.lower()
    norm = first if normalises else None
    return Block(call.name, images, tuple(call.taken.shape), tuple(call.given.shape), norm)
