"""Sharpness-aware minimisation (SAM): take gradients a small step up the gradient.

Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving
Generalization, ICLR 2021, arXiv 2010.01412.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["perturbed"]


@contextmanager
def perturbed(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], rho: float
) -> Iterator[Tensor]:
    """Move parameters by rho g / (|g| + 1e-12) in a ``with`` block, and put them back exactly.

    Args:
        parameters: The tensors to move, in place.
        gradients: One gradient g for each parameter.
        rho: Length of the move.

    Yields:
        |g|, one norm over all gradients.

    Example:
        >>> p = torch.tensor([1.0, 1.0])
        >>> with perturbed([p], [torch.tensor([3.0, 4.0])], rho=0.5) as norm:
        ...     print(float(norm), p)
        5.0 tensor([1.3000, 1.4000])
        >>> p
        tensor([1., 1.])
    """
    foreach: Any = torch  # not in its type stubs
    parameters = [p.detach() for p in parameters]
    norm = torch.nn.utils.get_total_norm(gradients)
    saved = [p.clone() for p in parameters]
    foreach._foreach_add_(parameters, foreach._foreach_mul(gradients, rho / (norm + 1e-12)))
    try:
        yield norm
    finally:
        foreach._foreach_copy_(parameters, saved)
