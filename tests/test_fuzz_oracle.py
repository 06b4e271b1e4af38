"""The fuzzer's judge: what is planted is found, and what is right is let through."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

import tta
from tests.fuzz.nets import good
from tests.fuzz.oracle import Case, Planted, model_of, problem_of


def _raised(error: BaseException):
    def call() -> None:
        raise error

    return Case("a case", call)


def _status(code: int, text: str) -> Case:
    return Case("a command", lambda: (code, text), status=True)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (_raised(KeyError("a")), "raised KeyError"),
        (_raised(RuntimeError("a")), "raised RuntimeError"),
        (_raised(AssertionError("a")), "raised AssertionError"),
        (_raised(MemoryError()), "raised MemoryError"),
        (_raised(RecursionError()), "raised RecursionError"),
        (Case("", lambda: torch.zeros(2**40)), "raised RuntimeError"),  # out of memory
        (Case("", lambda: np.zeros(3).reshape(2)), "raw ValueError"),
        (Case("", lambda: tta.core.checks.nearest(3, 3)), "raw TypeError"),  # type: ignore[arg-type]
        (Case("", lambda: random.random()), "changed: generator of random"),
        (Case("", lambda: np.random.rand()), "changed: generator of numpy"),
        (Case("", lambda: torch.rand(1)), "changed: generator of torch"),
        (_status(3, ""), "exit status 3"),
        (_status(2, "error: a\nerror: b"), "a message of 2 lines"),
        (_status(2, "error: " + "a" * 400), "a message of 407 characters"),
        (_status(2, ""), "a message of 0 lines"),
    ],
)
def test_what_is_wrong_is_found(case, words) -> None:
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        assert words in str(problem_of(case))
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])


@pytest.mark.parametrize(
    "case",
    [
        Case("", lambda: None),
        _raised(Planted("by the caller")),
        Case("", lambda: tta.wrap(good(), "tnet")),
        Case("", lambda: tta.wrap(good(), "tent", lr=-1)),
        _status(2, "warning: a\nerror: b"),
        _status(0, ""),
    ],
)
def test_what_is_right_is_not(case) -> None:
    assert problem_of(case) is None


def test_long_messages_are_found(monkeypatch) -> None:
    monkeypatch.setattr(tta.core.checks, "told", lambda text, most=0: str(text))
    case = Case("", lambda: tta.wrap(good(), "tent", params=["norm"] * 300))
    assert problem_of(case) is None  # a list is cut where its text is made
    case = Case("", lambda: tta.wrap(good(), "tent", params=b"a" * 5000))
    assert "characters" in str(problem_of(case))


def test_a_model_that_was_changed_is_found() -> None:
    for change in (
        lambda net: net.train(),
        lambda net: net.fc.bias.data.add_(1),
        lambda net: setattr(net.fc.bias, "grad", torch.ones_like(net.fc.bias)),
        lambda net: setattr(net.fc, "bias", torch.nn.Parameter(net.fc.bias.detach())),
        lambda net: net.fc.register_forward_hook(print),
        lambda net: net.fc.requires_grad_(False),
    ):
        net = good()

        def call(change=change, net=net) -> None:
            change(net)
            raise Planted("after a change")

        case = Case("", call, watched={"the model": lambda net=net: model_of(net)})
        assert "changed: the model" in str(problem_of(case))


@pytest.mark.slow
def test_what_takes_too_long_is_stopped() -> None:
    def call() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass

    assert "more than 10 s" in str(problem_of(Case("", call)))
