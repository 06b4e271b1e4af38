"""Which features lie so far outside that an average of features must not follow them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tta.core.tracing import rows_before

__all__ = ["FarFeatures"]

STILL = 1e-9  # squared distance from the image before, in usual ones, of one that equals it
FAR = 30.0  # times the usual squared distance, as of images in norm layers
SPAN = 256  # images that the usual distance is an average of


class FarFeatures(nn.Module):
    """Puts features of bad images where they move nothing.

    A frame of a broken camera, as one of values up to 255 in place of 1, would move an average of
    features for good. An image is bad when the squared distance of its features from the centre is
    above ``FAR`` times the average of ordinary images; among the first ones, times their geometric
    mean. Where ``SPAN`` of them come in a row, as after a camera that hung, it begins anew.

    With ``width``, an image that equals the one before, as from a camera that hangs, moves nothing
    either: an average would become that image, and the shift take away what it shows.

    Args:
        width: D, the length of the features; None where equal images count like others.
    """

    distance: Tensor  # 0-dimensional, squared, of ordinary images from the centre; never shrinks
    images: Tensor  # 0-dimensional, that it is an average of, at most SPAN; 0 before the first
    in_a_row: Tensor  # 0-dimensional, far images since the last ordinary one
    last: Tensor | None  # features (D,) of the last image

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.register_buffer("last", None if width is None else torch.zeros(width))
        self.register_buffer("distance", torch.zeros(()))
        self.register_buffer("images", torch.zeros(()))
        self.register_buffer("in_a_row", torch.zeros(()))

    def left_out(self, features: Tensor, centre: Tensor, learns: Tensor | None = None) -> Tensor:
        """Features (B, D), with the centre (D,) in place of those of images that move nothing.

        Args:
            features: In float32.
            centre: What they are far from, or are not.
            learns: See :meth:`ordinary`.
        """
        return torch.where(self.ordinary(features, centre, learns)[:, None], features, centre)

    @torch.no_grad()
    def ordinary(self, features: Tensor, centre: Tensor, learns: Tensor | None = None) -> Tensor:
        """Which images (B,) may move an average, by their features (B, D).

        Args:
            features: In float32.
            centre: What they are far from, or are not.
            learns: 0-dimensional bool, in graphs: whether the average of distances moves.
        """
        away = (features - centre).square().sum(1)
        first = away.clamp_min(torch.finfo(away.dtype).tiny).log().mean().exp()
        usual = torch.where(self.images > 0, self.distance, first)
        far = ~(away <= FAR * usual)  # also where it is NaN
        ordinary = ~far
        if self.last is not None:
            steps = (features - rows_before(self.last, features)).square().sum(1)
            ordinary = ordinary & (steps > STILL * usual)
            last = torch.where(features[-1].isfinite(), features[-1], self.last)
            self.last.copy_(last if learns is None else torch.where(learns, last, self.last))
        count = ordinary.sum() if learns is None else torch.where(learns, ordinary.sum(), 0)
        mean = torch.where(ordinary, away, 0.0).sum() / ordinary.sum().clamp_min(1)
        total = (self.images + count).clamp_max(SPAN)
        moved = (count / total.clamp_min(1)).clamp_max(1.0) * (mean - self.distance)
        # It never shrinks: the same image again and again has no distance at all.
        self.distance += torch.where(count > 0, moved.clamp_min(0.0), 0.0)
        more = far.sum() if learns is None else torch.where(learns, far.sum(), 0)
        row = torch.where(count > 0, 0.0, self.in_a_row + more)
        self.images.copy_(torch.where(row < SPAN, total, 0.0))
        self.in_a_row.copy_(torch.where(row < SPAN, row, 0.0))
        self.distance.copy_(torch.where(row < SPAN, self.distance, 0.0))
        return ordinary
