"""RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition, arXiv:2105.01883, and
RepMLPNet, arXiv:2112.11081: the channel and local perceptrons."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import Device, Size, per_dim, require_at_least


class RepMLP2d(nn.Module):
    """Pieces of h x w pixels, all numbers of a piece given to one fully-connected layer, and convolutions beside it.

    RepMLP, arXiv:2105.01883, section 3.3.

    (N, C, H, W) -> (N, C, H, W), H and W multiples of h and w.

    Args:
        channels: C.
        size: h and w of a piece, in pixels, or one number for both.
        sets: S, channels with weights of their own; C / S channels share each.
        kernels: sizes of the convolutions beside, odd.

    Raises:
        ValueError: sets that do not divide the channels; an even kernel; sizes below 1, or not two of them.
        RuntimeError: by `forward`, for an input of other channels, or of no whole number of pieces.

    Example:
        >>> net = nn.Sequential(RepMLP2d(8, 6), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        RepMLP2d(
          (whole): Conv2d(36, 36, kernel_size=(1, 1), stride=(1, 1))
          (norm): Identity()
          (local): None
        )
    """

    def __init__(
        self, channels: int, size: Size, sets: int = 1, kernels: Iterable[int] = (1, 3),
        device: Device = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.height, self.width = per_dim("size", size, 2, 1)
        require_at_least(1, channels=channels, sets=sets)
        if channels % sets:
            raise ValueError(f"sets={sets} does not divide channels={channels}: choose a divisor")
        self.channels, self.sets = channels, sets
        numbers = sets * self.height * self.width
        self.whole = nn.Conv2d(numbers, numbers, 1, groups=sets, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(sets, device=device, dtype=dtype)
        self.local = nn.ModuleList()
        for kernel in kernels:
            require_at_least(1, kernel=kernel)
            if kernel % 2 == 0:
                raise ValueError(f"a kernel of {kernel} has no centre: choose an odd one")
            conv = nn.Conv2d(
                sets, sets, kernel, padding=kernel // 2, groups=sets, bias=False, device=device, dtype=dtype
            )
            norm = nn.BatchNorm2d(sets, device=device, dtype=dtype)
            self.local.append(nn.Sequential(OrderedDict(conv=conv, norm=norm)))

    def forward(self, x: Tensor) -> Tensor:
        h, w, s = self.height, self.width, self.sets
        rows, columns = x.shape[2] // h, x.shape[3] // w
        pieces = x.reshape(x.shape[0], self.channels, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5)
        y = self.norm(self.whole(pieces.reshape(-1, s * h * w, 1, 1)).reshape(-1, s, h, w))
        local = pieces.reshape(-1, s, h, w)
        for branch in self.local:
            y = y + branch(local)
        y = y.reshape(-1, rows, columns, self.channels, h, w).permute(0, 3, 1, 4, 2, 5)
        whole: Tensor = y.reshape(x.shape)
        return whole
