"""One stream on several processes: every pass through the model is split over the ranks.

Each rank holds the whole adapter and is given the whole batch. It runs its share of the rows
through the model; the logits (and features) of all rows are then gathered, so that everything
behind the model (losses, filters, memories, output rules) sees the batch as one process would, and
comes to the same decisions on every rank. Two things cross the ranks inside a pass:

* statistics of a batch: norm rules gather those of every image, with gradients, and go on as ever;
* gradients of parameters: each rank has those of its own rows, and they are summed on the way back.

So no method knows of it, and N ranks give what one gives, up to the order of sums.

Example, to be started by ``torchrun --nproc-per-node 2``::

    torch.distributed.init_process_group()
    adapter = tta.wrap(model, "eata")
    tta.runtime.split_batches(adapter)
    logits = adapter(images)  # the same images on every rank, the same logits
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tta.core.adapter import Adapter
from tta.core.batch_split import Ranks
from tta.core.norm_layers import rows_independent
from tta.core.registry import component
from tta.core.state_dict import checksum

__all__ = ["split_batches"]


def split_batches(adapter: Adapter, group: Any = None) -> Adapter:
    """Split every later batch of an adapter over the processes of a group.

    Call it on every rank, after ``wrap`` or ``load`` with the same arguments. Batches smaller than
    the number of ranks are run whole on each. Saved states do not know of ranks.

    Args:
        adapter: The same model, method and seed on every rank.
        group: A process group of ``torch.distributed``; None for the default one.

    Returns:
        The adapter, which then takes the whole batch on every rank and returns all of its logits.

    Raises:
        RuntimeError: When ``torch.distributed`` is not set up.
        ValueError: When a component works in one process alone, ranks hold different adapters,
            this process is not of the group, or the model mixes the rows of a batch where no rule
            can see it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "`split_batches` must find torch.distributed set up: call "
            "torch.distributed.init_process_group() first, under torchrun."
        )
    session = adapter.session
    for name in (part.name for part in adapter.config.components.values()):
        if not component(name).splits:
            raise ValueError(
                f"`adapter` must be of components that work in several processes, got {name}: run "
                "it in one process."
            )
    if adapter.config.norm is None and not rows_independent(adapter.model):
        raise ValueError(
            "`adapter` must have a norm rule where BatchNorm layers have no running statistics, "
            "got none: wrap the model with norm='bn'."
        )
    ranks = Ranks(dist.group.WORLD if group is None else group)
    # All that decides what comes out: what moves, what was fixed at wrap, and the model's buffers.
    held = {**adapter.state(), **adapter.constants(), **dict(adapter.model.named_buffers())}
    sums = checksum(held[key] for key in sorted(held))
    ranks.check_same(
        (adapter.fingerprint, adapter.config.to_dict(), sums),
        "`adapter` must be the same on every rank, got different models, configs, states or source "
        "artefacts: wrap the same model with the same arguments, source batches and seed on each.",
    )
    session.ranks = ranks
    return adapter
