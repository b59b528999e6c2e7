"""DO-Conv: Depthwise Over-parameterized Convolutional Layer, arXiv:2006.12030, section 3."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import ComputedConv, Device, Size, require_at_least


class _DOConv(ComputedConv):
    """One conv of weight D ∘ W: a depthwise map on the taps, (D + D_diag)[i] of M x D_mul, composed with W.

    DO-Conv, arXiv:2006.12030, section 3.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv{n}d` of these arguments; also without N.

    M is the number of taps, and D_mul >= M (M where not given). D_diag is the identity and D starts at
    zero, so the weight starts as W, which starts as an `nn.Conv{n}d`'s weight does. A 1x1 (M = D_mul = 1)
    has no D.

    `groups` gives the paper's DO-DConv (groups = in_channels) and its grouped form. The authors' reshape of
    W to O/groups filters over all I channels settles which D a channel of a filter then meets: channel j of
    filter o meets D[(o mod groups) * I/groups + j], which need not be the D of the channel that the conv
    applies it to.

    Parameters: W (O, I/groups, D_mul); D (I, M, D_mul), or None; bias (O,), or None.

    Raises:
        ValueError: arguments that `nn.Conv{n}d` could not work with; D_mul < M.

    Example:
        >>> net = nn.Sequential(DOConv2d(8, 16, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    D: nn.Parameter | None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, D_mul: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        taps = math.prod(self.kernel_size)
        self.D_mul = taps if D_mul is None else D_mul
        require_at_least(taps, D_mul=self.D_mul)
        shape = (out_channels, in_channels // groups, self.D_mul)
        self.W = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter("D", None)
        if self.D_mul > 1:
            self.D = nn.Parameter(torch.empty(in_channels, taps, self.D_mul, device=device, dtype=dtype))
            self.D_diag: Tensor
            self.register_buffer("D_diag", torch.empty_like(self.D[0]), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.uniform_(self.W, -self.bound, self.bound)
        if self.D is not None:
            nn.init.zeros_(self.D)

    def fill_buffers(self) -> None:
        if self.D is not None:
            nn.init.eye_(self.D_diag)

    def start_kernel(self, weight: Tensor) -> None:
        taps = math.prod(self.kernel_size)
        self.W[..., :taps].copy_(weight.flatten(2))
        if self.D is not None:
            nn.init.zeros_(self.D)

    def kernel(self) -> Tensor:
        """D ∘ W, (O, I/groups, *K)."""
        if self.D is None:
            return self.W.view(self.weight_shape)
        w = self.W.view(self.out_channels // self.groups, self.in_channels, self.D_mul)
        return torch.einsum("ims,ois->oim", self.D + self.D_diag.to(self.D.dtype), w).reshape(self.weight_shape)


class DOConv1d(_DOConv):
    __doc__ = _DOConv.__doc__
    dims = 1


class DOConv2d(_DOConv):
    __doc__ = _DOConv.__doc__
    dims = 2


class DOConv3d(_DOConv):
    __doc__ = _DOConv.__doc__
    dims = 3
