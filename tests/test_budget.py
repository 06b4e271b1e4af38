"""`wrap(..., memory_budget=bytes)`: which form of a recipe is taken, and that results are equal."""

from __future__ import annotations

import dataclasses
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images, surroundings
from tests.helpers.nets import tiny
from tta.core.budget import example_shape
from tta.core.frugal import segments
from tta.core.memory_use import PeakBytes
from tta.core.source import SourceStatistics

close = torch.testing.assert_close
MARGINS = {
    "eata": {"entropy_margin": 10.0, "redundancy_margin": 1.0},
    "sar": {"entropy_margin": 10.0},
}
STREAM = [images(t) for t in range(3)]


def _deep(norm: str, depth: int = 6) -> nn.Module:
    """Blocks whose activations are most of what a backward pass keeps."""

    def layer() -> nn.Module:
        return nn.BatchNorm2d(8) if norm == "bn" else nn.GroupNorm(2, 8)

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), layer(), nn.ReLU(), nn.Conv2d(8, 8, 1))

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.Sequential(*(block() for _ in range(depth)))
            self.fc = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.blocks(self.stem(x)).mean((2, 3)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Deep().eval()


def _run(adapter: tta.Adapter) -> list[Tensor]:
    return [adapter(x) for x in STREAM]


def _same(one: tta.Adapter, other: tta.Adapter) -> None:
    for a, b in zip(_run(one), _run(other), strict=True):
        close(a, b, atol=1e-5, rtol=1e-4)
    state = other.state()
    for key, value in one.state().items():
        close(value, state[key], atol=1e-5, rtol=1e-4, equal_nan=True, msg=key)


@pytest.mark.parametrize("recipe", ["tent", "eata", "sar", "cotta"])
@pytest.mark.parametrize(
    ("family", "form"),
    [("gn", {"micro_batch": 3}), ("gn", {"checkpointing": True}), ("bn", {"checkpointing": True}),
     ("ln", {"micro_batch": 2, "checkpointing": True})],
)  # fmt: skip
def test_forms_give_equal_results(recipe: str, family: str, form: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = {"lr": 0.01} | MARGINS.get(recipe, {})
        config = tta.wrap(tiny(family), recipe, **fields, **surroundings()).config
        more = {"source": surroundings()["source"]}
        plain = tta.wrap(tiny(family), config, **more)
        frugal = tta.wrap(tiny(family), dataclasses.replace(config, **form), **more)
        _same(plain, frugal)
        assert plain.report.stepped and frugal.report.stepped


def test_features_are_those_of_all_parts() -> None:
    config = tta.wrap(tiny("gn"), "tent", output="t3a").config
    assert torch.equal(
        torch.cat(_run(tta.wrap(tiny("gn"), dataclasses.replace(config, micro_batch=3)))),
        torch.cat(_run(tta.wrap(tiny("gn"), config))),
    )


def _needs(message: str) -> int:
    return int(re.findall(r"([\d,]+) bytes", message)[0].replace(",", ""))


def _least(make, recipe: str) -> int:
    with pytest.raises(ValueError, match=r"^`memory_budget` must be at least") as raised:
        tta.wrap(make(), recipe, memory_budget=1, batch_size=8)
    return _needs(str(raised.value))


def _peak(adapter: tta.Adapter) -> int:
    with PeakBytes(torch.device("cpu")) as peak:
        for x in STREAM:
            adapter(x)
    return peak.read()


def test_the_plain_forward_must_fit() -> None:
    least = _least(lambda: _deep("bn"), "tent")
    weights = sum(p.numel() * 4 for p in _deep("bn").parameters())
    assert least > weights + 8 * 8 * 32 * 32 * 4
    net = _deep("bn")
    with pytest.raises(ValueError, match="takes in the plain model"):
        tta.wrap(net, "tent", memory_budget=least - 1, batch_size=8)
    assert tta.wrap(net, "tent.cifar10").unwrap() is net


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_forms_are_tried_in_order(norm: str) -> None:
    """Smaller and smaller budgets: as it is, micro-batches, checkpoints, late layers, nothing."""
    net = _deep(norm)
    size = sum(t.numel() * 4 for t in net.state_dict().values())
    seen: list[str] = []
    budget, peaks = 64_000_000, []
    while True:
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                adapter = tta.wrap(net, "tent.cifar10", memory_budget=budget, batch_size=8)
        except ValueError as error:
            assert "`memory_budget` must be at least" in str(error)
            break
        config = adapter.config
        assert config.memory_budget == budget and isinstance(config.update, tta.UpdateConfig)
        words = [str(w.message) for w in found if "memory_budget" in str(w.message)]
        late = config.update.params != "norm"
        kind = "late" if late else "checkpointing" if config.checkpointing else "plain"
        kind = "micro" if kind == "plain" and config.micro_batch else kind
        assert len(words) == (kind != "plain")
        if late:
            assert len(adapter.parameters_adapted) < 12
            assert all(name in words[0] for name in (words[0].split("(")[-1].split(" ")[0],))
        seen += [kind] if kind not in seen else []
        peaks.append(_peak(adapter))
        assert peaks[-1] + size < budget * 1.05
        adapter.unwrap()
        budget = int(budget * 0.85)
    order = ["plain", "micro", "checkpointing", "late"]
    assert seen == [kind for kind in order if kind in seen] and seen[0] == "plain"
    assert ("micro" in seen) == (norm == "gn") and len(seen) > 1
    assert min(peaks) < 0.6 * peaks[0]


def test_a_chosen_form_is_saved_and_left_without_a_trace(tmp_path) -> None:
    net = _deep("bn")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.warns(UserWarning, match="`memory_budget` of"):
        adapter = tta.wrap(net, "tent.cifar10", memory_budget=3_200_000, batch_size=8)
    assert adapter.config.checkpointing
    assert tta.AdapterConfig.from_dict(adapter.config.to_dict()) == adapter.config
    _run(adapter)
    tta.save(adapter, tmp_path)
    other = tta.load(_deep("bn"), tmp_path)
    assert torch.equal(other(STREAM[0]), adapter(STREAM[0]))
    assert all("forward" not in vars(m) for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in adapter.unwrap().state_dict().items())


def test_the_size_of_images_is_that_of_the_source_or_declared() -> None:
    config = tta.wrap(tiny("bn"), "bn", batch_size=4).config
    nothing = SourceStatistics()
    assert example_shape(tiny("bn"), config, nothing) == (4, 3, 32, 32)
    source = SourceStatistics(batches=[(torch.rand(2, 3, 20, 24), torch.zeros(2))])
    assert example_shape(tiny("bn"), config, source) == (4, 3, 20, 24)
    assert example_shape(tiny("ln"), config, nothing) == (4, 3, 32, 32)
    strided = nn.Sequential(nn.Conv2d(1, 4, 7, 2), nn.Flatten(), nn.Linear(4, 2))
    assert example_shape(strided, dataclasses.replace(config, batch_size=None), nothing) == (
        64, 1, 224, 224,
    )  # fmt: skip


class _Takes(nn.Module):
    """A network that draws, counts its passes, and asks something of its images."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtypes = tiny("bn"), dtypes
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        if x.dtype not in self.dtypes:
            raise AssertionError
        return self.net(nn.functional.dropout(x.float() / 255, 0.1, training=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_measuring_leaves_the_global_generator_and_buffers_alone(dtype: torch.dtype) -> None:
    net = _Takes(dtype)
    count, before = net.count, torch.get_rng_state()
    adapter = tta.wrap(net, "tent.cifar10", memory_budget=10**9, batch_size=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert adapter.unwrap() is net and net.count is count and not net.count
    source = [(torch.zeros(2, 3, 24, 24, dtype=dtype), torch.zeros(2).long())]
    tta.wrap(net, "tent.cifar10", memory_budget=10**9, source=source).unwrap()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_takes_no_random_images_is_refused_and_left_as_it_was() -> None:
    net = _Takes()
    count = net.count
    message = r"^`memory_budget` must be measured.* \(AssertionError: \): pass source"
    with pytest.raises(ValueError, match=message) as refused:
        tta.wrap(net, "tent.cifar10", memory_budget=10**9)
    assert len(str(refused.value)) <= 300 and net.count is count and not net.count


def test_blocks_are_what_sequences_hold() -> None:
    assert len(segments(_deep("bn"))) == 6
    assert [type(m).__name__ for m in segments(tiny("ln"))] == ["Block", "Block"]


@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (1.5, TypeError), ("1", TypeError)])
def test_other_budgets_are_refused(value, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^`memory_budget` must"):
        tta.wrap(tiny("bn"), "tent.cifar10", memory_budget=value)
