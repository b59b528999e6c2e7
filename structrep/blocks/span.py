"""SPAN: Swift Parameter-free Attention Network for Efficient Super-Resolution, arXiv:2311.12770, Conv3XC."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structrep.blocks._geometry import ComputedConv, Device, Size, require_at_least


class Conv3XC2d(ComputedConv):
    """One conv whose kernel is that of a 1x1, a k×k and a 1x1 in a row, plus that of a 1x1 beside them.

    SPAN, arXiv:2311.12770, Conv3XC.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv2d` of these arguments; also without N.

    The kernels are composed on every pass, in weight space, so that a pass over the pixels costs what the one conv
    does.

    Args:
        gain: channels inside the row, relative to those outside.

    Parameters: `expand (gain*I, I, 1, 1)`, `dense (gain*O, gain*I, *K)`, `reduce (O, gain*O, 1, 1)`, and
    `skip (O, I, 1, 1)`, which is on the centre tap; bias (O,), or None.

    Raises:
        ValueError: arguments that `nn.Conv2d` could not work with; groups; a gain below 1.

    Example:
        >>> net = nn.Sequential(Conv3XC2d(8, 16, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    dims = 2

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, gain: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        if groups > 1:
            raise ValueError(f"groups={groups}: this block mixes all channels, give groups=1")
        require_at_least(1, gain=gain)

        def free(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        wide_in, wide_out = gain * in_channels, gain * out_channels
        self.expand, self.reduce = free(wide_in, in_channels, 1, 1), free(out_channels, wide_out, 1, 1)
        self.dense, self.skip = free(wide_out, wide_in, *self.kernel_size), free(out_channels, in_channels, 1, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for weight in (self.expand, self.dense, self.reduce, self.skip):
            nn.init.kaiming_uniform_(weight, 5**0.5)

    def start_kernel(self, weight: Tensor) -> None:
        inside, outside = self.in_channels, self.out_channels
        nn.init.dirac_(self.expand[:inside])
        self.dense[:outside, inside:] = 0
        self.dense[:outside, :inside].copy_(weight)
        nn.init.dirac_(self.reduce)
        nn.init.zeros_(self.skip)

    def kernel(self) -> Tensor:
        """The row's kernel and the 1x1 on its centre tap, (O, I, *K)."""
        row = _composed(_composed(self.expand, self.dense), self.reduce)
        height, width = self.kernel_size
        centre = (width // 2, width - 1 - width // 2, height // 2, height - 1 - height // 2)
        return row + F.pad(self.skip, centre)


def _composed(first: Tensor, second: Tensor) -> Tensor:
    """The kernel of two convolutions in a row: (M, I, *K1), (O, M, *K2) -> (O, I, *K1 + K2 - 1)."""
    reach = [k - 1 for k in second.shape[2:]]
    return F.conv2d(first.flip(2, 3).transpose(0, 1), second, padding=reach).flip(2, 3).transpose(0, 1)
