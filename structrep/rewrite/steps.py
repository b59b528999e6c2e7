"""The steps of a call as texts of its method: what a trace says, put to the syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from types import CodeType, ModuleType
from typing import Any

from torch import fx, nn

from structrep.errors import Unreadable
from structrep.graph.calls import Call
from structrep.graph.facts import AT, VALUE
from structrep.graph.operations import does
from structrep.graph.queries import asks_shape, counts_sizes, only_asserted
from structrep.graph.structures import is_torch, proxies
from structrep.graph.table import Is
from structrep.modules.attributes import is_computed, looks_itself
from structrep.modules.mentions import comes_to
from structrep.modules.positions import definition, parts_of, place
from structrep.modules.settable import calm
from structrep.modules.source import functions, written_in
from structrep.modules.uses import Place, Use, place_of
from structrep.read.nodes import hands_on
from structrep.rewrite.node_changes import NodeChanges
from structrep.rewrite.syntax import in_place_alike
from structrep.rewrite.wanted import Piece, Wanted

_LIBRARIES = {"torch", "math", "numpy", "operator", "functools", "itertools"}


class Steps:
    """What a call did, by the texts of its method.

    Args:
        space: the names outside of the method.
        misuses: what it may do, on paths that were not taken, with some of what is merged alone.
        answers: conditions on settings, and their answers.
        computing: paths of methods that only compute.
    """

    def __init__(
        self,
        changes: NodeChanges,
        call: Call,
        code: CodeType,
        tree: ast.FunctionDef,
        space: dict[str, Any],
        misuses: list[Use],
        answers: tuple[tuple[ast.expr, bool], ...],
        computing: Iterable[str],
    ) -> None:
        self.changes, self.call, self.code, self.tree, self.space = changes, call, code, tree, space
        self.misuses, self.answers, self.computing = misuses, answers, frozenset(computing)
        self.numbers: dict[fx.Node, int] = {}
        self.units = {root: set(nodes) for root, (owner, nodes) in changes.units.items() if owner is call}
        self.gone = set[fx.Node]().union(*self.units.values())

    def wanted(self) -> Wanted:
        texts: dict[ast.AST, list[fx.Node | Call]] = {}
        roots: dict[fx.Node, ast.AST | None] = {}
        for step in self.call.steps:
            at = step.at if isinstance(step, Call) else AT.of(step)
            text = _whole(self.code, place(self.code, at)) if at is not None else None
            nodes = [step] if isinstance(step, fx.Node) else list(step.nodes())
            roots |= {node: text for node in nodes if node in self.units}
            if text is not None:
                texts.setdefault(text, []).append(step)
            elif not self.gone.isdisjoint(nodes):
                raise Unreadable(f"{self.call.shown} has others compute what is merged")
        fates = {text: self._fate(text, steps) for text, steps in texts.items()}
        values: dict[ast.AST | str, frozenset[int]] = {}
        for name, given in self.call.arguments().items():
            if isinstance(given, fx.Proxy) and not VALUE.known(given.node):
                values[name] = frozenset({self._number(given.node)})
        if isinstance(self.call.result, fx.Proxy):
            values["return"] = frozenset({self._number(self.call.result.node)})
        for text, steps in texts.items():
            last = steps if self._repeats(text) else steps[-1:]
            values[text] = frozenset(n for step in last for n in self._numbers_of(step))
        made_in = {
            node: text for text, steps in texts.items() for step in steps
            for node in ([step] if isinstance(step, fx.Node) else step.nodes())
        }  # fmt: skip
        pieces = tuple(self._piece(node, text, values, made_in) for node, text in roots.items())
        if len({piece.text for piece in pieces}) < len(pieces):
            raise Unreadable(f"{self.call.shown} has one text for several merges")
        named = {name: self.space[name] for name in self.code.co_names if name in self.space}
        return Wanted(
            pieces,
            frozenset(text for text, fate in fates.items() if fate == "gone"),
            frozenset(text for text, fate in fates.items() if fate == "free"),
            frozenset(text for text, fate in fates.items() if fate == "kept"),
            tuple(values.items()),
            parts_of(self.call.module),
            frozenset(
                name
                for name, value in named.items()
                if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in _LIBRARIES
            ),
            frozenset(
                name for name, value in named.items() if not isinstance(value, ModuleType) and not callable(value)
            ),
            frozenset(self.numbers[node] for node in self.changes.vanishing if node in self.numbers),
            frozenset(self.numbers[node] for node in self.changes.turned if node in self.numbers),
            self.answers,
            frozenset(self._misused()),
            self._altered(),
            tuple(self._takers(texts, fates)),
            frozenset(
                [
                    *calm(_class_of(self.call.module)),
                    *(path for path, part in self.call.module.named_modules() if _is_calm(part)),
                ]
            ),
            _computed(self.call.module, {*self.code.co_names, *self.code.co_consts}),
            self.computing,
            frozenset(
                name
                for name, value in named.items()
                if callable(value) and written_in(value).startswith("torch") and not name.endswith("_")
            ),
        )

    def _takers(
        self, texts: dict[ast.AST, list[fx.Node | Call]], fates: dict[ast.AST, str]
    ) -> Iterator[tuple[ast.AST, int]]:
        """The texts that stay and take values that will be others."""
        placed = {step: text for text, steps in texts.items() for step in steps}
        for step in self.call.steps:
            of_call = [proxy.node for proxy in proxies((step.args, step.kwargs))] if isinstance(step, Call) else []
            given = step.all_input_nodes if isinstance(step, fx.Node) else of_call
            for node in given:
                if node not in self.changes.vanishing or (isinstance(step, fx.Node) and asks_shape(step)):
                    continue
                if step not in placed:
                    raise Unreadable(f"{self.call.shown} has others take what a merged layer gives")
                if fates[placed[step]] != "gone":
                    yield placed[step], self._number(node)

    def _misused(self) -> Iterator[ast.AST]:
        """The texts that may use some of what is merged alone."""
        places: set[Place] = set()
        for use in self.misuses:
            if use.code is not self.code:
                raise Unreadable(f"line {use.line} of {use.code.co_filename} may use what is merged otherwise")
            places |= use.places
        for node in ast.walk(self.tree):
            if isinstance(node, ast.expr) and place_of(node, self.code) in places:
                yield node

    def _altered(self) -> tuple[frozenset[str], frozenset[str]]:
        """The names of methods of the module, and of others, that come to such as give or take what will be another."""
        module, own, others = self.call.module, set[str](), set[str]()
        for one in (*self.call.all_calls(), *self.changes.owners):
            if one.method not in ("forward", self.call.method):
                seen = {proxy.node for proxy in proxies((one.args, one.kwargs, one.result))}
                if not seen.isdisjoint(self.changes.vanishing):
                    (own if one.module is module else others).add(one.method)
        known = functions(_class_of(module)) if own else ()
        comes = frozenset(name for name in known if comes_to(_class_of(module), name, own))
        return comes, frozenset(others)

    def _piece(
        self,
        node: fx.Node,
        text: ast.AST | None,
        values: dict[ast.AST | str, frozenset[int]],
        made_in: dict[fx.Node, ast.AST],
    ) -> Piece:
        base, path = self.changes.replaced.get(node) or (self.changes.bypassed[node], None)
        number = self._number(node)
        if text is None or number not in values[text]:
            raise Unreadable(f"{self.call.shown} has no text for what is merged")
        gone = frozenset(made_in[one] for one in self.units[node] if one in made_in)
        return Piece(text, number, self._number(base), path and path.rpartition(".")[2], gone)

    def _fate(self, text: ast.AST, steps: list[fx.Node | Call]) -> str:
        nodes = [n for step in steps for n in ([step] if isinstance(step, fx.Node) else step.nodes())]
        changed = [node for node in nodes if node in self.gone]
        rest = [node for node in nodes if node not in self.gone and not self._is_idle(node)]
        if changed and rest:
            raise Unreadable(f"line {getattr(text, 'lineno', 0)} of {self.call.shown} does more than what is merged")
        return "gone" if changed else "kept" if rest else "free"

    def _is_idle(self, node: fx.Node) -> bool:
        """Whether a node does nothing, or what is no part of the computation."""
        return (
            VALUE.known(node)
            or only_asserted(node)
            or self._source(node) is not None
            or self._is_counted_for_what_goes(node)
        )

    def _is_counted_for_what_goes(self, node: fx.Node) -> bool:
        """Whether a node is a size, or made of sizes, that only what is gone asks for: `y.reshape(y.shape[0], -1)`."""
        pending, seen = [node], {node}
        for one in pending:
            if not counts_sizes(one):
                return False
            users = {user for user in one.users if user not in self.gone} - seen
            pending += users
            seen |= users
        return True

    def _source(self, node: fx.Node) -> fx.Node | None:
        """What a node hands on as it is, in its dtype too; None if it does something."""
        if node in self.changes.ended or node in self.changes.refilled or does(node, Is.CAST):
            return None
        return hands_on(node)

    def _number(self, node: fx.Node) -> int:
        """A number for a value; one that is handed on as it is has the same."""
        while (source := self._source(node)) is not None:
            node = source
        return self.numbers.setdefault(node, len(self.numbers))

    def _numbers_of(self, step: fx.Node | Call) -> set[int]:
        if isinstance(step, fx.Node):
            return {self._number(step)}
        return {self._number(step.result.node)} if isinstance(step.result, fx.Proxy) else set()

    def _repeats(self, text: ast.AST) -> bool:
        """Whether a text stands in a loop."""
        found = definition(self.code)
        assert found is not None
        parents, node = found[1], text
        while node in parents:
            node = parents[node]
            if isinstance(node, (ast.For, ast.While)):
                return True
        return False


def _is_calm(part: nn.Module) -> bool:
    """Whether a module writes to nothing that it is given, by what its layers are told, and its forwards' source."""
    for one in part.modules():
        own = is_torch(type(one)) or "forward" in calm(_class_of(one))
        if getattr(one, "inplace", False) or not own:
            return False
    return True


def _class_of(module: nn.Module) -> Any:
    return type(module)


def _computed(module: nn.Module, names: set[Any]) -> frozenset[str]:
    """Which attributes of a module are properties, or given by its class where there is none of that name; "*" if any
    may be."""
    found = {name for name in names if isinstance(name, str) and is_computed(module, name)}
    of_class = (one for cls in type(module).__mro__[:-1] if cls is not nn.Module for one in vars(cls).values())
    if looks_itself(module) or any(isinstance(one, property) for one in of_class):
        found.add("*")
    return frozenset(found)


def _whole(code: CodeType, text: ast.AST | None) -> ast.AST | None:
    """A text, or the conditional expression that does the same in place by a setting: both ways go, or none."""
    found = definition(code)
    around = found[1].get(text) if found is not None and text is not None else None
    alike = isinstance(around, ast.IfExp) and text is not around.test and in_place_alike(around)
    return around if alike else text
