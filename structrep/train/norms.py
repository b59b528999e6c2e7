"""Which batch norms a block can take in: torch's, and those that only run parts of theirs behind, as an activation.

That a norm of another class computes no more is read from its trace; that it does so in training mode too, and in this
order, is shown on random numbers.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.graph.calls import Call
from structrep.graph.operations import does, torch_name
from structrep.graph.queries import asks_shape, only_asserted
from structrep.graph.table import Is
from structrep.modules.copies import own_copy

_SETTINGS = {
    *("training", "momentum", "eps", "affine", "track_running_stats", "num_features", "process_group"),
    *("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
}
PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_plain(norm: nn.Module) -> bool:
    return type(norm) in (*PLAIN, nn.SyncBatchNorm)


def why_not(norm: nn.Module) -> str:
    """Why no block takes in a batch norm of another class than torch's, which stands somewhere behind a layer."""
    name = type(norm).__name__
    more = f"{name} does something else than to normalize and to run its parts in turn"
    return f"{more}, or the code around asks for more of it" if runs_parts_in_turn(norm) else more


def runs_parts_in_turn(norm: nn.Module) -> bool:
    """Whether a subclass, as timm's norms with an activation, computes what torch's norm does and then its parts in
    turn, in both modes: it is run beside that."""
    modes = (False,) if isinstance(norm, nn.SyncBatchNorm) else (False, True)  # which trains where there is a group
    try:
        return all(_does_the_same(norm, training) for training in modes)
    except Exception:  # it wants more, or something else
        return False


def runs_parts_alone(call: Call) -> bool:
    """Whether a norm that was called does nothing but to normalize and to call parts of its own, goes by its own
    settings alone, and is given one value."""
    parts = dict(call.module.named_children())
    asked = {name for _, text in call.reads for name in re.findall(r"\.(\w+)", text)}
    calls = [step for step in call.steps if not isinstance(step, fx.Node)]
    nodes = [step for step in call.steps if isinstance(step, fx.Node)]
    checks = [one for one in calls if one.module is call.module]  # its input, by other methods
    nodes += [node for one in checks for node in one.nodes()]
    return call.leaf or (
        asked <= _SETTINGS | parts.keys()
        and len(call.args) == 1
        and not call.kwargs
        and all(torch_name(node) == "batch_norm" or asks_shape(node) or _asserts(node) for node in nodes)
        and all(one in checks or one.module in parts.values() for one in calls)
        and next(call.observed(), None) is None
    )


def _asserts(node: fx.Node) -> bool:
    return only_asserted(node) or does(node, Is.ASSERTS)


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
