"""What code may do, on a path that a trace has not taken, with what a merge makes another."""

from __future__ import annotations

import ast
import inspect
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

from torch import fx, nn

from structrep.graph.calls import Call, Traced
from structrep.graph.facts import AT, CALL
from structrep.graph.operations import torch_name
from structrep.graph.queries import counts_sizes
from structrep.graph.structures import proxies
from structrep.guard.asked import Asking
from structrep.guard.other_forwards import Borders
from structrep.match.merge import Merge
from structrep.modules.mentions import comes_to
from structrep.modules.objects import LIBRARIES
from structrep.modules.paths import strays
from structrep.modules.positions import branches, definition, parts_of, place, span
from structrep.modules.presence import path_to
from structrep.modules.uses import Place, Use, place_of, uses
from structrep.read.nodes import hands_on


@dataclass(frozen=True)
class Risks:
    """The calls whose code may do something else with what a merge makes another.

    Args:
        strays: those that may read it, or give another to what is merged.
        misuses: those that may use some of it alone.
        guarded: those that are right for what their modules are set to alone.
    """

    strays: Set[Call]
    misuses: Mapping[Call, list[Use]]
    guarded: Set[Call]

    @property
    def calls(self) -> set[Call]:
        return {*self.strays, *self.misuses, *self.guarded}


class Untaken:
    """The paths of a model's code that its traces have not taken.

    Args:
        borders: what other forwards look at.
    """

    def __init__(self, traced: Traced, asking: Asking, borders: Borders) -> None:
        self.traced, self.asking, self.borders = traced, asking, borders
        self.found: dict[Merge, Risks] = {}
        self.uses: dict[tuple[nn.Module, str], list[Use]] = {}  # of parts, by the code of a method
        self.alike: dict[Any, tuple[dict[nn.Module, str], list[Use]]] = {}  # and of modules that have the same parts
        self.sites: dict[nn.Module, set[Place]] = defaultdict(
            set
        )  # where the code of a module was seen to do something
        self.given: dict[fx.Node, set[Call]] = defaultdict(set)  # a value -> the calls that are given it
        for call in itertools.chain(*traced.calls.values()):
            given = [] if call.leaf else [proxy.node for proxy in proxies((call.args, call.kwargs))]
            for node in (*given, *call.held):
                self.given[node].add(call)

    def risks(self, merge: Merge) -> Risks:
        """What code may do otherwise with a merge."""
        if merge not in self.found:
            misuses = self._misuses(merge)
            guarded = {*_told_to_do_nothing(merge.nodes), *self.asking.otherwise(merge.nodes)}
            guarded |= self.borders.flagged(set(merge.nodes), merge.root, merge.owner)
            sizes = _sizes_of(merge.stretch.reshaped())
            guarded |= {call for size in sizes for call in self._seen_by(size) if _strays(size, call)}
            self.found[merge] = Risks(self._strays(merge), misuses, guarded)
        return self.found[merge]

    def hidden(self, merge: Merge, owner: Call) -> bool:
        """Whether a path that was not taken may read a value that will be another where the text of a call does not
        show it: in a method that is written out in it, or as one of several that something gives or is given."""
        strays = self.risks(merge).strays
        if any(call is not owner and next(call.homes()) is owner for call in strays):
            return True
        return owner in strays and any(_is_among_others(node, owner) for node in merge.changed)

    def _strays(self, merge: Merge) -> set[Call]:
        """The calls whose code may read a value that will be another, or give another to what is merged."""
        gone = merge.changed.union(*(one.changed for one in merge.absorbed))
        return {call for node in gone for call in self._seen_by(node) if _strays(node, call)}

    def _misuses(self, merge: Merge) -> dict[Call, list[Use]]:
        """What the code of calls, on a path that was not taken, may do with some of what is merged without the rest."""
        nodes = {*merge.nodes, *(one.node for one in merge.absorbed)}
        made = [CALL.of(node) for node in nodes]
        chains = [list((call.parent if call.leaf else call).chain()) for call in made]
        owner = next((one for one in chains[0] if all(one in chain for chain in chains)), None)
        paths = [call.path.split(".") for call in made]
        above = len(owner.path.split(".")) if owner is not None and owner.path else 0
        below = {tuple(path[:depth]) for path in paths for depth in range(above + 1, len(path) + 1)}
        alone = merge.root in merge.changed  # a part that does nothing any more, beside nothing
        some = {way for way in below if alone or not all(tuple(path[: len(way)]) == way for path in paths)}
        parts = {self.traced.model.get_submodule(".".join(way)) for way in some}
        if not parts:
            return {}
        around = list(dict.fromkeys(call for chain in chains for call in chain))
        around += self.traced.above(around)
        found: dict[Call, list[Use]] = {}
        hangs: dict[frozenset[str], list[tuple[Call, Use]]] = {}
        for call in around:
            others = {one.bytecode for one in around if one.module is call.module and one is not call}
            for use in self._uses_of(call):
                if use.parts.isdisjoint(parts) or (not use.hangs_on and use.code in others - {call.bytecode}):
                    continue
                several = bool(use.hangs_on) and len(use.parts & parts) > 1
                if several or use.places.isdisjoint(self._sites_of(call.module)):
                    found.setdefault(call, []).append(use)
                else:
                    hangs.setdefault(use.hangs_on, []).append((call, use))
        if len(hangs) > 1:  # what is always the same part goes with what may be another
            for on, those in hangs.items():
                for call, use in those if on else ():
                    found.setdefault(call, []).append(use)
        return found

    def _uses_of(self, call: Call) -> list[Use]:
        """What the code of a call does with parts of its module; read once for modules that have the same."""
        key = (call.module, call.method)
        if key not in self.uses:
            paths = {part: path for path, part in call.module.named_modules()}
            parts = tuple((path, type(part)) for part, path in paths.items())
            like = (call.bytecode, parts, *vars(call.module))
            first, found = self.alike.get(like, (paths, None))
            if found is None or not all(use.parts <= first.keys() for use in found):  # or parts that are held elsewhere
                self.uses[key] = uses(call.module, call.code)
                self.alike.setdefault(like, (paths, self.uses[key]))
            else:
                own = dict(zip(first, paths, strict=True))
                self.uses[key] = [replace(use, parts=frozenset(own[part] for part in use.parts)) for use in found]
        return self.uses[key]

    def _sites_of(self, module: nn.Module) -> set[Place]:
        if not self.sites:
            for call in itertools.chain(*self.traced.calls.values()):
                code, made = call.bytecode, self.sites[call.module]
                for step in call.steps if not call.leaf else ():
                    at = step.at if isinstance(step, Call) else AT.of(step)
                    if code is not None and at is not None and (node := place(code, at)) is not None:
                        made.add(place_of(node, code))
        return self.sites[module]

    def _seen_by(self, node: fx.Node) -> set[Call]:
        """The calls whose code has a value in hand: that made it, were given it, or were given it back."""
        found: set[Call] = set(self.given.get(node, ()))
        made: Call | None = CALL.of(node)
        while made is not None:
            found |= {made} if not made.leaf else set()
            if node not in {proxy.node for proxy in proxies(made.result)}:
                break
            made = made.parent
        return found


def _is_among_others(node: fx.Node, call: Call) -> bool:
    """Whether a call is given a value, or gets it from a step, in a structure."""
    results = (step.result for step in call.steps if isinstance(step, Call))
    structures = (one for one in (*call.arguments().values(), *results) if not isinstance(one, fx.Proxy))
    return any(proxy.node is node for one in structures for proxy in proxies(one))


def _sizes_of(values: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """The sizes of values, and the numbers made of them."""
    pending = list(values)
    seen = set(pending)
    for node in pending:
        new = [user for user in node.users if user not in seen and counts_sizes(user)]
        seen.update(new)
        pending += new
        yield from new


def _told_to_do_nothing(nodes: Sequence[fx.Node]) -> Iterator[Call]:
    """The calls that do nothing between layers for a number, a factor of 1, that their code does not spell out."""
    inert = [node.op != "call_module" and hands_on(node) is not None for node in nodes]
    while inert and inert[-1]:  # behind all of them it may do something
        inert.pop()
    for node in (node for node, nothing in zip(nodes, inert, strict=False) if nothing):
        numbers = [one for one in (*node.args, *node.kwargs.values()) if type(one) in (int, float)]
        at = AT.of(node)
        spelt = place(CALL.of(node).bytecode, at) if numbers and at is not None else None
        given = [*ast.iter_child_nodes(spelt), *(one.value for one in getattr(spelt, "keywords", ()))] if spelt else []
        told = any(all(getattr(one, "value", None) != number for one in given) for number in numbers)
        if told and "dropout" not in torch_name(node):
            yield CALL.of(node)


def decorated_otherwise(call: Call, values: Set[fx.Node]) -> bool:
    """Whether a decorator that may go several ways has some values in hand: it is given them, or what gives them."""
    seen = {proxy.node for proxy in proxies((call.args, call.kwargs, call.result))}
    around: Any = call.code
    while not seen.isdisjoint(values) and (inner := getattr(around, "__wrapped__", None)) is not None:
        code = getattr(around, "__code__", None)
        library = str(getattr(around, "__globals__", {}).get("__name__", "")).partition(".")[0]
        if code is None or (library not in LIBRARIES and branches(code) and not _only_hands_on(code)):
            return True
        around = inner
    return False


def _only_hands_on(code: CodeType) -> bool:
    """Whether a decorator's function gives what it decorates gives, itself or by way of who runs that: a checkpoint."""
    found = definition(code)
    if found is None:
        return False
    tree, parents, _ = found
    for one in (node.value for node in ast.walk(tree) if isinstance(node, ast.Return)):
        inner = [n for n in ast.walk(one) if isinstance(n, ast.Name) and n.id in code.co_freevars] if one else []
        ran = isinstance(one, ast.Call) and any(n is one.func for n in inner)
        handed = any(not isinstance(around := parents[n], ast.Call) or around.func is not n for n in inner)
        if not isinstance(one, ast.Call) or not (ran or handed):
            return False
    return True


def _methods_with(node: fx.Node, call: Call) -> tuple[set[str], set[str]]:
    """The methods of a call's module, and those of others, that made a value or were given it as it ran; not the
    forwards of others, which are called as parts."""
    makers = itertools.takewhile(lambda one: one is not call, CALL.of(node).chain())
    takers = (one for step in call.steps if isinstance(step, Call) for one in step.all_calls())
    given = (one for one in takers if node in {proxy.node for proxy in proxies((one.args, one.kwargs))})
    found = [one for one in (*makers, *given) if not one.leaf]
    own = {one.method for one in found if one.module is call.module and one.method != call.method}
    return own, {one.method for one in found if one.module is not call.module} - {"forward"}


def _is_called_elsewhere(call: Call, own: set[str], others: set[str]) -> bool:
    """Whether a call's code has another call, which the trace did not see, that comes to one of some methods."""
    code = call.bytecode
    found = definition(code) if code is not None and (own or others) else None
    if code is None or found is None or not found[0].args.args:
        return bool(own or others)
    ran = {place(code, step.at) for step in call.steps if isinstance(step, Call) and step.at is not None}
    itself, cls = found[0].args.args[0].arg, type(call.module)
    asked = (node for node in ast.walk(found[0]) if isinstance(node, ast.Attribute) and found[1].get(node) not in ran)
    return any(node.attr in others or comes_to(cls, path_to(node, itself), own) for node in asked)


def _strays(node: fx.Node, call: Call) -> bool:
    """Whether a call's code may read a value on a path that was not taken, or read another instead."""
    code = call.bytecode
    if code is None or str(getattr(inspect.unwrap(call.code), "__module__", "")).startswith("torch."):
        return False
    if any(map(branches, call.held.get(node, ()))):
        return True
    maker: fx.Node | Call = node
    taken: list[int | None] = []
    names: list[str] = []
    for step in call.steps:
        if isinstance(step, fx.Node):
            if node in step.all_input_nodes:
                taken.append(AT.of(step))
            continue
        if node in {proxy.node for proxy in proxies((step.args, step.kwargs))}:
            taken.append(step.at)
        if step in CALL.of(node).chain():
            maker = step
    if _is_called_elsewhere(call, *_methods_with(node, call)):
        return True
    if decorated_otherwise(call, {node}):
        return True
    given = inspect.signature(call.function).bind(*call.args, **call.kwargs).arguments
    names = [name for name, value in given.items() if node in {proxy.node for proxy in proxies(value)}]
    at = maker.at if isinstance(maker, Call) else AT.of(maker) if CALL.of(maker) is call else None
    returned = node in {proxy.node for proxy in proxies(call.result)}
    spans = frozenset(None if one is None else span(code, one) for one in taken)
    made = None if at is None else span(code, at)
    single = all(isinstance(given[name], fx.Proxy) for name in names)
    single &= isinstance(maker, fx.Node) or isinstance(maker.result, fx.Proxy)
    parts = parts_of(call.module)
    return strays(code, made, frozenset(names), spans, returned, parts, single, call.counted)
