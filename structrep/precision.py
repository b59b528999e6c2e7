"""Arithmetic as it is on the CPU, wherever a model is and whatever the caller has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


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
        stack.enter_context(_tf32(tf32))
        yield


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    try:
        before = matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:  # the settings that took their place were used, which cannot be read this way
        settings = [(one, one.fp32_precision) for one in (matmul, cudnn.conv, cudnn.rnn)]
        for one, _ in settings:
            one.fp32_precision = "tf32" if on else "ieee"
        try:
            yield
        finally:
            for one, precision in settings:
                one.fp32_precision = precision
        return
    precision = torch.get_float32_matmul_precision()  # of which "medium" is not told from "high" by the flag
    matmul.allow_tf32 = cudnn.allow_tf32 = on
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        torch.set_float32_matmul_precision(precision)
