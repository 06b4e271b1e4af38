"""What tests of bad arguments share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

__all__ = ["refused", "state_of"]


def state_of(net: nn.Module) -> list[Any]:
    """Whatever a refused call must leave as it was."""
    tensors = [v.clone() for v in net.state_dict().values()]
    flags = [(type(m), m.training, len(m._forward_pre_hooks)) for m in net.modules()]
    return [tensors, flags, [p.requires_grad for p in net.parameters()]]


def refused(error: type[Exception], words: str, call: Callable[[], Any]) -> str:
    """What `call` raises: of this kind exactly, in one line, with an argument's name."""
    with pytest.raises(error, match=words) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is error, type(caught.value)
    assert "\n" not in text and "`" in text
    return text
