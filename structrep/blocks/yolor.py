"""YOLOR: You Only Learn One Representation: Unified Network for Multiple Tasks, arXiv:2105.04206."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import CONV, ConvBlock, Device, Size


class ImplicitConv2d(ConvBlock):
    """multiply * conv(x + add): implicit knowledge, one learned number a channel before the conv and one behind it.

    YOLOR, arXiv:2105.04206, prediction refinement by addition and by multiplication; both in the heads of YOLOv7.

    (N, I, H, W) -> (N, O, H, W), as an `nn.Conv2d` of these arguments; also without N.

    Parameters: `add (I, 1, 1)`, which starts near 0, `multiply (O, 1, 1)`, which starts near 1, and those of `conv`.

    Raises:
        ValueError: arguments that `nn.Conv2d` could not work with; padding, for what is added to the input is not in
            its border.

    Example:
        >>> net = nn.Sequential(ImplicitConv2d(8, 16, 1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 16, kernel_size=(1, 1), stride=(1, 1))
    """

    dims = 2

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        if any(map(any, self.pads)):
            raise ValueError(f"padding={padding!r}: what is added to the input is not in its border, give padding=0")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv: Any = CONV[2](
            in_channels, out_channels, self.kernel_size, self.stride, 0, self.dilation, groups, bias, **factory
        )
        self.add = nn.Parameter(torch.empty(in_channels, 1, 1, **factory))
        self.multiply = nn.Parameter(torch.empty(out_channels, 1, 1, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.add, std=0.02)
        nn.init.normal_(self.multiply, mean=1.0, std=0.02)

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        """See `ConvBlock.start_as`: nothing is added, and all is multiplied by 1."""
        with torch.no_grad():
            self.conv.weight.copy_(weight)
            if self.conv.bias is not None and bias is not None:
                self.conv.bias.copy_(bias)
            nn.init.zeros_(self.add)
            nn.init.ones_(self.multiply)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.multiply * self.conv(x + self.add)
        return y
