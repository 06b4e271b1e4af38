"""The device: an adapter with a prompt that somebody else learns, and a link to who does."""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core import random
from tta.core.adapter import Adapter
from tta.core.checks import LARGEST, boolean, number, one_of, told, whole_number
from tta.core.component import log_probabilities
from tta.core.hooks import InputHook, pooled
from tta.core.prediction import Report
from tta.core.warn import warn
from tta.parts.augment import pixel_space
from tta.parts.dropout import dropped, keep_mask
from tta.parts.prompts import levels_of
from tta.runtime.cloud.budget import Budget
from tta.runtime.cloud.sending import Sender
from tta.runtime.cloud.uplink import as_uplink
from tta.runtime.cloud.wire import NOTHING, Downlink, Upload, Version

__all__ = ["Bytes", "Device"]

MEASURES = ("entropy", "mc")
PER_MESSAGE = 64  # images


class Bytes(NamedTuple):
    """Bytes of messages, without the headers of HTTP."""

    up: int
    down: int


class Device:
    """Predicts by an adapter, sends the images of which it is least sure, and takes prompts.

    Call it like the adapter. Whatever the cloud side does (it is down, slow, refuses, or answers
    what is no downlink), predictions go on with the prompt that is there; ``status`` says what is
    wrong, a warning says so once until it is right again, and ``counts`` counts: ``images`` seen,
    ``chosen`` to be sent, ``uploaded`` with an answer, ``lost`` of those chosen, ``failures`` of
    exchanges, ``updates`` that were applied, and ``refused`` downlinks. ``report`` has the
    ``uncertainty`` (B,), the mask of those ``chosen`` (B,) and the ``threshold`` of the last batch.
    Nothing is sent twice.

    The adapter itself may learn or be frozen; that does not concern the link. Parameters of norm
    layers, which a cloud side with ``downlink="norms"`` sends, need an update that has them, such
    as ``tta.wrap(model, input="prompt", update="tent")`` with ``adapter.freeze()``.

    Args:
        adapter: With ``prompt`` in its input slot.
        uplink: The address of a cloud side, what ``cloud.serve()`` gave, a :class:`Cloud` in this
            process, an :class:`HttpUplink`, or a function from message to answer.
        budget: Share of the images that may be sent, in [0, 1].
        uncertainty: "entropy" of the prediction, or "mc": the variance of the softmax over
            ``passes`` with dropout on the features.
        passes: Of "mc".
        dropout: Share of the features that each of these drops.
        window: Images over which the budget is kept; see :class:`Budget`.
        latency: Batches for which a downlink that has come waits before it is used.
        wait: Whether a call waits for the answer of the cloud side. By default it does for one in
            the same process, and not for others, which are asked in a thread.
        backlog: Messages that may wait for that thread; of more, images are lost.
        retry: Seconds without attempts after a failure, doubled by each further one up to a minute.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: When one is out of its range, or the adapter has no prompt.
    """

    def __init__(
        self,
        adapter: Adapter,
        uplink: Any,
        budget: float = 0.1,
        *,
        uncertainty: str = "entropy",
        passes: int = 5,
        dropout: float = 0.1,
        window: int = 1000,
        latency: int = 0,
        wait: bool | None = None,
        backlog: int = 4,
        retry: float = 1.0,
    ) -> None:
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"`adapter` must be what tta.wrap gave, got {type(adapter).__name__}: pass "
                'tta.wrap(model, input="prompt", mean=..., std=...).'
            )
        rule = adapter.input
        if rule is None or rule.prompt_buffer is None:
            raise ValueError(
                "`adapter` must have a prompt in its input slot, got "
                f'{"none" if rule is None else rule.name}: wrap(model, input="prompt", ...).'
            )
        self.adapter = adapter
        self.uplink = as_uplink(uplink)
        self.report = Report()
        self._latency = whole_number("latency", latency, 0, LARGEST)
        self._measure = one_of("uncertainty", uncertainty, MEASURES)
        self._passes = whole_number("passes", passes, 2, 10**4)
        self._dropout = number("dropout", dropout, 0, 1, above=True, below=True)
        self._budget = Budget(budget, window)
        self._key = f"input/{rule.prompt_buffer}"
        self._generator = rule.context.generator
        space = pixel_space(adapter.model, adapter.config.mean, adapter.config.std)
        self._space = ((0.0,), (1.0,)) if space is None else space
        if self._measure == "mc" and adapter.network.head.linear is None:
            raise ValueError(
                '`uncertainty` must be "entropy" for a model whose logits are not made by a linear '
                'layer, got "mc": leave it out.'
            )
        waits = self.uplink.waits if wait is None else boolean("wait", wait)
        self._sender = Sender(self.uplink, waits, backlog, retry, self._take)
        self._counts = {"images": 0, "chosen": 0, "updates": 0, "refused": 0}
        self._trouble: str | None = None  # with the last downlink
        self._told: set[str] = set()  # the troubles that there are, by where they are
        self._version: Version = NOTHING
        self._batches = 0  # begun
        self._arrived: deque[tuple[int, Downlink]] = deque()  # and the batch that each waits for
        self._lock = threading.RLock()

    def __call__(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Predict a batch, and send some of it.

        Args:
            images: (B, C, H, W) as the model takes them.
            *args: Passed to the model.
            **kwargs: Passed to the model.

        Returns:
            What the adapter returns.
        """
        with self._lock:
            self._apply(images)
            self._batches += 1
            answer, uncertainty = self._predict(images, args, kwargs)
            chosen = self._budget.choose(uncertainty)
            self.report = Report(
                uncertainty=uncertainty, chosen=chosen, threshold=self._budget.threshold
            )
            self._counts["images"] += len(images)
            self._counts["chosen"] += int(chosen.sum())
            for rows in chosen.nonzero()[:, 0].split(PER_MESSAGE):
                if len(rows) > 0:
                    levels = levels_of(images.detach()[rows.to(images.device)], self._space)
                    upload = Upload(
                        levels, (uncertainty[rows] / self._scale).clamp(max=1), self._version
                    )
                    self._sender.hand_over(upload.to_bytes(), len(rows))
            self._say()
            return answer

    @property
    def _scale(self) -> float:
        """What uncertainty is a share of when it is sent: entropy is one of ln C as it is."""
        return 1.0 if self._measure == MEASURES[0] else max(self._budget.largest, 1e-12)

    @property
    def bytes(self) -> Bytes:
        """Bytes sent and received so far."""
        return Bytes(self.uplink.up, self.uplink.down)

    @property
    def counts(self) -> dict[str, int]:
        """What has happened so far; see above."""
        return self._counts | self._sender.counts

    @property
    def status(self) -> str:
        """What is wrong with the link or with what came over it; "ok" where nothing is."""
        return self._sender.trouble or self._trouble or "ok"

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until everything that was chosen has been sent or lost.

        Args:
            timeout: Seconds.

        Returns:
            Whether it has. What came back is used from the next batch on.
        """
        done = self._sender.flush(timeout)
        self._say()
        return done

    def close(self, timeout: float = 60.0) -> None:
        """Send nothing more; predictions go on.

        Args:
            timeout: Seconds to wait for an exchange that is going on.
        """
        self._sender.close(timeout)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _predict(self, images: Tensor, args: Any, kwargs: Any) -> tuple[Any, Tensor]:
        """What the adapter says, and how uncertain that is (B,), on the CPU."""
        network = self.adapter.network
        if self._measure == "entropy":
            answer = self.adapter(images, *args, **kwargs)
            with torch.no_grad():
                logs = log_probabilities(self.adapter, network.reader.read(answer).detach())
                entropy = torch.special.entr(logs.exp()).sum(1)
                return answer, (entropy / math.log(logs.shape[1])).clamp(0, 1).cpu()
        hook = InputHook()
        handle = network.head.linear.register_forward_pre_hook(hook)
        try:
            answer = self.adapter(images, *args, **kwargs)
        finally:
            handle.remove()
        with torch.no_grad():
            rows = ~network.reader.read(answer).detach().isnan().any(1)
            found = torch.full((len(rows),), math.nan)
            seen = pooled(hook.values[-1], network.head.linear) if hook.values else rows[:0]
            if len(seen) == int(rows.sum()) > 0:  # those of other images, or none, say nothing
                found[rows.cpu()] = self._variance(seen.detach().float()).cpu()
            return answer, found

    def _variance(self, features: Tensor) -> Tensor:
        """Variance (B,) of the softmax over passes with dropout, as a share of the largest."""
        layer = self.adapter.network.head.linear
        weight, bias = layer.weight.detach().flatten(1).float(), layer.bias
        before = None if self.adapter.session.learning else self._generator.get_state()
        draws = random.fork(self._generator, features.device)
        if before is not None:
            self._generator.set_state(before)
        masks = (keep_mask(features.shape, self._dropout, draws) for _ in range(self._passes))
        seen = [F.linear(dropped(features, mask, self._dropout), weight) for mask in masks]
        logits = torch.stack(seen) + (0 if bias is None else bias.detach().float())
        variance = logits.softmax(2).var(0, correction=0).sum(1)
        # Where each pass is sure of another class, the sum over classes is 1 - 1/M.
        return (variance / (1 - 1 / self._passes)).clamp(0, 1)

    def _take(self, answer: Any) -> None:
        """Keep a downlink for when its time has come; in the thread of the sender."""
        downlink = Downlink.from_bytes(answer)
        self._version = downlink.version
        self._arrived.append((self._batches + self._latency, downlink))

    def _apply(self, images: Tensor) -> None:
        """Use the last downlink whose time has come."""
        downlink = None
        while self._arrived and self._arrived[0][0] <= self._batches:
            downlink = self._arrived.popleft()[1]
        if downlink is None:
            return
        values = {f"param/{name}": value for name, value in downlink.norms.items()}
        try:
            if downlink.prompt.shape != images.shape[1:]:
                raise ValueError(
                    f"`prompt` must be of the images' shape {tuple(images.shape[1:])}, got "
                    f"{tuple(downlink.prompt.shape)}: use a cloud of this device's own."
                )
            if values and self.adapter.update is None:
                raise ValueError(
                    "`adapter` must have an update whose parameters the cloud side can set, such "
                    "as update='tent' with adapter.freeze(), got none: it sends those of norm "
                    "layers."
                )
            self.adapter.load_state(values | {self._key: downlink.prompt})
        except ValueError as error:
            self._counts["refused"] += 1
            self._trouble = told(error, 250)
        else:
            self._counts["updates"] += 1
            self._trouble = None

    def _say(self) -> None:
        """Warn of what is wrong, once until it is right again."""
        now = {"link": self._sender.trouble, "downlink": self._trouble}
        for place, text in now.items():
            if text is None:
                self._told.discard(place)
            elif place not in self._told:
                self._told.add(place)
                warn(f"the cloud side is of no use now, and predictions go on without: {text}.")
