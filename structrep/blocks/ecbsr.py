"""ECBSR: Edge-oriented Convolution Block for Real-time Super Resolution on Mobile Devices. Zhang et al., ACM Multimedia
2021, doi:10.1145/3474085.3475291, section 3.2; and EFDN: Edge-enhanced Feature Distillation Network for Efficient
Super-Resolution, arXiv:2204.08759, the block named EDBB."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structrep.blocks._geometry import ConvBlock, Device, Size

Filter = tuple[tuple[float, ...], ...]
SOBEL_X: Filter = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
SOBEL_Y: Filter = tuple(zip(*SOBEL_X, strict=True))
LAPLACIAN: Filter = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


class EdgeBranch2d(nn.Module):
    """A 1x1, padded with its bias, then a 3x3 that is learned, or a fixed filter with a scale and bias per channel.

    Args:
        middle: channels between the two.
        fixed: (3, 3) numbers of the filter; None for a 3x3 that is learned.
    """

    filter: Tensor

    def __init__(
        self, in_channels: int, middle: int, out_channels: int, fixed: Filter | None, device: Device,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.expand = nn.Conv2d(in_channels, middle, 1, **factory)
        self.groups = 1 if fixed is None else out_channels
        if fixed is None:
            self.weight = nn.Parameter(torch.empty(out_channels, middle, 3, 3, **factory))
        else:
            self.fixed = fixed
            self.scale = nn.Parameter(torch.empty(out_channels, 1, 1, 1, **factory))
            self.register_buffer("filter", torch.empty(out_channels, 1, 3, 3, **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)
        if self.groups == 1:
            nn.init.kaiming_uniform_(self.weight, 5**0.5)
        else:
            nn.init.normal_(self.scale, std=1e-3)
            self.filter.copy_(torch.tensor(self.fixed))

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(x)
        border = self.expand.bias.reshape(-1, 1, 1)  # type: ignore[union-attr]
        y = F.pad(y - border, (1, 1, 1, 1)) + border
        weight = self.weight if self.groups == 1 else self.scale * self.filter.to(self.scale.dtype)
        return F.conv2d(y, weight, self.bias, groups=self.groups)


class EdgeBlock2d(ConvBlock):
    """conv_3(x) + four branches of a 1x1 and a 3x3, Sobel in x and y, Laplacian, + x where the block keeps its shape.

    ECBSR, doi:10.1145/3474085.3475291, section 3.2; with a 1x1 beside them EFDN's EDBB, arXiv:2204.08759.

    (N, I, H, W) -> (N, O, H, W); also without N. Its convs have biases, whatever `bias` says.

    Args:
        depth: channels between the two steps of the learned branch, relative to `out_channels`.
        point: add a 1x1.

    Raises:
        ValueError: anything but a 3x3 with padding 1, stride 1, dilation 1, one group and zeros: edges have no others.

    Example:
        >>> net = nn.Sequential(EdgeBlock2d(8, 16, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    dims = 2

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, depth: float = 2.0, point: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        found = (self.kernel_size, self.stride, self.pads, self.dilation, groups, padding_mode)
        if found != ((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1, "zeros"):
            raise ValueError(f"an edge block is a 3x3 with padding 1 and nothing else, and this one is {found}")
        self.dense = nn.Conv2d(in_channels, out_channels, 3, padding=1, device=device, dtype=dtype)
        self.point = nn.Conv2d(in_channels, out_channels, 1, device=device, dtype=dtype) if point else None
        kinds = [(int(depth * out_channels), None), *((out_channels, f) for f in (SOBEL_X, SOBEL_Y, LAPLACIAN))]
        self.edges = nn.ModuleList(
            EdgeBranch2d(in_channels, middle, out_channels, fixed, device, dtype) for middle, fixed in kinds
        )

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        """See `ConvBlock.start_as`: the edges start at zero, and the 3x3 does without what the skip adds."""
        skip = nn.init.dirac_(torch.empty_like(weight)) if self.keeps_shape else 0
        edges: list[Any] = list(self.edges)
        with torch.no_grad():
            self.dense.weight.copy_(weight - skip)
            assert self.dense.bias is not None
            nn.init.zeros_(self.dense.bias) if bias is None else self.dense.bias.copy_(bias)
            if self.point is not None:
                nn.init.zeros_(self.point.weight)
                nn.init.zeros_(self.point.bias)  # type: ignore[arg-type]
            for edge in edges:
                nn.init.zeros_(edge.bias)
                nn.init.zeros_(edge.weight if edge.groups == 1 else edge.scale)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dense(x)
        if self.point is not None:
            y = y + self.point(x)
        for edge in self.edges:
            y = y + edge(x)
        return y + x if self.keeps_shape else y
