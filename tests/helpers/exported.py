"""An exported graph and the adapter that it came from, run side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tta

__all__ = ["Graph", "differences", "make", "stream"]


class Graph:
    """An exported folder as onnxruntime runs it; call it like an adapter."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        meta = self.session.get_modelmeta().custom_metadata_map
        self.keys = {int(n): key for n, key in meta.items() if n.isdigit()}
        self.state: dict[str, Any] = dict(np.load(folder / "state.npz"))
        self.first = True

    def __call__(self, images: Tensor, reset: bool | None = None) -> Any:
        reset = self.first if reset is None else reset
        feeds = {"images": images.numpy(), "reset": np.array([reset]), **self.state}
        logits, *state = self.session.run(None, feeds)
        self.state = {f"state_in_{n}": value for n, value in enumerate(state)}
        self.first = False
        return logits

    def by_key(self) -> dict[str, np.ndarray]:
        """The state by the keys of ``state()``."""
        return {key: self.state[f"state_in_{n}"] for n, key in self.keys.items()}


def stream(batches: int, sizes: Iterable[int], shape: tuple[int, ...], seed: int = 0) -> Any:
    """Batches whose brightness drifts, as a camera's does."""
    draws = torch.Generator().manual_seed(seed)
    sizes = list(sizes)
    for t in range(batches):
        images = torch.randn(sizes[t % len(sizes)], *shape, generator=draws)
        yield images * (1 + 0.3 * np.sin(t / 9)) + 0.3 * np.cos(t / 7)


def differences(graph: Graph, adapter: tta.Adapter, batches: Iterable[Tensor]) -> dict[str, float]:
    """Largest differences of logits and state over a stream, and how many decisions differ.

    Logits are compared as a share of the largest of the batch where that is above 1.
    """
    logits = state = 0.0
    decisions = 0
    for images in batches:
        own, theirs = adapter(images).numpy(), graph(images)
        logits = max(logits, float(np.abs(own - theirs).max() / max(1.0, np.abs(own).max())))
        decisions += int((own.argmax(1) != theirs.argmax(1)).sum())
    now = adapter.state()
    for key, value in graph.by_key().items():
        ours = now[key].numpy().reshape(value.shape).astype(np.float64)
        assert np.array_equal(np.isnan(ours), np.isnan(value)), key
        gap = np.abs(np.nan_to_num(ours) - np.nan_to_num(value.astype(np.float64)))
        state = max(state, float((gap / np.maximum(1, np.abs(np.nan_to_num(ours)))).max()))
    return {"logits": logits, "state": state, "decisions": decisions}


def make(recipe: dict[str, Any], net: Any, width: int = 8, classes: int = 10) -> tta.Adapter:
    """An adapter by slots, with artefacts for those that need them; updates have learned a bit."""
    draws = torch.Generator().manual_seed(1)
    source = tta.SourceStatistics(
        features=torch.randn(60, width, generator=draws), feature_labels=torch.arange(60) % classes
    )
    given = {"source": source} | {k: v for k, v in recipe.items() if k != "recipe"}
    return tta.wrap(net, recipe.get("recipe"), **given)
