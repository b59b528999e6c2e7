"""The forward of one module, cut out of the flat graph of a model.

The recorded calls say which nodes a module's own code made and which its children did. Nodes that changes touch are
written out, with the changes made; untouched children stay calls of children.
"""

from __future__ import annotations

import functools
import operator
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.deployed.answers import NAMES
from structrep.deployed.methods import Method
from structrep.errors import Unreadable
from structrep.graph.calls import Call, Entry, site
from structrep.graph.reads import Read
from structrep.rewrite import guards
from structrep.rewrite.assumptions import Assumptions
from structrep.rewrite.body import Body
from structrep.rewrite.guards import Guard
from structrep.rewrite.node_changes import NodeChanges
from structrep.rewrite.observed import demand_same_for_all
from structrep.rewrite.otherwise import Key, Otherwise
from structrep.rewrite.parameters import Parameters
from structrep.rewrite.reads_again import ReadsAgain
from structrep.rewrite.spelling import Spelling
from structrep.trace.followed import Followed


@dataclass(eq=False)
class Forward:
    """The forward of one module, or another of its methods, as it is written anew.

    Args:
        guards: of arguments.
        reads: guards of what it has asked for beside them.
        ways: conditions on how it is run, and what it does then.
        names: that guards and questions use.
        merged: plain tensors that are merged, by holder and a name there.
    """

    call: Call
    body: Body
    guards: list[Guard]
    reads: list[Guard]
    ways: list[tuple[str, Forward | list[Guard]]]
    names: dict[str, Any]
    merged: dict[tuple[str, str], Entry]

    does_otherwise = True

    @property
    def constants(self) -> dict[str, Tensor]:
        """The tensors that it alone has, by name."""
        return self.body.constants.lifted

    def method(self, holds: Callable[[Guard], bool] = lambda guard: True) -> Method:
        """The method as text, with the guards for which something holds.

        Raises:
            Unreadable: that is no valid code.
        """
        head = self._code[0]
        source = f"{head}\n{textwrap.indent(self._text(holds), '    ')}\n"
        used = {name: value for name, value in self._known().items() if name in source}
        function = next(c for c in compile(source, self.call.method, "exec").co_consts if isinstance(c, CodeType))
        unused = {"device"} if "device(type=" not in source else set()  # written code always knows some names
        if clash := sorted((used.keys() - unused) & set(function.co_varnames[: function.co_argcount])):
            raise Unreadable(f"an argument named {clash[0]} clashes with what written code uses")
        names = {name: value for name, value in used.items() if name in function.co_names or name in head}
        method = Method.of(self.call.method, source, names)
        try:
            method.compile(f"<{self.call.method}>")
        except (SyntaxError, NameError) as error:
            raise Unreadable(f"{self.call.path or 'the model'}: its new forward is no valid code: {error}") from error
        return method

    def holding(self, module: nn.Module) -> set[Guard]:
        """The guards of what the forward has read that a module would pass."""
        inner = [way.holding(module) for _, way in self.ways if isinstance(way, Forward)]
        known = self._known()
        return {one for one in self.reads if one.passes(module, known)}.union(*inner)

    @functools.cached_property
    def _code(self) -> tuple[str, str, dict[str, Any]]:
        return self.body.code()

    def _text(self, holds: Callable[[Guard], bool]) -> str:
        """What the method does, as code."""
        lines = guards.code(self.guards)
        for condition, way in self.ways:
            inner = way._text(holds) if isinstance(way, Forward) else "\n".join(guards.code(way))
            lines += [f"if {condition}:", textwrap.indent(inner, "    ")]
        return "\n".join([*lines, *guards.code(filter(holds, self.reads)), self._code[1]]).rstrip()

    def _known(self) -> dict[str, Any]:
        """The names that the method's text may use."""
        known = {"torch": torch, **NAMES, **self._code[2], **self.names}
        for _, way in self.ways:
            known |= way._known() if isinstance(way, Forward) else {}
        return known


def written_anew(
    followed: Followed, changes: NodeChanges, answers: Mapping[Key, Any] = MappingProxyType({})
) -> Forward:
    """A forward cut out of the flat graph, with the changes made.

    Args:
        answers: what it was told otherwise than the forward that it is another way of.

    Raises:
        Unreadable: it takes values from elsewhere than its arguments, or cannot be written as code.
    """
    demand_same_for_all(followed, changes.vanishing)
    graph = fx.Graph()
    parameters = Parameters(followed.call)
    parameters.write(graph, followed.traced.observed)
    spelling = Spelling(followed, changes)
    otherwise = Otherwise(followed, answers)
    reads_again = ReadsAgain(otherwise, changes, spelling)
    assumptions = Assumptions(followed, changes, spelling)
    ways = Ways(otherwise, changes, spelling, reads_again, parameters.given)
    reads = assumptions.reads(answers)
    left = reads_again.note((key, read) for key, read in reads.items() if not read.where_am_i)
    assumptions.guards += reads_again.guards
    for (path, _), read in left:
        assumptions.add(path, read)
    for key, read in reads.items():
        if read.where_am_i:
            ways.add(key, read)
    assumptions.add_names()
    assumptions.add_merged()
    guards.check_settled(assumptions.guards, followed.call, others=False)
    body = Body(followed, changes, spelling, reads_again, ways.settled, graph, parameters.given)
    body.write()
    made = Forward(
        followed.call, body, parameters.guards, assumptions.guards, ways.found, spelling.names, assumptions.merged
    )
    made.method()
    return made


class Ways:
    """What a forward does where it is run otherwise: scripted, exported, on inputs of another dtype.

    Args:
        given: what comes in through its parameters.

    Attributes:
        found: a condition on how it is run, and what it does then; guards where that cannot be followed.
        settled: questions about inputs that need not be asserted.
    """

    def __init__(
        self,
        otherwise: Otherwise,
        changes: NodeChanges,
        spelling: Spelling,
        reads_again: ReadsAgain,
        given: Mapping[fx.Node, fx.Node],
    ) -> None:
        self.otherwise, self.changes, self.spelling = otherwise, changes, spelling
        self.reads_again, self.given, self.shown = reads_again, given, otherwise.followed.call.shown
        self.found: list[tuple[str, Forward | list[Guard]]] = []
        self.settled = set(otherwise.answers)
        self.excluded: dict[Key, Any] = {}  # answers that ways before have taken care of

    def add(self, key: Key, read: Read) -> None:
        """Follow the forward as it is run otherwise; write that too, if it does anything else then.

        Raises:
            Unreadable: that cannot be.
        """
        of_input = isinstance(read.holder, fx.Node)
        again = self.otherwise.told({key: not read.told})
        if self.otherwise.differences(again) == []:
            self.settled.add(key)
            return
        asked = self._comparison(read.holder) if of_input else self.spelling.read(key[0], read)
        if asked is None:
            return  # it is asserted where it is asked
        condition = f"not {asked}" if read.told else asked
        try:
            self.found.append((condition, self._written(key, read, again)))
            self.settled.add(key)
        except Unreadable:
            if read.text == "torch.jit.is_scripting()":  # that is not how it is run, but for who asks for it
                self.found.append((condition, [guards.never(read.text, self.shown)]))
            elif not of_input:
                raise
        self.excluded[key] = read.told

    def _written(self, key: Key, read: Read, again: Followed | None) -> Forward:
        if again is None:
            raise Unreadable(f"{self.shown} asks {read.text}, and cannot be followed where that is {not read.told}")
        again = Followed.of(again.traced, again.call, [one for one in again.calls() if site(one) in again.out])
        answers = {**self.otherwise.answers, **self.excluded, key: not read.told}
        where = f"where {read.text or 'the dtype of its input'} is {not read.told}"
        return written_anew(again, self.otherwise.changes(self.changes, again, where), answers)

    def _comparison(self, node: fx.Node) -> str | None:
        """A comparison of dtypes as code, of an argument of this forward; None if what is compared is made here."""
        sides: list[str] = []
        for place, side in enumerate(node.args):
            source = side.args[0] if isinstance(side, fx.Node) and side.target is getattr else None
            if isinstance(source, fx.Node):
                given = self.given.get(source)
                if given is None or given.op != "placeholder":
                    return None
                sides.append(f"{str(given.target).strip('*')}.dtype")
            else:
                sides.append(repr(self.reads_again.put(side, node, ("args", place))))
        return f"({sides[0]} {'==' if node.target is operator.eq else '!='} {sides[1]})"
