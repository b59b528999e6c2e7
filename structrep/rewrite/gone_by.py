"""What the text went by that vanishes in an edit: settings, parts, names outside. A guard asks for each again, or the
edit is none."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import replace
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn

from structrep.errors import Unreadable
from structrep.graph.calls import Call
from structrep.graph.facts import INDEX, VALUE
from structrep.graph.reads import Read
from structrep.graph.structures import proxies
from structrep.modules.objects import is_object
from structrep.modules.positions import parts_of, place
from structrep.modules.presence import path_to
from structrep.rewrite import guards
from structrep.rewrite.guards import Guard
from structrep.rewrite.node_changes import NodeChanges
from structrep.rewrite.syntax import in_place_alike
from structrep.rewrite.wanted import Edited
from structrep.trace.followed import Followed
from structrep.trace.instructions import namespace_reads

_OF_LAYERS = (nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd, nn.Linear, nn.LayerNorm, nn.GroupNorm)


class GoneBy:
    """What the vanishing text of a method went by.

    Args:
        function: what runs.
        found: the edit.
        mentions: paths of what the rest of the method asks its module for.
        answer: of a condition that is known, how it is spelt and the answer.
        of_rank: the same of a condition on how many dims an argument has.
        computing: by path, the methods that it may call which only compute, with those that they may come to.
    """

    def __init__(
        self,
        followed: Followed,
        function: FunctionType,
        found: Edited,
        mentions: set[str],
        answer: Callable[[ast.AST], tuple[str, bool] | None],
        of_rank: Callable[[ast.expr], tuple[str, bool] | None],
        computing: Mapping[str, frozenset[FunctionType]],
        changes: NodeChanges,
    ) -> None:
        self.followed, self.call, self.found = followed, followed.call, found
        self.mentions, self.answer, self.of_rank = mentions, answer, of_rank
        self.computing, self.changes = computing, changes
        self.function, self.code, self.space = function, function.__code__, function.__globals__
        self.reads: list[Guard] = []
        self.asked: list[Guard] = []  # of parts that vanish: for as long as nothing is applied

    def note(self) -> None:
        """Note guards.

        Raises:
            Unreadable: it went by what holds for the example alone, or by what no guard can ask for.
        """
        self._check_observed()
        self._check_outside()
        helped = self._check_helpers()
        vanished, assumed = self.found.vanished, {node for test in self.found.assumed for node in ast.walk(test)}
        choices = (one for one in vanished if isinstance(one, ast.IfExp) and in_place_alike(one))
        assumed |= {node for one in choices for node in ast.walk(one.test)}  # whose answer is of no matter
        counted = any(isinstance(one, ast.Name) and one.id == "len" for one in vanished)
        for (path, _), read in self.call.reads.items():
            asked = [place(code, at) if code is self.code else None for code, at, _ in read.places]
            computed = helped or isinstance(read.holder, nn.Module)  # by a property, say
            if any((one in vanished and one not in assumed) if one is not None else computed for one in asked):
                self._note(path, read, counted)
        self.reads += [made for test in self.found.assumed for made in self._assumed(test)]
        for one in self._vanished_calls():
            for (path, _), read in one.reads.items():
                if any(f"{path}.".startswith(f"{part.path}.") for part in self._parts_around(one)):
                    self.asked += self._guard(path, read, asked_still=False)
                else:
                    self._note(path, read, counted=True)
            if isinstance(one.code, FunctionType) and not one.leaf:
                self._check_names(one.code)

    def _check_observed(self) -> None:
        """Raise if vanishing text was told what holds for the example alone."""
        told = [one for call in self._vanished_calls() for one in call.observed()]
        guarded = {node for test in self.found.assumed if self.of_rank(test) is not None for node in ast.walk(test)}
        gone = self.found.vanished - guarded
        for one in filter(self._matters, self.followed.calls()):
            here = one is self.call
            told += [
                (one, answer) for answer in one.specializations
                if not here or answer.code is not self.code or place(self.code, answer.at) in gone
            ]  # fmt: skip
        for asker, answer in told:
            raise Unreadable(f"{asker.shown} asks {answer}, which holds for the example alone")

    def _matters(self, one: Call) -> bool:
        """Whether what a method was told has to do with what is merged: not of one whose call stays, and that neither
        takes nor gives what will be another."""
        around = list(itertools.takewhile(lambda call: call is not self.call, one.chain()))
        if not around:
            return True
        text = place(self.code, around[-1].at) if around[-1].at is not None else None
        seen = {proxy.node for call in around for proxy in proxies((call.args, call.kwargs, call.result))}
        return text is None or text in self.found.vanished or not seen.isdisjoint(self.changes.vanishing)

    def _check_outside(self) -> None:
        """Raise if vanishing text asks how things stand outside of the model."""
        texts = {ast.unparse(one) for one in self.found.vanished if isinstance(one, (ast.Call, ast.Attribute))}
        for read in namespace_reads([(self.code, self.space, self.function)]) if texts else ():
            if read.text in texts:
                raise Unreadable(f"{self.call.shown} goes by {read.text}, which may be another later")

    def _check_helpers(self) -> bool:
        """Whether vanishing text calls functions of the user's.

        Raises:
            Unreadable: one of them goes by what may be set outside of it.
        """
        helpers = [one for one in self.found.vanished if isinstance(one, ast.Call) and self._is_of_others(one)]
        for helper in helpers:
            held = self.space.get(helper.func.id) if isinstance(helper.func, ast.Name) else None
            for one in self.computing.get(path_to(helper.func, self.code.co_varnames[0]) or "", ()):
                self._check_names(one)
            if is_object(held):
                raise Unreadable(f"{self.call.shown} goes by {ast.unparse(helper.func)}, which may be set")
            if isinstance(held, FunctionType):
                self._check_names(held)
                if _may_change((held.__defaults__, tuple((held.__kwdefaults__ or {}).values()))):
                    raise Unreadable(f"{self.call.shown} goes by a default of {held.__name__}, which may change")
        return bool(helpers)

    def _parts_around(self, one: Call) -> Iterator[Call]:
        """The parts that go with a call: what they are set to, or cast to, matters no more."""
        around = itertools.takewhile(lambda call: call is not self.call, one.chain())
        parts = (call for call in around if call.method == "forward" and call.module is not self.call.module)
        return (part for part in parts if part.path not in self.mentions)

    def _check_names(self, function: FunctionType) -> None:
        """Raise if a function goes by what may be set outside of it."""
        for read in namespace_reads([(function.__code__, function.__globals__, function)]):
            of_function = read.text.endswith(".__defaults__") and not _may_change((read.told,))
            if guards.unlike("it", read.told) is not None and not of_function:
                raise Unreadable(f"{self.call.shown} goes by {read.text}, which may be set to something else")

    def guard_tensors(self, gone: set[fx.Node]) -> None:
        """Guard tensors of the module itself that are merged to be None, as they are then, or there where the text
        still asks for them: they may be set later."""
        merged = sorted(gone, key=INDEX.of)  # guards in one order, every time
        held = (given for node in merged for given in node.all_input_nodes if VALUE.known(given))
        paths = dict.fromkeys(self.followed.traced.names.get(id(VALUE.of(given)), "") for given in held)
        for holder, _, name in (path.rpartition(".") for path in paths if path):
            if holder == self.call.path and not isinstance(self.call.module, _OF_LAYERS):
                made = guards.kept if ".".join(filter(None, (holder, name))) in self.mentions else guards.gone
                self.reads.append(replace(made(f"self.{name}", self.call.shown), scripted=True))

    def guard_names(self, settings: Set[str]) -> None:
        """Guard settings that tell which part of the module is meant."""
        for name in sorted(settings):
            self.reads += self._guard(self.call.path, self.call.reads[self.call.path, f".{name}"])

    def _vanished_calls(self) -> Iterator[Call]:
        """The calls that are made no more, of parts and of methods."""
        for step in self.call.steps:
            within = place(self.code, step.at) if isinstance(step, Call) and step.at is not None else None
            if isinstance(step, Call) and within in self.found.vanished:
                yield from step.all_calls()

    def _is_of_others(self, call: ast.Call) -> bool:
        """Whether a call runs a function of the user's, which may ask for something itself."""
        held = self.space.get(call.func.id) if isinstance(call.func, ast.Name) else None
        method = path_to(call.func, self.code.co_varnames[0])
        of_others = isinstance(held, FunctionType) or is_object(held)
        return of_others or (method is not None and method not in dict(parts_of(self.call.module)))

    def _note(self, path: str, read: Read, counted: bool) -> None:
        """Guard an answer that a merge does not settle.

        Args:
            counted: whether code may count the parts of a container, instead of going through them.

        Raises:
            Unreadable: the method's own file has no words for that; a forward that is written anew has.
        """
        if isinstance(read.holder, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and not counted:
            return
        for made in self._guard(path, read):
            if "structrep_" in made.unlike:
                raise Unreadable(f"{self.call.shown} goes by {read.of(path or 'the model')}, which may be set")
            self.reads.append(made)

    def _guard(self, path: str, read: Read, asked_still: bool = True) -> list[Guard]:
        """A guard for an answer, if something hangs on it that a merge does not settle.

        Args:
            asked_still: whether it is asked when the model is applied; else one that cannot be guarded is none.
        """
        holder = read.holder
        if isinstance(holder, nn.Module):
            name = read.text.removeprefix(".")
            own = holder is self.call.module and isinstance(holder, _OF_LAYERS)
            if name == "training" or read.text.endswith(" is None)") or (own and name in _plain(holder).__constants__):
                return []
        prefix = f"{self.call.path}." if self.call.path else ""
        spelt = ".".join(filter(None, ("self", path.removeprefix(self.call.path).lstrip("."))))
        weight = self.changes.new_weight(self.call)
        if isinstance(holder, Tensor) and path.startswith(prefix) and path not in self.changes.homes and weight:
            first = next(self.call.module.parameters(), holder)
            if read.text in (".dtype", ".device") and getattr(first, read.text[1:]) == read.told:
                alike = guards.alike(read.of(spelt), f"{weight}{read.text}", self.call.shown)
                return [replace(alike, scripted=True)]  # as long as all are cast alike
        if not isinstance(holder, nn.Module) or not f"{path}.".startswith(prefix) or read.unstable:
            if not asked_still:
                return []
            raise Unreadable(f"{self.call.shown} goes by {read.of(path or 'the model')}, which may change")
        made = guards.guard(read.of(spelt), read.of(spelt), read.told, self.call.shown, scripted=True)
        return [replace(made, scripted=True)] if made is not None else []

    def _assumed(self, test: ast.expr) -> Iterator[Guard]:
        """A guard for a condition that is taken to have the answer that it has."""
        if (asked := self.of_rank(test)) is not None:
            yield guards.dims(*asked, self.call.shown)
            return
        found = self.answer(test)
        if found is None:
            return
        if "inplace" in found[0]:
            raise Unreadable(f"{self.call.shown} goes by {found[0]}, which may be no matter")
        spelt, told = found
        made = guards.guard(f"bool({spelt})", spelt, told, self.call.shown, scripted=True)
        assert made is not None
        yield replace(made, unlike=f"not ({spelt})" if told else spelt)


def _plain(layer: nn.Module) -> Any:
    """The class of torch's that a layer is one of."""
    return next(one for one in type(layer).__mro__ if one.__module__.startswith("torch.nn."))


def _may_change(defaults: Iterable[tuple[Any, ...] | None]) -> bool:
    """Whether some default may become another without being set."""
    return any(isinstance(one, (list, dict, set)) for some in defaults for one in some or ())
