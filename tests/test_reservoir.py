"""ReservoirTTA: clusters, sets and their averages by hand, other inner updates, and refusals."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tta.parts.style import assignments, cluster_loss, style_of, style_threshold

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-d": {
        "arrays": {
            "style_net": "source: style_net",
            "source_style_mean": "source: style_mean",
            "threshold": "source: style_threshold",
            "model_prob": "report.weights",
            "style": "none: min_dist depends on it",
            "model_index": "report.cluster",
            "num_models": "report.clusters",
            "new_cluster": "report.clusters: its growth",
            "replace_index": "wrap: draws=",
            r"(entropy|marginal)_loss": "none: the centroids depend on them",
            "min_dist": "report.style_distance",
            "centroids_final": "state: update/centroids",
            "buffer_final": "state: update/styles",
            r"model\d_final": "state: update/set<k>.<name>",
        },
        "hparams": {
            "params.max_models": "field: clusters",
            "params.buffer": "field: buffer",
            r"params\.(per_domain|ensembling|style|style_idx|centroid_optimizer)": "none: as here",
            "params.quantile": "field: quantile",
            "params.sampling": "field: sampling",
            "params.init": "field: start, 'best' for 'mi'",
        },
    },
}

RAW: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}
NAME = "layer1.1.weight"
close = torch.testing.assert_close


class Brightness(nn.Module):
    """A style of two numbers: contrasts of the first and the last channel."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, :1], x[:, -1:]]


def _domain(kind: int, seed: int, count: int = 8) -> Tensor:
    """Images of one contrast."""
    return 0.5 + (images(seed, count) - 0.5) * (0.9, 0.1, 0.01)[kind]


def _source() -> tta.SourceStatistics:
    mean = style_of(Brightness()(_domain(0, 50, 64)))
    threshold = torch.tensor(1.0)
    return tta.SourceStatistics(style_net=Brightness(), style_mean=mean, style_threshold=threshold)


def _reservoir(inner: Any = None, source: Any = None, **fields) -> tta.Adapter:
    inner = inner or tta.get_config("tent", lr=0.05)
    config = tta.get_config("reservoir", inner=inner, **{"clusters": 3, "buffer": 6} | fields)
    return tta.wrap(tiny("bn"), update=config, source=source or _source(), **RAW)


def test_style_and_losses_by_hand() -> None:
    maps = [torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]]), torch.tensor([[[2.0]], [[2.0]]])]
    style = style_of(maps)
    assert style.tolist() == pytest.approx([math.log(20 / 3), math.log(1e-12)])
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    shares = assignments(vectors, torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    expected = [1 / (1 + math.exp(-4.0)), 1 / (1 + math.exp(5.0 - 3.0))]
    assert shares[:, 0].tolist() == pytest.approx(expected)
    p = [expected[0], 1 - expected[0], expected[1], 1 - expected[1]]
    mean = [(p[0] + p[2]) / 2, (p[1] + p[3]) / 2]
    loss = -sum(v * math.log(v) for v in p) / 2 + sum(v * math.log(v) for v in mean)
    assert float(cluster_loss(shares)) == pytest.approx(loss, abs=1e-6)
    assert float(style_threshold(torch.tensor([[0.0], [0.0], [1.0], [3.0]]), 0.0)) == 1.0
    assert style_threshold(torch.zeros(3, 2), 0.9).isnan()


def test_a_channel_with_one_value_says_nothing_of_the_style() -> None:
    class Pooled(Brightness):
        def forward(self, x):
            return [*super().forward(x), x.mean((2, 3), keepdim=True)]

    source = [(_domain(0, t, 16), torch.zeros(16, dtype=torch.int64)) for t in range(3)]
    made = tta.SourceStatistics(style_net=Pooled(), batches=source)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"var\(\)")
        adapter = _reservoir(source=made)
        adapter(_domain(0, 9, 16))
        adapter(_domain(0, 9, 16)[:1])  # its pooled map has no variance
    far, mean = adapter.report.style_distance, adapter.constants()["update/style_mean"]
    style = style_of(Pooled()(_domain(0, 9, 16)[:1]))
    known = ~style.isnan()
    centroid = adapter.state()["update/centroids"][0]
    assert 0 < known.sum() < len(style)
    assert float(far) == pytest.approx(float((style - mean)[known].norm()), abs=0.01)
    assert centroid.isfinite().all()


def test_a_domain_that_recurs_finds_its_set_again() -> None:
    adapter = _reservoir()
    seen = []
    for t, kind in enumerate((0, 1, 0, 2, 1)):
        adapter(_domain(kind, t))
        seen.append((adapter.report.cluster, adapter.report.clusters))
    assert seen == [(0, 1), (1, 2), (0, 2), (2, 3), (1, 3)]
    state = adapter.state()
    sets = [state[f"update/set{k}.{NAME}"] for k in range(3)]
    assert not any(torch.equal(sets[a], sets[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(state[f"param/{NAME}"], sets[1])
    key = f"optim.{NAME}.momentum_buffer"
    assert torch.equal(state[f"update/set1.{key}"], state[key.replace(".", "/", 1)])


def test_the_returned_prediction_is_that_of_the_average_before_the_step() -> None:
    adapter, x = _reservoir(), _domain(1, 9)
    for t, kind in enumerate((0, 1)):
        adapter(_domain(kind, t))
    before = adapter.state()
    y = adapter(x)
    weights, net = adapter.report.weights, tta.wrap(tiny("bn"), norm="bn")
    for name, p in net.model.named_parameters():
        own = name.replace(".base.", ".")
        if f"update/set0.{own}" in before:
            sets = [before[f"update/set{k}.{own}"] for k in range(2)]
            with torch.no_grad():
                p.copy_(weights[0] * sets[0] + weights[1] * sets[1])
    close(y, net(x), atol=1e-5, rtol=1e-5)
    assert float(weights.sum()) == pytest.approx(1.0)
    with adapter.frozen():
        after = adapter.state()
        adapter(x)
        assert all(
            torch.equal(v.nan_to_num(9), after[k].nan_to_num(9))
            for k, v in adapter.state().items()
            if v.is_floating_point()
        )


def test_only_whole_batches_make_clusters() -> None:
    config = tta.get_config("reservoir", inner="tent.cifar10", clusters=3, buffer=6)
    adapter = tta.wrap(tiny("bn"), update=config, source=_source(), batch_size=8, **RAW)
    adapter(_domain(1, 0, 4))
    assert adapter.report.clusters == 1
    adapter(_domain(1, 0))
    assert adapter.report.clusters == 2


@pytest.mark.parametrize("start", ["best", "source"])
def test_what_a_new_set_starts_with(start: str) -> None:
    adapter = _reservoir(inner=tta.get_config("tent", lr=0.0), start=start)
    source = adapter.state()[f"param/{NAME}"]
    adapter.load_state({f"update/set0.{NAME}": source + 0.25})
    adapter(_domain(1, 0))
    expected = source + 0.25 if start == "best" else source
    assert torch.equal(adapter.state()[f"update/set1.{NAME}"], expected)


@pytest.mark.parametrize("sampling", ["reservoir", "fifo"])
def test_the_buffer(sampling: str) -> None:
    """Two styles for each cluster; draws are asked for where there is no room."""
    asked: list[int] = []

    def draws(name: str, shape: torch.Size, call: int) -> Tensor:
        asked.append(call)
        return torch.tensor(1 if call == 2 else 99)

    config = tta.get_config("reservoir", clusters=3, buffer=6, sampling=sampling)
    adapter = tta.wrap(tiny("bn"), update=config, source=_source(), draws=draws, **RAW)
    batches = [_domain(0, t) for t in range(4)]
    for x in batches:
        adapter(x)
    styles = [style_of(Brightness()(x)) for x in batches]
    kept = [styles[0], styles[2]] if sampling == "reservoir" else styles[2:]
    found = adapter.state()["update/styles"]
    close(found[:2], torch.stack(kept))
    assert found[2:].isnan().all()
    assert asked == ([2, 3] if sampling == "reservoir" else [])


@pytest.mark.parametrize("inner", ["eata.cifar10", "eta.cifar10", "sar.cifar10", "roid.cifar10"])
@pytest.mark.parametrize("family", ["bn", "gn"])
def test_other_inner_updates(inner: str, family: str, tmp_path) -> None:
    wide = {"entropy_margin": 10.0, "redundancy_margin": 10.0, "lr": 0.05}
    known = tta.get_config(inner).to_dict()
    config = tta.get_config(inner, **{k: v for k, v in wide.items() if k in known})
    config = tta.get_config("reservoir", inner=config, clusters=3, buffer=6)

    def make() -> tta.Adapter:
        return tta.wrap(tiny(family), update=config, source=source_batches(), **RAW)

    adapter = make()
    start = adapter.state()
    first = [adapter(_domain(kind, t)) for t, kind in enumerate((0, 2, 0, 2))]
    assert adapter.report.stepped and adapter.report.clusters > 1
    tta.save(adapter, tmp_path)
    again = tta.load(tiny(family), tmp_path)
    assert again.config == adapter.config
    assert torch.equal(again(_domain(2, 9)), adapter(_domain(2, 9)))
    adapter.reset()
    for key, value in adapter.state().items():
        assert torch.equal(value.float().nan_to_num(9), start[key].float().nan_to_num(9)), key
    assert all(
        torch.equal(y, adapter(_domain(k, t)))
        for t, (k, y) in enumerate(zip((0, 2, 0, 2), first, strict=True))
    )


def test_a_call_that_fails_leaves_the_inner_update_as_it_was() -> None:
    adapter = _reservoir(inner=tta.get_config("sar", lr=0.05, entropy_margin=10.0))
    adapter(_domain(0, 0))
    inner: Any = adapter.update.inner  # type: ignore[union-attr]
    before = dict(vars(inner.selection_pass)), list(inner.parameters_adapted)
    handle = adapter.model.fc.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter(_domain(1, 1))
    handle.remove()
    assert (dict(vars(inner.selection_pass)), list(inner.parameters_adapted)) == before


def test_the_first_set_is_never_undefined() -> None:
    adapter = _reservoir("eta")
    name = next(iter(adapter.parameters_adapted))
    state = adapter.state()
    with pytest.raises(ValueError, match="`state`"):
        adapter.load_state(
            {f"update/set0.{name}": torch.full_like(state[f"param/{name}"], torch.nan)}
        )
    for key in (f"update/set1.{name}", "update/set0.inner.ema_probs"):
        adapter.load_state({key: torch.full_like(state[key], torch.nan)})


def test_fields_of_the_inner_update() -> None:
    config = tta.get_config("reservoir", inner="eata.cifar10", lr=0.5)
    assert config.inner.lr == config.lr == 0.5 and config.inner.lr_scaling == "none"
    config = tta.get_config("reservoir.cifar10")
    assert config.inner == "tent.cifar10"
    inner = tta.get_config("tent.cifar10")
    assert (config.lr, config.optimizer) == (inner.lr, inner.optimizer)
    assert config.for_batch_size(20).inner.lr == inner.for_batch_size(20).lr
    from tta.core.registry import config_from_dict

    for one in (config, config.for_batch_size(20)):
        assert config_from_dict(one.to_dict()).host == one.host


def test_what_is_missing_or_does_not_fit_is_refused(tmp_path) -> None:
    for inner in ("bn", "cotta", tta.get_config("rmt")):
        with pytest.raises(ValueError, match="`inner` must be a name or config of tent"):
            tta.get_config("reservoir", inner=inner)
    with pytest.raises(TypeError, match="`inner` must be"):
        tta.get_config("reservoir", inner=3)
    with pytest.raises(ValueError, match="`buffer` must be"):
        tta.get_config("reservoir", buffer=8)
    with pytest.raises(ValueError, match="`source` must give reservoir"):
        _reservoir(source=tta.SourceStatistics(style_net=Brightness()))
    one = [(images(0), torch.zeros(8, dtype=torch.int64))]
    with pytest.raises(ValueError, match="at least two batches that differ"):
        _reservoir(source=one)
    with pytest.raises(TypeError, match="`style_net` must be a torch"):
        tta.SourceStatistics(style_net=lambda x: [x])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`mean` and `std`"):
        tta.wrap(tiny("bn"), "reservoir.cifar10", source=_source())
    wrong = tta.SourceStatistics(style_mean=torch.zeros(5), style_threshold=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"`source\.style_mean` must have a value"):
        _reservoir(source=wrong)(images(0))
    adapter = _reservoir()
    tta.save(adapter, tmp_path)
    with pytest.raises(ValueError, match=r"`source\.style_net` must be given again"):
        tta.load(tiny("bn"), tmp_path)
    again = tta.load(tiny("bn"), tmp_path, source=_source())
    assert torch.equal(again(_domain(1, 3)), adapter(_domain(1, 3)))


def test_small_first_logits_leave_the_style_as_it_is() -> None:
    """The model runs again for the judgement of logits that all lie in [0, 1]."""
    net = tiny("bn")
    with torch.no_grad():
        net.fc.weight.mul_(0.01)
        net.fc.bias.fill_(0.5)
    source = tta.collect_source(net, source_batches(), ["reservoir"])
    adapter = tta.wrap(net, "reservoir", source=source)
    first, moved = adapter(images(0)), adapter.state()
    adapter.reset()
    assert torch.equal(adapter(images(0)), first)
    for key, value in adapter.state().items():
        assert torch.equal(value.nan_to_num(), moved[key].nan_to_num()), key
