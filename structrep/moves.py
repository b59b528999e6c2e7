"""Where the channels of a value go when its dims are moved: permuted, folded together and apart, rolled.

A dim is counted from the end, -1 the last, so that how many there are in front of it need not be known. What a layer of
C features gives, and a scale of C numbers is given, is of C features at both ends; so a reshape whose last dim is that
of the scale on one side and of the layer on the other keeps the features as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from structrep.ranks import argument, rank, torch_name


def axis_before(node: fx.Node, axis: int) -> int | None:
    """Where a dim of what a node gives is in what it is given; None if it does not just move dims, or not knowably."""
    order = _order(node)
    if order is None:
        return _kept(node, axis)
    return order[axis] - len(order) if -axis <= len(order) else None


def axis_after(node: fx.Node, axis: int) -> int | None:
    """Where a dim of what a node is given is in what it gives; None as for `axis_before`."""
    order = _order(node)
    if order is None:
        return _kept(node, axis)
    return order.index(len(order) + axis) - len(order) if -axis <= len(order) else None


def _order(node: fx.Node) -> list[int] | None:
    """Which dim of its input each dim of a permuted value is; None if a node does not permute all of them."""
    name = torch_name(node)
    if name == "permute":
        places = _ints(argument(node, 1, "dims") if not _ints(node.args[1:]) else node.args[1:])
        return [place % len(places) for place in places] if places else None
    if name in ("transpose", "swapaxes"):
        known = rank(node)
        first, second = (argument(node, at, name) for at, name in ((1, "dim0"), (2, "dim1")))
        if known is None or not isinstance(first, int) or not isinstance(second, int):
            return None
        order = list(range(known))
        order[first], order[second] = order[second], order[first]
        return order
    return None


def _kept(node: fx.Node, axis: int) -> int | None:
    """The dim itself, where a node leaves it as it is."""
    name = torch_name(node)
    if name in ("view", "reshape", "flatten"):
        return axis if axis == -1 else None
    if name in ("roll", "flip"):
        dims = argument(node, 2, "dims") if name == "roll" else argument(node, 1, "dims")
        dims, known = _ints([dims] if isinstance(dims, int) else dims), rank(node)
        apart = dims is not None and known is not None and axis % known not in {dim % known for dim in dims}
        return axis if apart else None
    return None


def _ints(value: Any) -> Sequence[int] | None:
    plain = isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value)
    return value if plain else None
