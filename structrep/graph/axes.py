"""Where the channels of a value go when its dims are moved: permuted, folded together and apart, rolled.

A dim is counted from the end, -1 the last, so that how many there are in front of it need not be known. Channels that a
reshape divides among several dims (the heads of an attention) are followed no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from structrep.graph.facts import CALL, SHAPE
from structrep.graph.operations import does, torch_name
from structrep.graph.shapes import argument, rank, sizes_told
from structrep.graph.table import Is, facts


def axis_before(node: fx.Node, axis: int, channels: int) -> int | None:
    """Where a dim of so many channels of what a node gives is in what it is given; None if it does not just move dims,
    or not knowably."""
    order = _order(node)
    if order is not None:
        return order[axis] - len(order) if -axis <= len(order) else None
    if does(node, Is.FOLDS):
        return axis if axis == -1 and _last_size(node.all_input_nodes[0]) == channels else None
    return axis if _leaves(node, axis) else None


def axis_after(node: fx.Node, axis: int, channels: int) -> int | None:
    """Where a dim of so many channels of what a node is given is in what it gives; None as for `axis_before`."""
    order = _order(node)
    if order is not None:
        return order.index(len(order) + axis) - len(order) if -axis <= len(order) else None
    if does(node, Is.FOLDS):
        return axis if axis == -1 and _last_size(node) == channels else None
    return axis if _leaves(node, axis) else None


def swaps_unknown_dims(node: fx.Node) -> bool:
    """Whether a node swaps dims of a value, and nothing says how many that has."""
    return _swaps(node) and rank(node) is None


def _swaps(node: fx.Node) -> bool:
    name = torch_name(node)
    return Is.PERMUTES in facts(name) and name != "permute"


def _last_size(node: fx.Node) -> int | None:
    """Size of a value's last dim: of the example, or as it is written down; None if neither says."""
    if SHAPE.known(node):
        return int(SHAPE.of(node)[-1]) if SHAPE.of(node) else None
    if node.op == "call_module" and isinstance(module := CALL.of(node).module, nn.Linear):
        return module.out_features
    *_, size = sizes_told(node) or (None,)
    return size if isinstance(size, int) and size > 0 else None


def _leaves(node: fx.Node, axis: int) -> bool:
    """Whether a node moves pixels along other dims only."""
    name = torch_name(node)
    if name == "roll":
        given = argument(node, 2, "dims")
    elif name == "flip":
        given = node.kwargs.get("dims", node.args[1:])
        given = given[0] if isinstance(given, tuple) and given and not isinstance(given[0], int) else given
    else:
        return False
    dims, known = _ints((given,) if isinstance(given, int) else given), rank(node)
    return dims is not None and known is not None and axis % known not in {dim % known for dim in dims}


def _order(node: fx.Node) -> list[int] | None:
    """Which dim of its input each dim of a permuted value is; None if a node does not permute all of them."""
    name = torch_name(node)
    if name == "permute":
        places = _ints(argument(node, 1, "dims") if not _ints(node.args[1:]) else node.args[1:])
        return [place % len(places) for place in places] if places else None
    if _swaps(node):
        known = rank(node)
        first, second = (argument(node, at, name) for at, name in ((1, "dim0"), (2, "dim1")))
        if known is None or not isinstance(first, int) or not isinstance(second, int):
            return None
        order = list(range(known))
        order[first], order[second] = order[second], order[first]
        return order
    return None


def _ints(value: Any) -> Sequence[int] | None:
    plain = isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value)
    return value if plain else None
