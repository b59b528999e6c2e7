"""ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks.

arXiv:1908.03930, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import Device, Size
from structrep.blocks.normed import NormedBlock


class ACBlock2d(NormedBlock):
    """norm(conv_kxk(x)) + norm(conv_kx1(x)) + norm(conv_1xk(x)), each with a norm of its own.

    ACNet, arXiv:1908.03930, section 3.2.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv2d` of these arguments; the norms need N.

    The kx1 sits on the kernel's centre column, the 1xk on its centre row, whatever the padding: across
    itself, a strip reads a cropped input where the padding is less than `dilation*(k//2)`, and a padded one
    where it is more. The dilation counts in this, though the authors' code leaves it out. There is no 1d or
    3d form: a 1d kernel has no cross, and which planes or lines of a cube to strengthen has no agreed
    answer.

    The convs have no bias: `bias` is accepted so that the block drops in, and the norms supply one either
    way.

    Raises:
        ValueError: arguments that `nn.Conv2d` could not work with; a complex dtype.

    Example:
        >>> net = nn.Sequential(ACBlock2d(8, 16, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    dims = 2

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        height, width = self.kernel_size
        self.square = self.branch((height, width), device=device, dtype=dtype)
        self.tall = self.branch((height, 1), device=device, dtype=dtype)
        self.wide = self.branch((1, width), device=device, dtype=dtype)

    @property
    def main(self) -> nn.Sequential:
        return self.square

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.square(x) + self.tall(x) + self.wide(x)
        return y
