"""SPA: replaying its trace, and what it does beyond it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tests.helpers.traces import GOLDEN, Trace
from tests.helpers.update_traces import check_source
from tests.helpers.wild import Cosine
from tta.parts.degraded_views import low_frequencies, mask_amplitudes, noise_patches
from tta.parts.losses import entropy

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-d": {
        "arrays": {
            r"frequency_keep|patch_noise": "wrap: draws=",
            r"low_(rows|cols)": "piece: low_frequencies",
            "alpha_after": "state: update/alpha",
            "consistency": "report.frequency_loss and .noise_loss",
            r"view_(frequency|noise)_(first|last)": "output: what the model is fed",
        },
        "hparams": {
            "optimizer.lr_predictor": "field: predictor_lr",
            r"params\.(noise_ratio|low_fraction|patch_size|alpha_lr)": "field: of the same name",
            "params.freq_mask_ratio": "field: mask_ratio",
            "params.alpha_momentum": "none: always 0.9",
            "params.aux": "field: auxiliary",
            "params.constants_replaced": "none: in words",
        },
    },
}

LOGITS: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-4}
WEIGHTS: dict[str, Any] = {"atol": 5e-5, "rtol": 0.0}
PIXELS: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
HALVES: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
TRACES = sorted((GOLDEN / "set-d").glob("spa_*.npz"))
close = torch.testing.assert_close


def small(**fields: Any) -> Any:
    return tta.get_config("spa.imagenet_vit", **{"patch_size": 8, "lr": 0.05} | fields)


def in_image_order(kept: Tensor) -> Tensor:
    """Masks (B, 3, s, s) of a trace, whose code also shifts the axes of images and channels."""
    b = len(kept)
    rows = [(i + b // 2) % b for i in range(b)]
    return kept[rows][:, [(c + 1) % 3 for c in range(3)]]


def replaying(trace: Trace, **more: Any) -> tta.Adapter:
    p, optimizer = trace.params, trace.optimizer()
    auxiliary = p["aux"]
    if auxiliary == "eta":
        auxiliary = tta.get_config("eta", entropy_margin=0.5, redundancy_margin=0.6)
    config = tta.get_config(
        "spa",
        predictor_lr=optimizer.pop("lr_predictor"),
        noise_ratio=p["noise_ratio"],
        mask_ratio=p["freq_mask_ratio"],
        low_fraction=p["low_fraction"],
        patch_size=p["patch_size"],
        alpha_lr=p["alpha_lr"],
        auxiliary=auxiliary,
        official=True,
        **optimizer,
    )

    def draws(name: str, shape: torch.Size, call: int) -> Tensor:
        found = trace.tensor(name)[call]
        return in_image_order(found) if name == "frequency_keep" else found

    return tta.wrap(trace.model(), update=config, draws=draws, **HALVES, **more)


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_trace(path: Path, monkeypatch) -> None:
    trace = Trace(path)
    check_source(trace)
    adapter = replaying(trace)
    fed: list[Tensor] = []
    adapter.model.register_forward_pre_hook(lambda _, args: fed.append(args[0].detach()))
    for t, x in enumerate(trace.tensor("inputs")):
        fed.clear()
        close(adapter(x), trace.tensor("outputs")[t], **LOGITS)
        report = adapter.report
        counts = (report.selected, report.selected_second)
        assert counts == tuple(trace.arrays["n_kept"][t].tolist())
        found = torch.tensor([report.frequency_loss, report.noise_loss])
        close(found, trace.tensor("consistency")[t], **LOGITS)
        close(adapter.state()["update/alpha"], trace.tensor("alpha_after")[t], **WEIGHTS)
        which = {0: "first", len(trace.tensor("inputs")) - 1: "last"}.get(t)
        if which is not None:
            close(fed[1], trace.tensor(f"view_frequency_{which}"), atol=1e-5, rtol=0.0)
            close(fed[2], trace.tensor(f"view_noise_{which}"), atol=1e-5, rtol=0.0)
    rows, columns = low_frequencies(32, 32, trace.params["low_fraction"])
    assert list(range(32))[rows] == trace.arrays["low_rows"].tolist()
    assert list(range(32))[columns] == trace.arrays["low_cols"].tolist()
    state = adapter.state()
    names = {n.removeprefix("model.") for n in trace.arrays["param_names"]}
    assert {*adapter.parameters_adapted, "predictor.weight"} == names
    for name, value in trace.group("adapted").items():
        own = name == "predictor.weight"
        key = f"update/{name}" if own else f"param/{name.removeprefix('model.')}"
        close(state[key], value, **WEIGHTS)


def adapter_with(family: str = "ln", config: Any = None, **more: Any) -> tta.Adapter:
    return tta.wrap(tiny(family), update=config or small(), **PIXELS | more)


def test_answered_draws_take_nothing_from_the_generator() -> None:
    asked: list[str] = []

    def answer(name: str, shape: torch.Size, call: int) -> Tensor | None:
        asked.append(name)
        return torch.zeros(shape) if answers else None

    adapter = adapter_with(draws=answer)
    start, answers = adapter.state()["rng"], True
    adapter(images(0))
    assert torch.equal(adapter.state()["rng"], start)
    assert int(adapter.report.kept.sum()) == adapter.report.selected
    answers = False
    adapter(images(1))
    assert not torch.equal(adapter.state()["rng"], start)
    assert asked == ["frequency_keep", "patch_noise"] * 2


@pytest.mark.parametrize("shape", [(6, 6), (7, 5), (8, 9)])
def test_masks_of_amplitudes_are_symmetric(shape: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    rows, columns = low_frequencies(*shape, 0.7)
    sides = (rows.stop - rows.start, columns.stop - columns.start)
    assert sides == tuple(int(0.7 * n) for n in shape)
    everything = torch.ones(2, 3, *sides, dtype=torch.bool)
    close(mask_amplitudes(x, everything, 0.7), x)
    kept = torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(1)) > 0.4
    spectrum = torch.fft.fft2(mask_amplitudes(x, kept, 0.7))
    before = torch.fft.fft2(x)
    share = (spectrum / before).real
    close(share, share.round(), atol=1e-3, rtol=0.0)  # kept or left out, with its phase
    assert 0 < float(share.mean()) < 1
    shifted = torch.fft.fftshift(share.round().bool(), dim=(2, 3))
    decided = shifted[:, :, rows, columns]
    for i in range(rows.start, rows.stop):
        for j in range(columns.start, columns.stop):
            down, right = i - shape[0] // 2, j - shape[1] // 2
            if down < 0 or (down == 0 and right >= 0):
                at = (i - rows.start, j - columns.start)
                assert torch.equal(decided[..., at[0], at[1]], kept[..., at[0], at[1]])


def test_noise_goes_to_its_patch() -> None:
    x = torch.zeros(2, 3, 5, 4)
    noise = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 3, 3) / 2
    alpha = torch.tensor([1.0, 1.0, 0.5, 0.0], requires_grad=True)
    found = noise_patches(x, alpha, noise)
    assert torch.equal(found[0, 0, :3, :3], torch.zeros(3, 3))
    assert (found[..., :3, 3] == 0.5).all() and (found[..., 3:, :3] == 0.25).all()
    assert (found[..., 3:, 3] == 0).all()
    assert torch.equal(noise_patches(x + 2, torch.zeros(4), noise), torch.ones_like(x))
    found.sum().backward()
    assert alpha.grad is not None and alpha.grad[1] > 0


def test_one_step_by_hand() -> None:
    """Divergence over the rows that a view is less sure of, and a climbs."""
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(8, 3, 6, 6, generator=generator) > 0.2
    noise = torch.randn(16, 3, 8, 8, generator=generator)
    draws = {"frequency_keep": kept, "patch_noise": noise}
    config = small(momentum=0.0, predictor_lr=0.3, noise_ratio=0.25, alpha_lr=2.0)
    adapter = adapter_with("gn", config, draws=lambda name, shape, call: draws[name])
    net, x = tiny("gn"), images(0)
    found = adapter(x)
    alpha = torch.full((16,), 0.5, requires_grad=True)
    signed = x * 2 - 1
    views = (mask_amplitudes(signed, kept, 0.2), noise_patches(signed, alpha, noise))
    target = net(x).detach().softmax(1)
    close(found, net(x).detach())
    features: list[Tensor] = []
    net.get_submodule("fc").register_forward_pre_hook(lambda _, args: features.append(args[0]))
    predictor = torch.eye(8, requires_grad=True)
    loss, counts = torch.zeros(()), []
    for view in views:
        net((view + 1) / 2)
        probs = net.get_submodule("fc").forward(features[-1] @ predictor.t()).softmax(1)
        rows = [b for b in range(8) if target[b].max() > probs[b].max()]
        parts = [(target[b] * (target[b] / probs[b]).log()).sum() for b in rows]
        loss, counts = loss + torch.stack(parts).mean(), [*counts, len(rows)]
    loss.backward()
    report, state = adapter.report, adapter.state()
    assert [report.selected, report.selected_second] == counts and min(counts) > 0
    assert report.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert report.frequency_loss + report.noise_loss == pytest.approx(report.loss, abs=1e-5)
    assert predictor.grad is not None and alpha.grad is not None
    close(state["update/predictor.weight"], torch.eye(8) - 0.3 * predictor.grad)
    for name in adapter.parameters_adapted:
        p = net.get_parameter(name)
        close(state[f"param/{name}"], (p - 0.05 * p.grad).detach())  # type: ignore[operator]
    moved = 0.5 + 2.0 * alpha.grad
    expected = (moved * (0.25 / moved.square().mean()).sqrt()).clamp(-1, 1)
    close(state["update/alpha"], expected)


def test_a_view_that_is_surer_teaches_nothing() -> None:
    def nothing_left_out(name: str, shape: torch.Size, call: int) -> Tensor:
        return torch.ones(shape) if name == "frequency_keep" else torch.zeros(shape)

    adapter = adapter_with("ln", small(noise_ratio=0.0, optimizer="sgd"), draws=nothing_left_out)
    before = adapter.state()
    adapter.network.head.module.register_forward_pre_hook(lambda m, a: None)  # type: ignore[union-attr]
    assert adapter(images(0)).isfinite().all()
    after = adapter.state()
    assert adapter.report.loss < 1e-9 or math.isnan(adapter.report.loss)
    assert (after["update/alpha"] == 0).all()
    for key, value in before.items():
        if key.startswith("param/"):
            close(after[key], value, atol=1e-6, rtol=0.0)


def test_where_noise_starts() -> None:
    def start(config: Any, resets: int = 0) -> float:
        adapter = tta.wrap(tiny("ln"), update=config, **HALVES)
        for _ in range(resets):
            adapter(images(0) * 2 - 1)
            adapter.reset()
        update: Any = adapter.update
        assert adapter.state()["update/alpha"].shape == (0,)
        update._begin(images(0))
        assert adapter.state()["update/alpha"].shape == (16,)
        return float(adapter.state()["update/alpha"].square().mean())

    ours, theirs = small(noise_ratio=0.1), small(noise_ratio=0.1, official=True)
    assert start(ours) == start(ours, 1) == pytest.approx(0.1)
    assert start(theirs) == pytest.approx(0.4) and start(theirs, 1) == pytest.approx(0.1)


def test_images_of_another_size_are_refused_until_a_reset() -> None:
    adapter = adapter_with("gn")
    adapter(images(0))
    before = adapter.state()
    with pytest.raises(ValueError, match="`images` must have as many patches of 8 pixels"):
        adapter(images(1)[:, :, :20, :20])
    assert all(torch.equal(v, before[k]) for k, v in adapter.state().items())
    adapter.reset()
    assert adapter(images(1)[:, :, :20, :20]).shape == (8, 10)
    assert adapter.state()["update/alpha"].shape == (9,)
    fresh = adapter_with("gn")
    fresh.load_state({"update/alpha": adapter.state()["update/alpha"]})
    assert fresh(images(1)[:, :, :20, :20]).isfinite().all()
    with pytest.raises(ValueError, match="must have shape"):
        fresh.load_state({"update/alpha": before["update/alpha"]})
    fresh.load_state({"update/alpha": torch.zeros(0)})


@pytest.mark.parametrize("name", ["tent", "eta", "eata"])
def test_an_auxiliary_loss_is_added(name: str) -> None:
    fields = {} if name == "tent" else {"entropy_margin": 2.0, "redundancy_margin": 2.0}
    auxiliary = tta.get_config(name, **fields)
    more: dict[str, Any] = {"source": source_batches()} if name == "eata" else {}
    alone, joined = adapter_with(), adapter_with("ln", small(auxiliary=auxiliary), **more)
    x = images(0)
    assert torch.equal(alone(x), joined(x))
    with torch.no_grad():
        logits = tiny("ln")(x)
    nats = entropy(logits)
    limit = 2.0 * math.log(10)
    extra = nats.mean() if name == "tent" else (nats * torch.exp(limit - nats)).mean()
    expected = alone.report.loss + 0.1 * float(extra)
    assert joined.report.loss == pytest.approx(expected, abs=1e-4)
    state = joined.state()
    if name == "tent":
        assert "update/ema_probs" not in state
    else:
        close(state["update/ema_probs"], logits.softmax(1).mean(0))
    assert ("update/fisher" in joined.constants()) is (name == "eata")
    again = tta.AdapterConfig.from_json(joined.config.to_json())
    assert again == joined.config
    for t in (1, 2):
        joined(images(t))
    if name == "eata":
        update: Any = joined.update
        now = torch.cat([p.detach().flatten() for p in update.parameters_adapted.values()])
        assert update.fisher.sum() > 0 and not torch.equal(now, update.anchor)


def test_an_adapter_with_a_fisher_penalty_is_saved(tmp_path: Path) -> None:
    adapter = adapter_with("ln", small(auxiliary="eata"), source=source_batches())
    adapter(images(0))
    tta.save(adapter, tmp_path)
    again = tta.load(tiny("ln"), tmp_path)
    assert torch.equal(again(images(1)), adapter(images(1)))
    with pytest.raises(ValueError, match="`source` must give eata its Fisher"):
        adapter_with("ln", small(auxiliary="eata"))


@pytest.mark.parametrize("given", ["sar", "lame", 3, tta.get_config("rdumb")])
def test_other_auxiliary_methods_are_refused(given: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="`auxiliary` must be"):
        small(auxiliary=given)


def test_official_code_takes_images_in_minus_one_to_one() -> None:
    with pytest.raises(ValueError, match="`mean` and `std` must be"):
        adapter_with("ln", small(official=True))


def test_views_do_not_depend_on_what_the_model_takes() -> None:
    """A model of pixels and one of normalised images learn the same from the same picture."""
    x = images(0)
    one = adapter_with("ln")
    scaled = torch.nn.Sequential(Halves(), tiny("ln")).eval()
    other = tta.wrap(scaled, update=small(), **HALVES)
    close(one(x), other(x * 2 - 1))
    close(torch.tensor(one.report.loss), torch.tensor(other.report.loss), atol=1e-5, rtol=1e-4)


class Halves(torch.nn.Module):
    """From [-1, 1] to [0, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2 + 0.5


def test_a_model_without_a_linear_head_is_refused() -> None:
    with pytest.raises(ValueError, match="`model` must make its logits by a linear layer for spa"):
        tta.wrap(Cosine(), update=small(), num_classes=10, features="neck", **PIXELS)


def test_rates_are_scaled_apart() -> None:
    preset = tta.get_config("spa.imagenet_vit")
    half: Any = preset.for_batch_size(32)
    assert (half.lr, half.predictor_lr) == (0.005, 0.025)
    named: Any = tta.get_config("spa.imagenet_vit", predictor_lr=0.2).for_batch_size(32)
    assert (named.lr, named.predictor_lr) == (0.005, 0.2)
    adapter = adapter_with("ln", small(lr=0.5, predictor_lr=0.25))
    update: Any = adapter.update
    rates = {g["lr"]: len(g["params"]) for g in update.optimizer.param_groups}
    assert rates == {0.5: len(adapter.parameters_adapted), 0.25: 1}
