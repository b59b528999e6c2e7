"""The ATen operators of exported programs as the torch functions and tensor methods that they are behind."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from structrep.algebra.geometry import CONV, CONV_TRANSPOSE

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
# Those that give a tuple of more than the function does, which comes first.
_FIRST: dict[str, tuple[Callable[..., Any], tuple[int | bool, ...]]] = {
    "_native_batch_norm_legit_no_training": (F.batch_norm, (0, 3, 4, 1, 2, False, 5, 6)),
    "native_layer_norm": (F.layer_norm, (0, 1, 2, 3, 4)),
    "native_group_norm": (F.group_norm, (0, 6, 1, 2, 7)),
}
# Those whose namesakes in torch have other defaults, other arguments, or give something else.
_OTHERWISE = {
    *("cross_entropy_loss", "ctc_loss", "hinge_embedding_loss", "l1_loss", "margin_ranking_loss", "mse_loss", "stft"),
    *("soft_margin_loss", "triplet_margin_loss", "unique_consecutive", "cosine_embedding_loss", "kl_div"),
}


def gives_more(op: OpOverload) -> bool:
    """Whether what an operator gives is a tuple, of which the torch function gives the first alone."""
    return op.namespace == "aten" and _name(op) in _FIRST


def _name(op: OpOverload) -> str:
    return str(op._schema.name.removeprefix("aten::"))


def in_torch(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Called:
    """What is called in torch's own terms; the operator itself where it has no such name."""
    if op.namespace == "aten" and (name := _name(op)) not in _OTHERWISE:
        if name in _FIRST and not kwargs:
            function, places = _FIRST[name]
            return "call_function", function, tuple(at if at is False else args[at] for at in places), {}
        if name in ("to", "_to_copy"):
            return _moved(op, args, kwargs) or ("call_function", op, args, kwargs)
        if name == "convolution" and not kwargs:
            return _convolution(*args) or ("call_function", op, args, kwargs)
        if name == "index":
            index = tuple(slice(None) if one is None else one for one in args[1])
            return "call_function", operator.getitem, (args[0], index), {}
        if name in _REORDERED and not kwargs:
            function, order = _REORDERED[name]
            given = [*args, *(a.default_value for a in op._schema.arguments[len(args) :])]
            return "call_function", function, tuple(given[index] for index in order), {}
        if op._overloadname == "Scalar" and name in ("add", "sub", "rsub") and len(args) == 3:
            kwargs = {"alpha": args[-1]}  # torch's own functions take it by name alone
            args = args[:-1]
        for place in (F, torch, torch._C._nn):
            found = getattr(place, name, None)
            if isinstance(found, BuiltinFunctionType):
                return "call_function", found, args, kwargs
        if callable(getattr(Tensor, name, None)):
            return "call_method", name, args, kwargs
    return "call_function", op, args, kwargs


def _moved(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Called | None:
    """`x.to(...)`; None if it makes a tensor of another layout, or pins its memory, which that does not do."""
    given = {**dict(zip((a.name for a in op._schema.arguments), args, strict=False)), **kwargs}
    if given.pop("layout", None) not in (None, torch.strided) or given.pop("pin_memory", None):
        return None
    source, *others = (given.pop(name) for name in ("self", "a", "other") if name in given)
    named = {name: value for name, value in given.items() if value is not None and value is not False}
    if _name(op) == "_to_copy":
        named["copy"] = True
    return ("call_method", "to", (source, *others), named) if others or named else None


def _convolution(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, extra: Any, groups: int
) -> Called | None:
    """A convolution of as many dims as its stride has; None if that is one for all."""
    dims = len(stride)
    if not 1 <= dims <= 3 or (dims == 1 and getattr(weight, "ndim", None) != 3) or len(padding) != dims:
        return None
    if transposed:
        given = (x, weight, bias, stride, padding, extra, groups, dilation)
        return "call_function", CONV_TRANSPOSE[dims], given, {}
    return "call_function", CONV[dims], (x, weight, bias, stride, padding, dilation, groups), {}
