"""A process of several that share batches; apart from the tests, since ``spawn`` imports it."""

from __future__ import annotations

import copy
import gc
import pickle
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import tta
from tests.helpers.batches import images
from tests.helpers.compositions import arguments
from tests.helpers.nets import tiny
from tta.core.config import UpdateConfig
from tta.core.registry import component
from tta.runtime.parallel import split_batches

__all__ = ["SIZES", "all_cases", "close", "copies", "in_turn", "outcome", "refusals", "run_ranks"]

SIZES = (8, 7, 1, 9)  # images of each batch: even and odd shares, and one too small to be shared


def run_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Run ``work(rank, *arguments)`` in so many processes of a gloo group."""
    with tempfile.TemporaryDirectory() as folder:  # they meet at a file: a port may be taken
        meet = f"file://{folder}/meet"
        torch.multiprocessing.spawn(_begin, (size, meet, work, arguments), nprocs=size)


def outcome(case: Any, ranks: bool = False, device: str = "cpu") -> dict[str, Any]:
    """What a contract case gives on a short stream, alone or as one rank of the group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        family, slots = case
        adapter = tta.wrap(
            tiny(family).to(device), **{k: _mild(v) for k, v in arguments(slots).items()}
        )
        if ranks:
            split_batches(adapter)
        logits, reports = [], []
        for seed, count in enumerate(SIZES):
            logits.append(adapter(images(seed, count).to(device)).cpu())
            reports.append(dict(adapter.report))
        return {
            "logits": logits,
            "reports": reports,
            "state": {k: v.cpu() for k, v in adapter.state().items()},
        }


def close(a: torch.Tensor, b: torch.Tensor, limit: float) -> bool:
    """Equal but for rounding, relative to the largest element."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.double().nan_to_num(9.0), b.double().nan_to_num(9.0)
    return a.shape == b.shape and bool(((a - b).abs() <= limit * (1 + a.abs().max())).all())


def _mild(value: Any) -> Any:
    """A margin that all samples pass but whose weights are not exp(20): else rounding is all.

    And plain steps where more is trained than the model's norm layers: Adam's are as large for a
    gradient that is nothing but rounding, as that of a scale before a norm layer is.
    """
    own = isinstance(value, UpdateConfig) and not component(value.name).trains_model
    adam = getattr(value, "optimizer", None) == "adam"
    if adam and (own or value.params != "norm"):
        value = value.replace(optimizer="sgd")
    margin = hasattr(value, "redundancy_margin")
    return value.replace(entropy_margin=1.01) if margin else value


def _begin(rank: int, size: int, meet: str, work: Any, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", meet, rank=rank, world_size=size, timeout=limit)
    try:
        work(rank, *arguments)
        dist.barrier()  # a rank that ends while another one still talks to it would abort it
    finally:
        gc.collect()  # adapters hold the group in circles; it must be gone before its threads are
        dist.destroy_process_group()


def in_turn(rank: int, works: Sequence[tuple[Callable[..., Any], Sequence[Any]]]) -> None:
    """Do one work after the other: to start a process takes longer than most works."""
    for work, given in works:
        work(rank, *given)


def all_cases(rank: int, cases: Sequence[Any], folder: str) -> None:
    """Write the outcome of every case, for the test to compare with one process."""
    found = [outcome(case, ranks=True) for case in cases]
    torch.save(found, Path(folder) / f"{rank}.pt")


class TwoViews(torch.nn.Module):
    """Folds two views of each image into the batch."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([x, x.flip(-1)])).view(2, len(x), -1).mean(0)


def refusals(rank: int) -> None:
    """Ranks that do not fit together, each refused on all of them."""
    for adapter in (
        tta.wrap(tiny("bn", seed=rank), "tent.cifar10"),
        tta.wrap(tiny("bn"), "tent.cifar10", lr=0.1 * (1 + rank)),
        tta.wrap(tiny("bn"), "unmix_tns.cifar10", seed=rank),
    ):
        with pytest.raises(ValueError, match="the same on every rank"):
            split_batches(adapter)
    net = tiny("bn")
    with torch.no_grad():
        next(b for n, b in net.named_buffers() if n.endswith("running_mean")).add_(rank)
    with pytest.raises(ValueError, match="the same on every rank"):
        split_batches(tta.wrap(net, "source"))
    batches = [(images(5 + rank, 8), torch.zeros(8, dtype=torch.int64))]  # another share on each
    with pytest.raises(ValueError, match="the same on every rank"):
        split_batches(tta.wrap(tiny("bn"), "eata.cifar10", source=batches))
    alone = [dist.new_group([k]) for k in range(dist.get_world_size())]
    with pytest.raises(ValueError, match="must hold this process"):
        split_batches(tta.wrap(tiny("bn"), "bn"), alone[1 - rank])
    single = split_batches(tta.wrap(tiny("bn"), "bn"), alone[rank])
    assert torch.equal(single(images(0, 1)), tta.wrap(tiny("bn"), "bn")(images(0, 1)))
    views = split_batches(tta.wrap(TwoViews(tiny("bn")), "bn"))
    with pytest.raises(ValueError, match="one row for each image"):
        views(images(0, 8))
    adapter = split_batches(tta.wrap(tiny("bn"), "tent.cifar10"))
    before = adapter.state()
    x = images(0, 8)
    for other in (
        x.flip(0),
        x.flip(-1),
        x.where(x > 1e-3, torch.inf),
        x.where(x < 0.999, -torch.inf),
    ):
        with pytest.raises(ValueError, match="same whole batch"):
            adapter(x if rank else other)
    with pytest.raises(ValueError, match="same whole batch"):
        adapter(images(rank, 8))
    with pytest.raises(ValueError, match="same whole batch"):
        adapter(images(0, 8 + rank))
    assert all(torch.equal(value, before[key]) for key, value in adapter.state().items())
    assert adapter(images(0, 8)).shape == (8, 10)
    adapter.unwrap()
    with pytest.raises(RuntimeError, match="unwrapped"):
        split_batches(adapter)


def copies(rank: int) -> None:
    """A copy has the same ranks, a pickled one is on its own; saved and reset as ever."""
    adapter = split_batches(tta.wrap(tiny("bn"), "eata.cifar10", update="tent.cifar10"))
    twin = copy.deepcopy(adapter)
    alone = pickle.loads(pickle.dumps(adapter))
    outputs = [a(images(0, 7)) for a in (adapter, twin)]
    assert torch.equal(*outputs)
    torch.testing.assert_close(alone(images(0, 7)), outputs[0], rtol=1e-4, atol=1e-5)
    if rank == 0:  # no rank waits for another here
        alone(images(1, 7))
    adapter.reset()
    assert torch.equal(adapter(images(0, 7)), outputs[0])
