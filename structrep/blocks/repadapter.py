"""RepAdapter: Towards Efficient Visual Adaption via Structural Re-parameterization, arXiv:2302.08106."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structrep.blocks._geometry import Device, require_at_least


class RepAdapterLinear(nn.Module):
    """base(x + scale * up(down(x))): a Linear, and before it an adapter of two thin ones beside a skip.

    RepAdapter, arXiv:2302.08106. `down` is dense, `up` works on groups of features, and starts at zero.

    (..., in_features) -> (..., out_features).

    Args:
        rank: features between `down` and `up`.
        groups: of `up`: each makes its share of the features of its share of the rank.
        scale: of what the adapter adds.

    Parameters: `base`, `down`, `up (groups, in_features/groups, rank/groups)`, `up_bias (in_features,)`.

    Raises:
        ValueError: feature counts, a rank or groups below 1; groups that do not divide both rank and features.

    Example:
        >>> net = nn.Sequential(RepAdapterLinear(8, 16, rank=2), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Linear(in_features=8, out_features=16, bias=True)
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        device: Device = None, dtype: torch.dtype | None = None, *, rank: int = 8, groups: int = 2, scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        require_at_least(1, in_features=in_features, out_features=out_features, rank=rank, groups=groups)
        if in_features % groups or rank % groups:
            raise ValueError(f"groups={groups} does not divide in_features={in_features} and rank={rank}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.scale = in_features, out_features, scale
        self.base = nn.Linear(in_features, out_features, bias, **factory)
        self.down = nn.Linear(in_features, rank, **factory)
        self.up = nn.Parameter(torch.empty(groups, in_features // groups, rank // groups, **factory))
        self.up_bias = nn.Parameter(torch.empty(in_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the adapter add nothing."""
        nn.init.zeros_(self.up)
        nn.init.zeros_(self.up_bias)

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        """Take a Linear's weight (O, I) and bias; the adapter adds nothing at first."""
        with torch.no_grad():
            self.base.weight.copy_(weight)
            self.reset_parameters()
            if bias is not None:
                self.base.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        added = F.linear(self.down(x), torch.block_diag(*self.up), self.up_bias)
        y: Tensor = self.base(x + self.scale * added)
        return y
