"""Answers that a forward only hands to operations: where these are written, the read is written in their place."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from structrep.graph.calls import Call
from structrep.graph.facts import AT
from structrep.graph.reads import Read
from structrep.graph.structures import proxies
from structrep.modules import positions
from structrep.rewrite import guards
from structrep.rewrite.guards import Guard
from structrep.rewrite.node_changes import NodeChanges
from structrep.rewrite.otherwise import Key, Otherwise, alternatives
from structrep.rewrite.spelling import Spelling
from structrep.trace.comparison import Where
from structrep.trace.reads import INPUTS

_HANDED = (bool, int, float, str, tuple, list, type(None), torch.dtype, torch.device)


class ReadsAgain:
    """The arguments of operations, constants and calls that are answers to what a forward asked.

    Args:
        otherwise: the forward, which is told otherwise to see what hangs on an answer.

    Attributes:
        texts: the reads, as code, by where they stand.
        guards: that answers are the same of which one is asked for.
    """

    def __init__(self, otherwise: Otherwise, changes: NodeChanges, spelling: Spelling) -> None:
        self.otherwise, self.changes, self.spelling = otherwise, changes, spelling
        self.followed, self.call = otherwise.followed, otherwise.followed.call
        self.texts: dict[Where, _Text] = {}
        self.guards: list[Guard] = []

    @functools.cached_property
    def changed(self) -> set[fx.Node]:
        """The nodes that are not written as they are."""
        return self.changes.changed

    def put(self, value: Any, where: Any, way: tuple[Any, ...]) -> Any:
        """An argument, with what is asked for again as code."""
        if not self.texts:
            return value
        if (where, way) in self.texts:
            return self.texts[where, way]
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return type(value)(self.put(item, where, (*way, place)) for place, item in enumerate(value))
        if isinstance(value, dict):
            return {key: self.put(item, where, (*way, key)) for key, item in value.items()}
        return value

    def is_of(self, node: fx.Node) -> bool:
        """Whether a node has such an argument."""
        return any(where is node for where, _ in self.texts)

    def note(self, reads: Iterable[tuple[Key, Read]]) -> list[tuple[Key, Read]]:
        """Note what is asked for again; gives the reads on whose answers more hangs."""
        staying, calls = set(self.followed.steps()), list(self.followed.calls())
        done = {
            call: [(step, at) for step in call.steps if step in staying and (at := _at(step)) is not None]
            for call in calls
        }
        left: list[tuple[Key, Read]] = []
        for key, read in reads:
            found = self._handed_by_code(key, [call for call in calls if key in call.reads], done)
            found = self._handed_as_seen(key, read) if found is None else found
            if found is None:
                left.append((key, read))
            elif found:
                self._note(found, self.spelling.read(key[0], read))
        cast = self._note_cast(left)
        return [(key, read) for key, read in left if key not in cast]

    def _note(self, found: Set[Where], text: str) -> None:
        self.texts |= dict.fromkeys(found, _Text(text))

    def _note_cast(self, reads: Sequence[tuple[Key, Read]]) -> set[Key]:
        """Note of reads of dtypes those that have one answer, if to change it for all, inputs too, is what casting
        the model does; gives those. Others of them than the first are guarded to be as that is."""
        for dtype in {read.told for _, read in reads if isinstance(read.told, torch.dtype)}:
            same = [(key, read) for key, read in reads if read.told == dtype and isinstance(read.holder, Tensor)]
            found = self._handed(dtype, [*(key for key, _ in same), INPUTS]) if same else None
            if found is None:
                continue
            texts = [self.spelling.read(key[0], read) for key, read in same]
            self._note(found, texts[0])
            others = (text for text in texts if text != texts[0])
            self.guards += [guards.alike(text, texts[0], self.call.shown) for text in others]
            return {key for key, _ in same}
        return set()

    def _handed_by_code(
        self, key: Key, calls: Sequence[Call], done: Mapping[Call, list[tuple[fx.Node | Call, int]]]
    ) -> set[Where] | None:
        """The arguments that an answer is, if the code hands it to operations as it is each time that it has asked;
        None if not.

        Args:
            calls: those that ask.
            done: the steps that each call's own code does, and by which instruction.
        """
        found: set[Where] = set()
        for call in calls:
            code, read = call.bytecode, call.reads[key]
            for places in {one: read.places.count(one) for one in read.places}.items():
                (asking, at, deep), count = places
                handed = positions.argument(asking, at, deep) if asking is code and type(read.told) in _HANDED else None
                if handed is None:
                    return None
                operation, (kind, place) = handed
                takers = [step for step, made in done[call] if positions.place(asking, made) is operation]
                if len(takers) != count or not self.changed.isdisjoint(takers):
                    return None
                for taker in takers:
                    behind = isinstance(taker, fx.Node) and taker.op == "call_method" and kind == "args"
                    method = behind and not isinstance(operation, ast.BinOp)
                    where = place + 1 if method and isinstance(place, int) else place
                    try:
                        given = getattr(taker, kind)[where]
                    except (IndexError, KeyError):
                        return None
                    if type(given) is not type(read.told) or given != read.told:
                        return None
                    found.add((taker, (kind, where)))
        return found

    def _handed_as_seen(self, key: Key, read: Read) -> set[Where] | None:
        """The arguments that an answer is, by what is another when the forward is told otherwise; None if anything else
        hangs on it."""
        matters = isinstance(read.told, bool) and isinstance(read.holder, nn.Module) and "inplace" not in read.text
        # Most flags change what is computed: to find out is dear, and a guard costs nothing.
        if not read.counts or matters:
            return None
        handed = self.followed.traced.handed
        similar, done = self._similar(key, read), list(self.followed.steps())
        if similar in handed:
            return _at_places(handed[similar], dict(enumerate(done)))
        found = self._handed(read.told, [key])
        if not any(isinstance(where, int) for where, _ in found or ()):  # a constant of this forward alone
            handed[similar] = _at_places(found, {step: place for place, step in enumerate(done)})
        return found

    def _handed(self, told: Any, keys: list[Key]) -> set[Where] | None:
        """The arguments that an answer is, whatever it is; None if anything else hangs on it.

        Args:
            keys: the reads that have this answer.
        """
        found: set[Where] | None = None
        for other in alternatives(told):
            again = self.otherwise.told(dict.fromkeys(keys, other))
            if again is None and isinstance(other, torch.device):
                continue  # constants cannot be made where there is no such device
            differences = self.otherwise.differences(again)
            if differences is None or any(one.before != told or one.after != other for one in differences):
                return None
            places = {one.where for one in differences}
            if any(where in self.changed for where, _ in places) and not isinstance(told, torch.dtype):
                return None
            if found is not None and places != found:
                return None
            found = places
        return found

    def _similar(self, key: Key, read: Read) -> tuple[Any, ...]:
        """What tells forwards apart of which the same hangs on an answer: most modules of a class do the same."""
        done = tuple(
            (step.path.removeprefix(self.call.path), step.method)
            if isinstance(step, Call)
            else (
                step.op,
                str(step.target).removeprefix(self.call.path),
                len(step.all_input_nodes),
                str(step.kwargs.keys()),
            )
            for step in self.followed.steps()
        )
        alone = tuple(len(proxy.node.users) == 1 for proxy in proxies((self.call.args, self.call.kwargs)))
        told = tuple((text, repr(one.told)) for (_, text), one in self.call.reads.items())
        answers = tuple(map(str, self.otherwise.answers.items()))
        given = tuple(map(repr, pytree.tree_leaves((self.call.args, self.call.kwargs))))
        module, of = self.call.module, (key[0].removeprefix(self.call.path), key[1], repr(read.told))
        held = (module._modules, module._parameters, module._buffers)
        parts = tuple((name, type(part)) for one in held for name, part in one.items())
        return type(module), self.call.method, of, done, alone, told, answers, given, parts


class _Text:
    """Code that stands for a value."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _at(step: fx.Node | Call) -> int | None:
    """The instruction by which the code of a call does a step."""
    found: int | None = step.at if isinstance(step, Call) else AT.of(step)
    return found


def _at_places(found: set[Where] | None, places: Mapping[Any, Any]) -> set[Where] | None:
    """Arguments, their operations by the places in a forward that these have, or the other way round."""
    return {(places.get(where, where), way) for where, way in found} if found else found
