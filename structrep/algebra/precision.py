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
    """A value in float64 (complex128), if it is a tensor of floats (of complex numbers), where that can be."""
    if isinstance(value, Tensor) and is_inexact(value):
        return value.detach().to(exact(value.device), wider(value.dtype))
    return value


def as_stored(value: Any, like: Any) -> Any:
    """A value in the dtype of what is stored of it, if it is a tensor."""
    return value.to(like.dtype) if isinstance(value, Tensor) else value


WIDER = {
    **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
    **{one: torch.float64 for name, one in vars(torch).items() if name.startswith("float8")},
}


def wider(dtype: torch.dtype) -> torch.dtype:
    """float64 for floats, complex128 for complex numbers; others as they are."""
    return WIDER.get(dtype, dtype)


def is_inexact(tensor: Tensor) -> bool:
    """Whether a tensor is of floats or of complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


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
    value: bool | str
    try:
        # of which "medium" is not told from "high" by the flag
        process.afterwards(functools.partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
        before = {owner: owner.allow_tf32 for owner in (matmul, cudnn)}
        name, value = "allow_tf32", on
    except RuntimeError:  # the settings that took their place were used, which cannot be read this way
        before = {owner: owner.fp32_precision for owner in (matmul, cudnn.conv, cudnn.rnn)}
        name, value = "fp32_precision", "tf32" if on else "ieee"
    for owner, was in before.items():
        process.afterwards(functools.partial(_set_flag, owner, name, was))
        _set_flag(owner, name, value)


def _set_flag(owner: Any, name: str, value: Any) -> None:
    """Set a flag of a backend, also after `torch.backends.disable_global_flags`, as `torch.testing._internal` calls it:
    nothing of it is left afterwards."""
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        setattr(owner, name, value)
