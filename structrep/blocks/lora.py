"""LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, section 4.1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import Device, require_at_least


class LoRALinear(nn.Module):
    """base(x) + (alpha / rank) * up(down(x)): a Linear, and a product of two thin ones that starts at zero.

    LoRA, arXiv:2106.09685, section 4.1.

    (..., in_features) -> (..., out_features).

    Args:
        rank: features between `down` and `up`.
        alpha: the product counts alpha / rank times.

    Raises:
        ValueError: feature counts or a rank below 1.

    Example:
        >>> net = nn.Sequential(LoRALinear(8, 16, rank=2), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Linear(in_features=8, out_features=16, bias=True)
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        device: Device = None, dtype: torch.dtype | None = None, *, rank: int = 4, alpha: float = 4.0,
    ) -> None:  # fmt: skip
        super().__init__()
        require_at_least(1, in_features=in_features, out_features=out_features, rank=rank)
        self.in_features, self.out_features, self.scaling = in_features, out_features, alpha / rank
        self.base = nn.Linear(in_features, out_features, bias, device, dtype)
        self.down = nn.Linear(in_features, rank, False, device, dtype)
        self.up = nn.Linear(rank, out_features, False, device, dtype)
        nn.init.zeros_(self.up.weight)

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        """Take a Linear's weight (O, I) and bias; the product starts at zero."""
        with torch.no_grad():
            self.base.weight.copy_(weight)
            nn.init.zeros_(self.up.weight)
            if bias is not None:
                self.base.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x)) * self.scaling
        return y
