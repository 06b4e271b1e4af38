"""No component's memory grows with the length of the stream."""

from __future__ import annotations

import gc

import pytest
import torch

import tta
from tests.helpers.compositions import LOOSE, given, suiting
from tests.helpers.nets import cnn
from tta.core.registry import component

BATCH, SIZE, CLASSES = 2, 8, 4
EARLY, LATE = 200, 2_000


def _images(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(BATCH, 3, SIZE, SIZE, generator=generator)


def _elements() -> int:
    """Elements of all tensors that are alive."""
    gc.collect()
    return sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*preset, made for:UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.soak] if number % 6 else [])
        for number, name in enumerate(suiting("bn"))
    ],
)
def test_memory_does_not_grow_in_2000_batches(name: str) -> None:
    fields = {k: v for k, v in LOOSE.items() if k in tta.get_config(name).to_dict()}
    widths = (4,) if component(name).suits(cnn((4,), torch.nn.BatchNorm2d, CLASSES)) else (4, 4)
    adapter = tta.wrap(
        cnn(widths, torch.nn.BatchNorm2d, CLASSES),
        tta.get_config(name).replace(**fields) if fields else name,
        source=[(_images(90 + i), torch.tensor([i % 2, 2 + i % 2])) for i in range(4)],
        mean=(0.0,),
        std=(1.0,),
        **given({"recipe": name}),
    )
    figures = {}
    for t in range(LATE):
        logits = adapter(_images(t % 100))
        if t + 1 in (EARLY, LATE):
            state = {k: v.numel() for k, v in adapter.state().items()}
            figures[t + 1] = (state, _elements())
    assert torch.isfinite(logits).all()
    assert figures[EARLY] == figures[LATE]
