"""Images of a size that a model does not take are refused in a sentence, and end no run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused
from tests.helpers.served import npy, serving
from tta.core.image_checks import ImagesRefusedError
from tta.runtime import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FIXED = {"input_size": (3, 12, 12), "fixed_input_size": True}
GOOD, SMALL = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 2, 2)


class Fixed(nn.Module):
    """A model of one size, as vision transformers are."""

    def __init__(self, error: type[Exception] = AssertionError) -> None:
        super().__init__()
        self.net, self.error = small_net(), error

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 12:
            raise self.error("Input height doesn't match model")
        return self.net(x)


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 10),
    )  # fmt: skip


def test_what_is_too_small_for_a_layer_is_said_at_once() -> None:
    adapter = tta.wrap(small_net(), "tent.cifar10")
    words = r"`images` must be larger for this model, got shape \(2, 3, 2, 2\) \(.*Kernel"
    refused(ImagesRefusedError, words, lambda: adapter(SMALL))
    adapter(GOOD)
    words = r"`images` .* such as \(3, 12, 12\), got \(3, 2, 2\) \(.*\): resize them"
    refused(ImagesRefusedError, words, lambda: adapter(SMALL))
    adapter(GOOD)


@pytest.mark.parametrize("error", [AssertionError, RuntimeError, ValueError, IndexError])
@pytest.mark.parametrize("recipe", ["tent.cifar10", "bn_ema"])
def test_a_model_of_one_size_is_known_by_what_it_has_taken(error, recipe) -> None:
    adapter = tta.wrap(Fixed(error), recipe)
    with pytest.raises(error, match="Input height"):  # nothing tells it from a broken model
        adapter(SMALL)
    adapter(GOOD)
    before = {key: value.clone() for key, value in adapter.state().items()}
    words = r"such as \(3, 12, 12\), got \(3, 2, 2\) \(Input height doesn't match model\)"
    refused(ImagesRefusedError, words, lambda: adapter(SMALL))
    assert all(torch.equal(value, before[key]) for key, value in adapter.state().items())


@pytest.mark.parametrize("said", [{"image_size": 12}, {"pretrained_cfg": FIXED}], ids=str)
def test_a_model_that_says_its_size_is_known_by_it(said) -> None:
    net = Fixed()
    for name, value in said.items():
        setattr(net, name, value)
    words = r"such as \(3, 12, 12\), got \(3, 2, 2\) \(Input height doesn't match model\)"
    refused(ImagesRefusedError, words, lambda: tta.wrap(net, "tent.cifar10")(SMALL))


@pytest.mark.parametrize(
    "error", [MemoryError("full"), RuntimeError("can't allocate memory"), KeyError("layer")]
)
def test_other_errors_stay_as_they_are(error) -> None:
    adapter = tta.wrap(tiny("bn"), "source")
    adapter(GOOD)
    adapter.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)) as caught:
        adapter(torch.rand(2, 3, 16, 16))
    assert caught.value is error


@pytest.mark.parametrize("net", [small_net, Fixed])
def test_a_pipeline_goes_on_without_a_frame_of_another_size(net, caplog) -> None:
    frames = [*GOOD, SMALL[0], *GOOD]
    pipeline = Pipeline(tta.wrap(net(), "tent.cifar10"), frames, batch_size=2)
    assert [result.index for result in pipeline] == [0, 1, 3, 4]
    assert pipeline.counts["failed"] == 1 and "resize them" in caplog.text


def test_the_server_says_422_of_it() -> None:
    with serving(tta.wrap(small_net(), "tent.cifar10"), shape=None) as server:
        path = "/v1/predict?create=true&stream=a"
        server.refused(422, "larger", server.post(path, content=npy(SMALL[0].numpy())))
