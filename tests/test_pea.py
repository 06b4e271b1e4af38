"""PEA: replaying its traces, and what it does beyond them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tests.helpers.traces import GOLDEN, Trace
from tta.methods.pea import recoloured

# Its presets, as the papers have them, see `tests/test_presets.py`.
PRESETS = {
    "pea": {"views": 2, "views_per_pass": 1, "crop": 0.9, "rate": 0.02, "drift_rate": 0.2},
    "pea.imagenet": {"entropy_limit": 1.0},
    "pea.cifar100": {"entropy_limit": 0.5},
}

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-e": {
        "arrays": {
            "source_var": "source: block_variance",
            "source_cov_sqrt": "source: block_covariance_root",
            "blocks": "report: the order of the blocks, block<k> for blocks.<k>",
            "block_weights": "report.block_weights: all blocks",
            "drift_spike": "report.spikes: all blocks and passes",
            "spike_reset_after": "report.resets: its growth",
            "domain_mean_final": "state: update/mean.<block>",
            "domain_cov_final": "state: update/covariance.<block>",
        },
        "hparams": {
            "params.gamma": "field: drift_limit",
            "params.entropy_threshold": "field: entropy_limit",
            "params.variants_per_pass": "field: views_per_pass",
            "params.center_crop_ratio": "field: crop",
            "params.weights_from_cls_only": "field: class_token_weights",
        },
    },
}

pytestmark = pytest.mark.filterwarnings("ignore:.*preset, made for:UserWarning")
LIMIT = {"atol": 5e-4, "rtol": 1e-4}
TRACES = sorted((GOLDEN / "set-e").glob("pea_*.npz"))
ARTEFACTS = {
    "block_mean": "source_mean",
    "block_variance": "source_var",
    "block_covariance_root": "source_cov_sqrt",
}
close = torch.testing.assert_close


def _name(block: str) -> str:
    return block.replace("block", "blocks.")


def _source(trace: Trace) -> tta.SourceStatistics:
    found: dict[str, Any] = {
        kind: {_name(block): value for block, value in trace.group(key).items()}
        for kind, key in ARTEFACTS.items()
    }
    return tta.SourceStatistics(**found)


def _wrapped(net: Any = None, **fields: Any) -> Any:
    fields = {"source": source_batches()} | fields
    return tta.wrap(tiny("ln") if net is None else net, "pea", **fields)


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_trace(path: Path) -> None:
    trace = Trace(path)
    p, net = trace.params, trace.model()
    with torch.no_grad():
        close(net(trace.tensor("inputs")[0]), trace.tensor("source_outputs")[0])
    adapter = tta.wrap(
        net,
        "pea",
        views=p["views"],
        views_per_pass=p["variants_per_pass"],
        crop=p["center_crop_ratio"],
        group_size=p["group_size"],
        rate=p["momentum"],
        drift_rate=p["alpha"],
        drift_limit=p["gamma"],
        entropy_limit=p["entropy_threshold"],
        class_token_weights=p.get("weights_from_cls_only", True),
        source=_source(trace),
    )
    resets = 0
    assert list(adapter.update.axes) == [_name(str(b)) for b in trace.arrays["blocks"]]  # type: ignore[union-attr]
    for t, x in enumerate(trace.tensor("inputs")):
        close(adapter(x), trace.tensor("outputs")[t], **LIMIT)
        report = adapter.report
        close(report.block_weights, trace.tensor("block_weights")[t], atol=1e-5, rtol=1e-4)
        assert torch.equal(report.spikes, trace.tensor("drift_spike")[t])
        close(torch.tensor(report.entropy), trace.tensor("entropy")[t], **LIMIT)
        resets += int(trace.arrays["spike_reset_after"][t])
        assert report.resets == resets
    state = adapter.state()
    for kind, key in (("mean", "domain_mean_final"), ("covariance", "domain_cov_final")):
        found = trace.group(key)
        assert found
        for block, value in found.items():
            close(state[f"update/{kind}.{_name(block)}"], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_the_artefacts_of_the_trace(path: Path) -> None:
    """Means and roots; the variance of tokens has the slip of the authors' code."""
    trace = Trace(path)
    batches = [(x, None) for x in trace.tensor("source_inputs")]
    found = tta.collect_source(trace.model(), batches, for_methods=["pea"])  # type: ignore[arg-type]
    expected = _source(trace)
    assert found.contents == expected.contents == sorted(ARTEFACTS, key=found.contents.index)
    for name, value in (expected.block_mean or {}).items():
        close((found.block_mean or {})[name], value, atol=1e-5, rtol=1e-5)
        root = (expected.block_covariance_root or {})[name]
        close((found.block_covariance_root or {})[name], root, atol=2e-5, rtol=1e-4)
        variance = (expected.block_variance or {})[name]
        close((found.block_variance or {})[name], variance, atol=1e-4, rtol=2e-2)


def test_recoloured_rows_have_the_covariance_that_they_get() -> None:
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(8, 8, generator=draw)
    rows = torch.randn(5000, 8, generator=draw) @ mixed + 3
    root = torch.randn(8, 8, generator=draw)
    root = root @ root.T
    aim = torch.arange(8.0)
    covariance = torch.cov(rows.T)
    found = recoloured(rows, rows.mean(0), covariance, aim, root, 8)
    close(found.mean(0), aim, atol=1e-3, rtol=1e-3)
    close(torch.cov(found.T), root @ root, atol=1e-2, rtol=1e-2)
    grouped = torch.cov(recoloured(rows, rows.mean(0), covariance, aim, root, 3).T)
    for start in (0, 3, 6):  # the last group has two channels
        group = slice(start, start + 3)
        close(grouped[group, group], (root @ root)[group, group], atol=1e-2, rtol=1e-2)


def test_statistics_move_once_a_pass_and_start_anew_where_the_mean_jumps() -> None:
    """Written out for the one block that is not the nearest, without views."""
    adapter = _wrapped(views=0, rate=0.25, drift_rate=0.5, drift_limit=1.5)
    update = adapter.update
    states, rows = [], []
    for t, scale in enumerate((1.0, 1.0, 1.0, 6.0)):
        adapter(images(t) * scale)
        states.append(adapter.state())
        rows.append(adapter.report)
    far = [name for name in update.axes if not states[0][f"update/mean.{name}"].isnan().any()]
    assert len(far) == 1 and (rows[0].block_weights == 1).sum() == 1
    spikes = [int(report.spikes.max()) for report in rows]
    assert spikes[0] == 0 and spikes[1] == 1  # the drift starts at 0, and half of it is below 1/1.5
    assert set(spikes) == {0, 1}
    drift = [float(state[f"update/drift.{far[0]}"]) for state in states]
    assert drift[0] == 0 < drift[1]


def test_entropy_above_its_average_drops_all_statistics() -> None:
    adapter = _wrapped(views=0, entropy_limit=0.5, drift_rate=0.5)
    update = adapter.update
    adapter(images(0))
    update.entropy.fill_(0.0)  # whatever comes is above
    adapter(images(1))
    state = adapter.state()
    assert adapter.report.resets == 1
    assert all(v.isnan().all() for k, v in state.items() if k.startswith("update/mean."))
    close(state["update/entropy"], torch.tensor(adapter.report.entropy))
    adapter(images(2))
    assert any(not v.isnan().any() for k, v in adapter.state().items() if "/mean." in k)


@pytest.mark.parametrize("views", [0, 1, 2, 3])
@pytest.mark.parametrize("views_per_pass", [1, 2, 4])
def test_passes_cover_all_views(views: int, views_per_pass: int) -> None:
    adapter = _wrapped(views=views, views_per_pass=views_per_pass)
    sizes: list[int] = []
    adapter.model.patch_embed.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    assert adapter(images(0)).shape == (8, 10)
    passes = -(-(views + 1) // views_per_pass)
    assert adapter.report.spikes.shape == (2, passes)
    assert sizes[: views + 1] == [8] * (views + 1)
    assert sum(sizes[views + 1 :]) == 8 * (views + 1) and len(sizes) == views + 1 + passes
    found = adapter.update._views(images(0))
    assert len(found) == views + 1 and all(v.shape == (8, 3, 32, 32) for v in found)
    if views > 1:
        close(found[2], images(0).flip(-1))
    if views == 3:
        close(found[3], found[1].flip(-1))


def test_a_frozen_adapter_uses_what_it_has_and_moves_nothing() -> None:
    adapter = _wrapped(views=0)
    with adapter.frozen():
        close(adapter(images(0)), tiny("ln")(images(0)).detach())
    adapter(images(0))
    before = adapter.state()
    with adapter.frozen():
        y = adapter(images(1))
    assert not torch.allclose(y, tiny("ln")(images(1)))
    now = adapter.state()
    assert all(torch.equal(v.nan_to_num(9.0), now[k].nan_to_num(9.0)) for k, v in before.items())


def test_maps_of_one_pixel_and_single_images() -> None:
    torch.manual_seed(0)
    create: Any = timm.create_model
    net = create("resnet18", num_classes=10).eval()
    adapter = _wrapped(net, views=1)
    assert list(adapter.update.axes.values()) == [1] * 8
    assert adapter.update.group_size == 32 and adapter.update.drift_limit == 2.5
    for t, count in enumerate((8, 1, 3)):
        assert adapter(images(t, count)).isfinite().all()
    assert adapter.unwrap() is net
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 2}),
        ("test_mambaout", {}),  # whose blocks have convolutions
    ],
)
def test_maps_with_channels_last(name: str, given: dict[str, int]) -> None:
    create: Any = timm.create_model
    net = create(name, num_classes=10, **given).eval()
    adapter = _wrapped(net, views=0)
    assert set(adapter.update.axes.values()) == {3}
    assert adapter(images(0)).isfinite().all()


def test_artefacts_are_saved_and_loaded(tmp_path: Path) -> None:
    found = tta.collect_source(tiny("ln"), source_batches(), for_methods=["pea"])
    found.save(tmp_path / "source.safetensors")
    again = tta.SourceStatistics.load(tmp_path / "source.safetensors")
    assert again.contents == found.contents
    one, other = _wrapped(source=found), _wrapped(source=again)
    assert torch.equal(one(images(0)), other(images(0)))
    assert one.config.source == "moments of blocks as given"


@pytest.mark.parametrize("family", ["bn", "gn"])
def test_a_model_without_blocks_is_refused_and_its_blocks_may_be_named(family: str) -> None:
    net = tiny(family)
    with pytest.raises(ValueError, match="`model` must have blocks for pea"):
        _wrapped(net)
    assert not any(m._forward_hooks for m in net.modules())
    adapter = _wrapped(net, blocks=("layer1", "layer2"))
    assert adapter(images(0)).isfinite().all() and adapter.report.stepped


def test_what_is_missing_or_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="`source` must give pea block_mean, block_variance"):
        _wrapped(source=None)
    found = tta.collect_source(tiny("ln"), source_batches(), for_methods=["pea"])
    assert found.block_mean is not None
    found.block_mean["blocks.1"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"`source.block_mean` must hold 'blocks.1' of shape \(16"):
        _wrapped(source=found)
    del found.block_mean["blocks.1"]
    with pytest.raises(ValueError, match="got none"):
        _wrapped(source=found)
    adapter = _wrapped()
    adapter(images(0))
    with pytest.raises(ValueError, match="`keep` must be False for pea"):
        adapter.unwrap(keep=True)


def test_activations_whose_squares_overflow_are_left_alone() -> None:
    """As in the last block of a deep network with random weights."""
    adapter = _wrapped(views=0)
    adapter(images(0))
    update: Any = adapter.update
    name = next(iter(update.axes))
    mean, covariance = (update._held(kind, name) for kind in ("mean", "covariance"))
    mean.zero_()
    covariance.copy_(torch.eye(len(mean)))
    before = adapter.state()
    far = torch.full((2, 5, len(mean)), 1e37)
    far[0] = 1.0
    weights = {name: torch.ones(())}
    update._held("block_covariance_root", name).fill_(10.0)
    with torch.no_grad():
        moved = update._aligned(weights, {}, True, name, far)
    assert moved.isfinite().all() and torch.equal(moved[1], far[1])
    assert not torch.equal(moved[0], far[0])
    assert all(
        torch.equal(v.nan_to_num(9), before[k].nan_to_num(9)) for k, v in adapter.state().items()
    )
