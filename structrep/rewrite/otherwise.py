"""What hangs on an answer: a forward followed once more, told otherwise, beside the forward as it was followed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from structrep.errors import Unreadable
from structrep.graph.facts import CALL, CONTEXTS, FORMULA, VALUE
from structrep.graph.operations import writes
from structrep.graph.structures import proxies
from structrep.rewrite.node_changes import NodeChanges
from structrep.trace.again import retrace
from structrep.trace.comparison import ArgumentDifference, differences
from structrep.trace.followed import Followed

Key = tuple[str, str]  # of a read, in `Call.reads`


def alternatives(told: Any) -> list[Any]:
    """The other answers to a read, if they are few; none for a dtype that no model is cast to."""
    if isinstance(told, bool):
        return [not told]
    if isinstance(told, torch.dtype):
        known = [torch.bfloat16, torch.float16, torch.float64, torch.float32]
        return [dtype for dtype in known if dtype != told] if told in known else []
    if isinstance(told, torch.device):
        return [torch.device(kind) for kind in ("meta", "cpu", "cuda", "mps") if kind != told.type]
    return []


class Otherwise:
    """A forward as it is when it is told otherwise.

    Args:
        answers: what it was told otherwise already.
    """

    def __init__(self, followed: Followed, answers: Mapping[Key, Any]) -> None:
        self.followed, self.answers = followed, answers

    def told(self, answers: Mapping[Key, Any]) -> Followed | None:
        """The forward followed once more with other answers; None if that cannot be."""
        again = retrace(self.followed.traced, self.followed.call, {**self.answers, **answers})
        return None if again is None else Followed(*again, self.followed.out)

    def differences(self, again: Followed | None) -> list[ArgumentDifference] | None:
        """The arguments that differ in the forward as it is now; None if more does, or it was not followed again."""
        return None if again is None else differences(self.followed, again)

    def changes(self, changes: NodeChanges, again: Followed, where: str) -> NodeChanges:
        """The changes of the forward as it is when told otherwise.

        Args:
            where: how that is, as a message says it.

        Raises:
            Unreadable: it would not do the same with what is merged.
        """
        same = counterparts(self.followed, again)
        self._check_merged(changes, again, {new: old for old, new in same.items()}, where)
        return changes.carried(same)

    def _check_merged(self, changes: NodeChanges, again: Followed, back: Mapping[fx.Node, fx.Node], where: str) -> None:
        """Raise where what it does only when told otherwise is about what is merged."""
        shown = self.followed.call.shown
        for node in (one for one in again.call.nodes() if one not in back):
            if copied(node) is not None:
                continue  # what is made of it matters
            if writes(node):
                raise Unreadable(f"{shown} writes in place {where}")
            formulas = [FORMULA.of(n).tensors for n in node.all_input_nodes if FORMULA.get(n)]
            made_of = [*itertools.chain(*formulas), *(VALUE.get(n) for n in node.all_input_nodes)]
            held = {again.traced.names.get(id(tensor)) for tensor in made_of}
            if str(node.target) in changes.layers if node.op == "call_module" else held & changes.homes.keys():
                raise Unreadable(f"{shown} does not use {node.name} as it is merged {where}")
            if gone := {n for n in node.all_input_nodes if back.get(n) in changes.vanishing}:
                raise Unreadable(f"{shown} uses {next(iter(gone)).name}, which would be gone, {where}")
        given = {proxy.node for proxy in proxies(self.followed.call.result)}
        for proxy in proxies(again.call.result):
            if back.get(proxy.node) in changes.vanishing - given:
                raise Unreadable(f"{shown} gives back {proxy.node.name}, which would be gone, {where}")


def counterparts(before: Followed, after: Followed) -> dict[fx.Node, fx.Node]:
    """The nodes of a call that was followed otherwise which do what nodes of the call as it was followed do: those, by
    these."""
    known: dict[Any, int] = {}
    first, second = _Numbers(before, known), _Numbers(after, known)
    same = {first.number(node): node for node in before.call.nodes()}
    found = {same[number]: node for node in after.call.nodes() if (number := second.number(node)) in same}
    calls = before.call, after.call
    given = zip(*(proxies((call.args, call.kwargs)) for call in calls), strict=True)
    return found | {one.node: other.node for one, other in given}


def copied(node: fx.Node) -> Tensor | None:
    """The constant that a node gives as it is: `weight.to(dtype=x.dtype)`."""
    found = VALUE.get(node)
    given = (VALUE.of(n) for n in node.all_input_nodes if n.op == "get_attr" and VALUE.known(n))
    same = (one for one in given if isinstance(found, Tensor) and one.shape == found.shape and one.dtype == found.dtype)
    return next((one for one in same if torch.equal(one, found)), None) if isinstance(found, Tensor) else None


class _Numbers:
    """What each node of a call computes, as a number that is the same in another trace."""

    def __init__(self, of: Followed, known: dict[Any, int]) -> None:
        self.traced, call = of.traced, of.call
        self.known = known
        self.counts: dict[Any, int] = {}
        self.numbers: dict[fx.Node, Any] = {
            proxy.node: ("given", place) for place, proxy in enumerate(proxies((call.args, call.kwargs)))
        }

    def number(self, node: fx.Node) -> int:
        args, kwargs = node.args, dict(node.kwargs)
        if len(args) == 2 and "bias" in kwargs:  # which is the third of all layers as functions
            args = (*args, kwargs.pop("bias"))
        where = CALL.of(node).path, CONTEXTS.of(node)
        made = node.op, str(node.target), where, self._of(args), self._of(kwargs)
        count = self.counts[made] = self.counts.get(made, 0) + 1
        self.numbers[node] = number = self.known.setdefault((made, count), len(self.known))
        return number

    def _of(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return self._constant(VALUE.of(value)) if VALUE.known(value) else str(value.target)
            if (same := copied(value)) is not None:
                return self._constant(same)
            return self.numbers.get(value, id(value))
        if isinstance(value, Tensor):
            return self._constant(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(self._of, value))
        if isinstance(value, Mapping):
            return tuple((key, self._of(one)) for key, one in value.items())
        if isinstance(value, slice):
            return "slice", self._of((value.start, value.stop, value.step))
        return type(value).__name__, repr(value)

    def _constant(self, tensor: Tensor) -> Any:
        if (held := self.traced.names.get(id(tensor), self.traced.entries.get(id(tensor)))) is not None:
            return held
        origin = self.traced.origins.get(id(tensor))
        if origin is None:
            return tuple(tensor.shape), str(tensor.dtype), tuple(tensor.flatten()[:64].tolist())
        name = getattr(origin.function, "__name__", repr(origin.function))
        return name, origin.item, self._of(origin.args), self._of(origin.kwargs)
