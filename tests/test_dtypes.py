"""Adapters take another dtype after wrap, as models do."""

from __future__ import annotations

import pytest
import torch

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny


@pytest.mark.parametrize("after", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("before", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["tent", "cotta", "adacontrast"])
def test_an_adapter_of_any_dtype_takes_another(
    method: str, before: torch.dtype, after: torch.dtype
) -> None:
    pixels = {} if method == "tent" else {"mean": (0.0,), "std": (1.0,)}
    adapter = tta.wrap(tiny("bn").to(before), f"{method}.cifar10", **pixels)
    adapter(images(0).to(before))
    adapter.to(after)
    for t in (1, 2):
        y = adapter(images(t).to(after))
        assert y.dtype == after and torch.isfinite(y).all()
    expected = tiny("bn").to(before).to(after).state_dict()
    found = adapter.unwrap().state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_master_copies_and_averages_are_not_rounded() -> None:
    adapter = tta.wrap(tiny("bn").bfloat16(), "rotta", mean=(0.0,), std=(1.0,))
    adapter(images(0).bfloat16())
    before = adapter.state()
    after = adapter.to(torch.bfloat16).state()
    assert all(torch.equal(after[k], v) for k, v in before.items() if "memory" not in k)
    assert all(v.dtype == before[k].dtype for k, v in after.items())
    plain = tta.wrap(tiny("bn"), "neo", use_source_mean=True, source=source_batches())
    plain(images(0))
    centre = plain.state()["output/centre"]
    assert torch.equal(plain.bfloat16().state()["output/centre"], centre)


def test_source_batches_follow_the_model() -> None:
    adapter = tta.wrap(
        tiny("bn"), "rmt", source=source_batches(), warmup_samples=0, mean=(0.0,), std=(1.0,)
    ).double()
    assert adapter(images(0).double()).dtype == torch.float64
    assert adapter.report.stepped


@pytest.mark.parametrize("method", ["rotta", "adacontrast"])
def test_averages_of_a_teacher_are_never_in_half_precision(method: str) -> None:
    adapter = tta.wrap(tiny("bn"), method, mean=(0.0,), std=(1.0,))
    with pytest.warns(UserWarning, match="convert the model before wrap") as caught:
        adapter.bfloat16().half().bfloat16()
    assert [w.filename for w in caught] == [__file__]
    adapter(images(0).bfloat16())
    averages = {k: v for k, v in adapter.state().items() if k.endswith((".mean", ".var"))}
    assert {k.split("/")[0] for k in averages} == {"norm", "update"}
    assert {v.dtype for v in averages.values()} == {torch.float32}


def test_averages_of_an_inner_method_keep_their_dtype() -> None:
    pixels = {"mean": (0.0,), "std": (1.0,)}
    adapter = tta.wrap(tiny("bn"), "reservoir", inner="eata", source=source_batches(), **pixels)
    before = adapter.state()
    with pytest.warns(UserWarning, match="convert the model before wrap"):
        adapter.bfloat16()
    kept = {k: v.dtype for k, v in before.items() if ".inner." in k}
    assert kept and kept == {k: v.dtype for k, v in adapter.state().items() if ".inner." in k}


def test_a_model_in_half_precision_is_no_reason_for_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    adapter = tta.wrap(tiny("bn").bfloat16(), "tent.cifar10")
    adapter.half()
    tta.wrap(tiny("bn"), "neo").half()
    assert not [w for w in recwarn if "half precision" in str(w.message)]
