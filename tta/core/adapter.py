"""The adapter: a model, what fills its slots, and what a user does with both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.autocast import forget_casts
from tta.core.backbone import Backbone
from tta.core.component import Context
from tta.core.config import SLOTS
from tta.core.norm_layers import AdaptiveNorm, remove
from tta.core.output_rule import Output
from tta.core.prediction import Prediction, Report
from tta.core.recipe import AdapterConfig
from tta.core.session import Session
from tta.core.state import AdapterState
from tta.core.update import Update

__all__ = ["WRAPPED", "Adapter"]

WRAPPED = "_tta_wrapped"  # set on every module of a wrapped model


class Adapter(nn.Module):
    """A classifier that adapts while it predicts; made by :func:`tta.wrap`.

    Call it like the model: images in, logits of the same shape out. The model inside stays in
    eval mode whatever ``train()`` or ``eval()`` is called; learning is paused with
    :meth:`freeze` or :meth:`frozen`. It works under ``torch.no_grad`` and ``inference_mode``.
    """

    def __init__(
        self,
        config: AdapterConfig,
        context: Context,
        network: Backbone,
        wrappers: dict[str, AdaptiveNorm],
        update: Update | None,
        output: Output | None,
    ) -> None:
        super().__init__()
        self.model = model = network.model
        self.config = config
        self.update = update
        self.output = output
        self._network: Backbone | None = network
        self._context = context
        self._wrappers = wrappers
        self._state = AdapterState(
            config.label, model, context.generator, wrappers, update, output, network.session
        )
        self._learning = True
        self._rejected = 0
        self._seen = 0
        self._lend(model, context.parameters, update is not None)

    # What users do with it -----------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Predict a batch, and learn from it unless frozen.

        Args:
            images: What the model takes, usually (B, 3, H, W).

        Returns:
            Logits (B, C), without gradient. Rows of images with non-finite pixels are NaN and
            nothing is learned from them.

        Raises:
            TypeError: When ``images`` is no floating-point tensor of the model's dtype.
            ValueError: When rank or channels do not fit the model, or the batch is empty.
            RuntimeError: When the adapter was unwrapped.
        """
        self._held("no longer holds a model").check(images)
        if self.model.training:
            self.model.eval()
        with torch.inference_mode(False):
            x = images.clone() if images.is_inference() else images.detach()
            self._seen, self._rejected = len(x), 0
            # One cheap pass tells whether anything is wrong; only then look at every row.
            if bool(torch.isfinite(x.sum())):
                return self._forward(x)
            good = torch.isfinite(x).flatten(1).all(1)
            self._rejected = int((~good).sum())
            if self._rejected == 0:
                return self._forward(x)
            return self._forward_some(x, good)

    def reset(self) -> None:
        """Put everything back to what it was when ``wrap`` returned, bit for bit."""
        self._held("has no state")
        self._state.reset()

    def freeze(self) -> None:
        """Stop all learning: parameters, moving statistics, memory. Predictions go on."""
        self._set_learning(False)

    def unfreeze(self) -> None:
        """Go on learning."""
        self._set_learning(True)

    @contextmanager
    def frozen(self) -> Iterator[Adapter]:
        """Freeze within a ``with`` block."""
        before = self._learning
        self._set_learning(False)
        try:
            yield self
        finally:
            self._set_learning(before)

    def state(self) -> dict[str, Tensor]:
        """Clones of everything that moves, by name; see ``docs/streaming.md``."""
        self._held("has no state")
        return self._state.clones()

    def load_state(self, state: Mapping[str, Tensor], as_source: bool = False) -> None:
        """Copy a full or partial state in.

        Args:
            state: Tensors by the names that :meth:`state` uses; ``update/student.<name>`` is
                another name for ``param/<name>``.
            as_source: Also make these values the ones that :meth:`reset` restores.

        Raises:
            TypeError: When ``state`` is no dict.
            ValueError: For a name or a shape that this adapter does not have, or a state that
                :meth:`state` made for another method or other weights; nothing is copied.
        """
        self._held("has no state")
        if not isinstance(state, Mapping):
            raise TypeError(
                f"`state` must be a dict of tensors, got {type(state).__name__}: pass what "
                "state() gave."
            )
        self._state.load(state, as_source)

    def reset_point(self) -> dict[str, Tensor]:
        """Clones of the state that :meth:`reset` restores."""
        return {key: value.clone() for key, value in self.session.reset_point.items()}

    def constants(self) -> dict[str, Tensor]:
        """What was fixed at wrap (Fisher information, anchors, ...), by name."""
        return self._state.constants()

    def unwrap(self) -> nn.Module:
        """Give the caller's model back as it was: weights, modules, flags, key order.

        The adapter cannot be used afterwards.
        """
        network = self._held("gave its model back before")
        model = self.model
        network.close()
        remove(model, self._wrappers)
        self._give_back()
        self._network = None
        del self._modules["model"]
        return model

    @property
    def report(self) -> Report:
        """Figures of the last batch; see :class:`tta.Report`."""
        figures = {"seen": self._seen, "rejected": self._rejected, "selected": 0}
        figures |= {"loss": float("nan"), "stepped": False, "resets": 0}
        if self.output is not None:
            figures |= self.output.report.raw()
        if self.update is not None:
            figures |= self.update.report.raw() | {"resets": self.update.resets.clone()}
        return Report(figures)

    @property
    def num_classes(self) -> int:
        """Number of classes of the model."""
        return self._context.num_classes

    @property
    def parameters_adapted(self) -> dict[str, nn.Parameter]:
        """The parameters that move, by their name in the caller's model.

        A method that leaves layers out by position knows which after the first batch.
        """
        return {} if self.update is None else dict(self.update.parameters_adapted)

    @property
    def norm_layers(self) -> dict[str, AdaptiveNorm]:
        """The wrapped BatchNorm layers, by their name in the caller's model."""
        return dict(self._wrappers)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Which method on which source weights this is; states of others are refused."""
        return dict(self._state.fingerprint)

    @property
    def network(self) -> Backbone:
        """The wrapped model as components call it."""
        return self._held("has no network")

    @property
    def session(self) -> Session:
        """What the parts share while they serve; it belongs to whatever runs adapters."""
        return self.network.session

    def train(self, mode: bool = True) -> Adapter:
        """Change nothing but the flag: adaptation is paused by :meth:`freeze`, not by ``eval``."""
        self.training = mode
        return self

    def __repr__(self) -> str:
        filled = [
            f"{slot}={part.name}"
            for slot in SLOTS
            if (part := getattr(self.config, slot)) is not None
        ]
        moving = [v for k, v in self._state.tensors().items() if k != "rng"]
        trained = sum(p.numel() for p in self.parameters_adapted.values())
        total = sum(p.numel() for p in self.parameters())
        size = sum(v.numel() * v.element_size() for v in moving) / 1e6
        model = "unwrapped" if self._network is None else type(self.model).__name__
        return (
            f"Adapter({model}, {', '.join(filled) or 'source'}, "
            f"{len(self._wrappers)} norm layers wrapped, {trained:,} of {total:,} parameters "
            f"trained, state {size:.2f} MB{'' if self._learning else ', frozen'})"
        )

    # How it works ---------------------------------------------------------------------------

    def begin(self) -> Adapter:
        """What there is now is what :meth:`reset` restores; called at the end of ``wrap``."""
        self._state.mark_reset_point()
        self.session.serving = True
        return self

    def _held(self, problem: str) -> Backbone:
        """The network, unless it was given back."""
        if self._network is None:
            raise RuntimeError(f"this adapter was unwrapped and {problem}: wrap the model again.")
        return self._network

    def _lend(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], trains: bool) -> None:
        """Note what of the model :meth:`unwrap` gives back, and make it ready to adapt."""
        self._modes = [(m, m.training) for m in model.modules()]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._gradients = [(p, p.grad) for p in parameters.values()]
        for module, _ in self._modes:
            module.__dict__[WRAPPED] = True
        for p, _ in self._gradients:
            p.grad = None
        model.eval()
        if trains:
            chosen = {id(p) for p in parameters.values()}
            for p in model.parameters():
                p.requires_grad_(id(p) in chosen)

    def _give_back(self) -> None:
        with torch.no_grad():
            for name, p in self._context.parameters.items():
                p.copy_(self._state.original[name])
        for p, gradient in self._gradients:
            p.grad = gradient
        for p, flag in self._flags:
            p.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode
            module.__dict__.pop(WRAPPED, None)

    def _forward(self, x: Tensor) -> Tensor:
        """Predict and learn.

        Where this raises, norm rules and the generator are as before. Updates change what is
        theirs after their passes; one with several steps or passes keeps what came of the first.
        """
        rules = [w.rule for w in self._wrappers.values()] if self._learning else []
        buffers = [b for rule in rules for b in rule.buffers()]
        before = [b.clone() for b in buffers]
        rng = self._context.generator.get_state()
        try:
            return self._predict(x)
        except BaseException as error:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            self._context.generator.set_state(rng)
            refusal = self._network.refusal(error, x) if self._network is not None else None
            if refusal is None:
                raise
            raise refusal from error

    def _predict(self, x: Tensor) -> Tensor:
        forget_casts(x.device.type)  # whoever filled the cache may have done so without gradient
        if self.update is not None and self._learning:
            with torch.enable_grad():
                prediction = self.update.learn(x)
        else:
            if self.update is not None:
                self.update.report = Report()  # nothing is learned from this batch
            with torch.no_grad():
                predict: Any = self._network if self.update is None else self.update.predict
                prediction = predict(x)
        logits = prediction.logits.detach()
        if self.output is None:
            return logits
        features = prediction.features
        with torch.no_grad():
            detached = Prediction(logits, None if features is None else features.detach())
            return self.output.correct(detached).to(logits.dtype)

    def _forward_some(self, x: Tensor, good: Tensor) -> Tensor:
        self.session.warn_once(
            "nonfinite",
            f"`images` must be finite, got {self._rejected} of {len(x)} with NaN or infinite "
            "pixels: these rows are returned as NaN and nothing is learned from them.",
        )
        if self._rejected == len(x):
            for part in (self.update, self.output):
                if part is not None:
                    part.report = Report()
            return x.new_full((len(x), self.num_classes), float("nan"))
        some = self._forward(x[good])
        logits = some.new_full((len(x), self.num_classes), float("nan"))
        logits[good] = some
        return logits

    def _set_learning(self, learning: bool) -> None:
        self._learning = learning
        for wrapper in self._wrappers.values():
            wrapper.rule.learning = learning
        if self.output is not None:
            self.output.learning = learning
