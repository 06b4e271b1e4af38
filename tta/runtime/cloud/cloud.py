"""The cloud side: a large teacher, a copy of the device's model, and the prompt that it learns."""

from __future__ import annotations

import copy
import math
import secrets
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core.adapter import Adapter
from tta.core.checks import LARGE, LARGEST, number, one_of, whole_number
from tta.core.head import FeatureSpec, WithFeatures, find_head
from tta.core.hooks import InputHook, pooled
from tta.core.loan import WRAPPED, Loan
from tta.core.model_checks import check_model
from tta.core.norm_layers import AdaptiveNorm
from tta.core.outputs import LogitsReader, LogitsSpec
from tta.core.parameters import select
from tta.core.prediction import Report
from tta.core.source import SourceStatistics
from tta.parts.augment import pixel_space
from tta.parts.losses import entropy
from tta.parts.prompts import Space, add_prompt
from tta.runtime.cloud.device import Bytes
from tta.runtime.cloud.wire import Downlink, MessageError, Upload

if TYPE_CHECKING:
    from tta.runtime.cloud.serving import Serving

__all__ = ["Cloud"]

DOWNLINKS = {"prompt": False, "norms": True}  # whether norm layers are learned too
RAW: Space = ((0.0,), (1.0,))  # a model that takes pixels


class Cloud:
    """Learns a prompt from what devices of one model and one place send.

    Whenever ``batch_size`` images wait, a copy of the device's model takes them with the prompt,
    and the prompt makes one step of Adam on

        mean_b (1 - v_b^T) CE(softmax T(x_b), s(x_b + prompt)) + w |mean_b phi - mean_s|^2

    with w = ``align_weight``, the teacher's prediction T for the images as they came, v^T its
    entropy / ln C, and the features phi. What goes down is a moving average: ``rate`` times the
    mean uncertainty of the images is the share of the new prompt. This loss, and every constant, is
    our own design: the paper's are not known.

    All devices share one prompt, and images of one size; other images are refused. ``counts`` has
    ``images``, ``updates`` and ``refused`` messages, ``bytes`` what came up and went down,
    ``report`` the ``loss``, ``supervised``, ``align``, ``teacher_uncertainty`` and ``share`` of the
    last update.

    Args:
        model: The device's classifier, of which a copy is kept.
        teacher: A module, an adapter (which then adapts to what is sent), or a function, from
            images to logits of the same classes. It is used in eval mode.
        downlink: "prompt", or "norms": the affine parameters of the norm layers are learned too.
        source: Gives ``feature_mean`` (D,), or features to take the mean of; without either,
            features are not aligned.
        mean: Channel means of what the model takes; by default the model's own, else it takes
            pixels in [0, 1].
        std: Channel standard deviations.
        teacher_transform: From pixels (B, C, H, W) in [0, 1] to what the teacher takes; by default
            the teacher's own mean and standard deviation.
        width: Of the prompt's frame; as that of the device's ``prompt``.
        batch_size: Images of one update.
        lr: Adam's learning rate of the prompt, in pixels in [0, 1].
        norm_lr: Of norm layers.
        align_weight: Of the distance of features.
        rate: Largest share of a new prompt in the average.
        logits: As for :func:`tta.wrap`.
        num_classes: As for :func:`tta.wrap`.
        features: As for :func:`tta.wrap`.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: When one is out of its range, or the model cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Any,
        *,
        downlink: str = "prompt",
        source: SourceStatistics | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        teacher_transform: Callable[[Tensor], Tensor] | None = None,
        width: int | None = None,
        batch_size: int = 64,
        lr: float = 1e-3,
        norm_lr: float = 1e-3,
        align_weight: float = 0.1,
        rate: float = 1.0,
        logits: LogitsSpec = None,
        num_classes: int | None = None,
        features: FeatureSpec = None,
    ) -> None:
        self._student = _copy(model)
        if not callable(teacher):
            raise TypeError(
                f"`teacher` must be a module or a function from images to logits, got "
                f"{type(teacher).__name__}: pass a large classifier of the same classes."
            )
        self._norms = DOWNLINKS[one_of("downlink", downlink, DOWNLINKS)]
        self._width = None if width is None else whole_number("width", width, 1, LARGEST)
        self._batch_size = whole_number("batch_size", batch_size, 1, 10**6)
        self._lr, self._norm_lr = number("lr", lr, 0, LARGE), number("norm_lr", norm_lr, 0, LARGE)
        self._align_weight = number("align_weight", align_weight, 0, LARGE)
        self._rate = number("rate", rate, 0, 1)
        self._reader = LogitsReader(logits)
        spec: Any = features
        if isinstance(features, nn.Module):  # of the copy, which has the same place
            places = [name for name, module in model.named_modules() if module is features]
            spec = places[0] if places else features
        self._head = find_head(self._student, self._reader, num_classes, spec)
        self._space = pixel_space(model, mean, std) or RAW
        self._teacher, self._teacher_transform = teacher, teacher_transform
        self._loan: Loan | None = None
        if isinstance(teacher, nn.Module) and not isinstance(teacher, Adapter):
            self._loan = Loan(teacher, (), (), mark=False)
        self._feature_mean = _feature_mean(source)
        self._trained: dict[str, nn.Parameter] = {}
        if self._norms:
            self._trained = select(self._student, "norm")
            for p in self._trained.values():
                p.requires_grad_(True)
        self._life = secrets.randbits(62) + 1
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._delta: nn.Parameter | None = None
        self._average: Tensor | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._lock = threading.Lock()
        self._bytes = [0, 0]
        self.counts = {"images": 0, "updates": 0, "refused": 0}
        self.report = Report()

    @property
    def prompt(self) -> Tensor | None:
        """What goes down: (C, H, W) offsets of pixels in [0, 1]; None before the first update."""
        return None if self._average is None else self._average.clone()

    @property
    def bytes(self) -> Bytes:
        """Bytes received (up) and sent (down) so far."""
        return Bytes(*self._bytes)

    def exchange(self, message: Any) -> Any:
        """Take an upload; return a downlink, or nothing where the device has the last one.

        Args:
            message: Bytes of an :class:`Upload`.

        Returns:
            Bytes of a :class:`Downlink`, or none.

        Raises:
            MessageError: When the message is no upload, or does not go with those before.
        """
        with self._lock, torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            self._bytes[0] += len(message)
            try:
                upload = Upload.from_bytes(message)
                self._check(upload.images)
            except MessageError:
                self.counts["refused"] += 1
                raise
            self._learn(upload.images, upload.uncertainty)
            answer = self._downlink(upload.version)
            self._bytes[1] += len(answer)
            return answer

    def serve(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        token: str | None = None,
        hosts: Collection[str] | None = (),
        limits: Any = None,
    ) -> Serving:
        """Serve devices over HTTP, in a thread of this process; needs the extra ``[serve]``.

        Args:
            host: The address; by default this machine alone can reach it.
            port: 0 for any that is free.
            token: That devices must send; None for none.
            hosts: Names, besides localhost and addresses, under which the server may be asked
                without a token; None for any.
            limits: What is refused; see :class:`tta.runtime.server.Limits`.

        Returns:
            What has the ``address``, and ``close()``, which ends it, as the ``with`` block does.

        Raises:
            ImportError: When the extra is not installed.
            OSError: When the address is taken.
        """
        from tta.runtime.cloud.serving import Serving

        return Serving(self, host, port, token=token, hosts=hosts, limits=limits)

    def close(self) -> None:
        """Give the teacher back as it was."""
        if self._loan is not None:
            self._loan.end()
            self._loan = None

    def _check(self, images: Tensor) -> None:
        expected = None if self._delta is None else tuple(self._delta.shape)
        waiting = self._waiting[0][0].shape[1:] if self._waiting else None
        expected = tuple(waiting) if expected is None and waiting is not None else expected
        got = tuple(images.shape[1:])
        channels = {len(values) for values in self._space} - {1, got[0]}
        if channels or (expected is not None and got != expected):
            wanted = expected or f"({channels.pop()}, H, W)"
            raise MessageError(
                f"`images` must be of shape {wanted} like those before or mean and std, got {got}: "
                "use a cloud of its own for each kind of device."
            )

    def _learn(self, images: Tensor, uncertainty: Tensor) -> None:
        """Make as many updates as there are whole batches."""
        self.counts["images"] += len(images)
        self._waiting.append((images, uncertainty))
        while sum(len(x) for x, _ in self._waiting) >= self._batch_size:
            x = torch.cat([x for x, _ in self._waiting])
            v = torch.cat([v for _, v in self._waiting])
            n = self._batch_size
            self._waiting = [(x[n:], v[n:])] if len(x) > n else []
            self._update(x[:n], v[:n])

    def _update(self, levels: Tensor, uncertainty: Tensor) -> None:
        """One step of the prompt, and of norm layers."""
        device = next(self._student.parameters()).device
        pixels = levels.to(device).float() / 255
        with torch.no_grad():
            target = self._teach(pixels)
        if self._delta is None:
            self._begin(pixels[0])
        delta, average, optimizer = self._delta, self._average, self._optimizer
        assert delta is not None and average is not None and optimizer is not None
        doubt = entropy(target) / math.log(target.shape[1])
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            x = add_prompt(self._normalised(pixels), delta, self._space, self._width)
            logits, features = self._predict(x)
            own = F.cross_entropy(logits.float(), target.softmax(1), reduction="none")
            supervised = ((1 - doubt) * own).mean()
            align = supervised.new_zeros(())
            if self._feature_mean is not None and features is not None:
                apart = features.float().mean(0) - self._feature_mean.to(features.device)
                align = apart.square().sum()
            loss = supervised + self._align_weight * align
        share = 0.0
        if bool(loss.isfinite()):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                delta.clamp_(-1, 1)
                share = self._rate * float(uncertainty.mean())
                average.lerp_(delta.detach(), share)
            self.counts["updates"] += 1
        self.report = Report(
            loss=loss.detach(),
            supervised=supervised.detach(),
            align=align.detach(),
            teacher_uncertainty=doubt.mean(),
            share=share,
        )

    def _begin(self, like: Tensor) -> None:
        """Start with a prompt of zeros."""
        self._delta = nn.Parameter(torch.zeros_like(like))
        self._average = torch.zeros_like(like)
        groups = [{"params": [self._delta], "lr": self._lr}]
        if self._trained:
            groups.append({"params": list(self._trained.values()), "lr": self._norm_lr})
        self._optimizer = torch.optim.Adam(groups)

    def _teach(self, pixels: Tensor) -> Tensor:
        """The teacher's logits (B, C), in float32."""
        teacher = self._teacher
        if self._teacher_transform is not None:
            x = self._teacher_transform(pixels)
        else:
            mean = std = None
            model = teacher
            if isinstance(teacher, Adapter):
                model, mean, std = teacher.model, teacher.config.mean, teacher.config.std
            found = pixel_space(model, mean, std) if isinstance(model, nn.Module) else None
            x = _normalised(pixels, found or RAW)
        if isinstance(teacher, nn.Module):
            p = next((p for p in teacher.parameters() if p.is_floating_point()), x)
            x = x.to(p.device, p.dtype)
        found = LogitsReader().read(teacher(x)).to(pixels.device).float()
        if found.shape != (len(pixels), self._head.num_classes):
            raise ValueError(
                f"`teacher` must return logits ({len(pixels)}, {self._head.num_classes}), got "
                f"shape {tuple(found.shape)}: pass one with the classes of the model."
            )
        return found

    def _normalised(self, pixels: Tensor) -> Tensor:
        p = next(self._student.parameters())
        return _normalised(pixels, self._space).to(p.dtype)

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the copy, and its features where it is known what these are."""
        head = self._head
        if head.function is not None:
            result, features = WithFeatures(self._student, head.function)(x)
            return self._reader.read(result), features
        if head.module is None:
            return self._reader.read(self._student(x)), None
        hook = InputHook()
        handle = head.module.register_forward_pre_hook(hook)
        try:
            logits = self._reader.read(self._student(x))
        finally:
            handle.remove()
        seen = [pooled(value, head.module) for value in hook.values]
        return logits, torch.cat(seen) if sum(map(len, seen)) == len(x) else seen[-1]

    def _downlink(self, version: tuple[int, int]) -> Any:
        own = (self._life, self.counts["updates"])
        if self._average is None or self.counts["updates"] == 0 or version == own:
            return b""
        norms = {name: p.detach() for name, p in self._trained.items()}
        return Downlink(self._average, norms, own).to_bytes()


def _copy(model: Any) -> nn.Module:
    """A copy of the model in eval mode; one that an adapter has may have no norm rule in it."""
    if not isinstance(model, nn.Module) or any(
        isinstance(module, (Adapter, AdaptiveNorm)) for module in model.modules()
    ):
        check_model(model)  # says what it is
    found = copy.deepcopy(model)
    for module in found.modules():
        module.__dict__.pop(WRAPPED, None)
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, InputHook)]:
            del hooks[key]  # an adapter's, which would keep features for ever
    check_model(found)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in found.parameters()):
        found = found.float()  # halves are too coarse for what an update adds
    return found.eval().requires_grad_(False)


def _normalised(pixels: Tensor, space: Space) -> Tensor:
    mean, std = (pixels.new_tensor(values).view(1, -1, 1, 1) for values in space)
    return (pixels - mean) / std


def _feature_mean(source: SourceStatistics | None) -> Tensor | None:
    """The mean of the source's features (D,), where the artefacts have it."""
    if source is None:
        return None
    if source.feature_mean is not None:
        return source.feature_mean.float()
    return None if source.features is None else source.features.float().mean(0)
