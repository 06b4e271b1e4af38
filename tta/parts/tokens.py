"""Prompt tokens in a vision transformer, and the class tokens between its blocks, by hooks.

Prompts are P more rows behind position 0 of the (B, N, D) sequence that enters the first block,
after positions were added. That makes sense where position 0 is a class token, where blocks take
the other rows as a set, and where the classifier sees the class token alone. All of it is found out
from how the model behaves, and a model that is otherwise is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.batch_split import current_split
from tta.core.component import Remembers
from tta.core.outputs import LogitsReader
from tta.core.prediction import Prediction
from tta.parts.blocks import Block, find_blocks, sole_tensor

__all__ = ["MOST_PROMPTS", "TokenPrompts", "takes_prompts", "uniform_start"]

MOST_PROMPTS = 1000  # tokens
# Largest difference of features, as a share of their size, that rounding may make.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE = 5e-2  # in other dtypes

Change = Callable[[Tensor], Tensor]


def takes_prompts(model: nn.Module) -> bool:
    """Whether a model has one stack of blocks that pass on a sequence (B, N, D)."""
    return _misfit(_sequential(model, LogitsReader())) is None


class TokenPrompts(Remembers):
    """Runs a model with prompt tokens, and reads its class token on the way.

    Args:
        network: The wrapped model, with features.
        name: Of the component, for what is said.
        blocks: Names of the blocks, in any order; None to find them.

    Raises:
        ValueError: When the model has no such blocks.
    """

    def __init__(self, network: Backbone, name: str, blocks: Sequence[str] | None = None) -> None:
        model, reader = network.model, network.reader
        found = find_blocks(model, reader, blocks) if blocks else _sequential(model, reader)
        if network.feature_hook is not None:
            network.feature_hook.values = []  # a dry run leaves nothing there
        if (misfit := _misfit(found, blocks is not None)) is not None:
            raise _refusal(name, misfit)
        self.name = name
        self.depth = len(found)  # L
        self.width = found[0].taken[2]  # D
        self._images = found[0].images
        self._prompts: Tensor | None = None
        self._read: dict[int, Tensor] | None = None  # class tokens of this pass, by block
        modules = dict(network.model.named_modules())
        self._ends = modules[found[0].name], modules[found[-1].name]
        handles = network.handles
        handles.append(self._ends[0].register_forward_pre_hook(self._insert, with_kwargs=True))
        for i, block in enumerate(found[1:]):
            if block.norm is None:
                taken = partial(self._note_taken, i)
                handle = modules[block.name].register_forward_pre_hook(taken, with_kwargs=True)
            else:
                handle = modules[block.norm].register_forward_hook(partial(self._note_given, i))
            handles.append(handle)

    def run(self, network: Backbone, x: Tensor, prompts: Tensor | None = None) -> Prediction:
        """One pass of images (B, ...) with prompts (P, D), or without any."""
        with self._with(prompts, network):
            return network(x)

    def run_reading(
        self, network: Backbone, x: Tensor, prompts: Tensor | None = None
    ) -> tuple[Prediction, Tensor]:
        """As :meth:`run`, and class tokens (L, B, D) after each block, in float32.

        Each is taken through the norm at the entrance of the next block, if there is one, and the
        last as the classifier takes it.
        """
        self._read = read = {}
        try:
            prediction = self.run(network, x, prompts)
        finally:
            self._read = None
        assert prediction.features is not None
        tokens = [*(read[i] for i in range(self.depth - 1)), prediction.features]
        return prediction, torch.stack([token.float() for token in tokens])

    @torch.no_grad()
    def check(self, network: Backbone) -> None:
        """Refuse a model in which prompts have no meaning, from passes of two random images.

        Raises:
            ValueError: When position 0 is no class token, when blocks tell other positions apart,
                or when the classifier sees other tokens than that at position 0.
        """
        weight = next(p for p in network.model.parameters() if p.is_floating_point())
        draw = torch.Generator().manual_seed(0)
        x = torch.rand(self._images, generator=draw).to(weight)
        seen: list[Tensor] = []

        def look(tokens: Tensor) -> Tensor:
            seen.append(tokens.clone())
            return tokens

        def shuffle(tokens: Tensor) -> Tensor:
            order = torch.randperm(tokens.shape[1] - 1, generator=draw).to(tokens.device)
            return torch.cat([tokens[:, :1], tokens[:, 1:][:, order]], 1)

        def blank(tokens: Tensor) -> Tensor:
            return torch.cat([tokens[:, :1], torch.zeros_like(tokens[:, 1:])], 1)

        plain = self._probe(network, x, entering=look)
        first = seen[0][:, 0]
        if not torch.equal(first[0], first[1]):
            raise _refusal(self.name, "its position 0 depends on the image")
        limit = ROUNDING.get(weight.dtype, COARSE)
        if _apart(plain, self._probe(network, x, leaving=blank)) > 1e-6:
            raise _refusal(self.name, "its classifier sees other tokens than that at position 0")
        if _apart(plain, self._probe(network, x, entering=shuffle)) > limit:
            raise _refusal(self.name, "its blocks tell positions apart")
        row = torch.randn(1, self.width, generator=draw).to(weight.device)
        try:
            found = _all_of(self.run(network, x, row))
        except Exception as error:  # whatever a block raises on a longer sequence
            problem = "its blocks take sequences of one length alone"
            raise _refusal(self.name, problem) from error
        if _apart(plain, found) == 0:
            raise _refusal(self.name, "prompts change nothing")

    def _probe(
        self,
        network: Backbone,
        x: Tensor,
        entering: Change = lambda t: t,
        leaving: Change = lambda t: t,
    ) -> Tensor:
        """Features and logits of a pass whose sequence is changed before or after the blocks."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return _with_first(args, kwargs, entering)

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            return (leaving(output[0]),) if isinstance(output, tuple) else leaving(output)

        first, last = self._ends
        handles = [
            first.register_forward_pre_hook(before, with_kwargs=True),
            last.register_forward_hook(after),
        ]
        try:
            return _all_of(network(x))
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _with(self, prompts: Tensor | None, network: Backbone) -> Iterator[None]:
        self._prompts = prompts
        network.session.inserted = 0 if prompts is None else len(prompts)
        try:
            yield
        finally:
            self._prompts, network.session.inserted = None, 0

    def _insert(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._prompts is None:
            return None
        prompts, split = self._prompts, current_split()
        if split is not None and prompts.requires_grad:
            prompts = split.share([prompts])[0]

        def longer(tokens: Tensor) -> Tensor:
            count = tokens.shape[0]  # len() would fix it in a graph
            rows = prompts.to(tokens.dtype).expand(count, -1, -1)
            return torch.cat([tokens[:, :1], rows, tokens[:, 1:]], 1)

        return _with_first(args, kwargs, longer)

    def _note_taken(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._note(i, sole_tensor(args, kwargs))

    def _note_given(self, i: int, module: nn.Module, args: Any, output: Tensor) -> None:
        self._note(i, output)

    def _note(self, i: int, tokens: Tensor | None) -> None:
        if self._read is not None and tokens is not None:
            split, own = current_split(), tokens[:, 0]
            self._read[i] = own if split is None else split.collect(own)


def uniform_start(network: Backbone, numbers: Tensor) -> Tensor:
    """Prompts uniform in (-v, v), v = sqrt(6 / (pixel values of a patch + D)).

    Args:
        network: Whose first layer shows how many pixel values make a patch.
        numbers: (P, D) uniform in [0, 1).
    """
    pixels = 0 if network.entry is None else network.entry.weight[0].numel()
    limit = math.sqrt(6 / (pixels + numbers.shape[1]))
    return ((2 * numbers - 1) * limit).float()


def _with_first(args: Any, kwargs: dict[str, Any], change: Change) -> Any:
    """Arguments of a module with its first one changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, kwargs | {first: change(kwargs[first])}


def _sequential(model: nn.Module, reader: LogitsReader) -> list[Block]:
    """The blocks that pass on a sequence; not those of a convolutional stem before them."""
    return [block for block in find_blocks(model, reader) if block.is_sequence]


def _misfit(blocks: list[Block], named: bool = False) -> str | None:
    """Why prompts cannot be put before these blocks, in words; None where they can."""
    if not blocks:
        return "no blocks are found in it that pass on a sequence (B, N, D)"
    if not all(block.is_sequence and block.taken == blocks[0].taken for block in blocks):
        return "its blocks do not pass on one sequence (B, N, D)"
    stacks = {block.name.rpartition(".")[0] for block in blocks}
    return None if named or len(stacks) == 1 else "it has several stacks of blocks"


def _all_of(prediction: Prediction) -> Tensor:
    assert prediction.features is not None
    return torch.cat([prediction.features.float(), prediction.logits.float()], 1)


def _refusal(name: str, problem: str) -> ValueError:
    return ValueError(
        f"`model` must be a vision transformer with a class token for {name}, but {problem}: name "
        "its blocks by blocks=, or use another method."
    )


def _apart(one: Tensor, other: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    gone = (one.float() - other.float()).abs().max() / one.float().abs().max().clamp_min(1e-12)
    return float(gone) if bool(gone.isfinite()) else math.inf
