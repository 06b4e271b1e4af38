"""Replaying traces of updates: what is compared with outputs, reports and states is said here.

How a method's hyper-parameters become a config stands in its own test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import tta
from tests.helpers.traces import Trace

__all__ = ["LOGITS", "WEIGHTS", "batches", "check_source", "check_state", "check_weights", "replay"]

LOGITS = {"atol": 5e-5, "rtol": 1e-4}
WEIGHTS = {"atol": 5e-5, "rtol": 0.0}
close = torch.testing.assert_close


def batches(trace: Trace, adapter: tta.Adapter) -> Iterator[tuple[int, Tensor]]:
    """Place and images of each batch, with resets as recorded and the last one cut."""
    found = trace.tensor("inputs")
    for t, x in enumerate(found):
        if t in trace.params.get("reset_before", []):
            adapter.reset()
        rows = trace.params.get("last_rows", 0) if t == len(found) - 1 else 0
        yield t, x[:rows] if rows else x


def check_source(trace: Trace) -> None:
    """The model is rebuilt as it was; everything else rests on that."""
    net = trace.model()
    images, expected = trace.tensor("inputs"), trace.tensor("source_outputs")
    with torch.no_grad():
        close(net(images.flatten(0, -4)), expected.flatten(0, -2), atol=1e-5, rtol=1e-5)


def replay(
    trace: Trace,
    adapter: tta.Adapter,
    figures: Mapping[str, str],
    tolerance: Mapping[str, float] = LOGITS,
) -> Iterator[int]:
    """Run all batches, and compare outputs, figures and weights.

    Args:
        trace: The recorded run.
        adapter: Its adapter, as wrapped.
        figures: Keys of the trace that hold one entry a batch, and the report's figures of these.
        tolerance: Of outputs and figures.

    Yields:
        The place of each batch when it is done, for more comparisons.
    """
    for t, x in batches(trace, adapter):
        close(adapter(x), trace.tensor("outputs")[t][: len(x)], **tolerance)
        for key, figure in figures.items():
            value = torch.as_tensor(adapter.report[figure])
            expected = trace.tensor(key)[t]
            exact = not expected.is_floating_point()
            close(
                value.to(expected.dtype),
                expected[: len(x)] if value.ndim else expected,
                **({"atol": 0, "rtol": 0} if exact else tolerance),
                equal_nan=True,
            )
        if t == 0:
            check_weights(trace, adapter, "adapted_after_step0")
        yield t
    check_weights(trace, adapter, "adapted")
    if "param_names" in trace:
        trained = [n for n in adapter.parameters_adapted]
        assert trained == [str(n) for n in trace.arrays["param_names"]]
    state = adapter.state()
    for name, value in trace.group("opt").items():
        parameter, _, slot = name.rpartition("/")
        own = f"optim/update.{parameter}.{slot}"
        key = own if own in state else f"optim/{parameter}.{slot}"
        close(state[key], value.reshape(state[key].shape), **WEIGHTS)


def check_weights(trace: Trace, adapter: tta.Adapter, key: str) -> None:
    """Compare the trained parameters with those that the trace has under ``key``."""
    check_state(adapter, {f"param/{n}": v for n, v in trace.group(key).items()}, **WEIGHTS)


def check_state(adapter: tta.Adapter, expected: Mapping[str, Tensor], **tolerance: Any) -> None:
    """Compare entries of the state; a parameter that is not trained is compared all the same."""
    found = {f"param/{n}": p.detach() for n, p in adapter.model.named_parameters()}
    found |= {f"param/{n}": b for n, b in adapter.model.named_buffers()}  # where no rule stands in
    found |= adapter.state()
    for name, value in expected.items():
        close(found[name], value, **tolerance)
