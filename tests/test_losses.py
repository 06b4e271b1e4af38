"""Losses against the same formulae written as loops over Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tta.parts import losses


def _softmax(row: list[float]) -> list[float]:
    top = max(row)
    parts = [math.exp(v - top) for v in row]
    return [p / sum(parts) for p in parts]


def _cross_entropy(target: list[float], logits: list[float]) -> float:
    return -sum(q * math.log(p) for q, p in zip(_softmax(target), _softmax(logits), strict=True))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator) * 3, torch.randn(6, 5, generator=generator)


def test_entropy(pair) -> None:
    expected = [-sum(p * math.log(p) for p in _softmax(z)) for z in pair[0].tolist()]
    assert losses.entropy(pair[0]).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_symmetric_cross_entropy(pair, alpha: float) -> None:
    z, q = pair
    expected = [
        (1 - alpha) * _cross_entropy(b, a) + alpha * _cross_entropy(a, b)
        for a, b in zip(z.tolist(), q.tolist(), strict=True)
    ]
    assert losses.symmetric_cross_entropy(z, q, alpha).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_consistency_treats_the_teacher_as_a_constant(pair, symmetric: bool) -> None:
    z, q = (t.clone().requires_grad_() for t in pair)
    loss = losses.consistency(z, q, symmetric)
    expected = losses.symmetric_cross_entropy(z, q, 0.5 if symmetric else 0.0)
    assert torch.equal(loss, expected)
    loss.sum().backward()
    assert z.grad is not None and z.grad.abs().sum() > 0 and q.grad is None


def test_soft_likelihood_ratio(pair) -> None:
    def one(row: list[float]) -> float:
        probs = [min(p, 0.99) for p in _softmax(row)]
        return -sum(p * math.log(p / (1 - p) + 1e-5) for p in probs)

    expected = [one(row) for row in pair[0].tolist()]
    found = losses.soft_likelihood_ratio(pair[0]).tolist()
    assert found == pytest.approx(expected, abs=1e-4)


def test_contrastive() -> None:
    vectors = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))
    vectors[1, 0] = vectors[0, 0]  # a prototype that two samples share stays a negative
    temperature = 0.2
    rows = [(b, [float(x) for x in vectors[b, v]]) for b in range(4) for v in range(3)]

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    total = 0.0
    for i, (sample, anchor) in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        scores = {j: cosine(anchor, rows[j][1]) / temperature for j in others}
        norm = math.log(sum(math.exp(s) for s in scores.values()))
        positives = [j for j in others if rows[j][0] == sample]
        assert len(positives) == 2
        total -= sum(scores[j] - norm for j in positives) / 2
    expected = total / len(rows)
    assert float(losses.contrastive(vectors, temperature)) == pytest.approx(expected, abs=1e-5)
