"""RepMixer of FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization, arXiv:2303.14189, section
3.2.1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import ConvBlock, Device, Size
from structrep.blocks.online import Composition, full_precision, merged_first


class RepMixer2d(ConvBlock):
    """x + scale * (norm(conv_k(x)) + norm(conv_1(x)) + norm(x) - norm(x)), depthwise as the paper has it with
    groups=in_channels.

    FastViT, arXiv:2303.14189, section 3.2.1.

    (N, I, H, W) -> (N, I, H, W); the norms need N. The convs have no bias: `bias` is accepted so that
    the block drops in, and the norms supply one either way.

    Args:
        layer_scale: what `scale`, (I, 1, 1), starts from; None leaves it out.
        online: whether the branches are merged before they are run, while they train: the same outputs, gradients and
            running statistics, from the moments of the input. None where that takes less time, by count; True wherever
            it can be done; False never.

    Raises:
        ValueError: arguments that `nn.Conv2d` could not work with; the block would not keep its shape; a complex dtype.

    Example:
        >>> net = nn.Sequential(RepMixer2d(8, 8, 3, padding=1, groups=8), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=8)
    """

    dims = 2

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, layer_scale: float | None = 1e-5, online: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        if not self.keeps_shape:
            raise ValueError("a token mixer adds to its input: give equal channels, stride 1, and padding='same'")
        self.online = online
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dense = self.branch(self.kernel_size, **factory)
        self.point = self.branch((1, 1), **factory)
        self.skip, self.minus = self.norm(**factory), self.norm(**factory)
        self.scale: nn.Parameter | None = None
        if layer_scale is not None:
            self.scale = nn.Parameter(torch.full((in_channels, 1, 1), layer_scale, **factory))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            composed = self.composed(x)
            if composed is not None:
                return composed
        y: Tensor = self.dense(x) + self.point(x) + self.skip(x) - self.minus(x)
        return x + (y if self.scale is None else self.scale * y)

    def composed(self, x: Tensor) -> Tensor | None:
        """See `NormedBlock.composed`."""
        branches = merged_first((self.dense, self.point, self.skip, self.minus), self.reading, x, self.online)
        if branches is None:
            return None
        with full_precision(x):
            made = Composition(x, self.reading, [branch.norm for branch in branches])
            kernels, biases = made.normed_branches(branches)
            kernel, bias = kernels[:3].sum(0) - kernels[3], biases[:3].sum(0) - biases[3]
            if self.scale is not None:
                kernel, bias = self.scale.flatten(1) * kernel, self.scale.flatten() * bias
            kernel, bias = kernel + made.identity(), bias + made.of_shift(made.identity()[None])[0]
        return made.convolved(kernel, bias)
