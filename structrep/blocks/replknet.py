"""RepLKNet: Scaling Up Your Kernels to 31x31, arXiv:2203.06717, section 3 (guideline 3); and UniRepLKNet: A Universal
Perception Large-Kernel ConvNet, arXiv:2311.15599, section 3.2, the dilated re-param block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import CONV, Device, Size, require_at_least
from structrep.blocks.normed import NormedBlock

# UniRepLKNet, table 1 of its code: (kernel, dilation) of the branches beside a depthwise K×K
DILATED = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


class LargeKernelBlock2d(NormedBlock):
    """norm(conv_K(x)) + norm(conv_k(x)) + ..., depthwise, smaller and dilated kernels centred on the large one.

    RepLKNet, arXiv:2203.06717, section 3; its dilated form, UniRepLKNet, arXiv:2311.15599, section 3.2.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv2d` of these arguments; the norms need N.
    The convs have no bias: `bias` is accepted so that the block drops in, and the norms supply one either way.

    Args:
        branches: (kernel, dilation) of each smaller branch: ((5, 1),) is RepLKNet's, the default; "dilated" those that
            UniRepLKNet has for this K.

    Raises:
        ValueError: arguments that `nn.Conv2d` could not work with; a kernel that is not one odd number, dilated or even
            kernels; a branch that reaches beyond the large kernel; "dilated" for a K that has none in UniRepLKNet;
            a complex dtype.

    Example:
        >>> net = nn.Sequential(LargeKernelBlock2d(8, 8, 13, padding=6, groups=8), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 8, kernel_size=(13, 13), stride=(1, 1), padding=(6, 6), groups=8)
    """

    dims = 2

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, branches: Sequence[tuple[int, int]] | str = ((5, 1),),
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        size = self.kernel_size[0]
        if set(self.kernel_size) != {size} or size % 2 == 0 or self.dilation != (1, 1):
            raise ValueError(
                f"kernel_size={self.kernel_size}, dilation={self.dilation}: give one odd kernel, undilated"
            )
        if branches == "dilated":
            if size not in DILATED:
                raise ValueError(f"kernel_size={size} has no dilated branches: choose one of {sorted(DILATED)}")
            branches = DILATED[size]
        try:
            given: Any = branches
            pairs = [(kernel, step) for kernel, step in given]
        except (TypeError, ValueError):
            raise ValueError(f"branches={branches!r}: give 'dilated', or pairs of a kernel and its dilation") from None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.large = self.branch(self.kernel_size, **factory)
        self.small = nn.ModuleList()
        for kernel, step in pairs:
            require_at_least(1, kernel=kernel, dilation=step)
            reach = step * (kernel - 1)
            if kernel % 2 == 0 or reach > size - 1:
                raise ValueError(f"a branch of kernel {kernel} and dilation {step} is not inside one of {size}")
            pads = tuple((lo - (size - 1 - reach) // 2, hi - (size - 1 - reach) // 2) for lo, hi in self.pads)
            pad, padding_ = self.padded(pads)
            conv = CONV[2](
                in_channels, out_channels, kernel, self.stride, padding_, step, groups, bias=False,
                padding_mode=padding_mode, **factory,
            )  # fmt: skip
            self.small.append(nn.Sequential(OrderedDict(**pad, conv=conv, norm=self.norm(**factory))))

    @property
    def main(self) -> nn.Sequential:
        return self.large

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.large(x)
        for branch in self.small:
            y = y + branch(x)
        return y
