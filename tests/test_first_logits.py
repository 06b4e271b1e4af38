"""Logits of few classes may all be small and positive, for which the model runs once more.

It is judged so whether a sigmoid made them. No component may notice.
"""

from __future__ import annotations

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.compositions import arguments, suiting
from tests.helpers.nets import tiny
from tta.core import logit_checks
from tta.core.classifier import find_classifier

SLOTS = [
    (slot, name)
    for slot in ("norm", "update", "output", "guard")
    for name in tta.list_methods(slot=slot)
    if name != "auto"  # the guard, which comes with its recipe
]


@pytest.mark.parametrize(("slot", "name"), SLOTS)
def test_the_judgement_of_first_logits_moves_nothing(
    slot: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny(next(f for f in ("ln", "bn", "gn") if name in suiting(f)))
    head = find_classifier(net)
    with torch.no_grad():
        head.weight.mul_(1e-2)
        head.bias.fill_(0.5)
    judged: list[bool] = []
    ends = logit_checks.ends_in_head

    def judge(*args: object) -> bool:
        judged.append(ends(*args))  # type: ignore[arg-type]
        return judged[-1]

    monkeypatch.setattr("tta.core.backbone.ends_in_head", judge)
    adapter = tta.wrap(net, **arguments({slot: name}))
    first, moved = adapter(images(0)), adapter.state()
    assert judged == [True] or name == "lsa"  # whose own logits are larger
    adapter.reset()
    assert torch.equal(adapter(images(0)), first)
    for key, value in adapter.state().items():
        assert torch.equal(value.nan_to_num(), moved[key].nan_to_num()), key
