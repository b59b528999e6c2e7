"""ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting, arXiv:2007.03260."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import CONV, ConvBlock, Device, Size
from structrep.blocks.normed import take_over


class _CompactorBlock(ConvBlock):
    """compact(norm(conv_k(x))), where `compact` is a 1x1 over the channels of the output that starts as the identity.

    ResRep, arXiv:2007.03260.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv{n}d` of these arguments; the norm needs N. The conv has no bias:
    `bias` is accepted so that the block drops in, and the norm supplies one either way.

    The paper drives rows of the compactor to zero as it trains, by a penalty and a mask on their gradients that belong
    to the training loop: what such rows give is zero, and those channels can be taken out.

    Parameter: `compact.weight (O, O, 1, ...)`.

    Raises:
        ValueError: arguments that `nn.Conv{n}d` could not work with; groups, for a compactor mixes all channels; a
            complex dtype.

    Example:
        >>> net = nn.Sequential(CompactorBlock2d(8, 16, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    own_norms = True

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        if groups > 1:
            raise ValueError(f"groups={groups}: a compactor mixes all channels, give groups=1")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dense = self.branch(self.kernel_size, **factory)
        compact: Any = CONV[self.dims](out_channels, out_channels, 1, bias=False, **factory)
        if not compact.weight.is_meta:
            nn.init.dirac_(compact.weight)
        self.compact = compact

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        """See `ConvBlock.start_as`: the compactor starts as the identity.

        Raises:
            ValueError: no norm is given.
        """
        if norm is None:
            raise ValueError("a compactor stands behind a norm, and no norm stands behind the conv")
        dense: Any = self.dense
        compact: Any = self.compact
        with torch.no_grad():
            dense.conv.weight.copy_(weight)
            take_over(dense.norm, norm, bias)
            nn.init.dirac_(compact.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.compact(self.dense(x))
        return y


class CompactorBlock1d(_CompactorBlock):
    __doc__ = _CompactorBlock.__doc__
    dims = 1


class CompactorBlock2d(_CompactorBlock):
    __doc__ = _CompactorBlock.__doc__
    dims = 2


class CompactorBlock3d(_CompactorBlock):
    __doc__ = _CompactorBlock.__doc__
    dims = 3
