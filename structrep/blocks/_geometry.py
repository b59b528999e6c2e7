"""What an `nn.Conv{n}d`'s arguments mean for the parts of a block that stands in its place.

A conv reads, for output p and tap t, the input at `stride*p + dilation*t - lo`; what lies outside is made
up by its `padding_mode`. A branch with a single tap sits on the kernel's centre tap, t = k//2, so it reads
the input padded by `lo - dilation*(k//2)` before and `hi - dilation*(k - 1 - k//2)` after: a negative pad
is a crop.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Ints = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]  # (lo, hi) per spatial dim
Size = int | Iterable[int]  # one number for all spatial dims, or one each
Device = torch.device | str | int | None

CONV: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOL: dict[int, Callable[..., nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def require_at_least(least: int, **values: int) -> None:
    """Check integers, by their names.

    Raises:
        ValueError: one is not an integer of at least `least`; the first is named.
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}={value!r} is not an integer of at least {least}: give {name} >= {least}")


def per_dim(name: str, value: Size, dims: int, least: int) -> Ints:
    """One integer per spatial dim.

    Raises:
        ValueError: `value` is neither that nor one for all, or one is below `least`.
    """
    each = tuple(value) if isinstance(value, Iterable) else (value,) * dims
    if len(each) != dims or not all(isinstance(i, Integral) and i >= least for i in each):
        raise ValueError(f"{name}={value!r}: give one integer >= {least}, or one for each of the {dims} spatial dims")
    return tuple(int(i) for i in each)


class BatchedNorm1d(nn.BatchNorm1d):
    """A batch norm of (N, C, L) alone: of (C, L), which a convolution takes, torch's would take L for channels."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 3:
            raise ValueError(f"expected (N, C, L), got {tuple(input.shape)}: the norms of a block need a batch")


NORM: dict[int, Callable[..., nn.Module]] = {1: BatchedNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Pad(nn.Module):
    """Pads as a conv of this `padding_mode` would, and crops where a pad is negative.

    Padding comes first: the made-up border may read what the crop takes away.
    """

    def __init__(self, pads: Pads, padding_mode: str) -> None:
        super().__init__()
        flat = [side for pad in reversed(pads) for side in pad]  # F.pad wants the last dim first
        self.grow = [max(side, 0) for side in flat]
        self.crop = [min(side, 0) for side in flat]
        self.mode = PAD_MODES[padding_mode]

    @property
    def pads(self) -> Pads:
        flat = [g + c for g, c in zip(self.grow, self.crop, strict=True)]
        return tuple(zip(flat[-2::-2], flat[::-2], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        if any(self.grow):
            x = F.pad(x, self.grow, self.mode)
        if any(self.crop):
            x = F.pad(x, self.crop)
        return x

    def extra_repr(self) -> str:
        return f"{[g + c for g, c in zip(self.grow, self.crop, strict=True)]}, mode={self.mode!r}"


class Reading(NamedTuple):
    """How the kernels of a block read their input, as the arguments of a conv say it."""

    in_channels: int
    out_channels: int
    kernel_size: Ints
    stride: Ints
    pads: Pads
    dilation: Ints
    groups: int
    padding_mode: str

    @property
    def pointwise(self) -> bool:
        return max(self.kernel_size) == 1

    @property
    def depthwise(self) -> bool:
        return self.groups == self.in_channels

    @property
    def taps(self) -> Iterator[Ints]:
        """Per spatial dim, the kernel's size, the stride and the dilation."""
        return zip(self.kernel_size, self.stride, self.dilation, strict=True)

    def outputs(self, x: Tensor) -> int:
        """How many pixels an image's output has."""
        count = 1
        for size, k, stride, (lo, hi) in zip(x.shape[2:], self.kernel_size, self.stride, self.pads, strict=True):
            count *= (size + lo + hi - k) // stride + 1
        return count


class ConvBlock(nn.Module):
    """A block made from an `nn.Conv{n}d`'s arguments, whose output has the shape that conv would give.

    Raises:
        ValueError: an argument is out of range, `groups` does not divide both channel counts, or `padding="same"` meets
            a stride. `nn.Conv{n}d` raises too, when it is made or when it is first called.
    """

    dims: ClassVar[int]  # spatial ones
    own_norms: ClassVar[bool] = False  # whether its branches have norms, and take in one that stood behind the conv

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size, padding: Size | str,
        dilation: Size, groups: int, padding_mode: str,
    ) -> None:  # fmt: skip
        super().__init__()
        require_at_least(1, in_channels=in_channels, out_channels=out_channels, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} does not divide in_channels={in_channels} and out_channels={out_channels}: "
                f"choose a divisor of {math.gcd(in_channels, out_channels)}"
            )
        if padding_mode not in PAD_MODES:
            raise ValueError(f"padding_mode={padding_mode!r} is unknown: choose one of {', '.join(PAD_MODES)}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = per_dim("kernel_size", kernel_size, self.dims, 1)
        self.stride = per_dim("stride", stride, self.dims, 1)
        self.dilation = per_dim("dilation", dilation, self.dims, 1)
        self.padding_mode = padding_mode
        self.padding: Ints | str
        self.pads: Pads
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"padding={padding!r} is unknown: choose 'same', 'valid' or numbers")
            if padding == "same" and self.stride != (1,) * self.dims:
                raise ValueError(
                    f"padding='same' has no meaning with stride={self.stride}: give the padding in numbers"
                )
            spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            same = tuple((span // 2, span - span // 2) for span in spans)
            self.padding, self.pads = padding, same if padding == "same" else ((0, 0),) * self.dims
        else:
            self.padding = per_dim("padding", padding, self.dims, 0)
            self.pads = tuple((p, p) for p in self.padding)

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        """Take parameters with which the block computes what a conv of this weight and bias does, and a norm behind it.

        Args:
            weight: (O, I/groups, *K).
            bias: (O,), or None.
            norm: a batch norm, for blocks with norms of their own.

        Raises:
            ValueError: this block has no such parameters.
        """
        raise ValueError(f"{type(self).__name__} cannot start as what it replaces: give init='paper'")

    @property
    def centre_pads(self) -> Pads:
        """The pads of a branch that has only the centre tap of the kernel."""
        taps = zip(self.pads, self.dilation, self.kernel_size, strict=True)
        return tuple((lo - d * (k // 2), hi - d * (k - 1 - k // 2)) for (lo, hi), d, k in taps)

    @property
    def reading(self) -> Reading:
        return Reading(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.pads, self.dilation, self.groups,
            self.padding_mode,
        )  # fmt: skip

    @property
    def keeps_shape(self) -> bool:
        """Whether the output has the shape of the input, each pixel where it was."""
        same = self.in_channels == self.out_channels and self.stride == (1,) * self.dims
        return same and not any(map(any, self.centre_pads))

    def padded(self, pads: Pads, explicit: bool = False) -> tuple[dict[str, nn.Module], Ints]:
        """The pads as an `nn.Conv{n}d`'s `padding` if that can say them, else as a `Pad` to put before it."""
        if all(lo == hi >= 0 for lo, hi in pads) and not explicit:
            return {}, tuple(lo for lo, _ in pads)
        return {"pad": Pad(pads, self.padding_mode)}, (0,) * self.dims

    def norm(self, channels: int | None = None, **factory: Any) -> nn.Module:
        """A norm of so many channels, those of the output by default.

        Raises:
            ValueError: the dtype is complex.
        """
        dtype = factory["dtype"]
        if dtype is not None and dtype.is_complex:
            raise ValueError(f"dtype={dtype}: batch norm is for real numbers: give a floating-point dtype")
        return NORM[self.dims](channels or self.out_channels, **factory)

    def branch(self, kernel: Ints, **factory: Any) -> nn.Sequential:
        """Conv and norm. Per dim, `kernel` has all of the block's taps, or one, which is the centre tap."""
        sizes = zip(kernel, self.kernel_size, self.pads, self.centre_pads, strict=True)
        pad, padding = self.padded(tuple(own if k == size else centre for k, size, own, centre in sizes))
        conv = CONV[self.dims](
            self.in_channels, self.out_channels, kernel, self.stride, padding, self.dilation, self.groups,
            bias=False, padding_mode=self.padding_mode, **factory,
        )  # fmt: skip
        return nn.Sequential(OrderedDict(**pad, conv=conv, norm=self.norm(**factory)))


class ComputedConv(ConvBlock):
    """One conv whose weight is computed from parameters each time, by `kernel()`."""

    bias: nn.Parameter | None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size, padding: Size | str,
        dilation: Size, groups: int, bias: bool, padding_mode: str, device: Device, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.weight_shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.bound = 1 / math.sqrt(math.prod(self.weight_shape[1:]))  # nn.Conv{n}d starts within +-bound
        free = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", free)
        pad, self.conv_padding = self.padded(self.pads, explicit=padding_mode != "zeros")
        self.pad = pad.get("pad")

    def reset_parameters(self) -> None:
        self.fill_buffers()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -self.bound, self.bound)

    def fill_buffers(self) -> None:
        """Write the fixed numbers that `kernel()` uses into their buffers, which no state dict holds."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        empty = any(buffer.is_meta for buffer in self.buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if empty:  # `to_empty` made memory of them, and nobody else knows what was in it
            self.fill_buffers()
        return self

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        with torch.no_grad():
            self.start_kernel(weight)
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)

    def start_kernel(self, weight: Tensor) -> None:
        """Take parameters of which `kernel()` makes a weight, (O, I/groups, *K)."""
        raise NotImplementedError

    def kernel(self) -> Tensor:
        """The weight, (O, I/groups, *K)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.pad is not None:
            x = self.pad(x)
        return CONVOLVE[self.dims](
            x, self.kernel(), self.bias, self.stride, self.conv_padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )
