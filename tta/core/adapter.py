"""The adapter: a model, what fills its slots, and everything generic about their state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tta.core import norm_layers
from tta.core.autocast import forget_casts
from tta.core.backbone import Backbone
from tta.core.component import Context
from tta.core.config import SLOTS
from tta.core.output_rule import Output
from tta.core.prediction import Prediction, Report
from tta.core.recipe import AdapterConfig
from tta.core.state_dict import alias, check_origin, check_state, checksum, lasting_copies
from tta.core.update import Update
from tta.core.warn import warn

__all__ = ["Adapter"]

MARK = "_tta_wrapped"
CHECKED = 1024  # elements of each parameter that tell sets of weights apart: training moves all


class Adapter(nn.Module):
    """A classifier that adapts while it predicts; made by :func:`tta.wrap`.

    Call it like the model: images in, logits of the same shape out. The model inside stays in
    eval mode whatever ``train()`` or ``eval()`` is called; learning is paused with
    :meth:`freeze` or :meth:`frozen`. It works under ``torch.no_grad`` and ``inference_mode``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig,
        context: Context,
        network: Backbone,
        wrappers: dict[str, norm_layers.AdaptiveNorm],
        update: Update | None,
        output: Output | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.update = update
        self.output = output
        self._network: Backbone | None = network
        self._context = context
        self._wrappers = wrappers
        self._learning = True
        self._warned: set[str] = set()
        self._modes = [(m, m.training) for m in model.modules()]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._rejected = 0
        self._seen = 0
        for module, _ in self._modes:
            module.__dict__[MARK] = True
        self._grads = [(p, p.grad) for p in context.parameters.values()]
        for p, _ in self._grads:
            p.grad = None  # the caller's, given back by unwrap
        model.eval()
        if update is not None:
            chosen = {id(p) for p in context.parameters.values()}
            for p in model.parameters():
                p.requires_grad_(id(p) in chosen)
            update.recover = self._recover
        self._original = {n: p.detach().clone() for n, p in context.parameters.items()}
        self._initial: dict[str, Tensor] = {}
        self.made_by = {"method": config.label, "weights": checksum(model.parameters(), CHECKED)}

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
        """
        if self._network is None:
            raise RuntimeError(
                "this adapter was unwrapped and no longer holds a model: wrap the model again."
            )
        self._network.check(images)
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
        kept = self.update.survives_reset() if self.update is not None else ()
        names = {f"update/{name}" for name in kept}
        self._copy_in({k: v for k, v in self._initial.items() if k not in names})

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
        if self._network is None:
            raise RuntimeError("this adapter was unwrapped and has no state: wrap the model again.")
        state: Any = OrderedDict(self._clones())
        state.made_by = self.made_by  # as torch's state dicts carry their versions
        return state

    def load_state(self, state: dict[str, Tensor], as_source: bool = False) -> None:
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
        if not isinstance(state, Mapping):
            raise TypeError(
                f"`state` must be a dict of tensors, got {type(state).__name__}: pass what "
                "state() gave."
            )
        check_origin(getattr(state, "made_by", self.made_by), self.made_by)
        state = {alias(str(key)): value for key, value in state.items()}
        rows = {f"update/{n}" for n in self.update.taking_shape()} if self.update else set()
        check_state(state, self._moving(), set(self._growing()) - rows, rows)
        self._copy_in(state)
        if as_source:
            moving = self._moving()
            changed = {k: moving[k] for k in state if k != "rng"}
            self._initial |= lasting_copies(changed, self._original)
            if "rng" in state:
                self._initial["rng"] = state["rng"].clone()

    def reset_point(self) -> dict[str, Tensor]:
        """Clones of the state that :meth:`reset` restores."""
        return {k: v.clone() for k, v in self._initial.items()}

    def constants(self) -> dict[str, Tensor]:
        """What was fixed at wrap (Fisher information, anchors, ...), by name."""
        parts = {"update": self.update, "output": self.output}
        return {
            f"{slot}/{name}": value
            for slot, part in parts.items()
            if part is not None
            for name, value in part.constants().items()
        }

    def unwrap(self) -> nn.Module:
        """Give the caller's model back as it was: weights, modules, flags, key order.

        The adapter cannot be used afterwards.
        """
        if self._network is None:
            raise RuntimeError("this adapter was unwrapped before: use the model it returned.")
        model = self.model
        self._network.close()
        norm_layers.remove(model, self._wrappers)
        with torch.no_grad():
            for name, p in self._context.parameters.items():
                p.copy_(self._original[name])
        for p, grad in self._grads:
            p.grad = grad
        for p, flag in self._flags:
            p.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode
            module.__dict__.pop(MARK, None)
        self._network = None
        del self._modules["model"]
        return model

    @property
    def report(self) -> Report:
        """Figures of the last batch; see :class:`tta.core.prediction.Report`."""
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
    def norm_layers(self) -> dict[str, norm_layers.AdaptiveNorm]:
        """The wrapped BatchNorm layers, by their name in the caller's model."""
        return dict(self._wrappers)

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
        moving = [v for k, v in self._moving().items() if k != "rng"]
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
        self._warn(
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

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warn(text)

    def _warn_of_small_batch(self) -> None:
        if "small" not in self._warned and any(w.rule.fell_back for w in self._wrappers.values()):
            self._warn(
                "small", norm_layers.few_images_advice(getattr(self.config.norm, "name", None))
            )

    def _set_learning(self, learning: bool) -> None:
        self._learning = learning
        for wrapper in self._wrappers.values():
            wrapper.rule.learning = learning
        if self.output is not None:
            self.output.learning = learning

    def _moving(self) -> dict[str, Tensor]:
        """Everything that moves, as the tensors themselves (``rng`` as a copy)."""
        found: dict[str, Tensor] = {
            f"param/{n}": p.detach() for n, p in self._context.parameters.items()
        }
        for name, wrapper in self._wrappers.items():
            found |= {f"norm/{name}.{k}": v for k, v in wrapper.rule.state_dict().items()}
        for slot, part in (("update", self.update), ("output", self.output)):
            if part is not None:
                found |= {f"{slot}/{k}": v for k, v in part.state_dict().items()}
        if self.update is not None:
            for name, p in self.update.optimized().items():
                for key, value in self.update.optimizer.state.get(p, {}).items():
                    found[f"optim/{name}.{key}"] = value
        found["rng"] = self._context.generator.get_state()
        return found

    def _clones(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self._moving().items()}

    @torch.no_grad()
    def _copy_in(self, state: dict[str, Tensor]) -> None:
        if self._network is None:
            raise RuntimeError("this adapter was unwrapped: it has no model any more.")
        self._make_room(state)
        moving = self._moving()
        keys = [k for k in state if k != "rng"]
        if keys:
            foreach: Any = torch  # not in its type stubs
            foreach._foreach_copy_([moving[k] for k in keys], [state[k] for k in keys])
        if "rng" in state:
            self._context.generator.set_state(state["rng"].cpu())

    def _growing(self) -> dict[str, tuple[Any, str]]:
        """Keys whose tensors have any length, with the component and the buffer's name."""
        parts = (("update", self.update), ("output", self.output))
        return {
            f"{slot}/{name}": (part, name)
            for slot, part in parts
            if part is not None
            for name in (*part.growing(), *part.taking_shape())
        }

    def _make_room(self, state: dict[str, Tensor]) -> None:
        for key, (part, name) in self._growing().items():
            if key in state and state[key].shape != getattr(part, name).shape:
                setattr(part, name, getattr(part, name).new_empty(state[key].shape))

    def _recover(self, optimizer: bool = True) -> None:
        """A method's own recovery: parameters, and the optimiser, back to the reset point."""
        groups = ("param/", "optim/") if optimizer else ("param/",)
        self._copy_in({k: v for k, v in self._initial.items() if k.startswith(groups)})

    def _mark_reset_point(self) -> None:
        self._initial = lasting_copies(self._moving(), self._original)
        if self._network is not None:
            self._network.after = self._warn_of_small_batch  # before anything is learned from it

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        super()._apply(fn, recurse)
        if self.update is not None:
            for p in self.update.optimized().values():
                slots = self.update.optimizer.state.get(p, {})
                for key, value in slots.items():
                    if key != "step":  # torch keeps the step count on the CPU
                        slots[key] = fn(value)
        return self
