"""Layers of a deploy model that hold it to what its merges were made for."""

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
