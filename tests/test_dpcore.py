"""DPCore: replaying its trace, and what it does beyond it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tests.helpers.trace_keys import figures
from tests.helpers.traces import GOLDEN, Trace

# Its presets, as the papers have them, see `tests/test_presets.py`.
PRESETS = {
    "dpcore.imagenet": {
        "lr": 0.1,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "prompts": 8,
        "temperature": 3.0,
        "core_momentum": 0.999,
        "known_ratio": 0.8,
        "steps_new": 50,
        "steps_known": 1,
    },
}

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-d": {
        "arrays": {
            "loss_raw": "report.loss_plain",
            "loss_weighted": "report.loss_weighted",
            "loss_last": "report.loss",
            "in_core": "report.known",
            "core_size": "report.core_size",
            "core_weights": "none: the prompts that they mix depend on them",
            r"core\d": "state: update/core_mean, core_std, core_prompts, by row",
        },
        "hparams": {
            "params.tau": "field: temperature",
            "params.ema_alpha": "field: core_momentum",
            "params.rho": "field: known_ratio",
            r"params\.steps_(new|known)": "field: of the same name",
            "params.lambda": "none: always 1",
            r"optimizer\.(eps|note)": "none: the default, in words",
        },
    },
}

pytestmark = pytest.mark.filterwarnings("ignore:.*preset, made for:UserWarning")
LIMIT = {"atol": 2e-4, "rtol": 1e-4}
close = torch.testing.assert_close


def _wrapped(net: Any = None, **fields: Any) -> Any:
    fields = {"prompts": 2, "steps_new": 3, "source": source_batches()} | fields
    return tta.wrap(tiny("ln") if net is None else net, "dpcore", **fields)


@pytest.mark.parametrize("official", [False, True])
def test_trace(official: bool) -> None:
    trace = Trace(GOLDEN / "set-d" / "dpcore_ln_vit.npz")
    p = trace.params
    given = {f"feature_{kind}": trace.tensor(f"source_{kind}") for kind in ("mean", "std")}
    asked: list[tuple[str, int]] = []

    def draws(name: str, shape: torch.Size, call: int) -> Tensor:
        asked.append((name, call))
        return trace.tensor("prompts_init")[0]

    adapter = tta.wrap(
        trace.model(),
        "dpcore",
        prompts=p["num_prompts"],
        temperature=p["tau"],
        core_momentum=p["ema_alpha"],
        known_ratio=p["rho"],
        steps_new=p["steps_new"],
        steps_known=p["steps_known"],
        official=official,
        source=tta.SourceStatistics(**given),
        draws=draws,
        **{k: v for k, v in trace.optimizer().items() if k in ("optimizer", "lr", "weight_decay")},
    )
    assert asked == [("prompts_init", 0)]
    for t, x in enumerate(trace.tensor("inputs")):
        with torch.no_grad():
            close(adapter.network(x).logits, trace.tensor("source_outputs")[t], **LIMIT)
        close(adapter(x), trace.tensor("outputs")[t], **LIMIT)
        for key, figure in figures("set-d").items():
            if key in trace.arrays:
                expected = torch.tensor(float(trace.arrays[key][t]))
                found = torch.tensor(float(adapter.report[figure]))
                close(found, expected, **LIMIT, equal_nan=True, msg=key)
    state = adapter.state()
    count = int(trace.arrays["core_size"][-1])
    for place in range(count):
        for name, value in trace.group(f"core{place}").items():
            close(state[f"update/core_{name}"][place].view_as(value), value, **LIMIT)
    rows = state["update/core_mean"][count:]
    assert len(rows) == (0 if official else 64 - count) and rows.isnan().all()
    assert not any(key.startswith("optim/") for key in state)


def test_the_weights_of_the_members_are_those_of_the_trace() -> None:
    trace = Trace(GOLDEN / "set-d" / "dpcore_ln_vit.npz")
    adapter = _wrapped(temperature=0.5)
    update, count = adapter.update, 3
    generator = torch.Generator().manual_seed(0)
    update.core_mean[:count] = torch.randn(count, 16, generator=generator)
    update.core_std[:count] = torch.rand(count, 16, generator=generator)
    update.core_prompts[:count] = torch.randn(count, 2, 16, generator=generator)
    mean, std = torch.zeros(16), torch.ones(16)
    away = [
        float((mean - update.core_mean[j]).norm() + (std - update.core_std[j]).norm())
        for j in range(count)
    ]
    weights, mixed = update._mixture(mean, std)
    expected = (-torch.tensor(away) / 0.5).softmax(0)
    close(weights, expected)
    close(mixed, sum((w * p for w, p in zip(expected, update.core_prompts, strict=False)), 0.0))
    assert trace.tensor("core_weights")[0].isnan().all()  # none before the first member


def test_a_known_batch_takes_a_step_and_moves_the_members() -> None:
    """Written out for one member, whose weight is 1."""
    adapter, x = _wrapped(known_ratio=1e6, core_momentum=0.5, steps_known=1), images(1)
    adapter(images(0))
    update, before = adapter.update, adapter.state()
    old = {name: before[f"update/core_{name}"][0] for name in ("mean", "std", "prompts")}
    prompts = old["prompts"].clone().requires_grad_()
    prediction = update.tokens.run(update.network, x, prompts)
    mean, std = prediction.features.mean(0), prediction.features.std(0)
    loss = (mean - update.feature_mean).norm() + (std - update.feature_std).norm()
    loss.backward()
    optimizer = torch.optim.AdamW([prompts], lr=0.1, weight_decay=0.01)
    optimizer.step()
    close(adapter(x), prediction.logits.detach())
    assert adapter.report.known and adapter.report.core_size == 1
    close(adapter.report.loss, loss.item(), atol=1e-5, rtol=1e-5)
    after = adapter.state()
    close(after["update/core_mean"][0], old["mean"] + 0.5 * (mean - old["mean"]).detach())
    grown = old["std"] + 0.5 * (std - old["std"]).clamp_min(0).detach()
    close(after["update/core_std"][0], grown)
    new = old["prompts"] + 0.5 * (prompts.detach() - old["prompts"])
    close(after["update/core_prompts"][0], new, atol=1e-4, rtol=1e-3)


def test_a_full_set_loses_the_older_of_the_two_most_similar_members() -> None:
    adapter = _wrapped(known_ratio=0.0, core_size=3)
    streams = [images(0), images(1) * 0.2, images(2) + 3, images(3) * 9]
    means = []
    for x in streams:
        with torch.no_grad():
            means.append(adapter.network(x).features.mean(0))
        adapter(x)
        assert adapter.report.core_size == min(len(means), 3)
    found = adapter.state()["update/core_mean"]
    kept = [i for i, mean in enumerate(means) if any(torch.allclose(mean, row) for row in found)]
    assert len(kept) == 3 and 3 in kept and 2 in kept  # of the first two one has left
    assert not adapter.state()["update/core_prompts"].isnan().any()


def test_a_frozen_adapter_takes_the_mixture_where_the_batch_is_known() -> None:
    adapter = _wrapped(known_ratio=1e6)
    with adapter.frozen():
        close(adapter(images(0)), tiny("ln")(images(0)).detach())
    adapter(images(0))
    prompts = adapter.state()["update/core_prompts"][0]
    with adapter.frozen(), torch.no_grad():
        expected = adapter.update.tokens.run(adapter.network, images(1), prompts).logits
        close(adapter(images(1)), expected)
    adapter = _wrapped(known_ratio=0.0)
    adapter(images(0))
    with adapter.frozen():
        close(adapter(images(1)), tiny("ln")(images(1)).detach())


def test_the_statistics_are_of_sure_images_or_of_all() -> None:
    net: Any = tiny("ln")
    with torch.no_grad():
        net.head.weight.mul_(1000)  # nobody is in doubt
    source = tta.collect_source(net, source_batches(), for_methods=["dpcore"])
    assert source.contents == ["feature_mean", "feature_std"] and source.feature_std is not None
    adapter = tta.wrap(net, "neo")
    with torch.no_grad():
        rows = torch.cat([adapter.network(x).features for x, _ in source_batches()])  # type: ignore[misc]
        z = torch.cat([adapter.network(x).logits for x, _ in source_batches()])
    adapter.unwrap()
    sure = torch.special.entr(z.softmax(1)).sum(1) < torch.tensor(10.0).log() / 2 - 1
    assert sure.sum() > 1
    close(source.feature_mean, rows[sure].mean(0))
    close(source.feature_std, rows[sure].std(0))
    doubting = _wrapped()
    assert doubting.config.source == "features of 16 images"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "`source` must give dpcore feature_mean and feature_std, got nothing"),
        (
            tta.SourceStatistics(feature_mean=torch.zeros(16)),
            r"must give dpcore feature_mean and feature_std, got \['feature_mean'\]",
        ),
        (
            tta.SourceStatistics(feature_mean=torch.zeros(9), feature_std=torch.ones(9)),
            r"`source.feature_mean` must be of shape \(16,\)",
        ),
        ([(images(0, 1), torch.zeros(1).long())], "must hold at least 2 images, got 1"),
    ],
)
def test_what_is_missing_or_of_another_model_is_refused(source: Any, words: str) -> None:
    net = tiny("ln")
    with pytest.raises(ValueError, match=words) as caught:
        _wrapped(net, source=source)
    assert len(str(caught.value)) <= 300
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_a_model_without_a_graph_is_refused() -> None:
    class NoGraph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("ln")

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    adapter = _wrapped(NoGraph().eval())
    before = adapter.state()
    with pytest.raises(ValueError, match="`model` must let gradients flow from its features"):
        adapter(images(0))
    now = adapter.state()
    assert all(torch.equal(v.nan_to_num(9.0), now[k].nan_to_num(9.0)) for k, v in before.items())


def test_single_images_and_half_precision() -> None:
    adapter = _wrapped()
    for t in range(3):
        assert adapter(images(t, 1)).isfinite().all()
    assert adapter.report.stepped
    source = [(x.bfloat16(), y) for x, y in source_batches()]
    half = _wrapped(tiny("ln").bfloat16(), source=source)
    for t in range(2):
        y = half(images(t).bfloat16())
        assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert half.state()["update/core_prompts"].dtype == torch.float32
    with pytest.raises(ValueError, match="`keep` must be False for dpcore"):
        half.unwrap(keep=True)
