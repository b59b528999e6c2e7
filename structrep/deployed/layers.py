"""Layers of a deploy model that torch has none of: those that hold it to what its merges were made for, and a shift."""

import torch.fx
from torch import Tensor, nn


@torch.fx.wrap
def demand_features(input: Tensor) -> Tensor:
    """Raise unless a value is (N, C)."""
    if input.ndim != 2:
        raise ValueError(
            f"a batch norm was folded into a Linear here, for values of shape (N, C); this one has shape "
            f"{input.shape}: reparameterize with example_inputs of that shape"
        )
    return input


@torch.fx.wrap
def demand_size(input: Tensor, size: list[int], period: list[int]) -> Tensor:
    """Raise unless a value's spatial size is one that a merge holds for."""
    found = input.shape[-len(size) :]
    for n, known, step in zip(found, size, period):  # noqa: B905 TorchScript knows no strict=
        if n != known and (step == 0 or (n - known) % step != 0):
            raise ValueError(
                f"branches were merged here for inputs of {size} pixels, or {period} more or less, and this one is "
                f"{found}: reparameterize with example_inputs of that size"
            )
    return input


class Features2d(nn.Identity):
    """Stands where a batch norm over features was folded into a Linear, which holds for 2-d values (N, C) only.

    Raises:
        ValueError: a value of another rank, of which the norm would have normalised another dimension.
    """

    def forward(self, input: Tensor) -> Tensor:
        return demand_features(input)


class Sizes(nn.Module):
    """Stands before a merge that holds for some spatial sizes only: branches whose outputs are of one size there.

    `torch.jit.trace` records what is done with one input, and so leaves the demand out; export and scripts keep it.

    Args:
        size: a spatial size for which it holds.
        period: it holds for what differs from that by multiples of this, per dim; 0 for no other size.

    Raises:
        ValueError: an input (N, C, *spatial) of another size.
    """

    def __init__(self, size: tuple[int, ...], period: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.period = list(size), list(period)

    def forward(self, input: Tensor) -> Tensor:
        return demand_size(input, self.size, self.period)

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
