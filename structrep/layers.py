"""Layers of a deploy model that torch has none of: those that hold it to what its merges were made for, and a shift."""

from __future__ import annotations

from torch import Tensor, nn


class Features2d(nn.Identity):
    """Stands where a batch norm over features was folded into a Linear, which holds for 2-d values (N, C) only.

    Raises:
        ValueError: a value of another rank, of which the norm would have normalised another dimension.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim != 2:
            raise ValueError(
                f"a batch norm was folded into a Linear here, for values of shape (N, C); this one has shape "
                f"{tuple(input.shape)}: reparameterize with example_inputs of that shape"
            )
        return input


class Sizes(nn.Module):
    """Stands before a merge that holds for some spatial sizes only: branches whose outputs are of one size there.

    Args:
        size: a spatial size for which it holds.
        period: it holds for what differs from that by multiples of this, per dim; 0 for no other size.

    Raises:
        ValueError: an input (N, C, *spatial) of another size.
    """

    def __init__(self, size: tuple[int, ...], period: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.period = tuple(size), tuple(period)

    def forward(self, input: Tensor) -> Tensor:
        found = input.shape[-len(self.size) :]
        for n, size, period in zip(found, self.size, self.period, strict=True):
            if n != size and (not period or (n - size) % period):
                raise ValueError(
                    f"branches were merged here for inputs of {self.extra_repr()}; this one is "
                    f"{'x'.join(map(str, found))}: reparameterize with example_inputs of that size"
                )
        return input

    def extra_repr(self) -> str:
        size, period = ("x".join(map(str, each)) for each in (self.size, self.period))
        return f"{size} pixels" + (f", or {period} more or less" if any(self.period) else "")


class Shift(nn.Module):
    """Adds a constant to each channel of (N, C, *spatial).

    A convolution that is to read v outside its input does, up to its bias, if v is taken off first: then it reads 0.

    Args:
        shift: (C,).
        dims: spatial dims.
    """

    shift: Tensor

    def __init__(self, shift: Tensor, dims: int) -> None:
        super().__init__()
        self.register_buffer("shift", shift.reshape(-1, *[1] * dims))

    def forward(self, input: Tensor) -> Tensor:
        return input + self.shift
