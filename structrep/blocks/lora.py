"""LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, section 4.1; and of convolutions, as
Distillation-Supervised Convolutional Low-Rank Adaptation for Efficient Image Super-Resolution, arXiv:2504.11271."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import ComputedConv, Device, Size, require_at_least


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


class LoRAConv2d(ComputedConv):
    """One conv whose kernel is weight + (alpha / rank) * up @ down, a product of two thin matrices in the shape of it,
    which starts at zero.

    LoRA, arXiv:2106.09685, section 4.1, for a convolution: ConvLoRA, as arXiv:2504.11271 trains it.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv2d` of these arguments; also without N.

    Args:
        rank: of the product, times the taps of one row.
        alpha: the product counts alpha / rank times.

    Parameters: `weight (O, I/groups, k, k)`, `down (rank*k, I*k)`, `up (O/groups*k, rank*k)`; bias (O,), or None.

    Raises:
        ValueError: arguments that `nn.Conv2d` could not work with; a kernel that is not square; a rank below 1.

    Example:
        >>> net = nn.Sequential(LoRAConv2d(8, 16, 3, padding=1, rank=2), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    dims = 2

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, rank: int = 4, alpha: float = 4.0,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        require_at_least(1, rank=rank)
        taps = self.kernel_size[0]
        if set(self.kernel_size) != {taps}:
            raise ValueError(f"kernel_size={self.kernel_size}: the two matrices make a square kernel")
        self.scaling = alpha / rank
        self.weight = nn.Parameter(torch.empty(self.weight_shape, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(rank * taps, in_channels * taps, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_channels // groups * taps, rank * taps, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for weight in (self.weight, self.down):
            nn.init.kaiming_uniform_(weight, 5**0.5)
        nn.init.zeros_(self.up)

    def start_kernel(self, weight: Tensor) -> None:
        self.weight.copy_(weight)
        nn.init.zeros_(self.up)

    def kernel(self) -> Tensor:
        """The weight and the scaled product, (O, I/groups, k, k)."""
        return self.weight + (self.up @ self.down).reshape(self.weight_shape) * self.scaling
