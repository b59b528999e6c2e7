"""Structures of traced values: what is inside them, how they were, what they stand for."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx


def proxies(value: Any) -> Iterator[fx.Proxy]:
    """All proxies inside containers, dataclasses and model outputs."""
    if isinstance(value, fx.Proxy):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from proxies(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from proxies(item)
    elif isinstance(value, slice):
        yield from proxies((value.start, value.stop, value.step))
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from proxies(getattr(value, f.name))


def is_traced(value: Any) -> bool:
    """Whether a structure holds anything that depends on the input."""
    return next(proxies(value), None) is not None


def holds_tensor(value: Any) -> bool:
    """Whether a structure holds a tensor that does not depend on the input."""
    return any(isinstance(leaf, Tensor) and not isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(value))


def snapshot(value: Any) -> Any:
    """A structure as it is now: whoever holds its lists, dicts and traced values may write to them later."""
    if isinstance(value, fx.Proxy):
        return value.tracer.proxy(value.node)  # also of an attribute, which is a node only once it is used
    if type(value) in (list, tuple):
        return type(value)(snapshot(item) for item in value)
    if type(value) is dict:
        return {key: snapshot(item) for key, item in value.items()}
    return value


def alike(before: Any, after: Any) -> bool:
    """Whether a structure still holds the very values that its snapshot does."""
    if type(before) in (list, tuple):
        return len(before) == len(after) and all(map(alike, before, after))
    if type(before) is dict:
        return list(before) == list(after) and all(alike(before[key], after[key]) for key in before)
    return before is after or (isinstance(before, fx.Proxy) and isinstance(after, fx.Proxy))


_SHAPE_METHODS = {"size": torch.Size(), "dim": 0, "ndimension": 0, "numel": 0, "nelement": 0}
_SHAPE_ATTRIBUTES = {"shape": torch.Size(), "ndim": 0}
_PROBE = torch.empty(0)


def stand_in(node: fx.Node) -> Any:
    """A value of the type that a node's will have: a size, a number, or (as nearly all are) a tensor."""
    if "stand_in" not in node.meta:
        node.meta["stand_in"] = _stand_in(node)
    return node.meta["stand_in"]


def _stand_in(node: fx.Node) -> Any:
    if node.op == "call_method" and node.target in _SHAPE_METHODS:
        return 0 if len(node.args) > 1 or node.kwargs else _SHAPE_METHODS[node.target]
    if node.target is getattr:
        return _SHAPE_ATTRIBUTES.get(str(node.args[1]), _PROBE)
    inputs = [stand_in(n) for n in node.all_input_nodes]
    if node.op != "call_function" or not inputs or any(isinstance(one, Tensor) for one in inputs):
        return _PROBE
    if node.target is operator.getitem and isinstance(inputs[0], torch.Size):
        return torch.Size() if isinstance(node.args[1], slice) else 0
    return 0.0 if node.target is operator.truediv or any(isinstance(one, float) for one in inputs) else 0
