"""The adapter: a model, the components in its slots, and the methods that users call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from tta.core.arguments import check_without_tensors, split_arguments
from tta.core.backbone import Backbone
from tta.core.checks import boolean
from tta.core.compiled import COMPILED
from tta.core.component import Component, Context
from tta.core.guard import Guard
from tta.core.input_rule import Input, Inputs
from tta.core.keeping import check_keep
from tta.core.loan import Loan
from tta.core.norm_layers import AdaptiveNorm, remove
from tta.core.output_rule import Output
from tta.core.outputs import GIVEN
from tta.core.prediction import Report
from tta.core.recipe import AdapterConfig
from tta.core.serving import Serving
from tta.core.session import Session
from tta.core.state import AdapterState
from tta.core.state_dict import check_origin, extra_state
from tta.core.traced_pass import is_tracing, traced_answer
from tta.core.transaction import Transaction
from tta.core.turns import Turns, in_turn
from tta.core.update import Update
from tta.core.warn import warn
from tta.core.window import WINDOW, Window

__all__ = ["Adapter"]

PARALLEL = (
    "`module` of {} must not be an adapter, whose copies would each adapt and forget, got one: "
    "call the adapter itself; tta.runtime.split_batches shares its batches among processes."
)


class Adapter(nn.Module):
    """A classifier that adapts while it predicts; made by :func:`tta.wrap`.

    Call it like the model: images in, logits of the same shape out. The model inside stays in
    eval mode whatever ``train()`` or ``eval()`` is called; learning is paused with
    :meth:`freeze` or :meth:`frozen`. It works under ``torch.no_grad`` and ``inference_mode``, and
    from several threads, whose calls wait for each other.
    """

    def __init__(
        self,
        config: AdapterConfig,
        context: Context,
        network: Backbone,
        wrappers: dict[str, AdaptiveNorm],
        update: Update | None,
        output: Output | None,
        guard: Guard | None = None,
        input_rule: Input | None = None,
        on_event: Callable[[dict[str, Any]], Any] | None = None,
        window: Window | None = None,
    ) -> None:
        super().__init__()
        self.turns = Turns()
        self.model = network.model
        self.config = config
        self.update = update
        self.output = output
        self.guard = guard
        self.input = input_rule
        self.window = window
        self.compiled = False  # by the adapter, for `setting`
        self._on_event = on_event
        self._network: Backbone | None = network
        self._context = context
        self._wrappers = wrappers
        network.session.guard = guard
        slots = (wrappers, update, output, guard, input_rule, window)
        self._state = AdapterState(
            config.label, context.generator, context.journal, network, *slots
        )
        self._transaction = Transaction(self._state, network, list(self.parts.values()))
        self._serving = Serving(
            network, self._state, wrappers, update, output, self._transaction, guard, config.shadow
        )
        if input_rule is not None:
            self._serving.inputs = Inputs(input_rule, network, context.generator)
        self._serving.window, self._serving.setting = window, config.setting
        trained = None if update is None else context.parameters.values()
        self._loan = Loan(network.model, network.masters.own.values(), trained)

    # What users do with it -----------------------------------------------------------------

    @in_turn
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predict a batch, and learn from it unless frozen.

        Args:
            *args: The model's positional arguments: first the images, usually (B, 3, H, W).
            **kwargs: The model's keyword arguments. The images may be among them, under the name of
                the model's first parameter.

        Returns:
            What the model returns, with logits (B, C) in place of its own, without gradient. Rows
            of images that are not finite, or whose features overflow, are NaN, and nothing is
            learned from them. While the adapter is frozen, gradients flow to images that ask for
            them, through weights that stay as they are.

        Raises:
            TypeError: When the images are no tensor of the model's dtype.
            ValueError: When rank or channels do not fit the model, or the batch is empty.
            RuntimeError: When the adapter was unwrapped.
        """
        network = self._held("no longer holds a model")
        if is_tracing():
            return traced_answer(self, *split_arguments(self.model, args, kwargs))
        self._refuse_copies()
        images, args, kwargs = split_arguments(self.model, args, kwargs)
        network.check(images)
        if self.window is not None:
            check_without_tensors(args, kwargs)
        if self.model.training:
            self.model.eval()
        learning = network.session.learning

        def serve() -> Any:
            self._context.signs.look()
            with network.call(*args, **kwargs):
                follow = not learning and images.requires_grad and torch.is_grad_enabled()
                x = images if follow else images.detach()
                x = x.clone() if images.is_inference() else x
                answer = self._serving.serve(x, follow)
            self._context.draws.call += 1
            return answer

        setting = self.config.setting
        images = images if setting is None else setting.images(images)
        with (
            setting.running(images.device.type) if setting else nullcontext(),
            torch.inference_mode(False),
        ):
            answer = self._transaction.run(serve, learning)
        self._publish_events()
        return answer

    @in_turn
    def reset(self) -> None:
        """Put everything back to what it was when ``wrap`` returned, bit for bit."""
        self._held("has no state")
        self._transaction.run(self._state.reset)
        if self.guard is not None:
            self.guard.events.clear()

    def freeze(self) -> None:
        """Stop all learning: parameters, moving statistics, memory. Predictions go on."""
        self._set_learning(False)

    def unfreeze(self) -> None:
        """Resume learning after :meth:`freeze`."""
        self._set_learning(True)

    @contextmanager
    def frozen(self) -> Iterator[Adapter]:
        """Freeze within a ``with`` block, and restore what was before at its end."""
        before = self.session.learning
        self._set_learning(False)
        try:
            yield self
        finally:
            self._set_learning(before)

    @in_turn
    def state(self) -> dict[str, Tensor]:
        """Clones of everything that moves, by name; see ``docs/streaming.md``."""
        self._held("has no state")
        return self._state.clones()

    @in_turn
    def load_state(
        self,
        state: Mapping[str, Tensor],
        as_source: bool = False,
        allow_nonfinite: bool = False,
    ) -> None:
        """Copy a full or partial state in.

        Args:
            state: Tensors by the names that :meth:`state` uses; ``update/student.<name>`` is
                another name for ``param/<name>``.
            as_source: Also make these values the ones that :meth:`reset` restores.
            allow_nonfinite: Whether to take NaN and infinity even where they do not stand for a
                missing value.

        Raises:
            TypeError: When ``state`` is no dict.
            ValueError: For a name or a shape that this adapter does not have, values that cannot
                occur, or a state that :meth:`state` made for another method or other weights;
                nothing is copied.
        """
        self._held("has no state")
        if not isinstance(state, Mapping):
            raise TypeError(
                f"`state` must be a dict of tensors, got {type(state).__name__}: pass what "
                "state() gave."
            )
        boolean("as_source", as_source)
        boolean("allow_nonfinite", allow_nonfinite)
        self._transaction.run(lambda: self._state.load(state, as_source, allow_nonfinite))

    @in_turn
    def reset_point(self) -> dict[str, Tensor]:
        """Clones of the state that :meth:`reset` restores."""
        return {key: value.clone() for key, value in self.session.reset_point.items()}

    @in_turn
    def constants(self) -> dict[str, Tensor]:
        """What was fixed at wrap (Fisher information, anchors, ...), by name."""
        return self._state.constants()

    @in_turn
    def unwrap(self, keep: bool | str = False) -> nn.Module:
        """Return the caller's model, as it was or with what was learned.

        The adapter cannot be used afterwards.

        Args:
            keep: False gives weights, modules, flags and key order as they were, bit for bit. True
                writes what was learned into it: parameters, buffers of its own, statistics of norm
                rules that a plain BatchNorm can hold, and output rules that the bias of the linear
                layer can hold (one without a bias gets one). "parameters" writes the parameters
                whatever the other slots are, and warns that the source statistics go with them.

        Raises:
            ValueError: When ``keep`` is none of these values, or is True and a rule cannot be
                written into a model; nothing has changed then.
            RuntimeError: When the model was given back before.
        """
        network = self._held("gave its model back before")
        check_keep(self, keep)
        model = self.model
        network.close()
        remove(model, self._wrappers)
        if keep is True:
            for wrapper in self._wrappers.values():
                wrapper.rule.write_to(wrapper.base)
            if self.output is not None:
                self.output.write_to(network.classifier)
        if not keep:
            network.masters.give_back(self._state.original)
            network.buffers.give_back()
        self._loan.end()
        if self.compiled:
            vars(model).pop(COMPILED, None)
        if self.input is not None:
            self.input.release()
        self._network = None
        del self._modules["model"]
        return model

    def get_extra_state(self) -> dict[str, Any]:
        """Return what ``state_dict`` holds besides the modules' tensors: state and fingerprint."""
        return {"fingerprint": self.fingerprint, "state": dict(self.state())}

    @in_turn
    def set_extra_state(self, state: Any) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        fingerprint, values = extra_state(state)
        check_origin(fingerprint, self._state.fingerprint)
        self.load_state(values)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Restore the ``state_dict`` of an adapter like this one; it is always checked strictly.

        Raises:
            ValueError: For the state dict of a plain model or of another adapter, or for
                ``assign=True``.
        """
        if not isinstance(state_dict, Mapping) or "_extra_state" not in state_dict:
            raise ValueError(
                "`state_dict` must be that of an adapter, got one without its state, such as that "
                "of a plain model: unwrap() the adapter, load it into the model, and wrap again."
            )
        if assign:
            raise ValueError(
                "`assign` must be False, since the adapter's tensors stay in place: leave it out."
            )
        self.set_extra_state(state_dict["_extra_state"])
        return _IncompatibleKeys([], [])

    @property
    @in_turn
    def report(self) -> Report:
        """Figures of the last batch; see :class:`tta.Report`."""
        figures = {"seen": self._serving.seen, "rejected": self._serving.rejected, "selected": 0}
        figures |= {"loss": float("nan"), "stepped": False, "resets": 0}
        if self.input is not None:
            figures |= self.input.report.raw()
        if self.output is not None:
            figures |= self.output.report.raw()
        if self.update is not None:
            figures |= self.update.report.raw() | {"resets": self.update.resets.clone()}
        if self.guard is not None:
            resets = self.guard.resets + figures["resets"]
            figures |= self.guard.report.raw() | {"resets": resets}
        return Report(figures)

    @property
    @in_turn
    def health(self) -> Report:
        """What is seen of the last batch without labels, and moving averages of it.

        A guard fills it, or ``wrap(..., health=True)``; else it is empty. Keys: ``entropy`` (mean,
        in nats), ``concentration`` (of the mean prediction: its negative entropy in nats),
        ``agreement`` (share of predictions that are the source's; NaN where the source was not
        asked), ``estimated_accuracy`` (0 to 1) and ``estimator``, ``effective_rank`` (of features;
        NaN where no component reads them), ``run_length`` (images in a row for which one label is
        predicted), ``distance`` (of the trained parameters from the source, as a share of their
        length), ``passes`` (forward passes that the guard asked for), ``action`` and ``reason``,
        and ``<figure>_average``.
        """
        if self.guard is None:
            return Report()
        averages = {f"{k}_average": v for k, v in self.guard.monitor.averaged().items()}
        return Report(self.guard.figures | averages)

    @property
    @in_turn
    def events(self) -> list[dict[str, Any]]:
        """The last 1,000 actions of the guard other than "learn", the oldest first.

        Each is a dict of ``step`` (batches before it since wrap or reset), ``action``, ``reason``
        and ``figures`` (those of ``health``). They are no part of a state, and ``reset`` empties
        them.
        """
        return [] if self.guard is None else list(self.guard.events)

    @property
    def parts(self) -> dict[str, Component]:
        """The components by slot, but for norm rules, of which each layer has one; the window."""
        slots = ("input", "update", "output", "guard", WINDOW)
        found = {slot: getattr(self, slot) for slot in slots}
        return {slot: part for slot, part in found.items() if part is not None}

    @property
    def num_classes(self) -> int:
        """Number of classes of the model."""
        return self._context.num_classes

    @property
    def parameters_adapted(self) -> dict[str, nn.Parameter]:
        """The parameters that move, by their name in the caller's model.

        A method that leaves layers out by position knows these only after the first batch.
        """
        if self.update is None:
            return {}
        own = self.network.masters.own
        return {name: own[name] for name in self.update.parameters_adapted}

    @property
    def norm_layers(self) -> dict[str, AdaptiveNorm]:
        """The wrapped BatchNorm layers, by their name in the caller's model."""
        return dict(self._wrappers)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The method and a checksum of the source weights; a state with others is refused."""
        return dict(self._state.fingerprint)

    @property
    def network(self) -> Backbone:
        """The wrapped model as components call it."""
        with self.turns.lock:  # or what another thread is doing would count as interrupted
            return self._held("has no network")

    @property
    def session(self) -> Session:
        """What the adapter's parts share while it serves, for :mod:`tta.runtime`."""
        return self.network.session

    def train(self, mode: bool = True) -> Adapter:
        """Set the flag and nothing else: :meth:`freeze` pauses adaptation, ``eval`` does not."""
        self.training = mode
        return self

    def __repr__(self) -> str:
        filled = [f"{slot}={part.name}" for slot, part in self.config.components.items()]
        filled += ["input=given"] if self.config.input == GIVEN else []
        slots = ", ".join(filled) or "source"
        if self._network is None:
            return f"Adapter(unwrapped, {slots})"
        moving = [v for k, v in self._state.tensors().items() if k != "rng"]
        trained = sum(p.numel() for p in self.parameters_adapted.values())
        total = sum(p.numel() for p in self.parameters())
        size = sum(v.numel() * v.element_size() for v in moving) / 1e6
        frozen = "" if self.session.learning else ", frozen"
        return (
            f"Adapter({type(self.model).__name__}, {slots}, "
            f"{len(self._wrappers)} norm layers wrapped, {trained:,} of {total:,} parameters "
            f"trained, state {size:.2f} MB{frozen})"
        )

    # How it works ---------------------------------------------------------------------------

    def begin(self) -> Adapter:
        """Make the present state what :meth:`reset` restores; ``wrap`` calls this at its end."""
        self._state.mark_reset_point()
        self.session.serving = True
        return self

    def _held(self, problem: str) -> Backbone:
        """Return the network, or raise ``RuntimeError`` if the model was given back."""
        if self._network is None:
            raise RuntimeError(f"this adapter was unwrapped and {problem}: wrap the model again.")
        self._transaction.settle()
        return self._network

    def _refuse_copies(self) -> None:
        """Refuse to be called by what would average gradients over processes."""
        outside: Any = nn.parallel.DistributedDataParallel
        outside = outside._get_active_ddp_module()
        if outside is not None and any(module is self for module in outside.modules()):
            raise RuntimeError(PARALLEL.format("DistributedDataParallel"))

    def _replicate_for_data_parallel(self) -> Any:
        """Called by torch where every device is to get a copy for one batch."""
        raise RuntimeError(PARALLEL.format("DataParallel"))

    def _publish_events(self) -> None:
        """Keep what the guard did in this call, and tell the caller."""
        if self.guard is None:
            return
        events = self._serving.take_events()
        self.guard.events.extend(events)  # all of them, whatever the caller's function raises
        if self._on_event is not None:
            for event in events:
                self._on_event(event)

    @in_turn
    def _set_learning(self, learning: bool) -> None:
        if self._network is not None:
            self.switch_learning(learning)

    def switch_learning(self, learning: bool) -> None:
        """Freeze or unfreeze; the caller has the turn."""
        self.session.learning = learning
        for wrapper in self._wrappers.values():
            wrapper.rule.learning = learning
        for part in (self.input, self.output, self.guard):
            if part is not None:
                part.learning = learning

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        if self._network is None:
            return super()._apply(fn, recurse)  # type: ignore[return-value]
        masters = self._network.masters
        rounded = masters.rounds
        copies = masters.move(fn)
        for module in self.children():
            module._apply(fn if module is self.model else copies)
        self._network.convert(fn)
        self._transaction.forget()
        if masters.rounds and not rounded:
            warn(
                "`adapter` has weights to train that are now in half precision, which loses small "
                "steps: convert the model before wrap(), which then trains float32 copies."
            )
        return self

    def __getattr__(self, name: str) -> Any:
        """Read attributes of the model, such as ``pretrained_cfg``, as if it were not wrapped."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if name.startswith("_") or model is None:
                raise
            found = getattr(model, name)
            if callable(found):
                raise
            return found
