"""Teachers, restoration and replay, each against what it says in plain words."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import BATCH, images, source_batches
from tests.helpers.nets import tiny
from tta.core.norm_layers import normalize_by_batch, normalize_by_source, with_statistics
from tta.core.random import CountedDraws
from tta.parts.replay import Replay
from tta.parts.teachers import order_statistics, quantile, random_mask, restore

SPACE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def _cotta(family: str = "bn", **fields) -> tta.Adapter:
    values = {"views": 3, "confidence_threshold": 1.0} | fields
    return tta.wrap(tiny(family), update=tta.get_config("cotta.cifar10", **values), **SPACE)


def test_a_teacher_is_another_model_with_the_same_modules() -> None:
    adapter = _cotta()
    for t in range(2):
        adapter(images(t))
    other = tiny("bn")
    names = [n for n, _ in other.named_parameters()]
    state = adapter.state()
    assert [k for k in state if k.startswith("update/teacher.")] == [
        f"update/teacher.{n}" for n in names
    ]
    other.load_state_dict({n: state[f"update/teacher.{n}"] for n in names}, strict=False)
    assert not torch.equal(state[f"update/teacher.{names[0]}"], state[f"param/{names[0]}"])
    with adapter.frozen():
        found = adapter(images(5))
    assert torch.equal(found, tta.wrap(other, "bn")(images(5)))


def test_the_student_is_another_name_for_the_parameters() -> None:
    adapter = _cotta()
    value = torch.full((10,), 2.0)
    adapter.load_state({"update/student.fc.bias": value})
    assert torch.equal(adapter.state()["param/fc.bias"], value)
    with pytest.raises(ValueError, match=r"'param/fc.nothing'"):
        adapter.load_state({"update/student.fc.nothing": value})


@pytest.mark.parametrize("family", ["bn", "gn", "ln"])
def test_views_in_one_pass_or_apart(family: str) -> None:
    adapter = _cotta(family)
    teacher = adapter.update.teacher  # type: ignore[union-attr]
    views = [images(t, 4) for t in range(3)]
    calls: list[int] = []
    adapter.model.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    found = teacher.average(iter(views)).logits
    assert calls == ([4, 4, 4] if family == "bn" else [12])
    expected = torch.stack([teacher.predict(v).logits for v in views]).mean(0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_only_the_passes_that_are_needed() -> None:
    """Student, source and teacher; views where the source is unsure, and then no plain teacher."""

    def passes(**fields) -> tuple[int, Tensor]:
        adapter, count = _cotta(**fields), [0]
        adapter.model.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
        y = torch.stack([adapter(images(t)) for t in range(2)])
        return count[0] // 2, y

    for threshold, ours in ((0.0, 3), (1.0, 5)):
        few, y = passes(confidence_threshold=threshold)
        all_of_them, official = passes(confidence_threshold=threshold, official=True)
        assert (few, all_of_them) == (ours, 6)
        assert torch.equal(y, official)


def test_no_pass_but_the_students_moves_a_norm_rule() -> None:
    def means(adapter: tta.Adapter) -> dict[str, Tensor]:
        adapter(images(0))
        return {k: v for k, v in adapter.state().items() if k.startswith("norm/")}

    rule = {"norm": "unmix_tns.cifar10", "seed": 1}
    config = tta.get_config("cotta.cifar10", views=3, confidence_threshold=1.0)
    one = means(tta.wrap(tiny("bn"), update=config, **rule, **SPACE))
    two = means(tta.wrap(tiny("bn"), **rule))
    assert one and all(torch.equal(v, two[k]) for k, v in one.items())


def test_restoration_is_bitwise() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), ()]
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    source = [torch.randn(s, generator=generator) * 1e3 for s in shapes]
    masks = [torch.rand(s, generator=generator) < 0.5 for s in shapes]
    expected = [torch.where(m, s, p) for m, s, p in zip(masks, source, params, strict=True)]
    restore(params, source, [m.flatten() for m in masks])
    assert all(torch.equal(p, e) for p, e in zip(params, expected, strict=True))


@pytest.mark.parametrize("probability", [1.0, 0.5, 0.01, 1e-4])
def test_random_masks(probability: float) -> None:
    size = 200_000
    mask = random_mask(size, probability, CountedDraws(0))
    spread = (size * probability * (1 - probability)) ** 0.5
    assert abs(int(mask.sum()) - size * probability) <= 4 * spread
    for half in mask.split(size // 2):
        assert abs(int(half.sum()) - size / 2 * probability) <= 4 * spread
    again = random_mask(size, probability, CountedDraws(0))
    assert torch.equal(mask, again)
    if probability == 0.5:  # neighbours do not know of each other
        pairs = (mask[1:] & mask[:-1]).float().mean()
        assert float(pairs) == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize("size", [1, 2, 1001, 400_000])
def test_quantiles_are_those_of_a_sort(size: int) -> None:
    values = torch.rand(size, generator=torch.Generator().manual_seed(0)).square()
    values[: size // 10] = 0.0
    ordered = values.sort().values
    ranks = {*range(size // 10 - 2, size // 10 + 2)}  # where the zeros end
    ranks |= {int(share * (size - 1)) for share in (0.0, 0.003, 0.03, 0.5, 0.999, 1.0)}
    for rank in ranks & {*range(size)}:
        low, high = order_statistics(values, rank)
        assert low == ordered[rank] and high == ordered[min(rank + 1, size - 1)]
    for share in (0.0, 0.003, 0.03, 0.5, 0.999, 1.0):
        expected = torch.quantile(values, share)
        torch.testing.assert_close(quantile(values, share), expected, atol=1e-7, rtol=1e-5)


def test_the_anchor_and_the_probability_decide_what_comes_back() -> None:
    for probability, back in ((1.0, True), (0.0, False)):
        adapter = _cotta(restore_probability=probability)
        start = adapter.state()
        adapter(images(0))
        name = "param/layer1.0.weight"
        assert torch.equal(adapter.state()[name], start[name]) == back
        assert not torch.equal(
            adapter.state()["update/teacher.layer1.0.weight"], start[name]
        )  # it never sees the restored student


def test_autocast_does_not_keep_the_weights_of_the_batch_before() -> None:
    def make(steps: int) -> tta.Adapter:
        return tta.wrap(tiny("bn"), "tent.cifar10", params="all", lr=0.05, steps=steps)

    expected, one = [], make(1)
    for t in (0, 0, 1, 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected.append(one(images(t)))
    two = make(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for t, y in zip((0, 1), expected[1::2], strict=True):
            assert torch.equal(two(images(t)), y)
    moved = {k: v for k, v in two.state().items() if k.startswith("param/")}
    idle, fresh = (
        tta.wrap(tiny("bn"), "eta.cifar10", params="all", entropy_margin=1e-9) for _ in range(2)
    )
    fresh.load_state(moved)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fresh(images(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        idle(images(0))  # fills the cache, and no step clears it
        idle.load_state(moved)
        assert torch.equal(idle(images(0)), y)


def test_replay_wraps_around_and_goes_back() -> None:
    class Loader:
        def __iter__(self):
            return iter(batches)

    batches = [(torch.full((1,), float(i)), torch.tensor([i])) for i in range(3)]
    for replay in (Replay(batches), Replay(Loader())):
        order = [0, 1, 2, 3, 4, 1, 7, 7, 0]
        assert [int(replay[i][1]) for i in order] == [i % 3 for i in order]
        assert int(copy.deepcopy(replay)[4][1]) == 1
    assert Replay(batches).in_memory and not Replay(Loader()).in_memory
    for empty in (Replay([]), Replay(iter([]))):
        with pytest.raises(ValueError, match="`source` must give batches in every pass"):
            empty[0]


class _Loader:
    """Like a data loader: in passes, without an index."""

    def __iter__(self):
        return iter(source_batches())


def _rmt(source, **fields) -> tta.Adapter:
    config = tta.get_config("rmt.cifar10", **{"warmup_samples": 16} | fields)
    return tta.wrap(tiny("bn"), update=config, source=source, **SPACE)


def test_rmt_from_a_list_and_from_a_loader(tmp_path) -> None:
    one, two = _rmt(source_batches()), _rmt(_Loader())
    for t in range(3):
        assert torch.equal(one(images(t)), two(images(t)))
    assert int(one.state()["update/source_position"]) == 2 + 3  # after two updates of warm-up
    tta.save(two, tmp_path)
    with pytest.raises(ValueError, match="`source` must give rmt labelled batches"):
        tta.load(tiny("bn"), tmp_path)
    again = tta.load(tiny("bn"), tmp_path, source=_Loader())
    tta.save(one, tmp_path)
    other = tta.load(tiny("bn"), tmp_path)
    expected = one(images(5))
    assert torch.equal(again(images(5)), expected)
    assert torch.equal(other(images(5)), expected)
    assert torch.equal(pickle.loads(pickle.dumps(two))(images(5)), expected)


def test_rmt_goes_back_in_its_source_only_if_not_official() -> None:
    for official, position in ((False, 2), (True, 4)):
        adapter = _rmt(source_batches(), official=official)
        for t in range(2):
            adapter(images(t))
        adapter.reset()
        assert int(adapter.state()["update/source_position"]) == position


def test_rmt_is_reset_to_after_its_warm_up() -> None:
    cold, warm = _rmt(source_batches(), warmup_samples=0), _rmt(source_batches())
    start = warm.state()
    assert not torch.equal(start["param/fc.weight"], cold.state()["param/fc.weight"])
    assert not torch.equal(start["param/fc.weight"], start["update/teacher.fc.weight"])
    assert start["optim/fc.weight.exp_avg"].abs().sum() > 0
    assert start["optim/update.projector.0.weight.exp_avg"].abs().sum() == 0
    warm(images(0))
    assert warm.state()["optim/update.projector.0.weight.exp_avg"].abs().sum() > 0
    warm.reset()
    assert all(torch.equal(v, warm.state()[k]) for k, v in start.items())
    net = warm.unwrap()
    assert torch.equal(net.fc.weight, tiny("bn").fc.weight)  # type: ignore[union-attr]


def test_rmt_without_source_and_combined_as_a_mean() -> None:
    prototypes = torch.rand(10, 8, generator=torch.Generator().manual_seed(0))
    prototypes[4] = float("nan")
    source = tta.SourceStatistics(prototypes=prototypes)
    free = {"weight_source": 0.0, "warmup_samples": 0}
    a, b = _rmt(source, **free), _rmt(source, combine="mean", **free)
    x = images(0)
    assert torch.equal(a(x), 2 * b(x))
    assert 4 not in a.update.nearest(torch.randn(200, 8))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="labelled batches"):
        _rmt(source)
    with pytest.raises(ValueError, match=r"`source.prototypes` must be of shape \(10, 8\)"):
        _rmt(tta.SourceStatistics(prototypes=prototypes[:5]), **free)
    with pytest.raises(ValueError, match=r"class prototypes.*for_methods=\['rmt'\]"):
        _rmt(None, **free)


def test_prototypes_are_class_means_under_batch_statistics() -> None:
    net = tiny("bn")
    collected = tta.collect_source(net, source_batches(), for_methods=["rmt"], norm="unmix_tns")
    features: dict[int, list[Tensor]] = {}
    adapter = tta.wrap(net, "bn", output="lame")
    for x, y in source_batches():
        with torch.no_grad():
            found = adapter.network(x).features  # type: ignore[misc]
        assert found is not None
        for label, row in zip(y.tolist(), found, strict=True):
            features.setdefault(label, []).append(row)
    assert collected.prototypes is not None and collected.contents == ["prototypes", "batches"]
    for c, row in enumerate(collected.prototypes):
        if c in features:
            torch.testing.assert_close(row, torch.stack(features[c]).mean(0), atol=1e-6, rtol=1e-5)
        else:
            assert row.isnan().all()


def test_what_is_collected_for_rmt_is_what_rmt_takes(tmp_path) -> None:
    pixels = {"mean": 0, "std": torch.tensor(1.0)}  # raw pixels, as the lists below
    batches = source_batches()
    collected = tta.collect_source(tiny("bn"), batches, for_methods=["rmt.cifar10"])
    short = tta.get_config("rmt.cifar10", warmup_samples=2 * BATCH)  # by default thousands of steps
    adapter = tta.wrap(tiny("bn"), short, source=collected, **pixels)
    given = tta.wrap(tiny("bn"), short, source=batches, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert torch.equal(adapter(images(0)), given(images(0)))
    with pytest.warns(UserWarning, match="`batches` is not saved"):
        collected.save(tmp_path / "source.safetensors")
    loaded = tta.SourceStatistics.load(tmp_path / "source.safetensors")
    assert loaded.contents == ["prototypes"]
    with pytest.raises(IsADirectoryError, match="`path` must be a file"):
        loaded.save(tmp_path)


def test_the_posterior_is_fingerprint_sgd_from_the_source_and_given_back() -> None:
    net = tiny("bn")
    before = copy.deepcopy(net.state_dict())
    collected = tta.collect_source(net, source_batches(), for_methods=["petal"], posterior_epochs=4)
    assert collected.contents == ["posterior_mean", "posterior_variance"]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    optimizer = torch.optim.SGD(net.parameters(), 8e-4, momentum=0.9, weight_decay=5e-4)
    snapshots = []
    for epoch in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 8e-4 + (0.01 - 8e-4) * min(1, epoch / 3)
        for x, y in source_batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        if epoch > 0:
            snapshots.append({n: p.detach().clone() for n, p in net.named_parameters()})
    assert collected.posterior_mean is not None and collected.posterior_variance is not None
    for name in snapshots[0]:
        stack = torch.stack([s[name] for s in snapshots])
        mean, var = stack.mean(0), stack.var(0, correction=0)
        torch.testing.assert_close(collected.posterior_mean[name], mean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(collected.posterior_variance[name], var, atol=1e-9, rtol=1e-2)


def test_petal_says_what_it_needs_and_clamps_what_it_gets() -> None:
    variance = {n: torch.full_like(p, -1e-7) for n, p in tiny("bn").named_parameters()}
    config = tta.get_config("petal.cifar10", views=2)

    def wrap(source, official: bool = False) -> tta.Adapter:
        update = config.replace(official=official)
        return tta.wrap(tiny("bn"), update=update, source=source, **SPACE)

    key = "update/posterior_variance.fc.bias"
    given = tta.SourceStatistics(posterior_variance=variance)
    assert (wrap(given).constants()[key] == 0).all()
    assert (wrap(given, official=True).constants()[key] < 0).all()
    mean = wrap(given).constants()["update/posterior_mean.fc.bias"]
    assert torch.equal(mean, tiny("bn").fc.bias)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"posterior.*for_methods=\['petal'\]"):
        wrap(None)
    variance.pop("fc.bias")
    with pytest.raises(ValueError, match=r"`source.posterior_variance` must hold 'fc.bias'"):
        wrap(tta.SourceStatistics(posterior_variance=variance))
    with pytest.raises(ValueError, match="got none in pass 2"):
        wrap(iter(source_batches()))


def test_norm_layers_under_other_statistics() -> None:
    net, x = tiny("bn"), images(0)
    with torch.no_grad():
        source = net(x)
        adapter = tta.wrap(net, norm="unmix_tns.cifar10")
        wrappers = list(adapter.norm_layers.values())
        before = adapter.state()
        with with_statistics(wrappers, normalize_by_source):
            torch.testing.assert_close(net(x), source)
        with with_statistics(wrappers, normalize_by_batch):
            batch = net(x)
        assert all(torch.equal(v, adapter.state()[k]) for k, v in before.items())
        adapter.unwrap()
        torch.testing.assert_close(tta.wrap(net, "bn")(x), batch)


def test_a_module_used_in_several_places_is_given_back() -> None:
    class Shared(nn.Module):
        """One convolution under two names, one weight in two layers."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1)
            self.again = nn.Sequential(self.first, nn.GroupNorm(1, 3))
            self.other = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.other.weight = self.first.weight
            self.middle = nn.Linear(3, 3)
            self.fc = nn.Linear(3, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.other(self.again(self.first(x)))
            return self.fc(self.middle(x.mean((2, 3))))

    net = Shared()
    names = dict(net.named_parameters(remove_duplicate=False))
    before = {n: p.detach().clone() for n, p in names.items()}
    pixels = {"mean": (0.0,), "std": (1.0,)}
    adapter = tta.wrap(net, "cotta.cifar10", views=2, confidence_threshold=10.0, lr=0.1, **pixels)
    for t in range(2):
        adapter(images(t))
    assert adapter.report.stepped
    adapter.unwrap()
    after = dict(net.named_parameters(remove_duplicate=False))
    assert all(after[n] is p and torch.equal(before[n], p) for n, p in names.items())


@pytest.mark.parametrize("method", ["cotta", "petal", "rmt", "roid"])
@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (lambda x: x[:1], ValueError, "finite pixels of shape"),
        (lambda x: None, TypeError, "floating-point tensor, got NoneType"),
        (lambda x: x * float("nan"), ValueError, "values that are not finite"),
    ],
)
def test_what_augment_returns_is_checked(method, returned, error, words) -> None:
    fields = {"warmup_samples": 0} if method == "rmt" else {}
    fields |= {"confidence_threshold": 10.0, "views": 2} if method in ("cotta", "petal") else {}
    adapter = tta.wrap(
        tiny("bn"),
        f"{method}.cifar10",
        source=source_batches(),
        augment=lambda x, index: returned(x),
        mean=(0.0,),
        std=(1.0,),
        **fields,
    )
    before = adapter.state()
    with pytest.raises(error, match=f"`augment` must return .*{words}"):
        adapter(images(0))
    after = adapter.state()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("param/"))


@pytest.mark.parametrize("method", ["cotta", "petal"])
@pytest.mark.parametrize("mask", [None, torch.ones(1, dtype=torch.bool), torch.tensor(0.5)])
def test_what_restore_mask_returns_is_checked_before_anything_changes(method, mask) -> None:
    adapter = tta.wrap(
        tiny("bn"),
        f"{method}.cifar10",
        source=source_batches(),
        restore_mask=lambda name, shape: mask,
        mean=(0.0,),
        std=(1.0,),
    )
    before = adapter.state()
    with pytest.raises(ValueError, match="`restore_mask` must return a bool tensor of shape"):
        adapter(images(0))
    after = adapter.state()
    assert all(torch.equal(before[k], after[k]) for k in before if k != "rng")


class Clash(nn.Module):
    """A network whose layers have the names of what a teacher has."""

    NAMES = ("network", "followed", "places", "tensors", "named", "copy", "hold", "average")
    NAMES += (
        "predict",
        "_dtypes",
        "_places",
        "learn_statistics",
        "state",
        "update",
        "model",
        "rule",
    )

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.BatchNorm2d(3))
        self.rest = tiny("bn")

    def forward(self, x: Tensor) -> Tensor:
        for name in self.NAMES:
            x = self._modules[name](x)
        return self.rest(x)


@pytest.mark.parametrize("method", ["adacontrast", "cotta", "petta", "reservoir", "rotta", "santa"])
def test_layers_may_have_the_names_of_what_a_teacher_has(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Clash().eval()
    adapter = tta.wrap(net, f"{method}.cifar10", source=source_batches(), **SPACE)
    adapter(images(0))
    tta.save(adapter, tmp_path)
    expected = adapter(images(1))
    torch.manual_seed(0)
    other = tta.load(Clash().eval(), tmp_path, source=source_batches())
    assert torch.equal(other(images(1)), expected)
