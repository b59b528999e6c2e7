"""Sums of three values and more, whose order of additions nobody chose: `a + b + c` is `a + c + b`.

A graph has a node for each addition, and a merge takes all that one node adds up. So where b does not merge with a and
c, the sum is put into an order in which a and c do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import fx

from structrep.graph.aliases import aliases, writers
from structrep.graph.calls import Trace
from structrep.graph.facts import AUTOCAST, CALL, COUNTS_SIZES, INDEX, RANK, REORDERED, STORED
from structrep.graph.operations import torch_name
from structrep.graph.structures import proxies

Merges = Callable[[Sequence[fx.Node], Sequence[fx.Node]], bool]


@dataclass(frozen=True, eq=False)
class Reordered:
    """A sum whose additions are no more what they were: for each, what it called, and on what, as it was traced."""

    were: dict[fx.Node, tuple[str, Any, tuple[Any, ...]]]

    @classmethod
    def note(cls, additions: Sequence[fx.Node]) -> Callable[[], None]:
        """Note what some additions are before they are rewritten, perhaps once more; what undoes it."""
        before = {one: reordered(one) for one in additions}
        earlier = [found for found in before.values() if found is not None]
        were = {one: (one.op, one.target, one.args) for one in additions}
        whole = cls({**were, **{one: was for found in earlier for one, was in found.were.items()}})
        before |= {one: found for found in earlier for one in found.were}
        for one in whole.were:
            REORDERED.note(one, whole)

        def undo() -> None:
            for one, found in before.items():
                REORDERED.note(one, found)

        return undo


def reordered(node: fx.Node) -> Reordered | None:
    """The sum that an addition is of, if that is in another order than it was traced in."""
    found: Reordered | None = REORDERED.get(node)
    return found


def as_traced(node: fx.Node, but: Set[Reordered] = frozenset()) -> tuple[str, Any, tuple[Any, ...]]:
    """What a node called, and on what, before its sum was put into another order; with these sums, as it is."""
    found = reordered(node)
    return (node.op, node.target, node.args) if found is None or found in but else found.were[node]


@dataclass(frozen=True, eq=False)
class Order:
    """Another order of the sums of a graph, which is as it was until the order is taken.

    Args:
        sums: for each sum its additions that are made otherwise, and the groups of addends that are added up first.
    """

    trace: Trace
    sums: Sequence[tuple[Sequence[fx.Node], Sequence[Sequence[fx.Node]]]]

    def take(self) -> Callable[[], None]:
        """Write the sums in this order, and the steps of their calls; what undoes it."""
        steps = [_write(additions, groups) for additions, groups in self.sums]
        _place(self.trace)

        def undo() -> None:
            for step in reversed(steps):
                step()
            _place(self.trace)

        return undo


def order(trace: Trace, done: Set[fx.Node], merges: Merges) -> Order | None:
    """The order in which what merges is added up first, in every sum of which it is not all; None if that is the order
    of all sums.

    Args:
        done: additions that are part of a merge.
        merges: whether some addends of a sum would merge, given its additions, the last of which is the sum.
    """
    passed = {one.node for call in trace.calls for one in proxies((call.args, call.kwargs, call.result))}
    passed |= {node for call in trace.calls for written in call.written for node in written}
    sums: list[tuple[Sequence[fx.Node], Sequence[Sequence[fx.Node]]]] = []
    for root in trace.nodes:
        if not _is_sum(root) or root in done or _sum_of(root, passed) is not None:
            continue
        additions = list(_additions(root, lambda one: one not in done and _sum_of(one, passed) is not None))
        addends = list(_addends(root, additions))
        repeated = len({*addends}) < len(addends)  # groups are of addends, each of which stands once
        if len(addends) < 3 or repeated or _overwritten(addends, additions):
            continue
        groups = [some for some in _grouped(addends, lambda some: merges(some, additions)) if len(some) > 1]  # noqa: B023
        written = [{*_addends(addition, additions)} for addition in additions]
        if any({*group} not in written for group in groups):
            merged = {one for group in groups for one in group}
            # What adds up nothing that merges stays: numbers that are no floats may not be added up otherwise.
            additions = [one for one in additions if not merged.isdisjoint(_addends(one, additions))]
            others = [[one] for one in _addends(root, additions) if one not in merged]
            sums.append((additions, [*groups, *others]))
    return Order(trace, sums) if sums else None


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values, and writes to neither."""
    plain = len(node.args) == 2 and not node.kwargs and all(isinstance(one, fx.Node) for one in node.args)
    return torch_name(node) == "add" and plain and not AUTOCAST.of(node) and not STORED.get(node)


def _sum_of(addition: fx.Node, passed: Set[fx.Node]) -> fx.Node | None:
    """The sum, of the same forward, that alone takes what this one is; None if more see it."""
    (user, *more) = addition.users or (None,)
    if user is None or more or addition in passed or not _is_sum(addition) or not _is_sum(user):
        return None
    return user if user.args.count(addition) == 1 and CALL.of(user) is CALL.of(addition) else None


def _both(addition: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = addition.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return left, right


def _additions(root: fx.Node, inner: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The additions of a sum, in the order of the graph."""
    found = [root]
    for one in found:
        found += filter(inner, _both(one))
    return sorted(found, key=lambda node: int(INDEX.of(node)))


def _addends(node: fx.Node, additions: Sequence[fx.Node]) -> Iterator[fx.Node]:
    inner, pending = {*additions}, [*reversed(_both(node))]
    while pending:
        one = pending.pop()
        if one in inner:
            pending += reversed(_both(one))
        else:
            yield one


def _overwritten(addends: Sequence[fx.Node], additions: Sequence[fx.Node]) -> bool:
    """Whether an addend is another value by the time that the last addition is made."""
    first = INDEX.of(additions[0])
    return any(INDEX.of(writer) > first for one in addends for writer in writers(aliases(one)))


def _grouped(addends: Sequence[fx.Node], merge: Callable[[Sequence[fx.Node]], bool]) -> list[list[fx.Node]]:
    groups: list[list[fx.Node]] = []
    for one in addends:
        home = next((group for group in groups if merge([*group, one])), None)
        if home is None:
            groups.append([one])
        else:
            home.append(one)
    return groups


def _write(additions: Sequence[fx.Node], groups: Sequence[Sequence[fx.Node]]) -> Callable[[], None]:
    """Add up the groups, each for itself, then all; what undoes it."""
    *inner, root = additions
    steps = CALL.of(root).steps
    earlier = list(steps)
    were = [(one, one.op, one.target, one.args, one.next) for one in additions]
    for addition in inner:  # all addends are there by the last one
        root.prepend(addition)
        steps.remove(addition)
        steps.insert(steps.index(root), addition)
    forget = Reordered.note(additions)
    free = iter(additions)

    def add(left: fx.Node, right: fx.Node) -> fx.Node:
        addition = next(free)
        addition.op, addition.target, addition.args = "call_function", operator.add, (left, right)
        return addition

    reduce(add, [reduce(add, group) for group in groups])

    def undo() -> None:
        for one, op, target, args, following in reversed(were):
            one.op, one.target, one.args = op, target, args
            following.prepend(one)
        steps[:] = earlier
        forget()

    return undo


def _place(trace: Trace) -> None:
    """Note places anew, and forget what was made of the old order."""
    for index, node in enumerate(trace.graph.nodes):
        INDEX.note(node, index)
        for made_of_others in (RANK, COUNTS_SIZES):
            made_of_others.forget(node)
