"""What a forward that is written anew takes to be as it was when it was traced, and guards that ask for it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn

from structrep.errors import Unreadable
from structrep.graph.calls import Entry
from structrep.graph.facts import FORMULA, VALUE
from structrep.graph.reads import MISSING, Read
from structrep.read.endings import ends
from structrep.rewrite import guards
from structrep.rewrite.guards import Guard
from structrep.rewrite.node_changes import NodeChanges
from structrep.rewrite.otherwise import Key
from structrep.rewrite.spelling import Spelling
from structrep.trace.class_reads import class_reads, methods_of, settings_given
from structrep.trace.followed import Followed
from structrep.trace.instructions import namespace_reads
from structrep.trace.reads import WHOLE


class Assumptions:
    """What a forward has asked for beside its arguments, and the tensors that are merged.

    Attributes:
        guards: that the answers are still the same.
        merged: plain tensors that are merged, by holder and a name there under which they are kept to compare with.
    """

    def __init__(self, followed: Followed, changes: NodeChanges, spelling: Spelling) -> None:
        self.followed, self.changes, self.spelling = followed, changes, spelling
        self.traced, self.call = followed.traced, followed.call
        self.guards: list[Guard] = []
        self.merged: dict[tuple[str, str], Entry] = {}

    def reads(self, answers: Container[Key]) -> dict[Key, Read]:
        """What it asked for as it was traced.

        Args:
            answers: reads that are left out.

        Raises:
            Unreadable: one of them no guard can ask again.
        """
        calls = self.followed.calls()
        asked = {
            key: read
            for call in calls
            for key, read in call.reads.items()
            if key not in answers and not self._is_of_a_layer(key, read)
        }
        for (path, _), read in asked.items():
            _check_stable(path, read)
            if read.text == WHOLE:
                raise Unreadable(f"{self.call.shown} looks at all attributes of {path or 'the model'} at once")
        return asked

    def _is_of_a_layer(self, key: Key, read: Read) -> bool:
        """Whether an answer is what layers are set to that will be gone, or others, or how many those are."""
        if isinstance(holder := read.holder, nn.ModuleDict):
            inside = (
                f"{key[0]}.{name}" for name, one in holder.named_modules() if not any(True for _ in one.children())
            )
            return self.changes.layers.issuperset(inside)
        return isinstance(holder, nn.Module) and key[0] in self.changes.layers and not ends(holder)

    def add(self, path: str, read: Read) -> None:
        """Guard an answer, if it matters.

        Args:
            path: of the module or tensor that was asked.
        """
        if read.told is MISSING:
            holder, _, name = self.spelling.read(path, read).rpartition(".")
            self.guards.append(guards.missing(f"{holder}.{name}", holder, name, self.call.shown))
            return
        if path in self.changes.homes and (read.of_numbers or read.text.endswith(".shape")):
            return  # of a tensor that is merged, which is no more set
        asked = self.spelling.read(path, read)
        held = isinstance(read.holder, nn.Module) and read.text[1:] in read.holder.__dict__
        named = asked.replace("structrep_is(", "isinstance(") if isinstance(read.holder, nn.Module) else read.of(path)
        made = guards.guard(asked, named, read.told, self.call.shown, scripted=held)
        if read.text == ".device" and isinstance(read.holder, Tensor) and path not in self.changes.homes:
            weight = self.changes.new_weight(self.call)
            first = next(self.call.module.parameters(), read.holder)
            if weight and first.device == read.told:  # as long as all are moved alike
                made = guards.alike(asked, f"{weight}.device", self.call.shown)
        if made is not None and read.of_numbers:
            made = replace(made, unlike=f"not structrep_is_exporting() and ({made.unlike})")
        if made is not None:
            self.guards.append(made)

    def add_names(self) -> None:
        """Guard what its code asks namespaces, closures and classes for, which nothing could note as it ran.

        Raises:
            Unreadable: the answer may be another at every call.
        """
        for one in self.followed.calls():
            function = one.code
            if isinstance(function, FunctionType) and not one.leaf:
                known = {code: function for code, (function, *_) in one.functions.items()}
                codes: list[Any] = [(code, space, known.get(code)) for code, space in one.codes.items()]
                methods = [function, *methods_of([function.__code__, *one.codes], one.module)]
                held = (getattr(value, "func", value) for value in vars(one.module).values() if callable(value))
                methods += [value for value in held if isinstance(value, FunctionType)]  # that it may call
                own = [(method.__code__, method.__globals__, method) for method in methods]
                for read in namespace_reads([*codes, *own], self.traced.unfollowed):  # own last: those are read first
                    _check_stable(one.path, read)
                    self.add("", read)
                for code, (_, of, path) in one.functions.items():
                    for read in class_reads([code], of):
                        self.add(path, read)
                own_codes = [*(method.__code__ for method in methods), *one.codes]
                for read in (*class_reads(own_codes, one.module), *settings_given(own_codes, one.module)):
                    self.add(one.path, read)

    def add_merged(self) -> None:
        """Guard tensors that are merged to be what they were, or to be gone: nothing else would see them set."""
        for node in (step for step in self.followed.steps() if isinstance(step, fx.Node)):
            merged = node in self.changes.dead or node in self.changes.ended
            for given in (n for n in node.all_input_nodes if n.op == "get_attr") if merged else ():
                formula = FORMULA.get(given)
                for tensor in formula.tensors if formula else (VALUE.get(given),):
                    self._add_tensor(tensor)

    def _add_tensor(self, tensor: Any) -> None:
        entry, path = self.traced.plain(tensor), self.traced.names.get(id(tensor), "")
        if entry is not None:
            alias = entry.alias
            while self.merged.setdefault((entry.holder, alias), entry) != entry:  # another of this name
                alias += "_"
            spelt = self.spelling.part(entry.holder)
            names = self.spelling.relative(entry.holder).split(".") if entry.holder != self.call.path else []
            above = [self.call.path] if self.call.path else []
            holders = [self.spelling.part(".".join([*above, *names[:depth]])) for depth in range(1, len(names) + 1)]
            made = guards.same(f"{spelt}{entry.text}", f"{spelt}.{alias}", holders, self.call.shown)
            self.guards.append(made)
        elif path and path.startswith(f"{self.call.path}." if self.call.path else ""):
            self.guards.append(guards.gone(self.spelling.part(path), self.call.shown))


def _check_stable(path: str, read: Read) -> None:
    if read.unstable:
        raise Unreadable(f"{path or 'the model'} asks {read.text}, whose answer may be another at every call")
