"""The wrapped model as methods see it: a function from images to logits and features.

Features are the input of the classifier (:mod:`tta.core.head`), as a hook reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tta.core import functional
from tta.core.batch_split import Split
from tta.core.classifier import first_layer
from tta.core.compiled import without_graphs
from tta.core.head import Head, WithFeatures
from tta.core.hooks import CallOrderHook, InputHook, drop_hooks, next_hook, pooled
from tta.core.image_checks import ImageChecks
from tta.core.input_guard import ArgumentGuard, InputGuard, copies, rows_refusal
from tta.core.logit_checks import LogitChecks, RowsOverflowError, ends_in_head, overflow
from tta.core.masters import Masters
from tta.core.model_buffers import ModelBuffers
from tta.core.norm_layers import (
    AdaptiveNorm,
    few_images_advice,
    frozen_statistics,
    normalize_by_source,
    with_statistics,
)
from tta.core.outputs import LogitsReader
from tta.core.prediction import Prediction
from tta.core.session import Session
from tta.core.structure import OtherTensors
from tta.core.traced_pass import is_recorded, traced_pass

__all__ = ["Backbone"]

# All names of each tensor in the model, and the tensors to use under these names.
Weights = tuple[Sequence[list[str]], Sequence[Tensor]]


class Backbone:
    """Calls the model, checks what comes out, and reads features when asked to.

    Args:
        model: A classifier in eval mode, with its norm layers wrapped.
        head: Where the model makes its logits.
        features: Whether predictions carry features.
        session: Shared with the adapter.
        reader: Takes logits out of what the model returns.
        masters: The trained parameters.
        buffers: The buffers that the model itself changes.
        softmax: Whether the logits are meant for a softmax, rather than a sigmoid.
        linear: Whether a component takes the logits to be those of the head's linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        features: bool,
        session: Session,
        reader: LogitsReader,
        masters: Masters,
        buffers: ModelBuffers,
        softmax: bool = True,
        linear: bool = False,
    ) -> None:
        self.model = model
        self.head = head
        self.num_classes = head.num_classes
        self.session = session
        self.reader = reader
        self.masters = masters
        self.buffers = buffers
        session.around_backward = buffers.as_before_pass
        self.guard, self.more = InputGuard(), ArgumentGuard()
        self.result: Any = None  # what the model returned for the images
        self.wrappers = [m for m in model.modules() if isinstance(m, AdaptiveNorm)]
        self.entry = first_layer(model)
        self.images = ImageChecks(self.entry)
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._first_pass = False  # whether the next pass is the first of a call
        order = head.linear if features and head.function is None else None
        judged = self.classifier if linear else None
        self._logit_checks = LogitChecks(session, softmax, judged, order)
        self.handles: list[Any] = []  # of hooks, components' too, that `close` takes off
        self._order_hooks: list[Any] = []
        self.first_hook = next_hook()  # number of the first one that a call may put on
        self._order: list[str] = []
        self.feature_hook: InputHook | None = None
        if session.logit_hook is not None:
            self.handles.append(head.linear.register_forward_hook(session.logit_hook))
        self._callee, self._prefix = model, ""
        if features and head.module is not None:
            self.feature_hook = InputHook()
            self.handles.append(head.module.register_forward_pre_hook(self.feature_hook))
        elif features:
            self._callee, self._prefix = WithFeatures(model, head.function), "model."
        own_reader = LogitsReader(0) if self._prefix else reader
        self._other = OtherTensors(self._callee, own_reader, session.frugal)
        places = functional.names(model, [p for _, p in masters.pairs])
        self._master_places = [
            (names, master, p) for names, (master, p) in zip(places, masters.pairs, strict=True)
        ]
        if masters.pairs or buffers.moving:
            self._prepare()

    @property
    def classifier(self) -> Any:
        """The layer that makes logits out of features.

        Raises:
            ValueError: When no layer is known to do so.
        """
        if self.head.module is None:
            raise ValueError(
                "`model` must make its logits by a linear layer for a method that reads it, got a "
                "head that is none: use another method."
            )
        return self.head.module

    def names(self, tensors: Iterable[Tensor]) -> list[list[str]]:
        """All names of each tensor in the model as it is now, with norm layers inside wrappers."""
        self._prepare()
        return functional.names(self.model, self.masters.in_model(tensors))

    def _prepare(self) -> None:
        """Find out how to run the model with other weights; a dry run leaves nothing in hooks."""
        self._other.prepare()
        self._order.clear()
        if self.feature_hook is not None:
            self.feature_hook.values = []

    def __call__(self, x: Tensor, weights: Weights | None = None) -> Prediction:
        """One forward pass.

        Args:
            x: Images (B, ...), as the model takes them.
            weights: What :meth:`names` returned, and tensors for these names; None for the own.

        Returns:
            Logits (B, C), and features (B, D) if predictions carry any.

        Raises:
            ImagesRefusedError: When the model raised and shape or size of ``x`` is the reason.
            RowsOverflowError: When logits of some images are NaN or infinite.
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
        """Add all trained tensors to ``weights``, with gradients that are summed over ranks."""
        places, values = ([], []) if weights is None else weights
        given = {name for names in places for name in names}
        own = [p for p in self.model.parameters() if p.requires_grad]
        trained: list[Tensor] = [*own, *(master for _, master, _ in self._master_places)]
        more = list(zip(self.names(trained), trained, strict=True))
        more = [(names, p) for names, p in more if not given.issuperset(names)]
        places = [*places, *(names for names, _ in more)]
        return places, split.share([*values, *(p for _, p in more)])

    def _pass(self, x: Tensor, weights: Weights | None) -> Prediction:
        if any(w.rule.learns_first and w.rule.learning for w in self.wrappers):
            self._learn_first(x, weights)
            with frozen_statistics(self.wrappers):
                return self._pass(x, weights)
        if is_recorded():
            return traced_pass(self, x, self._tensors(weights))
        hooked = bool(self.handles or self._order_hooks)
        self.session.recording = torch.is_grad_enabled()
        tensors, lent = self._tensors(weights), self.guard.lend(x)
        args, kwargs, more = self.more.lend(*self.arguments)
        try:
            with without_graphs(hooked), self.buffers.apart(tensors, self._prefix):
                result = self.session.run(self._other, tensors, lent[0], *args, **kwargs)
            result, features = result if self._prefix else (result, None)
            logits = self.reader.read(result)
            self._check_logits(logits, len(x))
            if not logits.requires_grad:  # a model may give the same tensor again next time
                logits = logits.clone()
            if self.feature_hook is not None:
                features = self._hooked_features(len(x))
            self._check_features(features, len(x))
        except Exception as error:
            refusal = self.images.refusal(error, x)
            refusal = refusal or rows_refusal(error, len(x), args, kwargs)
            if (refusal := refusal or self.images.size_refusal(error, x, self.model)) is None:
                raise
            raise refusal from error
        finally:
            self.session.recording = False
            if self.feature_hook is not None:
                self.feature_hook.values = []
        self.images.taken = tuple(x.shape[1:])
        self.guard.take_back(x, lent)
        self.more.take_back(more)
        if self.session.belongs(x):
            self.result = result
        if self.session.serving:
            self._warn_of_small_batch()
            if self._first_pass:
                self._first_pass = False
                self._check_values(x, logits.detach(), features)
                ends = partial(ends_in_head, self, x)
                self._logit_checks.check(logits.detach(), features, weights is None, ends)
        return Prediction(logits, features)

    @torch.no_grad()
    def _learn_first(self, x: Tensor, weights: Weights | None) -> None:
        """Run the pass in which norm rules move that do so before the one that answers."""
        args, kwargs = copies(*self.arguments)
        before = [(w.rule, w.rule.override) for w in self.wrappers]
        for rule, _ in before:
            rule.override = rule.override or rule.learn
        try:
            functional.call(self._callee, self._tensors(weights), x.clone(), *args, **kwargs)
        except Exception as error:
            refusal = self.images.refusal(error, x)
            if (refusal := refusal or self.images.size_refusal(error, x, self.model)) is None:
                raise
            raise refusal from error
        finally:
            for rule, override in before:
                rule.override = override
            if self.feature_hook is not None:
                self.feature_hook.values = []

    def _hooked_features(self, rows: int) -> Tensor:
        """What the classifier was fed; a model may show it the images one by one, or in parts."""
        assert self.feature_hook is not None
        values, self.feature_hook.values = self.feature_hook.values, []
        if not values:
            raise ValueError(
                "`model` must call its classifier in forward, but "
                f"{type(self.head.module).__name__} was not called: name the module that the "
                "features go into by wrap(..., features=...)."
            )
        features = pooled(values[-1], self.head.module)
        if len(features) != rows and sum(map(len, values)) == rows:
            features = torch.cat([pooled(value, self.head.module) for value in values])
        return features

    def _check_features(self, features: Tensor | None, rows: int) -> None:
        if features is not None and len(features) != rows:
            raise ValueError(
                f"`features` must have a row for each image, got {len(features)} rows for {rows} "
                "images: pass wrap(..., features=...), a function of model and images that returns "
                "them so."
            )

    def _tensors(self, weights: Weights | None) -> dict[str, Tensor]:
        """The tensors that stand in for the model's own, by name in the module that is called."""
        found = {} if weights is None else functional.named(*weights)
        for names, master, p in self._master_places:
            for name in names:
                found[name] = found.get(name, master).to(p.dtype)
        return {f"{self._prefix}{name}": tensor for name, tensor in found.items()}

    def _check_logits(self, logits: Tensor, rows: int) -> None:
        trained = next(iter(self.masters.trained.values()), None)
        wanted = self.session.recording and trained is not None and trained.requires_grad
        if wanted and not logits.requires_grad:
            raise ValueError(
                "`model` must let gradients flow from its logits to the parameters that are "
                "trained, got logits without a graph: take no_grad, detach or "
                "requires_grad_(False) out of it."
            )
        if logits.layout != torch.strided or logits.is_meta or logits.is_complex():
            raise TypeError(
                "`model` must return logits that are real numbers in a dense tensor, got "
                f"{logits.dtype} in {logits.layout}: convert them in the model."
            )
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"`model` must return logits of shape (B, {self.num_classes}), the size of its "
                f"classifier, got {tuple(logits.shape)}: say how many there are by "
                "wrap(..., num_classes=...), and where they are by logits=."
            )
        if len(logits) != rows:
            raise ValueError(
                f"`images` must have a batch axis, but the model returned {len(logits)} rows of "
                f"logits for a first axis of {rows}: add one with images[None]."
            )

    def _check_values(self, x: Tensor, logits: Tensor, features: Tensor | None) -> None:
        """Find rows with NaN or infinite logits.

        Features count as well, squared, because components that read them square them.
        """
        total = logits.float().sum()
        if features is not None:
            total = total + features.detach().float().square().sum()
        total = float(total)
        if total != total or total == float("inf"):
            rows = overflow(logits, features)
            if len(rows) > 1 and bool(rows.all()):
                rows = self.overflowing(x)
                rows = rows if bool(rows.any()) else ~rows
            raise RowsOverflowError(rows)

    @torch.no_grad()
    def overflowing(self, x: Tensor) -> Tensor:
        """Find the images (B,) that make the batch statistics overflow.

        The pass uses the source statistics, under which no image affects another.
        """
        rows = torch.zeros(len(x), dtype=torch.bool, device=x.device)

        def note_overflow(values: Tensor, base: Any) -> Tensor:
            rows.logical_or_(~values.float().square().flatten(1).sum(1).isfinite())
            return normalize_by_source(values, base)

        args, kwargs = copies(*self.arguments)
        with with_statistics(self.wrappers, note_overflow):
            result = self._other(self._tensors(None), x.clone(), *args, **kwargs)
        features = None
        if self._prefix:
            result, features = result
        elif self.feature_hook is not None:
            features = self._hooked_features(len(x))
        return rows | overflow(self.reader.read(result), features)

    @contextmanager
    def call(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Open one call of the adapter, in whose passes the model gets these further arguments."""
        self.arguments, self._first_pass = (args, kwargs), True
        for wrapper in self.wrappers:
            wrapper.passes.clear()
        try:
            yield
        finally:
            self.arguments, self._first_pass, self.result = ((), {}), False, None
            for wrapper in self.wrappers:
                wrapper.passes.clear()

    def check_next(self) -> None:
        """Check what the next pass of this call gives as that of the first one."""
        self._first_pass = True

    def settle(self) -> None:
        """Leave a call that an exception has ended, at whatever line."""
        self.session.settle()
        self.arguments, self._first_pass, self.result = ((), {}), False, None
        if self.feature_hook is not None:
            self.feature_hook.values = []
        for wrapper in self.wrappers:
            wrapper.rule.override = None
            wrapper.rule.learning = self.session.learning
            wrapper.rule.part_size = 1.0
            wrapper.passes.clear()
        self._other.put_back()
        drop_hooks(self.model, self.first_hook, (*self.handles, *self._order_hooks))

    def check(self, x: Any) -> None:
        """Refuse what is no batch of images, before anything changes; see :class:`ImageChecks`."""
        self.images.check(x)
        if self.session.ranks is not None:
            self.session.ranks.check_batch(x)

    def _warn_of_small_batch(self) -> None:
        """Warn before anything is learned from the batch, as warnings may be turned into errors."""
        for wrapper in self.wrappers:
            if wrapper.rule.fell_back:
                self.session.warn_once("small", few_images_advice(wrapper.rule.name))
                return

    def convert(self, fn: Any) -> None:
        """Apply ``fn``, which moved the model to another device or dtype, to what goes with it."""
        self.buffers.convert(fn)
        self._other.forget()

    def watch_calls(self, names: Iterable[str]) -> None:
        """Record, from now on, the order in which the named layers are first called."""
        for name in names:
            hook = CallOrderHook(name, self._order)
            self._order_hooks.append(self.model.get_submodule(name).register_forward_pre_hook(hook))

    def call_order(self) -> list[str]:
        """Return the watched layers that were called, in the order of their first call."""
        return list(self._order)

    def end_watching(self) -> None:
        """Take the hooks of :meth:`watch_calls` off the model; other streams ask for the order."""
        for handle in self._order_hooks:
            handle.remove()
        self._order_hooks = []

    def close(self) -> None:
        """Take all hooks off the model."""
        self.end_watching()
        for handle in self.handles:
            handle.remove()
