"""What every test may count on."""

from __future__ import annotations

import torch

# The first exponential in float64 that torch 2.13 spreads over threads is wrong by about 1e-9 in
# one fresh process of forty, in one thread's share. Truths must not be that first one.
torch.ones(1 << 18, dtype=torch.float64).exp()
