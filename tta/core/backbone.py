"""The wrapped model as methods see it: a function from images to logits and features.

Features are what the classifier (:mod:`tta.core.classifier`) is fed, averaged over space where it
is a convolution; they are read by a hook, so that no model has to be split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tta.core import functional
from tta.core.batch_split import Split
from tta.core.classifier import CONVOLUTIONS, first_layer, size_in, size_out
from tta.core.compiled import without_graphs
from tta.core.norm_layers import AdaptiveNorm, few_images_advice
from tta.core.prediction import Prediction
from tta.core.session import Session

__all__ = ["Backbone", "ImagesRefusedError"]

Weights = tuple[Sequence[list[str]], Sequence[Tensor]]


class ImagesRefusedError(ValueError):
    """The model raised on images of a shape that its first layer does not take."""


class _InputHook:
    """A forward pre-hook that keeps the input of its layer; picklable, unlike a closure."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.value = args[0]


class _CallOrderHook:
    """A forward pre-hook that notes the first call of its layer."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.name not in self.order:
            self.order.append(self.name)


class Backbone:
    """Calls the model, checks what comes out, and reads features when asked to.

    Args:
        model: A classifier in eval mode.
        classifier: Its layer that makes the logits, see :mod:`tta.core.classifier`.
        features: Whether predictions carry features.
        session: Shared with the adapter.
    """

    def __init__(
        self, model: nn.Module, classifier: nn.Module, features: bool, session: Session
    ) -> None:
        self.model = model
        self.classifier = classifier
        self.session = session
        self.num_classes = size_out(classifier)
        self.feature_hook = _InputHook() if features else None
        self._handles: list[Any] = []
        self._order_hooks: list[Any] = []
        self._order: list[str] = []
        if self.feature_hook is not None:
            self._handles.append(classifier.register_forward_pre_hook(self.feature_hook))
        self.wrappers = [m for m in model.modules() if isinstance(m, AdaptiveNorm)]
        self.entry = first_layer(model)

    def names(self, tensors: Iterable[Tensor]) -> list[list[str]]:
        """Names in the model as it is now, with norm layers inside their wrappers."""
        return functional.names(self.model, tensors)

    def __call__(self, x: Tensor, weights: Weights | None = None) -> Prediction:
        """One forward pass.

        Args:
            x: What the model takes.
            weights: What :meth:`names` returned, and the tensors that are used there.

        Raises:
            ImagesRefusedError: When the model raised and the shape of ``x`` is the reason.
        """
        ranks = self.session.ranks
        if ranks is None or ranks.size == 1 or len(x) < ranks.size:
            return self._pass(x, weights)
        with ranks.splitting(len(x)) as split:
            if torch.is_grad_enabled():
                weights = self._shared(split, weights)
            own = self._pass(x[split.own], weights)
        features = None if own.features is None else split.collect(own.features)
        return Prediction(split.collect(own.logits), features)

    def _shared(self, split: Split, weights: Weights | None) -> Weights:
        """``weights``, and all that is trained, with gradients that are summed over ranks."""
        places, values = ([], []) if weights is None else weights
        given = {name for names in places for name in names}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        more = [(n, p) for n, p in zip(self.names(trained), trained, strict=True)]
        more = [(names, p) for names, p in more if not given.issuperset(names)]
        places = [*places, *(names for names, _ in more)]
        return places, split.share([*values, *(p for _, p in more)])

    def _pass(self, x: Tensor, weights: Weights | None) -> Prediction:
        hooked = self.feature_hook is not None or bool(self._order_hooks)
        try:
            with without_graphs(hooked):
                logits = functional.call(self.model, *(weights or ([], [])), x)
            self._check_logits(logits, len(x))
        except Exception as error:
            if (refusal := self.refusal(error, x)) is None:
                raise
            raise refusal from error
        if self.session.serving:
            self._warn_of_small_batch()
        features = None
        if self.feature_hook is not None:
            if self.feature_hook.value is None:
                raise ValueError(
                    "`model` must call its classifier in forward, but "
                    f"{type(self.classifier).__name__} was not called: give the model a "
                    "get_classifier() that returns the layer which makes the logits."
                )
            features, self.feature_hook.value = (
                _pooled(self.feature_hook.value, self.classifier),
                None,
            )
        return Prediction(logits, features)

    def _check_logits(self, logits: Any, rows: int) -> None:
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"`model` must return one tensor of logits, got {type(logits).__name__}: wrap it "
                "in a module that returns the logits."
            )
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"`model` must return logits of shape (B, {self.num_classes}), the size of its "
                f"classifier, got {tuple(logits.shape)}: give it a get_classifier() that returns "
                "the layer which makes the logits."
            )
        if len(logits) != rows:
            raise ValueError(
                f"`images` must have a batch axis, but the model returned {len(logits)} rows of "
                f"logits for a first axis of {rows}: add one with images[None]."
            )

    def check(self, x: Any) -> None:
        """Refuse what is no batch of images in the model's dtype, before anything has changed.

        Raises:
            TypeError: Not a floating-point tensor of the model's dtype.
            ValueError: No batch axis, or an empty batch.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"`images` must be a tensor, got {type(x).__name__}: pass a batch.")
        if x.layout != torch.strided or x.is_meta:
            raise TypeError(
                f"`images` must be a dense tensor with values, got {x.layout} on {x.device}: "
                "convert it with to_dense()."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"`images` must be floating point, got {x.dtype}: pass what the model takes, "
                "such as images.float() / 255."
            )
        if x.ndim < 2:
            raise ValueError(
                f"`images` must have a batch axis and more, got shape {tuple(x.shape)}: add one."
            )
        if x.shape[0] == 0 or x.numel() == 0:
            raise ValueError(
                f"`images` must hold at least one image, got shape {tuple(x.shape)}: "
                "skip empty batches."
            )
        entry = self.entry
        if self.session.ranks is not None:
            self.session.ranks.check_batch(x)
        if entry is not None and x.dtype != entry.weight.dtype:
            if torch.is_autocast_enabled(x.device.type):
                return
            raise TypeError(
                f"`images` must be {entry.weight.dtype} like the model, got {x.dtype}: convert "
                "one of them, or call under torch.autocast."
            )

    def refusal(self, error: BaseException, x: Tensor) -> ImagesRefusedError | None:
        """What to raise in place of ``error``, which came of ``x``, if the shape may be why.

        The first layer is taken for what images meet. Models that rearrange or repeat pixels
        before it accept other shapes, so this is no ground to refuse a batch beforehand.
        """
        final = (ImagesRefusedError, torch.OutOfMemoryError)
        reason = self._misfit(x)
        if reason is None or not isinstance(error, Exception) or isinstance(error, final):
            return None
        return ImagesRefusedError(reason)

    def _misfit(self, x: Tensor) -> str | None:
        """What of the shape of ``x`` the first layer does not take, if anything."""
        entry, shape = self.entry, tuple(x.shape)
        if isinstance(entry, nn.Linear):
            if shape[-1] == entry.in_features:
                return None
            return (
                f"`images` must end in an axis of {entry.in_features}, got shape {shape}: "
                "reshape them."
            )
        if not isinstance(entry, CONVOLUTIONS):
            return None
        rank = entry.weight.ndim
        if x.ndim != rank:
            advice = "add a batch axis with images[None]" if x.ndim == rank - 1 else "reshape them"
            return (
                f"`images` must have {rank} axes (batch, {entry.in_channels} channels, {rank - 2} "
                f"of space), got shape {shape}: {advice}."
            )
        if x.shape[1] != entry.in_channels:
            return (
                f"`images` must have {entry.in_channels} channels, got shape {shape}: convert "
                "them to what the model takes."
            )
        return None

    def _warn_of_small_batch(self) -> None:
        """Before anything is learned from the batch, as the caller may make warnings errors."""
        for wrapper in self.wrappers:
            if wrapper.rule.fell_back:
                self.session.warn_once("small", few_images_advice(wrapper.rule.name))
                return

    def watch_calls(self, names: Iterable[str]) -> None:
        """Note, from now on, in which order the named layers are called."""
        for name in names:
            hook = _CallOrderHook(name, self._order)
            self._order_hooks.append(self.model.get_submodule(name).register_forward_pre_hook(hook))

    def call_order(self) -> list[str]:
        """The watched layers in the order of their first call, those never called left out.

        Watching ends here.
        """
        for handle in self._order_hooks:
            handle.remove()
        order, self._order_hooks, self._order = self._order, [], []
        return order

    def close(self) -> None:
        """Take all hooks off the model."""
        self.call_order()
        for handle in self._handles:
            handle.remove()


def _pooled(features: Tensor, classifier: nn.Module) -> Tensor:
    """(B, D) of what a classifier was fed: (B, ..., D) to a linear layer, else mostly (B, D, ...).

    A classifier that makes logits at every place is averaged after it; being linear, it may as
    well be averaged before.
    """
    if features.ndim == 2:
        return features
    is_linear = isinstance(classifier, nn.Linear)
    channels_first = not is_linear and features.shape[1] == size_in(classifier)
    return features.mean(
        list(range(2, features.ndim) if channels_first else range(1, features.ndim - 1))
    )
