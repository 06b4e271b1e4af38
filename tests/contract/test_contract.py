"""What every component and composition promises, on every norm family it can take."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tta
from tests.helpers.batches import BATCH, images, surroundings
from tests.helpers.compositions import (
    ALONE,
    CASES,
    FED,
    SAMPLED_GUARDED,
    SAMPLED_PAIRS,
    SAMPLED_TRIPLES,
    Case,
    arguments,
    components,
    given,
    label,
    make,
)
from tests.helpers.nets import tiny
from tta.core.classifier import find_classifier
from tta.core.registry import component
from tta.core.update import Update

pytestmark = pytest.mark.filterwarnings("ignore:.*preset, made for:UserWarning")


def on(*groups: list[Case], where: Callable[[Case], bool] = lambda case: True):
    """Run a check on the cases of these groups, and in ``make soak`` on all other cases.

    Args:
        groups: Of ``ALONE`` and the sampled ones: those whose cases every run checks.
        where: Whether the check says anything of a case; without, it is not collected for it.
    """
    always = [case for group in groups for case in group]
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=label(case), marks=[] if case in always else pytest.mark.soak)
            for case in CASES
            if where(case)
        ],
    )


# Checks of what one component does run on components; a composition adds nothing to them.
on_components = on(ALONE)
# A dtype is the component's affair, whatever the network.
on_a_network_each = on(list({case[1]["recipe"]: case for case in ALONE}.values()))
# Checks of state and isolation run on compositions too: there the state of one component could
# be left out, shared with another or put back in the wrong order.
on_compositions = on(ALONE, SAMPLED_PAIRS, SAMPLED_TRIPLES)
# A guard puts back what the others remember, and its own memory must go along with theirs.
on_guarded = on(ALONE, SAMPLED_PAIRS, SAMPLED_TRIPLES, SAMPLED_GUARDED, FED)
# A call that is undone or held back is so by the adapter for all slots: one case has all three.
on_whole_compositions = on(ALONE, SAMPLED_TRIPLES, SAMPLED_GUARDED, FED)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(_bits(a[k]), _bits(b[k])) for k in a)


def _bits(t: Tensor) -> Tensor:
    return torch.nan_to_num(t, nan=12345.0) if t.is_floating_point() else t


def _learns(case: Case) -> bool:
    return any(cls.slot == "update" for cls in components(case))


def _trains(case: Case) -> bool:
    """Whether parameters of the model move, rather than what an update has of its own."""
    return all(cls.trains_model for cls in components(case) if issubclass(cls, Update))


def _forgets(case: Case) -> bool:
    """Whether the update puts parameters back before a call returns."""
    return any(issubclass(cls, Update) and cls.episodic for cls in components(case))


def _learns_from_whole_batch(case: Case) -> bool:
    updates = [cls for cls in components(case) if issubclass(cls, Update)]
    return all(cls.learns_from_whole_batch for cls in updates)


def _filters(case: Case) -> bool:
    """Whether a component leaves samples out of its loss by their entropy."""
    return any("entropy_margin" in tta.get_config(name).to_dict() for name in case[1].values())


@on_components
def test_logits_have_the_models_shape_and_learning_moves_what_was_chosen(case) -> None:
    _, adapter = make(*case)
    with torch.no_grad():
        expected = tiny(case[0])(images(0))
    others = {
        n: p.detach().clone()
        for n, p in adapter.model.named_parameters()
        if not any(p is q for q in adapter.parameters_adapted.values())
    }
    before, stepped = adapter.state(), False
    for t in range(3):
        y = adapter(images(t))
        stepped = stepped or adapter.report.stepped
        assert y.shape == expected.shape and y.dtype == expected.dtype
        assert torch.isfinite(y).all() and not y.requires_grad
    after = adapter.state()
    moved = [k for k in before if not torch.equal(_bits(before[k]), _bits(after[k]))]
    if _learns(case):
        own = "param/" if _trains(case) else "update/"
        has_moved = any(k.startswith(own) for k in moved)
    if _learns(case) and case not in ALONE and not (has_moved and adapter.report.stepped):
        # A filter may keep no image under another norm rule, and a guard may go back to the start.
        went_back = adapter.report.resets > 0 or _forgets(case)
        assert not stepped or went_back or has_moved
        assert stepped or not any(k.startswith("param/") for k in moved)
    elif _learns(case):
        assert has_moved is not _forgets(case)
        assert adapter.report.stepped
        assert (
            adapter.report.selected == BATCH
            if _learns_from_whole_batch(case)
            else adapter.report.selected or case not in ALONE  # gtta also learns from source images
        )
    assert all(
        torch.equal(p, others[n]) for n, p in adapter.model.named_parameters() if n in others
    )
    assert adapter.report.seen == BATCH and adapter.report.rejected == 0


@on_guarded
def test_reset_replays_bitwise(case) -> None:
    _, adapter = make(*case)
    start = adapter.state()
    first = [adapter(images(t)) for t in range(3)]
    adapter.reset()
    assert _same(adapter.state(), start)
    assert all(torch.equal(a, adapter(images(t))) for t, a in enumerate(first))


@on_guarded
def test_state_resumes_bitwise(case, tmp_path) -> None:
    _, adapter = make(*case)
    adapter(images(0))
    saved = adapter.state()
    tta.save(adapter, tmp_path)
    expected = [adapter(images(t)) for t in (1, 2)]
    _, other = make(*case)
    other.load_state(saved)
    assert all(torch.equal(a, other(images(t))) for t, a in zip((1, 2), expected, strict=True))
    from_disk = tta.load(tiny(case[0]), tmp_path, **given(case[1]))
    assert from_disk.config == adapter.config
    assert all(torch.equal(a, from_disk(images(t))) for t, a in zip((1, 2), expected, strict=True))
    adapter.reset()
    from_disk.reset()
    assert _same(adapter.state(), from_disk.state())


@on_guarded
def test_two_streams_interleaved_are_two_streams(case) -> None:
    _, one = make(*case)
    expected = [[one(images(10 * s + t)) for t in range(3)] for s in (0, 1) if not one.reset()]
    _, shared = make(*case)
    states = [shared.state(), shared.state()]
    for t in range(3):
        for s in (0, 1):
            shared.load_state(states[s])
            assert torch.equal(shared(images(10 * s + t)), expected[s][t])
            states[s] = shared.state()


@on_compositions
def test_unwrap_gives_the_model_back_bitwise(case) -> None:
    family = case[0]
    net = tiny(family)
    net.train()
    for i, p in enumerate(net.parameters()):
        p.requires_grad_(i % 2 == 0)
    reference = copy.deepcopy(net)
    types = [type(m) for m in net.modules()]
    adapter = tta.wrap(net, **arguments(case[1]))
    adapter(images(0))
    assert adapter.unwrap() is net
    assert [type(m) for m in net.modules()] == types
    assert _same(net.state_dict(), reference.state_dict())
    for a, b in zip(net.parameters(), reference.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad and a.grad is None
    for a, b in zip(net.modules(), reference.modules(), strict=True):
        assert a.training == b.training and not a._forward_pre_hooks
    assert torch.equal(net.eval()(images(1)), reference.eval()(images(1)))


@on_whole_compositions
def test_frozen_predicts_and_changes_nothing(case) -> None:
    _, adapter = make(*case)
    adapter(images(0))
    before = adapter.state()
    with adapter.frozen():
        first = adapter(images(1))
        assert torch.equal(first, adapter(images(1)))
    assert _same(adapter.state(), before)
    adapter.freeze()
    adapter(images(2))
    assert _same(adapter.state(), before)
    adapter.unfreeze()
    adapter(images(2))
    if _learns(case):
        assert not _same(adapter.state(), before)


@on_components
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(case, mode) -> None:
    _, plain = make(*case)
    expected = [plain(images(t)) for t in range(2)]
    _, adapter = make(*case)
    with mode():
        for t in range(2):
            assert torch.equal(adapter(images(t)), expected[t])


@on_components
def test_train_and_eval_have_no_effect(case) -> None:
    _, plain = make(*case)
    _, adapter = make(*case)
    adapter.train()
    for t, call in enumerate((adapter.eval, adapter.train, adapter.model.train)):
        assert torch.equal(adapter(images(t)), plain(images(t)))
        call()


@on_guarded
def test_a_model_in_train_mode_is_adapted_as_one_in_eval_mode(case) -> None:
    _, plain = make(*case)
    net = tiny(case[0]).train()
    net.register_forward_pre_hook(lambda m, args: F.dropout(args[0], 0.5, m.training))
    before = torch.get_rng_state()
    adapter = tta.wrap(net, **arguments(case[1]))
    for t in range(3):
        assert torch.equal(adapter(images(t)), plain(images(t)))
    assert torch.equal(torch.get_rng_state(), before)


@on_components
def test_bfloat16_autocast(case) -> None:
    _, adapter = make(*case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for t in range(2):
            y = adapter(images(t))
    assert torch.isfinite(y).all()
    assert all(v.isfinite().all() for k, v in adapter.state().items() if k.startswith("param/"))


@on_components
def test_a_model_in_bfloat16(case) -> None:
    family, parts = case
    net = tiny(family).to(torch.bfloat16)
    source = [(x.to(torch.bfloat16), y) for x, y in surroundings()["source"]]
    adapter = tta.wrap(net, **arguments(parts) | {"source": source})
    for t in range(3):
        y = adapter(images(t).to(torch.bfloat16))
        assert y.shape == (BATCH, 10) and y.dtype == torch.bfloat16 and torch.isfinite(y).all()
    state = adapter.state()
    assert all(v.isfinite().all() for k, v in state.items() if k.startswith(("param/", "norm/")))


@on_a_network_each
def test_an_adapter_takes_another_dtype_after_wrap(case) -> None:
    """Averages stay as exact as they were, whatever the model's dtype."""
    _, plain = make(*case)
    _, adapter = make(*case)
    plain(images(0)), adapter(images(0))
    kinds = {k: v.dtype for k, v in adapter.state().items() if k != "update/memory"}
    adapter.double()
    for t in (1, 2):
        y = adapter(images(t).double())
        assert y.dtype == torch.float64 and torch.isfinite(y).all()
        if case in ALONE or not _trains(case):  # steps of some compositions amplify rounding
            torch.testing.assert_close(y.float(), plain(images(t)), rtol=1e-2, atol=1e-2)
    adapter.float()
    assert torch.isfinite(adapter(images(3))).all()
    adapter.bfloat16()
    assert torch.isfinite(adapter(images(4).bfloat16())).all()
    averages = {k: v for k, v in kinds.items() if k.startswith(("norm/", "output/"))}
    adapter.reset()
    assert averages.items() <= {k: v.dtype for k, v in adapter.state().items()}.items()


@on_components
def test_channels_last_gives_the_same(case) -> None:
    _, plain = make(*case)
    net = tiny(case[0]).to(memory_format=torch.channels_last)
    adapter = tta.wrap(net, **arguments(case[1]))
    if case not in ALONE:  # under some norm rules a step of float32 makes much of its rounding
        plain.double()
        adapter.double()
    for t in range(2):
        x = images(t).to(next(plain.model.parameters()).dtype)
        y = adapter(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(y, plain(x), rtol=1e-2, atol=1e-3)


@on_components
def test_short_batches(case) -> None:
    _, adapter = make(*case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t, count in enumerate((BATCH, 3, 1, BATCH)):
            y = adapter(images(t, count))
            assert y.shape == (count, 10) and torch.isfinite(y).all()


@on_components
def test_constant_images(case) -> None:
    _, adapter = make(*case)
    for value in (0.0, 0.5, 1.0):
        assert torch.isfinite(adapter(torch.full((BATCH, 3, 32, 32), value))).all()
    assert torch.isfinite(adapter(images(0))).all()


@on_components
def test_nonfinite_images_are_left_out(case) -> None:
    bad = images(0)
    bad[2, 0, 3, 3] = float("nan")
    bad[5, 1, 0, 0] = float("inf")
    good = [i for i in range(BATCH) if i not in (2, 5)]
    _, adapter = make(*case)
    with pytest.warns(UserWarning, match="2 of 8 with NaN or infinite"):
        y = adapter(bad)
    assert adapter.report.rejected == 2 and adapter.report.seen == BATCH
    assert y.shape == (BATCH, 10) and y[[2, 5]].isnan().all()
    _, other = make(*case)
    assert torch.equal(other(bad[good]), y[good])
    assert _same(other.state(), adapter.state())
    before = adapter.state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warned once, and once is enough
        assert adapter(torch.full((3, 3, 32, 32), float("nan"))).isnan().all()
    assert _same(adapter.state(), before)


@on_whole_compositions
def test_a_model_that_raises_halfway_has_changed_nothing(case) -> None:
    net, adapter = make(*case)
    adapter(images(0))
    before = adapter.state()

    def fail(module: nn.Module, args: object) -> None:
        raise RuntimeError("out of order")

    handle = find_classifier(net).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of order"):
        adapter(images(1))
    assert _same(adapter.state(), before)
    handle.remove()
    wrong = images(1)[:, :2]
    with pytest.raises(ValueError, match="`images` must have 3 channels"):
        adapter(wrong)
    assert _same(adapter.state(), before)
    adapter(images(1))


@on_components
def test_same_seed_same_numbers_and_the_global_generator_is_left_alone(case) -> None:
    torch.manual_seed(1)
    _, one = make(*case, seed=3)
    a = [one(images(t)) for t in range(2)]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    _, two = make(*case, seed=3)
    assert all(torch.equal(x, two(images(t))) for t, x in enumerate(a))
    assert torch.equal(before, torch.get_rng_state())


@on_compositions
def test_deepcopy_and_pickle_go_on_alone(case) -> None:
    _, adapter = make(*case)
    adapter(images(0))
    twins = [copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))]
    before = adapter.state()
    expected = None
    for twin in twins:
        y = twin(images(1))
        assert expected is None or torch.equal(expected, y)
        expected = y
    assert _same(adapter.state(), before)
    assert torch.equal(adapter(images(1)), expected)


@on_components
def test_config_round_trip(case) -> None:
    _, adapter = make(*case)
    again = tta.AdapterConfig.from_json(adapter.config.to_json())
    assert again == adapter.config
    other = tta.wrap(tiny(case[0]), again, source=surroundings()["source"], **given(case[1]))
    assert torch.equal(adapter(images(0)), other(images(0)))


@on(ALONE, where=_filters)
def test_nothing_selected_changes_no_parameter(case) -> None:
    family, parts = case
    closed = {
        slot: tta.get_config(name, entropy_margin=1e-9)
        for slot, name in parts.items()
        if "entropy_margin" in tta.get_config(name).to_dict()
    }
    adapter = tta.wrap(tiny(family), **arguments(parts) | closed)
    before = adapter.state()
    assert torch.isfinite(adapter(images(0))).all()
    after = adapter.state()
    assert adapter.report.selected == 0 and not adapter.report.stepped
    for key in before:
        if key.startswith(("param/", "optim/")):
            assert torch.equal(before[key], after[key])


@pytest.mark.parametrize("name", tta.list_methods())
def test_a_component_is_documented(name: str) -> None:
    cls = component(name)
    module = __import__(cls.__module__, fromlist=["_"])
    assert name == "source" or "arXiv" in (module.__doc__ or ""), "the module cites its paper"
    assert cls.__doc__ and cls.Config.__doc__
    assert cls.Config.name == name


def test_wrapping_copies_only_what_moves() -> None:
    net = nn.Sequential(tiny("bn"), nn.Identity())
    storages = {p.data_ptr() for p in net.parameters()}
    adapter = tta.wrap(net, "tent.cifar10")
    assert {p.data_ptr() for p in adapter.model.parameters()} == storages
