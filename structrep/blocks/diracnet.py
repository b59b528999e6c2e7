"""DiracNets: Training Very Deep Neural Networks Without Skip-Connections, arXiv:1706.00388, section 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structrep.blocks._geometry import ComputedConv, Device, Size


class _DiracConv(ComputedConv):
    """One conv of weight diag(a) I + diag(b) W / ‖W‖: a skip connection inside the kernel.

    DiracNets, arXiv:1706.00388, section 3.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv{n}d` of these arguments; also without N.

    I is the Dirac kernel: in each group, filter i has a one at input i on the tap k//2, and filters beyond
    the inputs have none. ‖W‖ is the 2-norm of each whole filter.

    Parameters: weight (O, I/groups, *K), which is W and starts at N(0, 1); a (O,), at 1; b (O,), at 0.1;
    bias (O,), or None.

    Raises:
        ValueError: arguments that `nn.Conv{n}d` could not work with.

    Example:
        >>> net = nn.Sequential(DiracConv2d(8, 8, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        self.weight = nn.Parameter(torch.empty(self.weight_shape, device=device, dtype=dtype))
        self.a = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        self.delta: Tensor
        self.register_buffer("delta", torch.empty_like(self.weight), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.weight)
        nn.init.constant_(self.a, 1.0)
        nn.init.constant_(self.b, 0.1)

    def fill_buffers(self) -> None:
        nn.init.dirac_(self.delta, self.groups)

    def start_kernel(self, weight: Tensor) -> None:
        self.weight.copy_(weight - self.a.view(-1, 1, *(1,) * self.dims) * self.delta)
        self.b.copy_(self.weight.flatten(1).norm(dim=1))

    def kernel(self) -> Tensor:
        """diag(a) I + diag(b) W / ‖W‖, (O, I/groups, *K)."""
        per_filter = (-1, 1, *(1,) * self.dims)
        direction = F.normalize(self.weight.flatten(1), dim=1).view(self.weight_shape)
        return self.a.view(per_filter) * self.delta.to(self.a.dtype) + self.b.view(per_filter) * direction


class DiracConv1d(_DiracConv):
    __doc__ = _DiracConv.__doc__
    dims = 1


class DiracConv2d(_DiracConv):
    __doc__ = _DiracConv.__doc__
    dims = 2


class DiracConv3d(_DiracConv):
    __doc__ = _DiracConv.__doc__
    dims = 3
