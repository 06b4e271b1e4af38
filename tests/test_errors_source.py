"""Source batches and artefacts that cannot be used are refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused, state_of

NAN, INF = float("nan"), float("inf")


def pair(x: Any = None, y: Any = None) -> tuple[Any, Any]:
    return images(0) if x is None else x, torch.zeros(8, dtype=torch.int64) if y is None else y


BATCHES = [
    (TypeError, r"pairs \(images, labels\), but batch 1 is a Tensor", [pair(), images(0)]),
    (TypeError, r"batch 0 is a tuple of 3", [(*pair(), 1)]),
    (TypeError, r"batch 0 is a str", ["ab"]),
    (
        TypeError,
        r"a batch has images.*floating point for this model, got torch.uint8",
        [pair(images(0).byte())],
    ),
    (TypeError, r"batch 0 has images.*must be a tensor, got list", [pair([1.0])]),
    (ValueError, r"a batch has images.*3 channels, got shape", [pair(torch.rand(8, 1, 32, 32))]),
    (ValueError, r"a batch has images.*4 axes", [pair(torch.rand(8, 3, 32))]),
    (ValueError, r"batch 0 has images.*at least one", [pair(torch.rand(0, 3, 32, 32))]),
    (
        ValueError,
        r"batch 1 has NaN or infinite values in 2 of 8 images: leave these out",
        [pair(), pair(torch.rand(8, 3, 32, 32).index_fill(0, torch.tensor([3, 5]), NAN))],
    ),
    (TypeError, r"labels of list: pass class numbers", [pair(y=[0] * 8)]),
    (TypeError, r"labels of torch.float32", [pair(y=torch.zeros(8))]),
    (ValueError, r"labels of shape \(7,\) for 8 images", [pair(y=torch.zeros(7).long())]),
    (ValueError, r"labels of shape \(8, 10\)", [pair(y=torch.zeros(8, 10).long())]),
    (ValueError, r"labels from 3 to 10, and this model has 10", [pair(y=torch.arange(8) + 3)]),
    (ValueError, r"labels from -1 to", [pair(y=torch.arange(8) - 1)]),
    (ValueError, r"batch", []),
]


class Loader:
    """What a data loader is to us: read in passes, without a length."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


@pytest.mark.parametrize("kind", [list, Loader])
@pytest.mark.parametrize("method", ["petal", "rmt", "adanpc", "eata"])
@pytest.mark.parametrize(("error", "words", "batches"), BATCHES)
def test_source_batches(error, words, batches, method, kind) -> None:
    net = tiny("bn")
    before = state_of(net)
    more = {} if method in ("eata", "adanpc") else {"mean": (0.0,), "std": (1.0,)}

    def call() -> None:
        tta.wrap(net, f"{method}.cifar10", source=kind(batches), **more)

    if (method == "eata" and "labels of" in words) or (method == "eata" and "labels from" in words):
        call()  # its Fisher information is of pseudo-labels
        return
    assert "`source`" in refused(error, words, call)
    after = state_of(net)
    assert all(map(torch.equal, before[0], after[0])) and before[1:] == after[1:]


def test_a_method_that_takes_nothing_of_the_source_reads_no_batch() -> None:
    tta.wrap(tiny("bn"), "tent.cifar10", source=Loader(None))


FISHER = {n: torch.ones_like(p) for n, p in tiny("bn").named_parameters()}
NAME = "layer1.1.weight"
STATISTICS = [
    (TypeError, r"`fisher` must be a dict of tensors.* got Tensor", {"fisher": torch.ones(3)}),
    (TypeError, r"`fisher` .* got float under", {"fisher": FISHER | {NAME: 1.0}}),
    (TypeError, r"`fisher` .* got Tensor under 3", {"fisher": {3: torch.ones(3)}}),
    (ValueError, r"`fisher` .* got NaN .*'layer1", {"fisher": {NAME: torch.tensor([NAN] * 4)}}),
    (ValueError, r"`fisher` .* got negative values", {"fisher": {NAME: -torch.ones(4)}}),
    (ValueError, r"`posterior_mean` .* got NaN", {"posterior_mean": {"a": torch.tensor(INF)}}),
    (TypeError, r"`prototypes` must be a tensor of shape \(C, D\), got list", {"prototypes": []}),
    (ValueError, r"`prototypes` .* got shape \(3,\)", {"prototypes": torch.ones(3)}),
    (ValueError, r"`prototypes` must be finite", {"prototypes": torch.full((2, 2), INF)}),
    (ValueError, r"`features` must be finite", {"features": torch.full((2, 2), NAN)}),
    (TypeError, r"`feature_labels` .* torch.float32", {"feature_labels": torch.ones(2)}),
    (ValueError, r"`feature_labels` must come together", {"features": torch.ones(2, 2)}),
    (TypeError, r"`batches` must be an iterable .* got int", {"batches": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "fields"), STATISTICS)
def test_source_statistics(error, words, fields) -> None:
    refused(error, words, lambda: tta.SourceStatistics(**fields))


def test_names_that_no_file_can_hold_are_refused_when_they_are_saved(tmp_path) -> None:
    statistics = tta.SourceStatistics(fisher={"\ud800": torch.ones(2)})
    refused(ValueError, "`path` must get tensors under names of whole characters", lambda: (
        statistics.save(tmp_path / "source.safetensors")
    ))  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "fisher"),
    [
        (r"'layer1.1.weight' of shape \(4,\), got \(8,\)", FISHER | {NAME: torch.ones(8)}),
        (r"got 'layer9.weight': did you mean .*Known: layer1", {"layer9.weight": torch.ones(4)}),
        (r"'layer1.1.weight' is missing", {k: v for k, v in FISHER.items() if k != NAME}),
    ],
)
def test_a_fisher_that_is_not_this_models(words, fisher) -> None:
    net = tiny("bn")
    given = tta.SourceStatistics(fisher=fisher)
    text = refused(ValueError, words, lambda: tta.wrap(net, "eata.cifar10", source=given))
    assert "`source.fisher`" in text
    tta.wrap(net, "source")


def test_a_first_row_of_another_model() -> None:
    given = tta.SourceStatistics(
        features=torch.ones(2, 8), feature_labels=torch.arange(2), memory_init=torch.ones(3)
    )
    words = r"`source.memory_init` must be of shape \(8,\).*got \(3,\)"
    refused(ValueError, words, lambda: tta.wrap(tiny("bn"), "adanpc.domainbed", source=given))


def test_statistics_from_files(tmp_path: Path) -> None:
    load = tta.SourceStatistics.load
    refused(TypeError, r"`path` must be a path, got None", lambda: load(None))  # type: ignore[arg-type]
    refused(FileNotFoundError, r"`path` .* is not there", lambda: load(tmp_path / "no"))
    refused(FileNotFoundError, r"`path` .* is not there", lambda: load(tmp_path))
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk" * 100)
    refused(ValueError, r"`path` .* no whole safetensors file", lambda: load(junk))
    for key in ("fisher", "features/a", "batches", "fishre/a"):
        save_file({key: torch.ones(2, 2)}, junk)
        refused(ValueError, rf"`path` .* holds '{key}'.*Known: ", lambda: load(junk))
    statistics = tta.SourceStatistics(fisher=FISHER)
    refused(TypeError, r"`path`", lambda: statistics.save(3))  # type: ignore[arg-type]
    refused(FileNotFoundError, r"`path` .* folder", lambda: statistics.save(tmp_path / "a" / "b"))
    statistics.save(junk)
    assert load(junk).contents == ["fisher"]
    junk.write_bytes(junk.read_bytes()[:-8])
    refused(ValueError, r"`path` .* no whole safetensors file", lambda: load(junk))


ZERO = np.array(0.0)  # has __iter__, which raises
COLLECT = [
    (ValueError, r"unknown method 'a'", source_batches(), "a"),
    (ValueError, r"unknown method 'a'", source_batches(), ["a"]),
    (TypeError, r"`for_methods` must be a list of names, got 3", source_batches(), 3),
    (TypeError, r"`for_methods` .* got \[3\]", source_batches(), [3]),
    (TypeError, r"`for_methods` must be a list of names, got array\(0", source_batches(), ZERO),
    (ValueError, r"`for_methods` must name at least one method", source_batches(), []),
    (ValueError, r"`source` must hold at least one batch", [], ["eata"]),
    (TypeError, r"`loader` must be an iterable .* got NoneType", None, ["eata"]),
    (TypeError, r"`loader` must be an iterable .* got Tensor", images(0), ["eata"]),
    (TypeError, r"`loader` must be an iterable .* got ndarray", ZERO, ["eata"]),
    (TypeError, r"batch 0 is a Tensor", [images(0)], ["eata"]),
]


def test_source_batches_made_in_inference_mode_are_as_any_others() -> None:
    with torch.inference_mode():
        made = [(x.clone(), y.clone()) for x, y in source_batches()]
    for batches, methods in ((made, ["eata", "petal"]), (iter(made), ["eata"])):
        found = tta.collect_source(tiny("bn"), batches, methods)
        expected = tta.collect_source(tiny("bn"), source_batches(), methods)
        assert all(map(torch.equal, found.fisher.values(), expected.fisher.values()))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("recipe", ["santa.cifar10", "gtta.cifar10", "itta", "lsa"])
def test_labels_of_any_whole_numbers(recipe: str, lazy: bool) -> None:
    found = []
    for dtype in (torch.int64, torch.int32, torch.uint8):
        batches: Any = [(x, y.to(dtype)) for x, y in source_batches()]
        source = (batch for batch in batches) if lazy else batches
        if lazy and recipe == "gtta.cifar10":
            source = torch.utils.data.DataLoader(batches, batch_size=None)
        adapter = tta.wrap(tiny("bn"), recipe, source=source, mean=(0.0,), std=(1.0,), seed=1)
        adapter(images(0))
        found.append(adapter(images(1)))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("guard", [None, True, "watch"])
def test_none_stands_for_labels_that_only_a_guard_would_use(guard: Any) -> None:
    batches = [(x, None) for x, _ in source_batches()]
    kind = {"mean": (0.0,), "std": (1.0,)}
    adapter = tta.wrap(tiny("bn"), "reservoir.cifar10", source=batches, guard=guard, **kind)
    assert adapter(images(0)).isfinite().all()
    assert guard is None or 0 <= adapter.health["estimated_accuracy"] <= 1
    refused(
        TypeError,
        "labels of NoneType",
        lambda: tta.wrap(tiny("bn"), "santa.cifar10", source=batches, **kind),
    )


def test_a_later_batch_of_another_dtype_is_refused_in_words() -> None:
    (x, y), *_ = source_batches()
    refused(
        TypeError,
        "torch.float32 like the model, got torch.float64",
        lambda: tta.collect_source(tiny("bn"), [(x, y), (x.double(), y)], ["itta"]),
    )


@pytest.mark.parametrize(("error", "words", "loader", "methods"), COLLECT)
def test_collect_source(error, words, loader, methods) -> None:
    net = tiny("bn")
    before = state_of(net)
    with pytest.raises(error, match=words) as caught:
        tta.collect_source(net, loader, methods)
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, before[0], state_of(net)[0]))
    tta.wrap(net, "source")
