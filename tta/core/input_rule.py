"""The input slot: what the model is given in place of the images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.component import Component, Context
from tta.core.config import ComponentConfig
from tta.core.loan import Loan
from tta.core.masters import NeverHalf
from tta.core.outputs import GIVEN
from tta.core.oversight import without_trace
from tta.core.prediction import Prediction, Report
from tta.core.source import SourceStatistics

__all__ = ["DEFAULT_INPUT", "GivenInput", "Input", "Inputs"]

DEFAULT_INPUT = "dda"  # what a denoiser is for, where nobody says


class Input(Component):
    """Turns images into other images before the model sees them. A subclass defines ``transform``.

    ``learning`` is False while the adapter is frozen; draws are then the same at every call.

    Args:
        config: The component's config.
        network: The wrapped model.
        context: What is known at wrap.
    """

    slot = "input"
    must_define = ("transform",)
    # Whether the images as they came are classified too, and what is made of both predictions:
    # "logits" joins them by `join`, "images" mixes the images by `fuse`, which are classified.
    joins: str | None = None
    # The buffer that holds a prompt (C, H, W), which a cloud side may set: see tta.runtime.cloud.
    prompt_buffer: ClassVar[str | None] = None

    def __init__(self, config: Any, network: Backbone, context: Context) -> None:
        super().__init__(config)
        self.network = network
        self.context = context
        self.learning = True
        self.report = Report()
        self._loans: list[Loan] = []
        self._held: list[nn.Module] = []  # in a list, so that they are no modules of this one

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """Use modules of the caller's: in eval mode, without gradients, on the model's device."""
        for module in modules:
            self._held.append(module)
            self._loans.append(Loan(module, (), (), mark=False))
            parameter = next(self.network.model.parameters(), None)
            if parameter is not None:
                module.to(parameter.device)

    def release(self) -> None:
        """Give the caller's modules back as they were."""
        while self._loans:
            self._loans.pop().end()

    def fit(self, source: SourceStatistics, network: Backbone) -> None:
        """Take what the rule needs from ``source``, or raise ``ValueError`` if it is not there."""
        self.attach(source)

    def transform(self, images: Tensor) -> Tensor:
        """Return images (B, ...) in place of those given (B, ...), as the model takes them."""
        raise NotImplementedError  # pragma: no cover

    def classify(self, images: Tensor) -> Tensor | None:
        """Return logits (B, C) of the images as they came; None for those of the wrapped model."""
        return None

    def join(self, logits: Tensor, other: Tensor) -> Tensor:
        """Return logits (B, C), of those of the images as they came and of the others."""
        raise NotImplementedError  # pragma: no cover

    def fuse(self, images: Tensor, others: Tensor, logits: Tensor, other: Tensor) -> Tensor:
        """Return images (B, ...) of those that came and the others, by their logits (B, C)."""
        raise NotImplementedError  # pragma: no cover

    def _apply(self, fn: Any, recurse: bool = True) -> Input:
        super()._apply(fn, recurse)
        for module in self._held:
            module._apply(fn.fn if isinstance(fn, NeverHalf) else fn)
        return self


class GivenInput(Input):
    """A module of the caller's, images to images; its buffers are the state.

    Args:
        module: Any module.
        network: The wrapped model.
        context: What is known at wrap.
    """

    name = GIVEN
    takes_softmax = False

    def __init__(self, module: nn.Module, network: Backbone, context: Context) -> None:
        super().__init__(ComponentConfig(), network, context)
        self.hold([module])
        _share_buffers(self, module, {})

    def transform(self, images: Tensor) -> Tensor:
        """What the module makes of the images."""
        return self._held[0](images)

    def undefined_as_nan(self) -> tuple[str, ...]:
        """Any: nobody knows what they mean."""
        return tuple(self.state_dict())

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Any, for the same reason."""
        return dict.fromkeys(self.state_dict(), (-(2**63), 2**63 - 1))


def _share_buffers(mine: nn.Module, module: nn.Module, seen: dict[int, nn.Module]) -> None:
    """Give ``mine`` the dict of buffers of ``module``, and children that do so for its children."""
    seen[id(module)] = mine
    mine.__dict__["_buffers"] = module._buffers
    endless = {
        name
        for name, b in module._buffers.items()
        if b is not None and b.is_floating_point() and not bool(torch.isfinite(b).all())
    }
    mine.__dict__["_non_persistent_buffers_set"] = endless  # masks, which no state may hold
    for name, child in module._modules.items():
        if child is None:
            continue
        if id(child) not in seen:
            _share_buffers(nn.Module(), child, seen)
        mine._modules[name] = seen[id(child)]


class Inputs:
    """Runs the input rule of an adapter.

    Args:
        rule: The rule.
        network: The wrapped model.
        generator: Source of all random draws.
    """

    def __init__(self, rule: Input, network: Backbone, generator: torch.Generator) -> None:
        self.rule = rule
        self.network = network
        self.generator = generator

    def __call__(self, x: Tensor, follow: bool, learning: bool) -> tuple[Tensor, Tensor | None]:
        """What the model is given in place of ``x``, and logits of ``x`` to join to its own.

        Args:
            x: Images (B, ...).
            follow: Whether gradients flow to them.
            learning: Whether the generator goes on.

        Raises:
            TypeError: When the rule returns no images for these.
        """
        rng = None if learning else self.generator.get_state()
        before = {} if learning else {k: b.clone() for k, b in self.rule.state_dict().items()}
        try:
            with torch.set_grad_enabled(follow):
                found = self.rule.transform(x)
        finally:
            if rng is not None:
                self.generator.set_state(rng)
                _put_back(self.rule, before)
        self._check(found, x)
        if self.rule.joins is None:
            return found, None
        logits = self._plain(x, follow)
        if self.rule.joins == "logits":
            return found, logits
        other = self._plain(found, follow)
        with torch.set_grad_enabled(follow):
            fused = self.rule.fuse(x, found, logits, other)
        self._check(fused, x)
        return fused, None

    def join(self, logits: Tensor | None, prediction: Prediction) -> Prediction:
        """The prediction, with the logits of the images as they came joined to its own."""
        if logits is None:
            return prediction
        return Prediction(self.rule.join(logits, prediction.logits), prediction.features)

    def _plain(self, x: Tensor, follow: bool) -> Tensor:
        with torch.set_grad_enabled(follow):
            found = self.rule.classify(x)
            if found is None:
                with without_trace(self.network):
                    found = self.network(x).logits
                self.network.check_next()
        if found.shape != (len(x), self.network.num_classes):
            raise ValueError(
                f"`classifier` must return logits ({len(x)}, {self.network.num_classes}), got "
                f"shape {tuple(found.shape)}: pass one with the wrapped model's classes."
            )
        return found

    def _check(self, found: Any, x: Tensor) -> None:
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(x):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"`input` must return as many images as it is given, {len(x)}, got {got}: correct "
                "the module."
            )


@torch.no_grad()
def _put_back(rule: Input, before: dict[str, Tensor]) -> None:
    """Give the buffers of a rule the values that they had before a frozen call."""
    now = rule.state_dict()
    for name, value in before.items():
        if not torch.equal(now[name], value):
            now[name].copy_(value)
