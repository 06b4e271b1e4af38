"""Components that somebody else writes: mistakes are said when they are registered or used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tta.core import registry


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_COMPONENTS", dict(registry._COMPONENTS))


def _config(**fields: Any) -> type[tta.ComponentConfig]:
    """A fresh config class with fields and their defaults."""
    body = {"__annotations__": {key: type(v).__name__ for key, v in fields.items()}, **fields}
    made = type("OwnConfig", (tta.ComponentConfig,), body)
    return dataclass(frozen=True, kw_only=True)(made)


def _output(**attributes: Any) -> type[tta.Output]:
    def correct(self, prediction: tta.Prediction) -> Tensor:
        return prediction.logits

    return type("Own", (tta.Output,), {"Config": _config(), "correct": correct, **attributes})


@dataclass(frozen=True, kw_only=True)
class _WithoutDefault(tta.ComponentConfig):
    size: int


@dataclass(frozen=True, kw_only=True)
class _OfNoJson(tta.ComponentConfig):
    device: Any = field(default_factory=lambda: torch.device("cpu"))


MISTAKES = [
    (
        TypeError,
        r"`Config` of 'own' must be a dataclass of its own",
        {"Config": tta.ComponentConfig},
    ),
    (TypeError, r"`Config` of 'own' must be its own, got that of 'lame'", {"Config": None}),
    (TypeError, r"default for every field", {"Config": _WithoutDefault}),
    (TypeError, r"a kind that JSON knows", {"Config": _OfNoJson}),
    (
        ValueError,
        r"`PRESETS` of 'own'.*preset 'cifar10'.*`sise`",
        {"PRESETS": {"cifar10": {"sise": 1}}},
    ),
    (TypeError, r"`own` must define correct\(\)", {"correct": tta.Output.correct}),
]


@pytest.mark.parametrize(("error", "words", "attributes"), MISTAKES)
def test_mistakes_are_said_when_a_class_is_registered(error, words, attributes) -> None:
    if "Config" in attributes and attributes["Config"] is None:
        attributes = {"Config": type(tta.get_config("lame"))}
    with pytest.raises(error, match=words):
        tta.register("own")(_output(**attributes))
    assert "own" not in tta.list_methods()


def test_an_update_needs_the_fields_of_one() -> None:
    cls = type(
        "Own", (tta.Update,), {"Config": _config(), "adapt": lambda self, x: self.network(x)}
    )
    with pytest.raises(TypeError, match=r"made from UpdateConfig, got 'OwnConfig'"):
        tta.register("own")(cls)


@pytest.mark.parametrize("returned", [None, torch.zeros(2, 10), torch.zeros(8, 9)])
def test_what_an_output_rule_returns_is_checked(returned) -> None:
    tta.register("own")(_output(correct=lambda self, prediction: returned))
    with pytest.raises(TypeError, match=r"`own` must return scores of shape \(8, 10\)"):
        tta.wrap(tiny("bn"), output="own")(images(0))


def test_what_an_update_returns_is_checked() -> None:
    class OwnConfig(tta.UpdateConfig):
        """Fields of ``own``."""

    class Own(tta.Update):
        Config = OwnConfig

        def adapt(self, x: Tensor) -> Any:
            return self.network(x).logits

    tta.register("own")(Own)
    with pytest.raises(TypeError, match=r"`own` must give a tta.Prediction, got Tensor"):
        tta.wrap(tiny("bn"), "own")(images(0))


class _Remembering(tta.Output):
    """Remembers the features of the last batch."""

    Config = _config()
    lazy: ClassVar[tuple[str, ...]] = ()
    needs_features = True

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__(config, context)
        self.register_buffer("last", torch.zeros(8, 0))

    def lazy_buffers(self) -> tuple[str, ...]:
        return self.lazy

    def correct(self, prediction: tta.Prediction) -> Tensor:
        if self.learning:
            self.last = prediction.features
        return prediction.logits


def test_a_buffer_of_another_shape_must_be_declared() -> None:
    tta.register("own")(type("Own", (_Remembering,), {"Config": _config()}))
    adapter = tta.wrap(tiny("bn"), output="own")
    adapter(images(0))
    for call in (adapter.state, adapter.reset):
        with pytest.raises(ValueError, match=r"`output/last` must keep the shape.*lazy_buffers"):
            call()


def test_a_declared_one_resets_saves_and_loads(tmp_path) -> None:
    tta.register("own")(type("Own", (_Remembering,), {"Config": _config(), "lazy": ("last",)}))
    adapter = tta.wrap(tiny("bn"), output="own")
    adapter(images(0))
    tta.save(adapter, tmp_path)
    held = adapter.state()["output/last"]
    loaded = tta.load(tiny("bn"), tmp_path)
    assert torch.equal(loaded.state()["output/last"], held) and held.shape[1] > 0
    adapter.reset()
    assert adapter.state()["output/last"].shape == (8, 0)


def test_an_empty_path_is_no_folder() -> None:
    with pytest.raises(ValueError, match=r"`folder` must be a path, got an empty one"):
        tta.save(tta.wrap(tiny("bn"), "source"), "")
