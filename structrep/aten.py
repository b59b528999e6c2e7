"""The ATen operators of exported programs as the torch functions and tensor methods that they are behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

Called = tuple[Literal["call_function", "call_method"], Any, tuple[Any, ...], dict[str, Any]]

# Where the function takes its arguments in another order than the operator, or fewer of them.
_REORDERED: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "batch_norm": (F.batch_norm, (0, 3, 4, 1, 2, 5, 6, 7)),
    "layer_norm": (F.layer_norm, (0, 1, 2, 3, 4)),
    "group_norm": (F.group_norm, (0, 1, 2, 3, 4)),
    "instance_norm": (F.instance_norm, (0, 3, 4, 1, 2, 5, 6, 7)),
    "dropout": (F.dropout, (0, 1, 2)),
    "pad": (F.pad, (0, 1, 2, 3)),
}


def in_torch(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Called:
    """What is called in torch's own terms; the operator itself where it has no such name."""
    if operator.namespace == "aten":
        name = operator._schema.name.removeprefix("aten::")
        if name in _REORDERED and not kwargs:
            function, order = _REORDERED[name]
            given = [*args, *(a.default_value for a in operator._schema.arguments[len(args) :])]
            return "call_function", function, tuple(given[index] for index in order), {}
        if operator._overloadname == "Scalar" and name in ("add", "sub", "rsub") and len(args) == 3:
            kwargs = {"alpha": args[-1]}  # torch's own functions take it by name alone
            args = args[:-1]
        for place in (F, torch, torch._C._nn):
            found = getattr(place, name, None)
            if found is not None and not hasattr(found, "__code__"):
                return "call_function", found, args, kwargs
        if hasattr(Tensor, name):
            plain = {"layout": torch.strided, "pin_memory": None} if name == "to" else {}  # which the method has not
            kwargs = {key: one for key, one in kwargs.items() if key not in plain or one not in (plain[key], None)}
            return "call_method", name, args, kwargs
    return "call_function", operator, args, kwargs
