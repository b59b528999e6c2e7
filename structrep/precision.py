"""Float64 and plain arithmetic, wherever a model is and whatever the caller has set."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from structrep import process

WITHOUT_FLOAT64 = {"mps"}  # devices


def exact(device: torch.device) -> torch.device:
    """Where float64 is computed of what is on a device: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def doubled(value: Any) -> Any:
    """A value in float64, if it is a tensor of floats, where that can be."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(exact(value.device), torch.float64)
    return value


@contextlib.contextmanager
def whole(*, tf32: bool = False) -> Iterator[None]:
    """No autocast, and no TensorFloat-32 unless asked for: CUDA convolves float32 in it by default.

    Args:
        tf32: multiply and convolve float32 in it, on CUDA.
    """
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(process.alone())
        _set_tf32(tf32)
        yield


def _set_tf32(on: bool) -> None:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    try:
        # of which "medium" is not told from "high" by the flag
        process.afterwards(functools.partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
        for owner in (matmul, cudnn):
            process.keep(owner, "allow_tf32")
        matmul.allow_tf32 = cudnn.allow_tf32 = on
    except RuntimeError:  # the settings that took their place were used, which cannot be read this way
        for owner in (matmul, cudnn.conv, cudnn.rnn):
            process.change(owner, "fp32_precision", "tf32" if on else "ieee")
