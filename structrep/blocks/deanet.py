"""DEA-Net: Single image dehazing based on detail-enhanced convolution and content-guided attention, arXiv:2301.04805,
the detail-enhanced convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structrep.blocks._geometry import ComputedConv, Device, Size

CLOCKWISE = [3, 0, 1, 6, 4, 2, 7, 8, 5]  # for each tap of a 3x3, row by row, the one before it round the centre


class DEConv2d(ComputedConv):
    """One 3x3 conv whose kernel is the sum of a plain one and of four that take differences of pixels: central,
    angular, horizontal and vertical.

    DEA-Net, arXiv:2301.04805, detail-enhanced convolution.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv2d` of these arguments; also without N.

    The central kernel is without its sum, at the centre; the angular one is without itself, turned by one tap
    clockwise; a column of three and its negative two columns further are the horizontal one, a row of three and its
    negative two rows below the vertical one.

    Parameters: `dense`, `central`, `angular (O, I/groups, 3, 3)`; `horizontal`, `vertical (O, I/groups, 3)`; bias (O,),
    or None.

    Raises:
        ValueError: arguments that `nn.Conv2d` could not work with; another kernel than 3x3.

    Example:
        >>> net = nn.Sequential(DEConv2d(8, 16, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    dims = 2

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        if self.kernel_size != (3, 3):
            raise ValueError(f"kernel_size={self.kernel_size}: differences are taken within a 3x3")

        def free(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.dense, self.central, self.angular = (free(*self.weight_shape) for _ in range(3))
        self.horizontal, self.vertical = (free(*self.weight_shape[:-1]) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for weight in (self.dense, self.central, self.angular, self.horizontal, self.vertical):
            nn.init.kaiming_uniform_(weight, 5**0.5)

    def start_kernel(self, weight: Tensor) -> None:
        self.dense.copy_(weight)
        for difference in (self.central, self.angular, self.horizontal, self.vertical):
            nn.init.zeros_(difference)

    def kernel(self) -> Tensor:
        """The five kernels, added, (O, I/groups, 3, 3)."""
        central = self.central - F.pad(self.central.sum((2, 3), keepdim=True), (1, 1, 1, 1))
        angular = self.angular - self.angular.flatten(2)[:, :, CLOCKWISE].reshape(self.weight_shape)
        column, row = self.horizontal.unsqueeze(3), self.vertical.unsqueeze(2)
        horizontal = F.pad(column, (0, 2)) - F.pad(column, (2, 0))
        vertical = F.pad(row, (0, 0, 0, 2)) - F.pad(row, (0, 0, 2, 0))
        return self.dense + central + angular + horizontal + vertical
