"""From a finished config to an adapter: checks, surgery, components, source artefacts.

Everything that can be refused is refused before the first change to the model; what fails later
(a source pass, say) is undone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tta.core import norm_layers as surgery
from tta.core.adapter import MARK, Adapter
from tta.core.backbone import Backbone, ImagesRefusedError
from tta.core.classifier import find_classifier, size_out
from tta.core.component import Context
from tta.core.config import ComponentConfig, UpdateConfig
from tta.core.norm_layers import AdaptiveNorm
from tta.core.norm_rule import NormRule
from tta.core.output_rule import Output
from tta.core.parameters import select
from tta.core.recipe import AdapterConfig
from tta.core.registry import component
from tta.core.source import SourceStatistics, as_source
from tta.core.source_checks import check_parameters, checked
from tta.core.update import Update

__all__ = ["build", "check_model"]

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def build(
    model: nn.Module,
    config: AdapterConfig,
    source: Any,
    constants: dict[str, Tensor] | None = None,
    classifier: nn.Module | None = None,
    **injected: Any,
) -> Adapter:
    """Make the adapter that ``config`` describes.

    Args:
        model: The classifier.
        config: All slots, with every figure decided.
        source: As for :func:`wrap`.
        constants: What a saved adapter had; when given, nothing is computed from source data.
        classifier: The layer that makes the logits, where it was found already.
        **injected: ``augment`` and ``restore_mask``, as for :func:`wrap`.
    """
    check_model(model)
    statistics = as_source(source)
    check_parameters(statistics, model)
    with torch.inference_mode(False):
        return _build(model, config, statistics, constants, classifier, injected)


def _build(
    model: nn.Module,
    config: AdapterConfig,
    source: SourceStatistics,
    constants: dict[str, Tensor] | None,
    classifier: nn.Module | None,
    injected: dict[str, Any],
) -> Adapter:
    _check_injected(config, injected)
    classifier = find_classifier(model) if classifier is None else classifier
    classes = size_out(classifier)
    context = Context(
        num_classes=classes,
        generator=torch.Generator().manual_seed(config.seed),
        batch_size=config.batch_size,
        mean=config.mean,
        std=config.std,
        **injected,
    )
    if isinstance(config.update, UpdateConfig):
        context.parameters = _parameters(model, config.update)
    output = None
    if config.output is not None:
        output_class: Any = component(config.output.name)
        assert issubclass(output_class, Output)
        output = output_class(config.output, context)
    wrappers: dict[str, AdaptiveNorm] = {}
    if config.norm is not None:
        wrappers = _insert_norm(model, config.norm, context)
    else:
        context.rows_independent = surgery.rows_independent(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    update_class: Any = None if config.update is None else component(config.update.name)
    needs_features = any(c is not None and c.needs_features for c in (output, update_class))
    adapter = network = None
    try:
        network = Backbone(model, classifier, needs_features)
        update = None
        if update_class is not None:
            assert issubclass(update_class, Update)
            update = update_class(config.update, network, context)
            update.to(device)
        if output is not None:
            output.to(device)
        for wrapper in wrappers.values():
            wrapper.rule.to(device)
        adapter = Adapter(model, config, context, network, wrappers, update, output)
        used_by = [part for part in (update, output) if part is not None]
        if source.batches is not None and used_by:
            labels = any(part.uses_labels for part in used_by)
            batches = checked(source.batches, network.check, classes if labels else None)
            source = dataclasses.replace(source, batches=batches)
        if constants is not None:
            _load_constants({"update": update, "output": output}, constants)
            if update is not None:
                update.attach(source)
        else:
            adapter.config = dataclasses.replace(config, source=_fit(adapter, network, source))
        for wrapper in wrappers.values():
            wrapper.rule.fell_back = False  # source batches may have been short
        adapter._mark_reset_point()
    except BaseException:  # an interrupt too leaves the model as it was
        if adapter is not None:
            adapter.unwrap()
        else:
            if network is not None:
                network.close()
            surgery.remove(model, wrappers)
        raise
    return adapter


def _fit(adapter: Adapter, network: Backbone, source: SourceStatistics) -> str | None:
    """Give the components what they need of the source; returns what that was, in words."""
    wrappers = adapter.norm_layers.values()
    before = adapter.state()
    try:
        if adapter.output is not None:
            with surgery.overriding(wrappers, surgery.by_source):
                adapter.output.fit(source, network)
        if adapter.update is not None:
            adapter.update.fit(source)
    except ImagesRefusedError as error:
        raise ValueError(
            "`source` must give pairs (images, labels), but a batch has images that this model "
            f"cannot take: {error}"
        ) from error
    # Source passes go through the norm rule and must leave no trace in it.
    adapter.load_state({k: v for k, v in before.items() if k.startswith("norm/")})
    used = [p.source_used for p in (adapter.update, adapter.output) if p is not None]
    return "; ".join(words for words in used if words) or None


def _parameters(model: nn.Module, config: UpdateConfig) -> dict[str, nn.Parameter]:
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


def _load_constants(parts: dict[str, Any], constants: dict[str, Tensor]) -> None:
    for slot, part in parts.items():
        if part is None:
            continue
        prefix = f"{slot}/"
        mine = {k[len(prefix) :]: v for k, v in constants.items() if k.startswith(prefix)}
        try:
            part.load_constants(mine)
            missing = min(set(part.constants()) - set(mine), default=None)
            reason = f"{missing!r} is missing"
        except (KeyError, RuntimeError) as error:
            missing, reason = "", str(error)
        if missing is not None:
            raise ValueError(
                f"`folder` must hold the constants of {part.name} for this model, but does not "
                f"({reason}): save the adapter again."
            )


def _check_injected(config: AdapterConfig, injected: dict[str, Any]) -> None:
    update: Any = None if config.update is None else component(config.update.name)
    for name, value in injected.items():
        if value is None:
            continue
        if not callable(value):
            raise TypeError(
                f"`{name}` must be callable, got {type(value).__name__}: pass a function."
            )
        if update is None or name not in update.injects:
            chosen = "no update" if update is None else repr(update.name)
            raise ValueError(
                f"`{name}` must belong to an update that takes it, got {chosen}: leave it out."
            )


def check_model(model: Any) -> None:
    """Refuse what is no single, unwrapped network."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}: pass a classifier."
        )
    for module in model.modules():
        if isinstance(module, PARALLEL):
            raise ValueError(
                f"`model` must be one copy of a network, got a {type(module).__name__}, whose "
                "copies would each adapt and forget: wrap its .module."
            )
        inner = getattr(module, "_orig_mod", None)
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"`model` must be compiled as a whole, got a {type(inner).__name__} that was by "
                "itself and would go on as it is: give torch.compile the model."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"`model` must have layers that can be looked into, got a {type(module).__name__}: "
                "wrap the network it was scripted from."
            )
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            "`model` must have ordinary parameters, got inference tensors: build it outside "
            "torch.inference_mode()."
        )
    if any(isinstance(m, (Adapter, AdaptiveNorm)) or MARK in m.__dict__ for m in model.modules()):
        raise ValueError(
            f"`model` must not be wrapped yet, got {type(model).__name__} that is or holds a "
            "wrapped model: call unwrap() on its adapter first."
        )


def _insert_norm(
    model: nn.Module, config: ComponentConfig, context: Context
) -> dict[str, AdaptiveNorm]:
    cls: Any = component(config.name)
    assert issubclass(cls, NormRule)
    layers = surgery.batch_norm_layers(model)
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
    return surgery.insert(model, lambda base: cls(config, base, context))
