"""Casts that leave a value as it is: to the dtype and device that it has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.graph.constants import constant
from structrep.graph.dtypes import cast_to
from structrep.graph.facts import AUTOCAST, CALL, INDEX, TO_OWN_DTYPE, VALUE
from structrep.graph.operations import does, torch_name
from structrep.graph.queries import asks_dtype
from structrep.graph.shapes import argument
from structrep.graph.table import CASTS, Is
from structrep.read.arguments import Arguments, reads
from structrep.read.endings import ENDINGS
from structrep.read.modules import IDENTITIES
from structrep.terms.layer import Identity

_BESIDE = {"non_blocking", "copy", "memory_format"}  # what a cast is told that changes no number
_ARITHMETIC = {f"{side}{name}" for side in ("", "i", "r") for name in ("add", "sub", "mul", "div", "truediv")}
_DEEPEST = 8  # sums inside each other


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether a node gives floats in the dtype that it is given them in: a `view` may be one of the bits."""
    sizes = torch_name(node) != "view" or all(isinstance(one, int) for one in node.args[1:])
    return (does(node, Is.MOVES | Is.DTYPE) and sizes) or torch_name(node) == "batch_norm"


def _weight_of(node: fx.Node) -> Tensor | None:
    """The weight of a convolution or Linear; it takes nothing but its dtype."""
    module = CALL.of(node).module if node.op == "call_module" else None
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return module.weight
    weight = constant(argument(node, 1, "weight")) if does(node, Is.KERNEL) else None
    return weight if isinstance(weight, Tensor) else None


def _dtype_of(node: fx.Node, depth: int = 0) -> torch.dtype | None:
    """The dtype of what a layer gives, whatever it is given, or takes as it is; of what a norm gives, which is taken to
    be given its own; of a sum of such values. None where that is not told."""
    own: torch.dtype | None = None
    while not AUTOCAST.get(node):
        beside = (user for user in node.users if argument(user, 0, "input") is node and not AUTOCAST.get(user))
        for layer in (node, *beside):
            if (weight := _weight_of(layer)) is not None:
                return weight.dtype
        module = CALL.of(node).module if node.op == "call_module" else None
        if (to := cast_to(node)) is not None:
            return to
        sources = [n for n in node.all_input_nodes if not VALUE.known(n)]
        norm = isinstance(module, (nn.modules.batchnorm._NormBase, *(one for one in ENDINGS if isinstance(one, type))))
        if norm and module is not None:
            own = own or next((one.dtype for one in (*module.parameters(), *module.buffers())), None)
        elif node.target in ENDINGS:
            given = (constant(one) for one in node.all_input_nodes)
            own = own or next((one.dtype for one in given if isinstance(one, Tensor)), None)
        elif torch_name(node).strip("_") in _ARITHMETIC:
            return own or _common_dtype(node, depth)
        elif not _keeps_dtype(node) and not isinstance(module, IDENTITIES):
            return own
        if len(sources) != 1:
            return own
        node = sources[0]
    return own


def _common_dtype(node: fx.Node, depth: int) -> torch.dtype | None:
    """The dtype that all values have which a node computes with, and so its own; None if it is not told of one."""
    known = [VALUE.get(one) for one in node.all_input_nodes if VALUE.known(one)]
    dtypes: set[torch.dtype | None] = {one.dtype for one in known if isinstance(one, Tensor) and one.ndim}
    values = [one for one in node.all_input_nodes if not VALUE.known(one)]
    dtypes |= {_dtype_of(one, depth + 1) if depth < _DEEPEST else None for one in values}
    found = dtypes.pop() if len(dtypes) == 1 else None
    return found if found is not None and found.is_floating_point else None


@reads("to", "type_as", "type", "cpu", *CASTS)
def _(a: Arguments) -> Identity | None:
    """A value with the dtype or on the device of another one of the same model, or with a dtype that it has already; or
    what was cast so before."""
    source = a(0, "input")
    if (before := _cast_before(a.node)) is not None:
        return Identity(before)
    to = cast_to(a.node)
    if to is not None and _dtype_of(source) is to:
        return Identity(source)
    if a.node.target not in ("to", "type_as", "cpu"):
        return None
    named = [one for name, one in a.node.kwargs.items() if name not in _BESIDE]
    given: list[Any] = [one for one in (*a.node.args[1:], *named) if not isinstance(one, bool)]
    given += ["cpu"] if a.node.target == "cpu" else []
    like = given[0] if len(given) == 1 else None
    if TO_OWN_DTYPE.get(a.node) or (isinstance(like, fx.Node) and asks_dtype(like) and VALUE.known(like)):
        return Identity(source)
    own = _dtype_of(source)
    return Identity(source) if own is not None and all(_is_own(one, own, source) for one in given) else None


def _cast_before(cast: fx.Node) -> fx.Node | None:
    """An earlier cast of the same value to the same."""
    source = cast.args[0]
    others = source.users if isinstance(source, fx.Node) else ()
    same = [one for one in others if (one.op, one.target) == (cast.op, cast.target) and _are_same(one, cast)]
    first = min(same, key=INDEX.of, default=cast)
    return first if first is not cast else None


def _are_same(one: fx.Node, other: fx.Node) -> bool:
    """Whether two calls of one function are given the same values, or answers to the same questions."""
    given, more = ([*node.args, *node.kwargs.values()] for node in (one, other))

    def alike(left: Any, right: Any) -> bool:
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and asks_dtype(left) and asks_dtype(right):
            return bool(left.args == right.args)
        return left is right or (not isinstance(left, (fx.Node, tuple, list)) and bool(left == right))

    return one.kwargs.keys() == other.kwargs.keys() and len(given) == len(more) and all(map(alike, given, more))


def _is_own(given: Any, own: torch.dtype, source: fx.Node) -> bool:
    """Whether a cast leaves the dtype, and the device on which a model is, as they are."""
    if isinstance(given, (str, torch.device)):
        users = (user for user in source.users if argument(user, 0, "input") is source)
        weights = (weight for node in (source, *users) if (weight := _weight_of(node)) is not None)
        there, to = {weight.device for weight in weights}, torch.device(given)
        return bool(there) and all(one.type == to.type and to.index in (None, one.index) for one in there)
    if isinstance(given, fx.Node):
        asked, of = asks_dtype(given), given.args[0] if given.args else None
        value = VALUE.get(given)
        if asked and isinstance(value, torch.device):
            return True
        if asked and value is None and given.target is getattr and given.args[1] == "dtype":
            return isinstance(of, fx.Node) and _dtype_of(of) is own
        given = value.dtype if isinstance(value, nn.Parameter) else value
    return given is own
