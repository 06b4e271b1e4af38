"""Which features lie so far outside that an average of features must not follow them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FarFeatures"]

FAR = 30.0  # times the usual squared distance, as of images in norm layers
SPAN = 256  # images that the usual distance is an average of


class FarFeatures(nn.Module):
    """Puts features of bad images where they move nothing.

    A frame of a broken camera, as one of values up to 255 in place of 1, would move an average of
    features for good. An image is bad when the squared distance of its features from the centre is
    above ``FAR`` times the average of ordinary images; among the first ones, times their geometric
    mean. Where ``SPAN`` of them come in a row, as after a camera that hung, it begins anew.
    """

    distance: Tensor  # 0-dimensional, squared, of ordinary images from the centre; never shrinks
    images: Tensor  # 0-dimensional, that it is an average of, at most SPAN; 0 before the first
    in_a_row: Tensor  # 0-dimensional, images since the last ordinary one

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("distance", torch.zeros(()))
        self.register_buffer("images", torch.zeros(()))
        self.register_buffer("in_a_row", torch.zeros(()))

    @torch.no_grad()
    def left_out(self, features: Tensor, centre: Tensor, learns: Tensor | None = None) -> Tensor:
        """Features (B, D), with the centre (D,) in place of those of bad images.

        Args:
            features: In float32.
            centre: What they are far from, or are not.
            learns: 0-dimensional bool, in graphs: whether the average of distances moves.
        """
        away = (features - centre).square().sum(1)
        first = away.clamp_min(torch.finfo(away.dtype).tiny).log().mean().exp()
        usual = torch.where(self.images > 0, self.distance, first)
        ordinary = away <= FAR * usual  # not where it is NaN
        count = ordinary.sum() if learns is None else torch.where(learns, ordinary.sum(), 0)
        mean = torch.where(ordinary, away, 0.0).sum() / ordinary.sum().clamp_min(1)
        total = (self.images + count).clamp_max(SPAN)
        moved = (count / total.clamp_min(1)).clamp_max(1.0) * (mean - self.distance)
        # It never shrinks: the same image again and again has no distance at all.
        self.distance += torch.where(count > 0, moved.clamp_min(0.0), 0.0)
        more = torch.ones_like(away).sum()
        more = more if learns is None else torch.where(learns, more, 0.0)
        row = torch.where(count > 0, 0.0, self.in_a_row + more)
        self.images.copy_(torch.where(row < SPAN, total, 0.0))
        self.in_a_row.copy_(torch.where(row < SPAN, row, 0.0))
        self.distance.copy_(torch.where(row < SPAN, self.distance, 0.0))
        return torch.where(ordinary[:, None], features, centre)
