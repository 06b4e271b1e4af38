"""The last images of a stream, beside which the new ones of a call are predicted.

Statistics of one image say little. With ``wrap(..., window=n)`` a call runs the model on the last
n images, of which its own are the last ones, and answers for these alone. Each image goes through
the model in as many calls as it stays, so a stream of single images costs n forward passes of one
image a call, and updates their backward passes beside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tta.core.component import Component
from tta.core.config import ComponentConfig
from tta.core.journal import Journal

__all__ = ["WINDOW", "Window"]

WINDOW = "window"  # before its buffers in a state


class Window(Component):
    """A ring of the last images that were good.

    Args:
        size: Images of a call, n, at least 2.
        journal: Keeps rows that a call overwrites.
    """

    name = WINDOW
    takes_softmax = False

    # (n, 0) before the first batch, then (n, ...): images as the model takes them
    images: Tensor
    count: Tensor  # 0-dimensional: images in the ring, 0 to n
    place: Tensor  # 0-dimensional: where the next image goes, 0 to n - 1

    def __init__(self, size: int, journal: Journal) -> None:
        super().__init__(ComponentConfig())
        self.size = size
        self.journal = journal
        self.register_buffer("images", torch.zeros(size, 0, dtype=torch.uint8))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def beside(self, x: Tensor) -> Tensor:
        """Images that are seen beside new ones, oldest first: (max(0, n - B), ...) at most.

        Args:
            x: New images (B, ...).

        Raises:
            ValueError: When those that are held have another size.
        """
        room = min(int(self.count), self.size - len(x))
        if room <= 0:
            return x[:0]
        if self.images.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"`images` must be of the size of those in the window, "
                f"{tuple(self.images.shape[1:])}, got {tuple(x.shape[1:])}: resize them, or call "
                "reset() first."
            )
        last = torch.arange(int(self.place) - room, int(self.place)) % self.size
        return self.images[last.to(self.images.device)].to(x)

    @torch.no_grad()
    def push(self, x: Tensor) -> None:
        """Take in new images (B, ...), in place of the oldest."""
        x = x.detach()[-self.size :]
        kept = x if x.dtype == torch.uint8 else x.float()
        if self.images.numel() == 0 or self.images.shape[1:] != x.shape[1:]:
            self.images = kept.new_zeros(self.size, *x.shape[1:])
            self.count.zero_()
            self.place.zero_()
        elif self.images.dtype != kept.dtype:  # pixels of 8 bits, then others
            self.images, kept = self.images.float(), kept.float()
        rows = (int(self.place) + torch.arange(len(x))) % self.size
        self.journal.keep(self.images, rows.to(self.images.device))
        self.images[rows.to(self.images.device)] = kept
        self.place.copy_((self.place + len(x)) % self.size)
        self.count.copy_((self.count + len(x)).clamp_max(self.size))

    def kept_by_rows(self) -> tuple[str, ...]:
        """Return ``images``: they are large, and a call replaces some."""
        return ("images",)

    def lazy_buffers(self) -> tuple[str, ...]:
        """Return ``images``: the first batch shows how large they are."""
        return ("images",)

    def image_buffers(self) -> tuple[str, ...]:
        """Return ``images``: those of 8 bits are kept in 8 bits."""
        return ("images",)

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """How many images there may be, and where the next may go."""
        return {"count": (0, self.size), "place": (0, self.size - 1)}
