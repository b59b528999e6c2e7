"""FMEN: Fast and Memory-Efficient Network Towards Efficient Image Super-Resolution, arXiv:2204.08397, the block named
RRRB."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structrep.blocks._geometry import ConvBlock, Device, Size, require_at_least


class ResidualRepBlock2d(ConvBlock):
    """x + reduce(h + conv_3(h)), where h = expand(x): residual in residual, a 1x1 that expands, a 3x3 beside a skip,
    and a 1x1 that reduces; the 3x3 is padded with what the first 1x1 makes of 0.

    FMEN, arXiv:2204.08397.

    (N, I, H, W) -> (N, I, H, W); also without N. Its convs have biases, whatever `bias` says.

    Args:
        ratio: channels inside, relative to those outside.

    Raises:
        ValueError: anything but a 3x3 that keeps the shape, with dilation 1, one group and zeros; a ratio below 1.

    Example:
        >>> net = nn.Sequential(ResidualRepBlock2d(8, 8, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    dims = 2

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, ratio: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        require_at_least(1, ratio=ratio)
        found = (self.kernel_size, self.stride, self.pads, self.dilation, groups, padding_mode)
        if found != ((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1, "zeros") or in_channels != out_channels:
            raise ValueError(
                f"a residual rep block is a 3x3 with padding 1 and nothing else, which keeps the channels, and this "
                f"one, {in_channels} -> {out_channels}, is {found}"
            )
        inner = ratio * in_channels
        self.expand = nn.Conv2d(in_channels, inner, 1, device=device, dtype=dtype)
        self.dense = nn.Conv2d(inner, inner, 3, device=device, dtype=dtype)
        self.reduce = nn.Conv2d(inner, in_channels, 1, device=device, dtype=dtype)

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        """See `ConvBlock.start_as`: the first channels inside are those of the input, and the 3x3 does without what
        both skips add."""
        inside = self.in_channels
        skip = nn.init.dirac_(torch.empty_like(weight))
        with torch.no_grad():
            nn.init.dirac_(self.expand.weight)
            nn.init.dirac_(self.reduce.weight)
            self.dense.weight[:inside, inside:] = 0
            self.dense.weight[:inside, :inside] = weight - 2 * skip
            for conv in (self.expand, self.dense, self.reduce):
                assert conv.bias is not None
                nn.init.zeros_(conv.bias)
            if bias is not None and self.reduce.bias is not None:
                self.reduce.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        linear = F.conv2d(x, self.expand.weight)
        bias = self.expand.bias.reshape(-1, 1, 1)  # type: ignore[union-attr]
        y: Tensor = x + self.reduce(linear + bias + self.dense(F.pad(linear, (1, 1, 1, 1)) + bias))
        return y
