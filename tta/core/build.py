"""From a complete config to an adapter.

Everything that can be refused is refused before the first change to the model; what fails later
(a source pass, say) is undone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.adapter import Adapter
from tta.core.allocator import keep_freed_memory
from tta.core.backbone import Backbone
from tta.core.checks import shown
from tta.core.compiled import COMPILED
from tta.core.component import Context
from tta.core.config import ComponentConfig, UpdateConfig
from tta.core.denoiser import Diffusion
from tta.core.draws import Draws, GivenDraws
from tta.core.fitting import fit, load_constants
from tta.core.frugal import Frugal
from tta.core.guard import Guard
from tta.core.head import Head, find_head
from tta.core.hooks import LogitHook
from tta.core.input_rule import GivenInput, Input
from tta.core.loan import Untouched
from tta.core.masters import Masters
from tta.core.model_buffers import ModelBuffers
from tta.core.model_checks import check_model
from tta.core.narrow import is_narrow
from tta.core.norm_layers import (
    AdaptiveNorm,
    batch_norm_layers,
    insert,
    rows_independent,
)
from tta.core.norm_rule import NormRule
from tta.core.output_rule import Output
from tta.core.outputs import GIVEN, LogitsReader
from tta.core.parameters import norm_layers_in_words, select
from tta.core.recipe import AdapterConfig
from tta.core.registry import component
from tta.core.session import Session
from tta.core.setting import Setting
from tta.core.source import as_source
from tta.core.source_checks import check_parameters
from tta.core.update import Update
from tta.core.window import Window

__all__ = ["Injected", "build"]


@dataclass(frozen=True, kw_only=True)
class Injected:
    """Functions and modules of the caller, which are not part of the config.

    Args:
        augment: Makes views, in place of an update's own random ones.
        restore_mask: Makes masks, in place of an update's own random ones.
        draws: Makes other random draws, in place of a component's own.
        logits: Takes logits out of what the model returns.
        features: The module that features go into, or a function of model and images.
        on_event: Called with every event of the guard.
        input: A module for the input slot, or a Diffusion for the rule in it.
    """

    augment: Callable[[Tensor, int], Tensor] | None = None
    restore_mask: Callable[[str, torch.Size], Tensor] | None = None
    draws: GivenDraws | None = None
    logits: Any = None
    features: Any = None
    on_event: Callable[[dict[str, Any]], Any] | None = None
    input: nn.Module | Diffusion | None = None

    def check(self, config: AdapterConfig) -> None:
        """Refuse what is no function, what no component takes, and what is missing."""
        for name in ("logits", "features", "input"):
            if getattr(config, name) == GIVEN and not callable(getattr(self, name)):
                raise ValueError(
                    f"`{name}` must be given again, since no file holds what it was, got none: "
                    f"pass {name}= what wrap was given."
                )
        for name in ("augment", "restore_mask", "draws", "on_event"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(
                    f"`{name}` must be callable, got {type(value).__name__}: pass a function."
                )
        names = [part.name for part in config.components.values()]
        if self.draws is not None and not any(component(name).takes_draws for name in names):
            raise ValueError(
                "`draws` must belong to a component that takes them, got "
                f"{', '.join(names) or 'no component'}: leave it out."
            )
        for name, value in (("augment", self.augment), ("restore_mask", self.restore_mask)):
            if value is None:
                continue
            if not any(name in component(part).injects for part in names):
                chosen = ", ".join(names) or "no component"
                raise ValueError(
                    f"`{name}` must belong to a component that takes it, got {chosen}: leave it "
                    "out."
                )


def build(
    model: nn.Module,
    config: AdapterConfig,
    source: Any,
    injected: Injected | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Make the adapter that ``config`` describes.

    Args:
        model: The classifier.
        config: All slots, with every value decided.
        source: As for :func:`tta.wrap`.
        injected: Functions and modules of the caller.
        constants: Those of a saved adapter; when given, nothing is computed from source data.

    Returns:
        The adapter, ready to serve.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: When config, source or constants do not fit the model, which stays as it was.
    """
    check_model(model)
    injected = Injected() if injected is None else injected
    injected.check(config)
    statistics = as_source(source)
    if isinstance(injected.input, Diffusion):
        statistics = dataclasses.replace(statistics, denoiser=injected.input)
    check_parameters(statistics, model)
    before, adapter = Untouched(model), None
    with torch.inference_mode(False):
        try:
            adapter = _assemble(model, config, injected)
            if constants is None:
                fit(adapter, statistics)
            else:
                load_constants(adapter, statistics, constants)
            return adapter.begin()
        except BaseException:  # an interrupt too leaves the model as it was
            try:
                if adapter is not None:
                    adapter.unwrap()
            finally:
                before.put_back()
            raise


def _assemble(model: nn.Module, config: AdapterConfig, injected: Injected) -> Adapter:
    """Put model, components and adapter together, before anything of the source is known."""
    reader = LogitsReader(injected.logits if config.logits == GIVEN else config.logits)
    features = injected.features if config.features == GIVEN else config.features
    head = find_head(model, reader, config.num_classes, features)
    linear = _needs_linear_head(config, head)
    trained = _trained(model, config.update, head)
    masters = Masters(trained)
    skip = _replaced_layers(model, config)
    buffers = ModelBuffers(model, reader, skip, trained.values())
    context = _context(model, config, head, masters, buffers, injected)
    output = None if config.output is None else _component(Output, config.output, context)
    session = Session()
    if config.micro_batch is not None or config.checkpointing:
        session.frugal = Frugal(config.micro_batch, config.checkpointing)
    if output is not None and output.makes_logits:
        session.logit_hook = LogitHook(output)
    wrappers: dict[str, AdaptiveNorm] = {}
    rule = None
    try:
        if config.norm is not None:
            wrappers = _insert_norm(model, config.norm, context, session)
        softmax = config.activation == "softmax"
        features = _needs_features(config, head)
        network = Backbone(
            model, head, features, session, reader, masters, buffers, softmax, linear
        )
        update = None
        if config.update is not None:
            update = _component(Update, config.update, network, context)
        guard = None
        if config.guard is not None:
            guard = _component(Guard, config.guard, network, context)
        rule = _input_rule(config, injected, network, context)
        if output is not None:
            output.begin(network)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        window = None if config.window is None else Window(config.window, context.journal)
        for part in (
            rule,
            update,
            output,
            guard,
            window,
            *(wrapper.rule for wrapper in wrappers.values()),
        ):
            if part is not None:
                part.to(device)
        slots = (wrappers, update, output, guard, rule)
        adapter = Adapter(config, context, network, *slots, injected.on_event, window)
        setting = config.setting or Setting()
        if setting.keep_memory:
            keep_freed_memory()
        mode = setting.compile
        if mode is not None and getattr(model, COMPILED, None) is None:
            model.compile(mode=mode)
            adapter.compiled = True
        return adapter
    except BaseException:
        if rule is not None:  # the model itself is put back by the caller
            rule.release()
        raise


def _input_rule(
    config: AdapterConfig, injected: Injected, network: Backbone, context: Context
) -> Input | None:
    if isinstance(config.input, ComponentConfig):
        return _component(Input, config.input, network, context)
    if isinstance(injected.input, nn.Module) and config.input is not None:
        return GivenInput(injected.input, network, context)
    return None


def _replaced_layers(model: nn.Module, config: AdapterConfig) -> set[int]:
    """Ids of the norm layers that a rule stands in for, whose own buffers never move."""
    layers = {} if config.norm is None else batch_norm_layers(model)
    return {id(layer) for layer in layers.values()}


def _needs_features(config: AdapterConfig, head: Head) -> bool:
    used = [component(c.name) for c in (config.update, config.output, config.guard) if c]
    needing = [cls.name for cls in used if cls.needs_features]
    if needing and not head.has_features:
        raise ValueError(
            f"`features` must say what the features of this model are, since {needing[0]} reads "
            "them, got nothing: name the module that they go into, or pass a function of model and "
            "images."
        )
    wanting = any(cls.wants_features for cls in used)
    return bool(needing) or (wanting and head.has_features)


def _needs_linear_head(config: AdapterConfig, head: Head) -> bool:
    """Whether a component reads the head's linear layer, which must be there then."""
    used = [c.name for c in (config.update, config.output) if c is not None]
    needing = [name for name in used if component(name).needs_linear_head]
    if needing and head.linear is None:
        found = "a function" if head.function is not None else type(head.module).__name__
        found = "a head that is unknown" if not head.has_features else found
        raise ValueError(
            f"`model` must make its logits by a linear layer for {needing[0]}, which reads its "
            f"weights, got {found}: use another component, or name the layer by features=."
        )
    return bool(needing)


def _context(
    model: nn.Module,
    config: AdapterConfig,
    head: Head,
    masters: Masters,
    buffers: ModelBuffers,
    injected: Injected,
) -> Context:
    alone = config.norm is None and not buffers.moving and rows_independent(model)
    output: Any = None if config.output is None else component(config.output.name)
    return Context(
        num_classes=head.num_classes,
        width=head.width,
        classifier=head.linear,
        parameters=masters.trained,
        generator=torch.Generator().manual_seed(config.seed),
        batch_size=config.batch_size,
        harm="" if output is None else output.harm,
        narrow=any(is_narrow(layer) for layer in batch_norm_layers(model).values()),
        rows_independent=alone,
        mean=config.mean,
        std=config.std,
        augment=injected.augment,
        restore_mask=injected.restore_mask,
        draws=Draws(injected.draws),
    )


def _component(kind: type, config: ComponentConfig, *arguments: Any) -> Any:
    cls = component(config.name)
    assert issubclass(cls, kind)
    make: Any = cls
    return make(config, *arguments)


def _trained(
    model: nn.Module, config: ComponentConfig | None, head: Head
) -> dict[str, nn.Parameter]:
    """The model's parameters that the update trains."""
    if not isinstance(config, UpdateConfig):
        return {}
    cls = component(config.name)
    assert issubclass(cls, Update)
    if not cls.trains_model:
        return {}
    found = select(model, config.params, head.module)
    left_out = cls.leaves_out(config, found)
    if len(left_out) == len(found):
        raise ValueError(
            f"`params`={shown(config.params)} must leave {config.name} something to train, but it "
            f"leaves out all {len(found)} parameters of this {type(model).__name__}: choose other "
            "params=."
        )
    return cls.chooses(config, model, {n: p for n, p in found.items() if n not in left_out})


def _insert_norm(
    model: nn.Module, config: ComponentConfig, context: Context, session: Session
) -> dict[str, AdaptiveNorm]:
    cls: Any = component(config.name)
    assert issubclass(cls, NormRule)
    layers = batch_norm_layers(model)
    if not layers or "" in layers:
        raise ValueError(
            f"`norm`={shown(config.name)} must find BatchNorm layers in the model, but this "
            f"{type(model).__name__} has {norm_layers_in_words(model)}: leave norm= out, or use a "
            "model with BatchNorm."
        )
    for name, layer in layers.items():
        if (
            not float(getattr(layer, "eps", 1)) > 0
        ):  # torch divides by no batch statistics without it
            raise ValueError(
                f"`norm`={shown(config.name)} must find an eps above 0 in every BatchNorm layer, "
                f"but {shown(name)} has {layer.eps}: set it to 1e-5, torch's own."
            )
    if cls.needs_source_stats:
        for name, layer in layers.items():
            if layer.running_mean is None:
                raise ValueError(
                    f"`norm`={shown(config.name)} must find running statistics in every BatchNorm "
                    f"layer, but {shown(name)} has none: use norm='bn'."
                )
    return insert(model, lambda base: cls(config, base, context), session)
