"""Sums of three values and more, whose order of additions nobody chose: `a + b + c` is `a + c + b`.

A graph has a node for each addition, and a merge takes all that one node adds up. So where b does not merge with a and
c, the sum is put into the order in which a and c do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence, Set
from functools import reduce

import torch
from torch import fx

from structrep.readers import aliases, writers

Merges = Callable[[Sequence[fx.Node], Sequence[fx.Node]], bool]


def reorder(graph: fx.Graph, done: Set[fx.Node], merges: Merges) -> bool:
    """Add up first what merges, in every sum of which it is not all; whether a sum has another order now.

    Args:
        graph: of nodes that know their call and their place.
        done: additions that are part of a merge.
        merges: whether some addends of a sum would merge, given its additions, the last of which is the sum.
    """
    changed = False
    for root in list(graph.nodes):
        if not _is_sum(root) or root in done or _sum_of(root) is not None:
            continue
        additions = sorted(_additions(root, done), key=lambda node: int(node.meta["index"]))
        addends = list(_addends(root, {*additions}))
        if len(addends) > 2 and not _overwritten(addends, additions):
            groups = _grouped(addends, lambda some: merges(some, additions))  # noqa: B023
            written = [{*_addends(addition, {*additions})} for addition in additions]
            if any(len(group) > 1 and {*group} not in written for group in groups):
                _write(additions, groups)
                changed = True
    if changed:
        for index, node in enumerate(graph.nodes):
            node.meta["index"] = index
    return changed


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values, and writes to none that is looked at again."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(one, fx.Node) for one in node.args):
        return False
    if node.meta["autocast"] or node.meta.get("kept"):
        return False
    if node.target is operator.iadd:
        return _is_sum(_both(node)[0]) and _sum_of(_both(node)[0]) is node
    return node.target in (operator.add, torch.add) or (node.op, node.target) == ("call_method", "add")


def _sum_of(addition: fx.Node) -> fx.Node | None:
    """The sum, of the same forward, that alone takes what this one is."""
    (user, *more) = addition.users or (None,)
    if user is None or more or user.args.count(addition) != 1 or user.meta["call"] is not addition.meta["call"]:
        return None
    if user.target is operator.iadd:
        return user if user.args[0] is addition and isinstance(user.args[1], fx.Node) and not user.kwargs else None
    return user if _is_sum(user) else None


def _both(addition: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = addition.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return left, right


def _additions(root: fx.Node, done: Set[fx.Node]) -> Iterator[fx.Node]:
    pending = [root]
    while pending:
        node = pending.pop()
        yield node
        pending += [one for one in _both(node) if _is_sum(one) and one not in done and _sum_of(one) is node]


def _addends(node: fx.Node, additions: Set[fx.Node]) -> Iterator[fx.Node]:
    for one in _both(node):
        yield from _addends(one, additions) if one in additions else (one,)


def _overwritten(addends: Sequence[fx.Node], additions: Sequence[fx.Node]) -> bool:
    """Whether an addend is another value by the time that the last addition is made."""
    first = additions[0].meta["index"]
    return any(writer.meta["index"] > first for one in addends for writer in writers(aliases(one)))


def _grouped(addends: Sequence[fx.Node], merge: Callable[[Sequence[fx.Node]], bool]) -> list[list[fx.Node]]:
    groups: list[list[fx.Node]] = []
    for one in addends:
        home = next((group for group in groups if merge([*group, one])), None)
        if home is None:
            groups.append([one])
        else:
            home.append(one)
    return groups


def _write(additions: Sequence[fx.Node], groups: Sequence[Sequence[fx.Node]]) -> None:
    *inner, root = additions
    for addition in inner:  # all addends are there by the last one
        root.prepend(addition)
    free = iter(additions)

    def add(left: fx.Node, right: fx.Node) -> fx.Node:
        addition = next(free)
        addition.op, addition.target, addition.args = "call_function", operator.add, (left, right)
        return addition

    reduce(add, [reduce(add, group) for group in groups])
