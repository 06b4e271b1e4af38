"""Image classifiers of Hugging Face, tiny and with random weights, which return no tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.wild import wrapped
from tta.core.registry import component

transformers: Any = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'tta-vision[hf]'"
)

CONFIGS: dict[str, dict[str, Any]] = {
    "ViT": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    },
    "ResNet": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    "Swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
}


def _classifier(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(**CONFIGS[kind], num_labels=10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForImageClassification")(config).eval()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", tta.list_methods())
def test_a_classifier_goes_through_every_recipe_and_back(method: str, kind: str) -> None:
    if not component(method).suits(_classifier(kind)):
        return
    net, untouched = _classifier(kind), _classifier(kind)
    adapter = wrapped(net, method)
    assert adapter.num_classes == 10
    for t in range(2):
        result = adapter(pixel_values=images(t))
        assert type(result) is type(untouched(images(t)))
        assert result.logits.shape == (8, 10) and result.logits.isfinite().all()
        assert not result.logits.requires_grad
    if method == "source":
        with torch.no_grad():
            assert torch.equal(result.logits, untouched(images(1)).logits)
    back = adapter.unwrap().state_dict()
    assert all(torch.equal(back[k], v) for k, v in untouched.state_dict().items())


def test_other_arguments_and_outputs_are_the_models() -> None:
    adapter = tta.wrap(_classifier("ViT"), "tent.cifar10")
    result = adapter(images(0), output_hidden_states=True)
    assert len(result.hidden_states) == 3
    assert not any(state.requires_grad for state in result.hidden_states)
    with pytest.raises(TypeError, match=r"got tuple with 0: .* logits=0"):
        adapter(images(0), return_dict=False)


@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_half_precision_weights_on_images_that_the_model_converts(kind: str) -> None:
    adapter = tta.wrap(_classifier(kind).bfloat16(), "tent.cifar10", lr=1e-5)
    start = adapter.state()
    x = images(0) if kind == "ViT" else images(0).bfloat16()
    try:
        result = adapter(x)
    except TypeError as error:  # this release does not convert
        assert "must be torch.bfloat16 like the model" in str(error)
        result = adapter(x.bfloat16())
    assert result.logits.dtype == torch.bfloat16
    now = adapter.state()
    assert any(not torch.equal(now[k], start[k]) for k in now if k.startswith("param/"))
