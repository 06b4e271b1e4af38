"""The numbers adapters draw: published words, right distributions, no two alike."""

from __future__ import annotations

import pytest
import torch

from tta.core.random import CountedDraws, fork


def test_words_are_those_of_splitmix() -> None:
    """The first outputs for seed 1234567, as the authors' reference program prints them."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [w % 2**64 for w in CountedDraws(1234567).words(5).tolist()] == expected


def test_a_stream_goes_on_however_it_is_asked() -> None:
    one, two = CountedDraws(5), CountedDraws(5)
    parts = torch.cat([one.words(3), one.words(1), one.words(7)])
    assert torch.equal(parts, two.words(11))
    assert CountedDraws(2).uniforms(2, 3).flatten().tolist() == CountedDraws(2).numbers(6)


def test_distributions() -> None:
    uniform = CountedDraws(1).uniforms(200_000)
    assert uniform.dtype == torch.float64 and uniform.min() >= 0 and uniform.max() < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.003)
    assert torch.histc(uniform.float(), 10).std() < 500
    normal = CountedDraws(2).normals(4, 50_001)
    assert normal.shape == (4, 50_001) and normal.dtype == torch.float32
    assert float(normal.mean()) == pytest.approx(0, abs=0.01)
    assert float(normal.std()) == pytest.approx(1, abs=0.01)
    assert float((normal > 1.96).float().mean()) == pytest.approx(0.025, abs=0.002)


def test_forks_differ_and_repeat() -> None:
    generator = torch.Generator().manual_seed(3)
    device = torch.device("cpu")
    first, second = fork(generator, device), fork(generator, device)
    assert not torch.equal(first.words(4), second.words(4))
    words = CountedDraws(int(torch.randint(2**62, (), generator=generator.manual_seed(3)))).words(4)
    assert torch.equal(words, fork(generator.manual_seed(3), device).words(4))
