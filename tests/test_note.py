"""NOTE and its norm rule: pieces of the authors' code, formulas by hand, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.recorded import GOLDEN, Recorded
from tta.core.component import Context
from tta.core.draws import Draws
from tta.core.norm_layers import learning_pass, part_of_batch
from tta.methods.note import Iabn, IabnConfig
from tta.parts.chance import Chance
from tta.parts.memory import Fifo, Pbrs
from tta.parts.statistics import instance_aware

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-d": {
        "arrays": {
            "source_iabn_outputs": "output: the model with iabn before it learns",
            "after_update0": "state: param/<name> and norm/<layer>.mean, .var",
            "draw_kind": "none: what draw_value decides",
            r"draw_value|batch_order": "wrap: draws=",
            "memory_image": "state: update/memory, in the bank's order",
            r"memory_label": "state: update/bank.labels; FIFO: none, true labels",
            "updates_after_sample": "report.updates",
        },
        "hparams": {
            "params.iabn_k": "field: alpha of iabn",
            "params.bn_momentum": "field: momentum of iabn",
            "params.use_learned_stats": "field: learned_statistics of iabn",
            "params.memory_type": "field: memory",
            "params.update_every": "field: update_every",
            "params.epochs": "field: epochs",
            "params.batch_size": "field: mini_batch",
            "params.skip_thres": "none: no mini-batch of the traces is so small",
        },
    },
}

PIECE = {"atol": 2e-6, "rtol": 2e-6}
close = torch.testing.assert_close


# The norm rule ------------------------------------------------------------------------------


def _layer(piece: Recorded) -> Any:
    base: Any = nn.BatchNorm2d(len(piece.tensor("weight")), eps=piece.hparams["eps"])
    with torch.no_grad():
        for name in ("running_mean", "running_var", "weight", "bias"):
            getattr(base, name).copy_(piece.tensor(name))
    return base


def test_the_recorded_layer() -> None:
    piece = Recorded(GOLDEN / "set-d" / "pieces_iabn.npz")
    base, h = _layer(piece), piece.hparams
    config = IabnConfig(alpha=h["iabn_k"], momentum=h["momentum"])
    rule = Iabn(config, base, Context(num_classes=2))
    close(rule(piece.tensor("x"), base), piece.tensor("y_eval"), **PIECE)
    x = piece.tensor("x").requires_grad_()
    y = rule.learn(x, base)
    close(y, piece.tensor("y_train"), **PIECE)
    (y * piece.tensor("probe")).sum().backward()
    close(x.grad, piece.tensor("grad_x_train"), **PIECE)
    close(base.weight.grad, piece.tensor("grad_weight_train"), atol=2e-4, rtol=0)
    close(rule.mean, piece.tensor("running_mean_after"), **PIECE)
    close(rule.var, piece.tensor("running_var_after"), **PIECE)


def test_statistics_of_an_image_by_hand() -> None:
    """One channel of 4 values: chance is 1 for the mean and about 1.63 for the variance."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])  # mean 3, unbiased variance 14 / 3
    mean, variance = torch.tensor([0.5]), torch.tensor([2.0])
    y = instance_aware(x, mean, variance, None, None, alpha=math.sqrt(2), eps=0.0)
    m = 0.5 + (2.5 - math.sqrt(2) * math.sqrt(2 / 4))
    v = 2.0 + (14 / 3 - 2.0) - math.sqrt(2) * 2.0 * math.sqrt(2 / 3)
    close(y, (x - m) / math.sqrt(v))
    wide = instance_aware(x, mean, variance, None, None, alpha=10.0, eps=0.0)
    close(wide, (x - 0.5) / math.sqrt(2.0))


def test_one_value_has_the_given_statistics() -> None:
    x, mean, variance = torch.randn(5, 3), torch.randn(3), torch.rand(3) + 0.5
    weight, bias = torch.randn(3), torch.randn(3)
    expected = (x - mean) / (variance + 1e-5).sqrt() * weight + bias
    for given in (x, x[..., None, None]):
        y = instance_aware(given, mean, variance, weight, bias, alpha=4.0, eps=1e-5)
        close(y.flatten(1), expected)


def test_images_do_not_depend_on_each_other_and_statistics_are_at_rest() -> None:
    adapter = tta.wrap(tiny("bn"), norm="iabn")
    start = adapter.state()
    together = adapter(images(0))
    alone = torch.cat([adapter(x[None]) for x in images(0)])
    close(together, alone, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(start[k], v) for k, v in adapter.state().items())
    adapter = tta.wrap(tiny("bn"), norm="iabn", update="tent.cifar10")
    adapter(images(0))
    state = adapter.state()
    assert all(torch.equal(start[k], state[k]) for k in start if k.startswith("norm/"))


def test_statistics_move_in_a_learning_pass_alone() -> None:
    adapter = tta.wrap(tiny("bn"), norm="iabn", momentum=0.25)
    rule: Any = adapter.norm_layers["layer1.1"].rule
    before, x = rule.mean.clone(), images(3)
    with torch.no_grad(), learning_pass(adapter.network.wrappers):
        adapter.network(x)
    expected = adapter.model.layer1[0](x).mean((0, 2, 3))
    close(rule.mean, 0.75 * before + 0.25 * expected, atol=1e-6, rtol=1e-5)
    assert rule.override is None


def test_statistics_of_the_batch() -> None:
    """A large alpha leaves batch statistics with the unbiased variance."""
    config = tta.get_config("iabn", learned_statistics=False, alpha=1e6)
    adapter = tta.wrap(tiny("bn"), norm=config)
    rule: Any = adapter.norm_layers["layer1.1"].rule
    x = torch.randn(4, len(rule.mean), 5, 5)
    base: Any = adapter.norm_layers["layer1.1"].base

    def expected(x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=1)
        return nn.functional.batch_norm(x, mean, var, base.weight, base.bias, eps=base.eps)

    close(rule(x, base), expected(x), atol=1e-5, rtol=1e-5)
    with part_of_batch(adapter.norm_layers.values(), 0.25):  # which has more images
        close(rule(x[:1], base), expected(x[:1]), atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="at least 2 images for batch statistics"):
        adapter(images(0, 1))


def test_what_a_plain_layer_cannot_hold_is_refused() -> None:
    adapter = tta.wrap(tiny("bn"), norm="iabn")
    with pytest.raises(ValueError, match="iabn"):
        adapter.unwrap(keep=True)
    with pytest.raises(ValueError, match="must find BatchNorm layers"):
        tta.wrap(tiny("ln"), norm="iabn")
    for field in ({"alpha": -1.0}, {"momentum": 1.5}, {"learned_statistics": 1}):
        with pytest.raises((TypeError, ValueError), match=f"`{next(iter(field))}` must be"):
            tta.get_config("iabn", **field)


# The memory ---------------------------------------------------------------------------------


def _chance(*values: float) -> tuple[Chance, list[str]]:
    """Decisions as given, and a list that fills with the names of what was asked for."""
    asked: list[str] = []
    answers = iter(values)

    def draws(name: str, shape: torch.Size, call: int) -> torch.Tensor:
        asked.append(name)
        assert shape == ()
        return torch.tensor(next(answers))

    return Chance(Context(num_classes=3, draws=Draws(draws))), asked


def _contents(bank: Fifo, names: dict[int, int]) -> list[tuple[int, int]]:
    """Label and image of each place, in the bank's order."""
    return [(int(bank.labels[slot]), names[slot]) for slot in bank.order()]


def test_the_last_images_stay() -> None:
    bank, names = Fifo(3, 4), {}
    for first, labels in ((0, [3, 1]), (2, [0, 0, 2])):
        placed = bank.offer(labels, _chance()[0])
        names |= {slot: first + position for slot, position in placed.items()}
    assert _contents(bank, names) == [(0, 2), (0, 3), (2, 4)]


def test_a_reservoir_by_hand() -> None:
    bank = Pbrs(4, 3)
    names: dict[int, int] = {}

    def offer(image: int, label: int, *values: float) -> None:
        chance, asked = _chance(*values)
        names.update({slot: image for slot in bank.offer([label], chance)})
        assert asked == ["draw_value"] * len(values)

    for image, label in enumerate([1, 1, 0, 2]):
        offer(image, label)
    offer(4, 0, 1, 0)  # class 1 has most: its first image leaves
    assert _contents(bank, names) == [(0, 2), (0, 4), (1, 1), (2, 3)]
    offer(5, 2, 0, 1)  # class 0 has most: its second image leaves
    assert _contents(bank, names) == [(0, 2), (1, 1), (2, 3), (2, 5)]
    offer(6, 2, 0.6, 1)  # two of class 2 are held and three were seen
    assert _contents(bank, names) == [(0, 2), (1, 1), (2, 3), (2, 6)]
    offer(7, 2, 0.6)  # and now four were
    assert _contents(bank, names) == [(0, 2), (1, 1), (2, 3), (2, 6)]
    assert bank.seen.tolist() == [2, 2, 4]


def test_a_class_is_held_as_often_as_others_in_the_long_run() -> None:
    bank, generator = Pbrs(12, 3), torch.Generator().manual_seed(0)
    chance = Chance(Context(num_classes=3, generator=generator))
    kept: list[int] = []
    for image in range(600):
        label = 0 if image % 10 else 1 + image // 10 % 2
        for slot in bank.offer([label], chance):
            kept[slot : slot + 1] = [image]
    assert sorted(bank.labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    old = [kept[slot] for slot in bank.order()[:4]]
    assert min(old) < 500  # class 0 is no queue of the last images


@pytest.mark.parametrize(
    ("values", "said"),
    [((7.0,), "one of"), ((1.0, 5.0), "one of")],
)
def test_decisions_that_cannot_be_are_refused(values, said: str) -> None:
    bank = Pbrs(2, 3)
    bank.offer([1, 1], _chance()[0])
    with pytest.raises(ValueError, match=f"`draws` must return {said}"):
        bank.offer([0], _chance(*values)[0])
    bank = Pbrs(2, 3)
    bank.offer([1, 1], _chance()[0])
    with pytest.raises(ValueError, match="a number from 0 to 1"):
        bank.offer([1], _chance(1.5)[0])


# The update ---------------------------------------------------------------------------------


def _note(**fields) -> tta.Adapter:
    config = tta.get_config("note", **{"lr": 0.05, "memory_size": 6, "update_every": 6} | fields)
    return tta.wrap(tiny("bn"), update=config)


def test_an_update_falls_inside_of_a_batch() -> None:
    """Rows after it see it, as if the batch had come in two."""
    x = images(0, 10)
    whole, parts = _note(), _note()
    found = whole(x)
    assert whole.report.updates == 1 and whole.report.stepped
    expected = torch.cat([parts(x[:6]), parts(x[6:])])
    close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[6:], tta.wrap(tiny("bn"), norm="iabn")(x)[6:], atol=1e-3)
    assert parts.report.updates == 0 and math.isnan(parts.report.loss)
    for key, value in parts.state().items():
        if key.startswith(("param/", "norm/")):
            close(whole.state()[key], value, atol=1e-5, rtol=1e-5)


def test_the_loss_by_hand() -> None:
    adapter = _note(temperature=2.0)
    reference = tta.wrap(tiny("bn"), norm="iabn")
    x = images(0, 6)
    with torch.no_grad(), learning_pass(reference.network.wrappers):
        p = (reference.network(x).logits / 2).softmax(1)
    adapter(x)
    assert float(adapter.report.loss) == pytest.approx(
        float(-(p * (p + 1e-6).log()).mean()), abs=1e-6
    )
    assert adapter.report.selected == adapter.report.remembered == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_kept_as_they_came(dtype: torch.dtype) -> None:
    """They may lie outside of [0, 1]."""
    net = tiny("bn").to(dtype)
    adapter = tta.wrap(net, update=tta.get_config("note", memory_size=6, update_every=6))
    assert adapter.state()["update/memory"].shape == (6, 0)
    x = (3 * images(0, 4) - 1).to(dtype)
    adapter(x)
    memory = adapter.state()["update/memory"]
    assert memory.dtype == torch.float32 and torch.equal(memory[:4], x.float())
    adapter(x)
    assert adapter.report.updates == 1
    with pytest.raises(ValueError, match="size of those in the memory"):
        adapter(images(0, 2)[:, :, :16, :16].to(dtype))


def test_an_image_that_overflows_after_an_update_is_rejected() -> None:
    adapter = _note()
    x = images(0, 10)
    x[8] = 1e30
    with pytest.warns(UserWarning, match="features that overflow"):
        found = adapter(x)
    good = [i for i in range(10) if i != 8]
    assert adapter.report.rejected == 1 and torch.isfinite(found[good]).all()
    assert int(adapter.state()["update/offered"]) == 9


def test_fields_are_checked() -> None:
    for field in ({"memory": "lifo"}, {"epochs": 0}, {"mini_batch": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(field))}` must be"):
            tta.get_config("note", **field)
