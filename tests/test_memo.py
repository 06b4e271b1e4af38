"""MEMO: replaying its traces, its views, and what it does beyond them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.traces import GOLDEN, Trace
from tta.core.random import CountedDraws
from tta.methods.memo import Memo
from tta.parts import augmix
from tta.parts.losses import marginal_entropy

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-d": {
        "arrays": {
            "view_logits_first": "output: the model on the views",
            r"adapted_(first|last)": "state: param/<name>, before it is put back",
        },
        "hparams": {
            "optimizer.state": "none: official=True in words",
            "params.views": "field: views",
            "params.niter": "field: steps",
            "params.bn_prior_strength": "field: prior_strength",
            "params.script": "none: provenance",
        },
    },
}

LOGITS: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-4}
WEIGHTS: dict[str, Any] = {"atol": 5e-5, "rtol": 0.0}
PIECES: dict[str, Any] = {"atol": 2e-6, "rtol": 0.0}
PIXELS: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
SET_D = GOLDEN / "set-d"
TRACES = sorted(SET_D.glob("memo_*.npz"))
close = torch.testing.assert_close


def shifted(x: Tensor, view: int) -> Tensor:
    """A view that depends on its number alone."""
    return x.roll(view % 7, 3)


def small(**fields: Any) -> Any:
    """A config with views that are quickly made, and steps that move something."""
    return tta.get_config("memo.cifar10", **{"lr": 0.05, "views": 3, **fields})


def one_by_one(adapter: tta.Adapter, x: Tensor) -> Tensor:
    return torch.cat([adapter(x[i : i + 1]) for i in range(len(x))])


def replaying(trace: Trace, **more: Any) -> tta.Adapter:
    """The adapter of a trace, whose views are the recorded ones."""
    p = trace.params
    views = trace.tensor("views").flatten(0, 1)
    mean, std = (torch.tensor(p[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    config = tta.get_config(
        "memo",
        views=p["views"],
        steps=p["niter"],
        prior_strength=p["bn_prior_strength"],
        official=True,
        **trace.optimizer(),
    )
    return tta.wrap(
        trace.model(),
        update=config,
        mean=p["mean"],
        std=p["std"],
        augment=lambda x, n: views[n : n + 1] * std + mean,
        **more,
    )


def trace_images(trace: Trace) -> Tensor:
    mean, std = (torch.tensor(trace.params[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    return (trace.tensor("images").float() / 255 - mean) / std


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_trace(path: Path, monkeypatch) -> None:
    trace = Trace(path)
    x = trace_images(trace)
    with torch.no_grad():
        close(trace.model()(x), trace.tensor("source_outputs"), atol=1e-5, rtol=1e-5)
    adapter = replaying(trace)
    start = adapter.state()
    adapted: list[dict[str, Tensor]] = []
    predict = Memo.adapt

    def watch(update: Any, image: Tensor) -> tta.Prediction:
        found = predict(update, image)
        adapted.append({n: p.detach().clone() for n, p in update.parameters_adapted.items()})
        return found

    monkeypatch.setattr(Memo, "adapt", watch)
    for i in range(len(x)):
        close(adapter(x[i : i + 1])[0], trace.tensor("outputs")[i], **LOGITS)
        close(torch.tensor(adapter.report.loss), trace.tensor("marginal_entropy")[i, -1], **LOGITS)
        assert adapter.report.stepped and adapter.report.selected == 1
    for key, found in (("adapted_first", adapted[0]), ("adapted_last", adapted[-1])):
        for name, value in found.items():
            close(value, trace.group(key)[name], **WEIGHTS)
    after = adapter.state()
    assert all(torch.equal(after[k], start[k]) for k in start if k.startswith("param/"))
    whole = replaying(trace)(x)
    close(whole, trace.tensor("outputs"), **LOGITS)


def test_the_first_views_are_those_of_the_trace() -> None:
    for path in TRACES:
        trace = Trace(path)
        adapter = replaying(trace)
        views = trace.tensor("views")[0, : trace.params["views"]]
        with torch.no_grad():
            close(adapter.network(views).logits, trace.tensor("view_logits_first"), **LOGITS)


def test_the_marginal_entropy_of_the_trace() -> None:
    trace = Trace(SET_D / "pieces_memo.npz")
    logits = trace.tensor("logits").requires_grad_()
    log_probs = logits.log_softmax(1)
    loss = marginal_entropy(log_probs)
    loss.backward()
    close(loss.detach(), trace.tensor("marginal_entropy"), **PIECES)
    close(logits.grad, trace.tensor("grad"), **PIECES)
    mean = log_probs.exp().mean(0).log()
    close(mean.detach(), trace.tensor("log_mean_prob"), **PIECES)


def test_the_marginal_entropy_of_impossible_classes_is_finite() -> None:
    sure = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]], requires_grad=True)
    loss = marginal_entropy(sure)
    assert float(loss.detach()) == 0
    nearly = torch.tensor([[0.0, -1e38], [0.0, -1e38]], requires_grad=True)
    marginal_entropy(nearly).backward()
    assert nearly.grad is not None and nearly.grad.isfinite().all()


def test_the_views_of_the_trace() -> None:
    trace = Trace(SET_D / "pieces_augmix.npz")
    assert tuple(trace.hparams["op_names"]) == augmix.OPERATIONS
    for i, index in enumerate(trace.arrays["image_index"]):
        top, left = trace.arrays["crop_top_left"][i]
        image = F.pad(trace.tensor("images")[index], (4, 4, 4, 4))
        image = image[:, top : top + 32, left : left + 32]
        image = image.flip(2) if trace.arrays["flip"][i] else image
        levels = np.where(trace.arrays["negate"][i], -1, 1) * trace.arrays["levels"][i]
        weights, mixing = trace.tensor("w")[i], trace.tensor("m")[i]
        found = augmix.view(
            image, trace.tensor("ops")[i], torch.from_numpy(levels), weights, mixing
        )
        close((found - 0.5) / 0.5, trace.tensor("views")[i], atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (96, 64)])
def test_operations_are_those_of_pillow(shape: tuple[int, int]) -> None:
    from PIL import Image, ImageOps

    generator = torch.Generator().manual_seed(shape[1])
    noise = (torch.rand(3, *shape, generator=generator) * 256).to(torch.uint8)
    smooth = F.avg_pool2d(noise.float()[None] * 0.6, 5, 1, 2)[0].to(torch.uint8)
    flat = smooth.clone()
    flat[1] = 5
    h, w = shape
    cases = ((noise, 0.97, 1), (smooth, 0.4, -1), (flat, 0.71, -1), (smooth, 0.1, 1))
    for image, u, sign in cases:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())

        def moved(*matrix: float, picture: Any = picture) -> Any:
            how = {"resample": Image.Resampling.BILINEAR, "fillcolor": 128}
            return picture.transform(picture.size, Image.Transform.AFFINE, matrix, **how)

        expected = (
            ImageOps.autocontrast(picture),
            ImageOps.equalize(picture),
            picture.rotate(sign * int(3 * u), Image.Resampling.BILINEAR, fillcolor=128),
            ImageOps.solarize(picture, 256 - int(25.6 * u)),
            moved(1, sign * 0.03 * u, 0, 0, 1, 0),
            moved(1, 0, 0, sign * 0.03 * u, 1, 0),
            moved(1, 0, sign * int(u * w / 30), 0, 1, 0),
            moved(1, 0, 0, 0, 1, sign * int(u * h / 30)),
            ImageOps.posterize(picture, 4 - int(0.4 * u)),
        )
        chains = torch.full((3, 3), -1)
        alone = torch.tensor([1.0, 0.0, 0.0])
        for operation, result in enumerate(expected):
            chains[0, 0] = operation
            levels = torch.full((3, 3), sign * u, dtype=torch.float64)
            found = augmix.view(image, chains, levels, alone, 0.0)
            target = torch.from_numpy(np.array(result)).permute(2, 0, 1).float() / 255
            assert torch.equal(found, target), augmix.OPERATIONS[operation]


@pytest.mark.parametrize("side", [32, 80])
def test_random_views_are_pixels_and_differ(side: int) -> None:
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    draws = CountedDraws(3)
    views = torch.cat([augmix.random_view(x, draws) for _ in range(20)])
    assert views.shape == (20, 3, side, side) and views.min() >= 0 and views.max() <= 1
    assert len({float(v.sum()) for v in views}) == 20
    again = CountedDraws(3)
    assert torch.equal(views, torch.cat([augmix.random_view(x, again) for _ in range(20)]))
    grey = augmix.random_view(x[:, :1], CountedDraws(4))
    assert grey.shape == (1, 1, side, side)


def test_draws_have_their_distributions() -> None:
    draws = CountedDraws(0)
    found = [augmix.draw_mix(draws) for _ in range(2000)]
    ops = torch.stack([m.ops for m in found])
    lengths = (ops >= 0).sum(2)
    assert torch.equal((ops >= 0).int().cummin(2).values, (ops >= 0).int())  # ends at the end
    assert (torch.bincount(lengths.flatten(), minlength=4)[1:] / 6000 - 1 / 3).abs().max() < 0.03
    kinds = torch.bincount(ops[ops >= 0])
    assert len(kinds) == 9 and (kinds / kinds.sum() - 1 / 9).abs().max() < 0.02
    levels = torch.stack([m.levels for m in found])[ops >= 0]
    assert levels.abs().min() >= 0.1 and levels.abs().max() <= 1
    assert abs(float((levels < 0).float().mean()) - 0.5) < 0.03
    weights = torch.stack([m.weights for m in found])
    close(weights.sum(1), torch.ones(2000))
    assert (weights.mean(0) - 1 / 3).abs().max() < 0.02
    assert abs(float(weights[:, 0].var()) - 1 / 18) < 0.006  # of Dirichlet(1, 1, 1)
    assert abs(sum(m.mixing for m in found) / 2000 - 0.5) < 0.03


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gn", {}),
        ("bn", {"prior_strength": 4.0, "steps": 2}),
        ("bn", {"optimizer": "adamw", "weight_decay": 0.1}),
        ("ln", {"momentum": 0.9}),
    ],
)
def test_a_batch_is_its_images_one_by_one(family: str, fields: dict[str, Any]) -> None:
    def wrapped() -> tta.Adapter:
        return tta.wrap(tiny(family), update=small(**fields), augment=shifted, **PIXELS)

    x = images(0, 4)
    whole = wrapped()(x)
    adapter = wrapped()
    assert torch.equal(one_by_one(adapter, x), whole)
    order = torch.tensor([2, 0, 3, 1])
    again = tta.wrap(tiny(family), update=small(**fields), augment=lambda v, n: v.flip(3), **PIXELS)
    assert torch.equal(again(x)[order], again(x[order]))
    assert all(not v.any() for k, v in again.state().items() if k.startswith("optim/"))
    with adapter.frozen():
        close(adapter(x), one_by_one(adapter, x), atol=1e-5, rtol=1e-5)
    assert not torch.equal(adapter(x), adapter.network(x).logits)


def test_the_official_optimiser_goes_on() -> None:
    x = images(0, 3)
    outputs = {}
    for official in (False, True):
        config = small(optimizer="adam", lr=1e-2, official=official)
        adapter = tta.wrap(tiny("gn"), update=config, augment=shifted, **PIXELS)
        outputs[official] = adapter(x)
        steps = adapter.state()["optim/fc.weight.step"]
        assert steps == (3 if official else 0)
        again = tta.wrap(tiny("gn"), update=config, augment=shifted, **PIXELS)
        assert torch.equal(one_by_one(again, x), outputs[official])
    assert torch.equal(outputs[True][0], outputs[False][0])
    assert not torch.equal(outputs[True][1], outputs[False][1])


def test_views_are_asked_for_image_by_image() -> None:
    asked: list[tuple[tuple[int, ...], int]] = []

    def augment(x: Tensor, n: int) -> Tensor:
        asked.append((tuple(x.shape), n))
        return x

    adapter = tta.wrap(tiny("gn"), update=small(steps=2), augment=augment, **PIXELS)
    adapter(images(0, 2))
    assert asked == [((1, 3, 32, 32), n) for n in range(2 * 2 * 3)]
    adapter.reset()
    adapter(images(0, 1))
    assert asked[-1][1] == 2 * 2 * 3 + 2 * 3 - 1


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps_by_hand(kind: str) -> None:
    net = tiny("gn")
    config = small(steps=2, optimizer=kind, weight_decay=0.1)
    adapter = tta.wrap(tiny("gn"), update=config, augment=shifted, **PIXELS)
    x = images(3, 1)
    found = adapter(x)
    make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    optimizer, loss = make(net.parameters(), lr=0.05, weight_decay=0.1), torch.zeros(())
    for step in range(2):
        views = torch.cat([shifted(x, 3 * step + n) for n in range(3)])
        mean = net(views).softmax(1).mean(0)
        loss = -(mean * mean.log()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    close(found, net(x).detach(), atol=1e-5, rtol=1e-5)
    assert adapter.report.loss == pytest.approx(float(loss.detach()), abs=1e-5)


def test_the_prior_brings_its_norm_rule_and_no_other() -> None:
    config = small(prior_strength=3.0)
    adapter = tta.wrap(tiny("bn"), update=config, **PIXELS)
    assert adapter.config.norm == tta.get_config("alpha_bn", source_weight=0.75, official=True)
    assert tta.wrap(tiny("gn"), update=config, **PIXELS).config.norm is None
    assert tta.wrap(tiny("bn"), update=small(), **PIXELS).config.norm is None
    assert tta.wrap(tiny("bn"), norm="bn", update=small(), **PIXELS).config.norm is not None
    for norm in ("bn", "source", tta.get_config("alpha_bn")):
        with pytest.raises(ValueError, match="`norm` must be left out with prior_strength=3"):
            tta.wrap(tiny("bn"), norm=norm, update=config, **PIXELS)
    broken = tta.AdapterConfig(norm=tta.get_config("bn"), update=config, **PIXELS)
    with pytest.raises(ValueError, match="`norm` must be left out"):
        tta.wrap(tiny("bn"), broken)
    again = tta.wrap(tiny("bn"), adapter.config)
    assert again.config == adapter.config


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"views": 0}, "`views`"), ({"prior_strength": -1.0}, "`prior_strength`")],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**fields)


def test_pixels_must_be_known() -> None:
    with pytest.raises(ValueError, match="`mean` and `std`"):
        tta.wrap(tiny("gn"), update=small())


class Structured(nn.Module):
    """A model that returns more than logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("gn")

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": self.net(x), "means": (x.mean((2, 3)),), "note": "same"}


def test_what_the_model_returns_has_all_rows() -> None:
    adapter = tta.wrap(Structured(), update=small(), num_classes=10, **PIXELS)
    x = images(0, 3)
    found = adapter(x)
    assert found["logits"].shape == (3, 10) and found["note"] == "same"
    close(found["means"][0], x.mean((2, 3)))


def test_images_whose_features_overflow_are_left_out() -> None:
    x = images(0, 3)
    x[1] *= 3e38
    adapter = tta.wrap(tiny("bn"), update=small(), augment=shifted, **PIXELS)
    with pytest.warns(UserWarning, match="1 of 3"):
        found = adapter(x)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
    assert adapter.report.rejected == 1 and adapter.report.selected == 2
