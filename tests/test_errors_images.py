"""Bad arguments of ``models`` and ``corruptions``: one sentence each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import corruptions
import models
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused

NAN, INF = float("nan"), float("inf")


def test_models_by_name() -> None:
    load: Any = models.load
    refused(TypeError, r"`name` must be a string, got 3", lambda: load(3))
    refused(TypeError, r"`pattern` must be a string", lambda: models.list_models(3))  # type: ignore[arg-type]
    refused(TypeError, r"`pretrained` .* got 'no'", lambda: load("cifar10_resnet20_bn", "no"))
    with pytest.raises(ValueError, match=r"did you mean 'resnet18'\? Known: resnet18, .* more\."):
        load("timm:resnet_18")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoints_that_are_none(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    name = "timm:test_resnet"

    def bad(words: str) -> None:
        text = refused(ValueError, words, lambda: models.load(name, checkpoint=path))
        assert "`checkpoint`" in text and len(text) < 600

    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.ones(1000)}, whole)
    for content in (b"", b"junk" * 100, whole.read_bytes()[:2000]):
        path.write_bytes(content)
        bad(r"is not \(")
    if suffix == ".pt":
        for value, words in (
            (torch.ones(3), "holds a Tensor"),
            ([1], "holds a list"),
            ({"epoch": 3}, "holds no tensors"),
            (tiny("bn"), "is not"),
        ):
            torch.save(value, path)
            bad(words)
    tensors = {"head.fc.weight": torch.tensor(1.0), "x": torch.ones(2)}
    _ = torch.save(tensors, path) if suffix == ".pt" else save_file(tensors, path)
    bad("does not fit")
    refused(TypeError, r"`checkpoint` must be a path", lambda: models.load(name, checkpoint=3))  # type: ignore[arg-type]
    refused(FileNotFoundError, r"`checkpoint`", lambda: models.load(name, checkpoint=tmp_path))


X = images(0, 4)
SEEDS = [
    (TypeError, r"got 'abcd'", "abcd"),
    (TypeError, r"got \[0, None", [0, None, 1, 2]),
    (TypeError, r"got \[\[0\], \[0, 1\]\]", [[0], [0, 1]]),
    (TypeError, r"got \[1180591620717411303424", [2**70] * 4),
    (TypeError, r"torch.float32", [0.0] * 4),
    (TypeError, r"torch.bool", torch.zeros(4, dtype=torch.bool)),
    (ValueError, r"shape \(4,\), .* got \(3,\)", [0, 1, 2]),
    (ValueError, r"got \(4, 1\)", torch.zeros(4, 1, dtype=torch.int64)),
    (ValueError, r"got \(\)", 3),
]


@pytest.mark.parametrize(("error", "words", "seeds"), SEEDS)
def test_seeds_of_corruptions(error, words, seeds) -> None:
    for call in (
        lambda: corruptions.corrupt(X, "fog", 3, seeds=seeds),
        lambda: corruptions.sample("fog", X.shape, 3, seeds),
    ):
        assert "`seeds`" in refused(error, words, call)


def test_params_that_are_none() -> None:
    apply: Any = corruptions.apply
    refused(TypeError, r"`params` must be a dict of tensors, got int", lambda: apply(X, "fog", 3))
    refused(TypeError, r"`params` .* float for 'a'", lambda: apply(X, "fog", {"a": 1.0}))
    refused(ValueError, r"`params` must come from sample", lambda: apply(X, "fog", {}))
    drawn = corruptions.sample("fog", X.shape, 3, range(4))
    for change in ({"amount": torch.ones(4)}, {"noise": torch.ones(4, 9, 9)}):
        words = r"`params` must come from sample\('fog', ...\) .* do not fit"
        refused(ValueError, words, lambda c=change: apply(X, "fog", drawn | c))


def test_shapes_and_folders_that_are_none() -> None:
    sample: Any = corruptions.sample
    for shape in (3, "abcd", (4, 3, 32, 32.5), None):
        words = r"`shape` must be the whole numbers"
        refused(TypeError, words, lambda s=shape: sample("fog", s, 3, [0]))
    call: Any = corruptions.corrupt
    words = r"`frost_pictures` must be a path, got int"
    refused(TypeError, words, lambda: call(X, "frost", 3, frost_pictures=3))


@pytest.mark.parametrize("name", corruptions.list_corruptions(extra=True))
def test_params_of_other_images(name: str) -> None:
    for shape in ((4, 3, 32, 40), (4, 3, 70, 32), (4, 3, 16, 16)):
        params = corruptions.sample(name, shape, 3, range(4))
        # Filters and constants fit any size; every other draw is one for each pixel.
        per_pixel = any(v.ndim > 1 and v.numel() > 4 * 100 for v in params.values())
        if not per_pixel:
            corruptions.apply(X, name, params)
            continue
        words = r"`params` must be drawn for the images.* pixels, got 32 x 32"
        refused(ValueError, words, lambda p=params: corruptions.apply(X, name, p))
    params = corruptions.sample(name, (3, 3, 32, 32), 3, range(3))
    if any(v.ndim and len(v) == 3 for v in params.values()):
        with pytest.raises(ValueError, match="drawn for 3 images, got 4"):
            corruptions.apply(X, name, params)
