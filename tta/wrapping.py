"""``wrap``: from names or configs in slots to an :class:`~tta.core.adapter.Adapter`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.adapter import Adapter
from tta.core.budget import within_budget
from tta.core.build import Injected, build
from tta.core.config import ComponentConfig
from tta.core.denoiser import Diffusion
from tta.core.draws import GivenDraws
from tta.core.head import FeatureSpec
from tta.core.model_checks import check_model
from tta.core.outputs import LogitsSpec
from tta.core.recipe import AdapterConfig
from tta.core.resolve import Request, resolve
from tta.core.setting import Setting

__all__ = ["wrap"]

Choice = str | ComponentConfig | None


def wrap(
    model: nn.Module,
    recipe: str | ComponentConfig | AdapterConfig | None = None,
    *,
    norm: Choice = None,
    update: Choice = None,
    output: Choice = None,
    guard: Choice | bool = None,
    input: Choice | nn.Module | Diffusion = None,
    source: Any = None,
    batch_size: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Callable[[Tensor, int], Tensor] | None = None,
    restore_mask: Callable[[str, torch.Size], Tensor] | None = None,
    draws: GivenDraws | None = None,
    logits: LogitsSpec = None,
    num_classes: int | None = None,
    features: FeatureSpec = None,
    activation: str = "softmax",
    health: bool = False,
    shadow: bool = False,
    window: int | None = None,
    memory_budget: int | None = None,
    setting: Setting | None = None,
    on_event: Callable[[dict[str, Any]], Any] | None = None,
    **overrides: Any,
) -> Adapter:
    """Make a classifier adapt while it predicts, in place.

    Args:
        model: Any classifier that takes a batch and returns logits (B, C). A compiled one runs
            without its graphs where features are read.
        recipe: A component name or ``"name.preset"`` (an update brings its default norm and output
            rules), a component's config, or an ``AdapterConfig``. A bare name means the ImageNet
            preset.
        norm: Replaces the norm slot: a name, a config, or "source" for running statistics.
        update: Replaces the update slot: a name, a config, or "source" for no update.
        output: Replaces the output slot: a name, a config, or "source" for the plain logits.
        guard: Fills the guard slot: a name, a config, True for the update's own choice, or False
            for none.
        input: Fills the input slot: a name, a config, a module from images to images, or a
            :class:`tta.Diffusion`; "source" for the images as they come. A module is not part of
            the config, nor saved.
        source: Source batches ``(images, labels)`` or a :class:`tta.SourceStatistics`, for methods
            that need something from the training data.
        batch_size: Batch size of the stream; learning rates are scaled for it once, unless given
            explicitly.
        seed: Seeds the adapter's own generator; the global one is never touched.
        mean: Channel means that turn pixels in [0, 1] into what the model takes, for methods
            that augment; 0 says that it takes raw pixels.
        std: Channel standard deviations, given together with ``mean``; 1 for raw pixels. Without
            both, timm's ``pretrained_cfg`` is read.
        augment: For methods that augment, instead of their own random views: ``images, index ->
            images`` on pixels in [0, 1], ``index`` counting calls since wrap (a reset does not
            rewind it). Not part of the config, nor saved.
        restore_mask: For CoTTA and PETAL, instead of their own draws:
            ``parameter name, shape -> bool tensor``, True = back to source. Not part of the config,
            nor saved.
        draws: For components that draw at random, instead of their own draws:
            ``name, shape, call -> tensor``, or None to draw as usual; ``call`` counts batches since
            wrap. Not part of the config, nor saved.
        logits: How to take logits (B, C) out of what the model returns: a key or the name of an
            attribute, an index, or a function. Not needed for a tensor, or for something with
            ``logits`` as a key or an attribute. The adapter returns what the model returns, with
            its logits replaced.
        num_classes: Number of classes C, for heads that are no linear layer.
        features: For such heads, where methods read features: the name of the module that they go
            into, that module, or a function ``model, images -> (B, D)``.
        activation: What the logits are for: "softmax", or "sigmoid" for models whose classes do not
            exclude each other, which norm rules alone can adapt.
        health: Fill ``adapter.health`` without a guard.
        shadow: Answer with the source model and learn beside it; ``adapter.health`` shows how far
            the two agree, and estimates of both. Costs a forward pass.
        window: For streams of single images or small batches: every call runs the model on the last
            ``window`` images, at least 2, of which its own are the last, and answers for its own.
            A call then costs as much as a batch of that size.
        memory_budget: Bytes that weights, state and a batch at its peak may take. Several forms of
            the recipe are tried on random images until one fits: micro-batches where no image
            affects another, activation checkpointing, then only late layers are adapted; a warning
            and ``adapter.config`` say which. Give ``batch_size=`` with it.
        setting: What :func:`tta.tune` found to be fastest on this device.
        on_event: Called with each of ``adapter.events`` at the end of the call that it belongs to.
            Not part of the config, nor saved.
        **overrides: Fields of the chosen components, or of what these bring.

    Returns:
        The adapter. ``adapter.unwrap()`` gives the model back, bit for bit.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: For unknown names or fields, a model that a component cannot work on, missing
            source artefacts, or a model that is already wrapped. The model is left as it was.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
        ...                     nn.Linear(4 * 6 * 6, 10))
        >>> adapter = wrap(net, "tent", lr=1e-3, update="tent.cifar10")
        >>> adapter(torch.rand(8, 3, 8, 8)).shape
        torch.Size([8, 10])
    """
    check_model(model)
    slots = {"input": input, "norm": norm, "update": update, "output": output, "guard": guard}
    request = Request(
        recipe=recipe,
        slots=slots,
        overrides=overrides,
        batch_size=batch_size,
        seed=seed,
        mean=mean,
        std=std,
        logits=logits,
        num_classes=num_classes,
        features=features,
        activation=activation,
        health=health,
        shadow=shadow,
        window=window,
        setting=setting,
    )
    config = resolve(model, request)
    injected = Injected(
        augment=augment,
        restore_mask=restore_mask,
        draws=draws,
        logits=logits,
        features=features,
        on_event=on_event,
        input=input if isinstance(input, (nn.Module, Diffusion)) else None,
    )
    if memory_budget is not None:
        config, source = within_budget(model, config, source, injected, memory_budget)
    return build(model, config, source, injected)
