"""What hangs on an answer: a forward followed once more, told otherwise, beside the forward as it was followed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from structrep.errors import Unreadable
from structrep.graph.calls import Call
from structrep.graph.facts import CALL, CONTEXTS, FORMULA, VALUE
from structrep.graph.operations import torch_name, writes
from structrep.graph.structures import proxies
from structrep.rewrite.followed import Followed
from structrep.rewrite.node_changes import NodeChanges
from structrep.trace.again import retrace

Key = tuple[str, str]  # of a read, in `Call.reads`
Where = tuple[Any, tuple[Any, ...]]  # a node, the id of a constant or a call, and the way to one of its arguments


@dataclass(frozen=True)
class ArgumentDifference:
    """An argument that is another, in the forward as it was followed."""

    where: Where
    before: Any
    after: Any


class Different(Exception):
    """Two forwards differ in more than what they hand to operations."""


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
        if again is None:
            return None
        asked = {key for call in self.followed.calls() for key in call.reads}
        if any(not call.reads.keys() <= asked or call.mutates for call in again.calls()):
            return None
        try:
            return Comparison(self.followed, again).differences
        except Different:
            return None

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


class Comparison:
    """Two traces of one call.

    Args:
        before, after: as it was followed, and as it is otherwise.

    Attributes:
        differences: arguments that are another; all else is the same.

    Raises:
        Different: more is.
    """

    def __init__(self, before: Followed, after: Followed) -> None:
        traces = before.traced, after.traced
        self.origins = traces[0].origins, traces[1].origins
        self.names: tuple[dict[int, Any], ...] = tuple({**one.entries, **one.names} for one in traces)
        self.differences: list[ArgumentDifference] = []
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.constants: dict[tuple[int, int], None] = {}
        first, second = before.call, after.call
        given = [proxies((call.args, call.kwargs)) for call in (first, second)]
        self.nodes |= {proxy.node: same.node for proxy, same in zip(*given, strict=True)}
        entries = list(before.steps()), list(after.steps())
        if len(entries[0]) != len(entries[1]):
            raise Different
        for one, other in zip(*entries, strict=True):
            self._step(one, other)
        self._pair(first.result, second.result, None, ())

    def _step(self, one: fx.Node | Call, other: fx.Node | Call) -> None:
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            if not _same_operation(one, other) or CONTEXTS.of(one) != CONTEXTS.of(other):
                raise Different
            self._pair(one.args, other.args, one, ("args",))
            self._pair(dict(one.kwargs), dict(other.kwargs), one, ("kwargs",))
            self.nodes[one] = other
        elif isinstance(one, Call) and isinstance(other, Call):
            if (one.path, one.method, one.contexts) != (other.path, other.method, other.contexts):
                raise Different
            self._pair(one.args, other.args, one, ("args",))
            self._pair(one.kwargs, other.kwargs, one, ("kwargs",))
            results = list(proxies(one.result)), list(proxies(other.result))
            if len(results[0]) != len(results[1]):
                raise Different
            for first, second in zip(*results, strict=True):
                self.nodes.setdefault(first.node, second.node)
            for (_, first_new), (_, second_new) in zip(one.written, other.written, strict=False):
                self.nodes.setdefault(first_new, second_new)
        else:
            raise Different

    def _pair(self, one: Any, other: Any, where: Any, way: tuple[Any, ...]) -> None:
        one = one.node if isinstance(one, fx.Proxy) else one
        other = other.node if isinstance(other, fx.Proxy) else other
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            self._pair_nodes(one, other)
        elif isinstance(one, Tensor) and isinstance(other, Tensor):
            self._pair_constants(one, other)
        elif isinstance(one, slice) and isinstance(other, slice):
            self._pair((one.start, one.stop, one.step), (other.start, other.stop, other.step), None, ())
        elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            if len(one) != len(other) or type(one) is not type(other):
                raise Different
            for place, (first, second) in enumerate(zip(one, other, strict=True)):
                self._pair(first, second, where, (*way, place))
        elif isinstance(one, dict) and isinstance(other, dict):
            if list(one) != list(other):
                raise Different
            for key in one:
                self._pair(one[key], other[key], where, (*way, key))
        elif is_dataclass(one) and type(one) is type(other) and not isinstance(one, type):
            for f in fields(one):
                self._pair(getattr(one, f.name), getattr(other, f.name), None, ())
        elif one is not other and (type(one) is not type(other) or one != other):
            if where is None:
                raise Different
            self.differences.append(
                ArgumentDifference((id(where) if isinstance(where, Tensor) else where, way), one, other)
            )

    def _pair_nodes(self, one: fx.Node, other: fx.Node) -> None:
        if one.op == "get_attr" and other.op == "get_attr":
            if VALUE.known(one) and VALUE.known(other):
                self._pair_constants(VALUE.of(one), VALUE.of(other))
            elif one.target != other.target:
                raise Different
        elif self.nodes.get(one) is not other:
            raise Different

    def _pair_constants(self, one: Tensor, other: Tensor) -> None:
        if (id(one), id(other)) in self.constants:
            return
        self.constants[id(one), id(other)] = None
        names = self.names[0].get(id(one)), self.names[1].get(id(other))
        if names[0] is not None or names[1] is not None:
            if names[0] != names[1]:
                raise Different
            return
        origins = self.origins[0].get(id(one)), self.origins[1].get(id(other))
        if origins[0] is None or origins[1] is None:
            if origins[0] is not origins[1] or one.shape != other.shape or not torch.equal(one, other):
                raise Different
            return
        if any(getattr(origins[0], name) != getattr(origins[1], name) for name in ("function", "contexts", "item")):
            raise Different
        self._pair(origins[0].args, origins[1].args, one, ("args",))
        self._pair(origins[0].kwargs, origins[1].kwargs, one, ("kwargs",))


def _same_operation(one: fx.Node, other: fx.Node) -> bool:
    if one.op == other.op and one.target == other.target:
        return True
    names = [torch_name(node).strip("_").removeprefix("i") for node in (one, other)]
    written = [writes(node) for node in (one, other)]
    # In place or not is the same, if nothing else looks at what is written to.
    alone = all(len(source.users) == 1 for sources in written for source in sources)
    return "call_module" not in (one.op, other.op) and names[0] == names[1] and any(written) and alone


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
