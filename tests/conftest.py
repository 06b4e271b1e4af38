"""Settings for all tests."""

from __future__ import annotations

import torch

# The networks are tiny: more threads only wait for each other, on shared machines for seconds.
torch.set_num_threads(1)
