"""What written forwards ask by: whether an answer still is what it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def numbers(tensor: Tensor) -> Any:
    """The numbers of a tensor; of one that has many, what tells whether they are the same."""
    if tensor.numel() <= 16:
        return tensor.tolist()
    bits = tensor.detach().contiguous().flatten().view(torch.uint8).long()
    return int((bits * (torch.arange(len(bits), device=bits.device) * 2654435761 + 1)).sum())
