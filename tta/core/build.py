"""From a complete config to an adapter.

Everything that can be refused is refused before the first change to the model; what fails later
(a source pass, say) is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.adapter import Adapter
from tta.core.backbone import Backbone
from tta.core.classifier import find_classifier, size_in, size_out
from tta.core.component import Context
from tta.core.config import ComponentConfig, UpdateConfig
from tta.core.fitting import fit, load_constants
from tta.core.model_checks import check_model
from tta.core.norm_layers import (
    AdaptiveNorm,
    batch_norm_layers,
    insert,
    is_narrow,
    remove,
    rows_independent,
)
from tta.core.norm_rule import NormRule
from tta.core.output_rule import Output
from tta.core.parameters import select
from tta.core.recipe import AdapterConfig
from tta.core.registry import component
from tta.core.session import Session
from tta.core.source import as_source
from tta.core.source_checks import check_parameters
from tta.core.update import Update

__all__ = ["Injected", "build"]


@dataclass(frozen=True, kw_only=True)
class Injected:
    """Functions of the caller in place of a method's own draws; no part of the config."""

    augment: Callable[[Tensor, int], Tensor] | None = None
    restore_mask: Callable[[str, torch.Size], Tensor] | None = None

    def check(self, config: ComponentConfig | None) -> None:
        """Refuse what is no function, or what the update does not take."""
        cls: Any = None if config is None else component(config.name)
        for name, value in vars(self).items():
            if value is None:
                continue
            if not callable(value):
                raise TypeError(
                    f"`{name}` must be callable, got {type(value).__name__}: pass a function."
                )
            if cls is None or name not in cls.injects:
                chosen = "no update" if cls is None else repr(cls.name)
                raise ValueError(
                    f"`{name}` must belong to an update that takes it, got {chosen}: leave it out."
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
        config: All slots, with every figure decided.
        source: As for :func:`tta.wrap`.
        injected: Functions in place of draws.
        constants: What a saved adapter had; when given, nothing is computed from source data.
    """
    check_model(model)
    injected = Injected() if injected is None else injected
    injected.check(config.update)
    statistics = as_source(source)
    check_parameters(statistics, model)
    with torch.inference_mode(False):
        adapter = _assemble(model, config, injected)
        try:
            if constants is None:
                fit(adapter, statistics)
            else:
                load_constants(adapter, statistics, constants)
            return adapter.begin()
        except BaseException:  # an interrupt too leaves the model as it was
            adapter.unwrap()
            raise


def _assemble(model: nn.Module, config: AdapterConfig, injected: Injected) -> Adapter:
    """Model, components and adapter, put together; nothing of the source is known yet."""
    classifier = find_classifier(model)
    context = _context(model, config, classifier, injected)
    output = None if config.output is None else _component(Output, config.output, context)
    session = Session()
    wrappers: dict[str, AdaptiveNorm] = {}
    network = None
    try:
        if config.norm is not None:
            wrappers = _insert_norm(model, config.norm, context)
        used = [c for c in (config.update, config.output) if c is not None]
        features = any(component(c.name).needs_features for c in used)
        network = Backbone(model, classifier, features, session)
        update = None
        if config.update is not None:
            update = _component(Update, config.update, network, context)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for part in (update, output, *(wrapper.rule for wrapper in wrappers.values())):
            if part is not None:
                part.to(device)
        return Adapter(config, context, network, wrappers, update, output)
    except BaseException:
        if network is not None:
            network.close()
        remove(model, wrappers)
        raise


def _context(
    model: nn.Module, config: AdapterConfig, classifier: nn.Module, injected: Injected
) -> Context:
    parameters: dict[str, nn.Parameter] = {}
    if isinstance(config.update, UpdateConfig):
        parameters = _trained(model, config.update)
    try:
        width = size_in(classifier)
    except ValueError:  # whoever needs it says so
        width = None
    return Context(
        num_classes=size_out(classifier),
        width=width,
        parameters=parameters,
        generator=torch.Generator().manual_seed(config.seed),
        batch_size=config.batch_size,
        narrow=any(is_narrow(layer) for layer in batch_norm_layers(model).values()),
        rows_independent=config.norm is None and rows_independent(model),
        mean=config.mean,
        std=config.std,
        augment=injected.augment,
        restore_mask=injected.restore_mask,
    )


def _component(kind: type, config: ComponentConfig, *arguments: Any) -> Any:
    cls = component(config.name)
    assert issubclass(cls, kind)
    make: Any = cls
    return make(config, *arguments)


def _trained(model: nn.Module, config: UpdateConfig) -> dict[str, nn.Parameter]:
    found, cls = select(model, config.params), component(config.name)
    assert issubclass(cls, Update)
    left_out = cls.leaves_out(config, found)
    if len(left_out) == len(found):
        raise ValueError(
            f"`params`={config.params!r} must leave {config.name} something to train, but it "
            f"leaves out all {len(found)} parameters of this {type(model).__name__}: choose other "
            "params=."
        )
    return {name: p for name, p in found.items() if name not in left_out}


def _insert_norm(
    model: nn.Module, config: ComponentConfig, context: Context
) -> dict[str, AdaptiveNorm]:
    cls: Any = component(config.name)
    assert issubclass(cls, NormRule)
    layers = batch_norm_layers(model)
    if not layers or "" in layers:
        found = sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__})
        raise ValueError(
            f"`norm`={config.name!r} must find BatchNorm layers in the model, but this "
            f"{type(model).__name__} has " + (", ".join(found) or "no norm layers") + ": leave "
            "norm= out, or use a model with BatchNorm."
        )
    if cls.needs_source_stats:
        for name, layer in layers.items():
            if layer.running_mean is None:
                raise ValueError(
                    f"`norm`={config.name!r} must find running statistics in every BatchNorm "
                    f"layer, but {name!r} has none: use norm='bn'."
                )
    return insert(model, lambda base: cls(config, base, context))
