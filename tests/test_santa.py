"""SANTA: its first loss by hand, where prototypes come from, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import affine, batch_statistics, tiny
from tta.parts.losses import contrastive

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-e": {
        "arrays": {
            "prototypes": "source: prototypes; constant: update/prototypes",
            "projector_init": "wrap: draws=",
            "projector_final": "state: update/projector.<name>",
            "prototype_index": "output: nearest prototype of the features",
            "loss_self_training": "report.self_training",
            "loss_contrastive": "report.contrastive",
        },
        "hparams": {
            "params.lambda_ce_trg": "field: weight_self_training",
            "params.lambda_cont": "field: weight_contrastive",
            "params.projection_dim": "field: of the same name",
        },
    },
}

RAW: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}
close = torch.testing.assert_close


def _view(x: torch.Tensor, index: int) -> torch.Tensor:
    return (x.roll(1 + index, dims=3) * 0.9).clamp(0, 1)


def _santa(**fields: Any) -> tta.Adapter:
    config = tta.get_config("santa.cifar10", **fields)
    prototypes = torch.randn(10, 8, generator=torch.Generator().manual_seed(3))
    source = tta.SourceStatistics(prototypes=prototypes)
    return tta.wrap(tiny("bn"), update=config, source=source, augment=_view, **RAW)


def test_two_steps_are_those_of_the_definition() -> None:
    """With torch's own network and optimiser, and nothing of the library but the contrast."""
    fields = {"lr": 0.01, "weight_self_training": 0.7, "weight_contrastive": 0.3}
    adapter = _santa(projection_dim=0, temperature=0.5, **fields)
    prototypes = adapter.constants()["update/prototypes"]
    net: Any = batch_statistics(tiny("bn"))
    source = copy.deepcopy(net)
    features: list[torch.Tensor] = []
    net.fc.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    theta = list(affine(net).values())
    adam = torch.optim.Adam(theta, lr=0.01)
    for t in range(2):
        x = images(t)
        features.clear()
        z, z_view = net(x), net(_view(x, t))
        with torch.no_grad():
            s = source(x).log_softmax(1)
        p, p_view = z.softmax(1), z_view.softmax(1)
        training = -((p + p_view) / 2 * s).sum(1).mean()
        cosines = torch.cosine_similarity(features[0][:, None], prototypes[None], dim=2)
        chosen = prototypes[cosines.argmax(1)]
        contrast = contrastive(torch.stack([chosen, *features], dim=1), 0.5)
        loss = 0.7 * training + 0.3 * contrast
        adam.zero_grad()
        loss.backward()
        adam.step()
        close(adapter(x), z.detach(), atol=1e-5, rtol=1e-5)
        assert adapter.report.self_training == pytest.approx(training.item(), rel=1e-5)
        assert adapter.report.contrastive == pytest.approx(contrast.item(), rel=1e-5)
        assert adapter.report.loss == pytest.approx(loss.item(), rel=1e-5)
    for p, value in zip(adapter.parameters_adapted.values(), theta, strict=True):
        close(p.detach(), value.detach(), atol=2e-5, rtol=0)


def test_prototypes_are_those_of_rmt() -> None:
    net, batches = tiny("bn"), source_batches()
    found = [tta.collect_source(net, batches, for_methods=[name]) for name in ("rmt", "santa")]
    assert found[1].contents == ["prototypes"]
    one, other = (a.prototypes for a in found)
    assert one is not None and other is not None
    close(one, other, equal_nan=True)
    for source in (found[1], batches):
        adapter = tta.wrap(tiny("bn"), "santa.cifar10", source=source, **RAW)
        close(adapter.constants()["update/prototypes"], one, equal_nan=True)


def test_reset_goes_back_to_the_projector_that_was_loaded() -> None:
    adapter = _santa(lr=0.01)
    own = adapter.state()["update/projector.0.weight"]
    other = torch.randn_like(own)
    adapter.load_state({"update/projector.0.weight": other}, as_source=True)
    adapter(images(0))
    assert not torch.equal(adapter.state()["update/projector.0.weight"], other)
    adapter.reset()
    assert torch.equal(adapter.state()["update/projector.0.weight"], other)


def test_words() -> None:
    with pytest.raises(ValueError, match="`source` must give santa class prototypes, got nothing"):
        tta.wrap(tiny("bn"), "santa.cifar10", **RAW)
    wrong = tta.SourceStatistics(prototypes=torch.zeros(10, 3))
    with pytest.raises(ValueError, match=r"`source.prototypes` must be of shape \(10, 8\)"):
        tta.wrap(tiny("bn"), "santa.cifar10", source=wrong, **RAW)
    with pytest.raises(ValueError, match="`temperature` must be"):
        tta.get_config("santa", temperature=0)
    with pytest.raises(ValueError, match="`mean` and `std` must say"):
        tta.wrap(tiny("bn"), "santa.cifar10", source=source_batches())
