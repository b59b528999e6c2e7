"""OREPA: Online Convolutional Re-parameterization, arXiv:2204.00826, section 3.2 and figure 4."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import ComputedConv, Device, Size


class OREPA2d(ComputedConv):
    """One conv whose kernel is a sum of branches, each scaled per filter, as the norms of a block would scale it.

    OREPA, arXiv:2204.00826, section 3.2 and figure 4.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv2d` of these arguments; also without N.

    The branches: a kernel, a 1x1, a 1x1 then a kernel, a 1x1 then an average, a 1x1 then fixed frequency filters (the
    paper's prior), a depthwise kernel then a 1x1. They are merged on every pass, in weight space; a norm follows
    outside.

    Parameters: dense (O, I/groups, *K); point, average, prior (O, I/groups); inner (I/groups, I/groups), outer
    (O, I/groups, *K); depth (I/groups, 8, *K), mix (O, I/groups, 8); scale (6, O); bias (O,), or None.

    Raises:
        ValueError: arguments that `nn.Conv2d` could not work with.

    Example:
        >>> net = nn.Sequential(OREPA2d(8, 8, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    dims = 2
    filters: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip

        def free(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        each, taps = in_channels // groups, self.kernel_size
        self.dense, self.outer = free(out_channels, each, *taps), free(out_channels, each, *taps)
        self.point, self.average, self.prior = (free(out_channels, each) for _ in range(3))
        self.inner = free(each, each)
        self.depth, self.mix = free(each, 8, *taps), free(out_channels, each, 8)
        self.scale = free(6, out_channels)
        self.register_buffer("filters", torch.empty(out_channels, *taps, device=device, dtype=dtype), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for weight in (self.dense, self.outer, self.point, self.average, self.prior, self.depth, self.mix):
            nn.init.uniform_(weight, -self.bound, self.bound)
        nn.init.eye_(self.inner)
        for row, value in zip(self.scale.data, (0.25, 0.5, 0.5, 0.5, 0.25, 0.5), strict=True):
            nn.init.constant_(row, value)

    def fill_buffers(self) -> None:
        height, width = self.kernel_size
        half = max(self.out_channels // 2, 1)
        index = torch.arange(self.out_channels, device=self.filters.device)[:, None, None]
        rows = torch.arange(height, device=self.filters.device)[:, None] + 0.5
        columns = torch.arange(width, device=self.filters.device)[None] + 0.5
        across = torch.cos(math.pi * (index + 1) * rows / height) * torch.ones_like(columns)
        along = torch.cos(math.pi * (index + 1 - half) * columns / width) * torch.ones_like(rows)
        self.filters.copy_(torch.where(index < half, across, along))

    def start_kernel(self, weight: Tensor) -> None:
        self.dense.copy_(weight)
        nn.init.zeros_(self.scale)
        nn.init.ones_(self.scale[0])

    def kernel(self) -> Tensor:
        """The sum of all branches, (O, I/groups, *K)."""
        centre = torch.zeros_like(self.dense[0, 0])
        centre[tuple(k // 2 for k in self.kernel_size)] = 1
        branches = (
            self.dense,
            torch.einsum("oi,hw->oihw", self.point, centre),
            torch.einsum("omhw,mi->oihw", self.outer, self.inner),
            torch.einsum("oi,hw->oihw", self.average, torch.ones_like(centre) / centre.numel()),
            torch.einsum("oi,ohw->oihw", self.prior, self.filters.to(self.prior.dtype)),
            torch.einsum("oid,idhw->oihw", self.mix, self.depth),
        )
        total = torch.zeros_like(self.dense)
        for scale, branch in zip(self.scale, branches, strict=True):
            total = total + torch.einsum("oihw,o->oihw", branch, scale)
        return total
