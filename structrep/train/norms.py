"""Which batch norms a block can take in: torch's, and those that only run parts of theirs behind, as an activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structrep.errors import said
from structrep.modules.copies import own_copy

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_plain(norm: nn.Module) -> bool:
    return type(norm) in (*PLAIN, nn.SyncBatchNorm)


def why_not(norm: nn.Module) -> str:
    """Why no block can take in a batch norm; "" if one can.

    A subclass, as timm's norms with an activation, has to compute what torch's norm does and then its parts in turn, in
    both modes: its code is run beside that, on random numbers.
    """
    if is_plain(norm):
        return ""
    name = type(norm).__name__
    modes = (False,) if isinstance(norm, nn.SyncBatchNorm) else (False, True)  # which trains where there is a group
    try:
        same = all(_does_the_same(norm, training) for training in modes)
    except Exception as error:
        return f"{name} cannot be run alone: {said(error)}"
    return "" if same else f"{name} does something else than to normalize and to run its parts in turn"


def _does_the_same(norm: nn.Module, training: bool) -> bool:
    dims = next((PLAIN.index(kind) + 1 for kind in PLAIN if isinstance(norm, kind)), 2)
    twin, other = own_copy(norm), own_copy(norm)
    twin.train(training)
    other.train(training)
    known: Any = other
    plain = PLAIN[dims - 1](known.num_features, known.eps, known.momentum, known.affine, known.track_running_stats)
    if {*plain._parameters, *plain._buffers} != {*other._parameters, *other._buffers}:
        return False
    plain._parameters, plain._buffers = dict(other._parameters), dict(other._buffers)
    parts = nn.Sequential(plain.train(training), *other.children())
    with torch.random.fork_rng(), torch.no_grad():
        x = torch.randn(2, known.num_features, *[3] * dims).to(known.running_mean)
        (found, counted), (expected, plainly) = _run(twin, x, twin), _run(parts, x, plain)
    pairs = [(found, expected), *((counted[name], plainly[name]) for name in counted)]
    return all(torch.allclose(value, wanted, rtol=1e-4, atol=1e-5) for value, wanted in pairs if wanted is not None)


def _run(module: nn.Module, x: Tensor, norm: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """What a module gives, and what a norm in it then holds of its own."""
    torch.manual_seed(0)
    return module(x.clone()), {**norm._parameters, **norm._buffers}
