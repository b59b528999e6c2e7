"""Which assignments a name may have its value of, wherever it is read, along all paths of a function."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import TypeAlias

Definition: TypeAlias = ast.AST | None  # what gives a name its value; None where it may have none
Names: TypeAlias = dict[str, frozenset[Definition]]
Function: TypeAlias = ast.FunctionDef | ast.Lambda
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Put:
    """What stands in the place of a text: another value, or what is made of it.

    Args:
        base: the name of that value, or its own text inside.
        name: of a statement, the name that is given the value.
    """

    base: str | ast.expr
    name: str | None = None


@dataclass
class _Loop:
    left: list[Names] = field(default_factory=list)
    again: list[Names] = field(default_factory=list)


class Reaching:
    """The definitions that reach each read of a name.

    Args:
        tree: a function without `global`, `nonlocal`, `yield`.
        known: the answer to a condition, if there is only one.
        put: texts that are replaced.
        removed: statements that are left out.
        behind: statements that are replaced, and run all the same: who reads the name behind them reads what was put.
        writes: the names whose values a text may write to in place; it counts as a definition of them.
    """

    def __init__(
        self,
        tree: Function,
        known: Callable[[ast.expr], bool | None],
        put: Mapping[ast.AST, Put] | None = None,
        removed: Set[ast.stmt] = frozenset(),
        *,
        behind: bool = False,
        writes: Callable[[ast.AST], Iterable[str]] = lambda text: (),
    ) -> None:
        self.writes = writes
        self.within: list[dict[str, set[Definition]]] = []  # what is defined where it may be left at any point
        self.known, self.put, self.removed, self.behind = known, put or {}, removed, behind
        self.reads: dict[ast.AST, frozenset[Definition]] = {}  # of names, and of texts that are replaced by a name
        self.loops: list[_Loop] = []
        self.late: list[ast.Name] = []  # reads in functions inside, which run at any time
        self.all: dict[str, set[Definition]] = {}
        start: Names = {}
        for one in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs, tree.args.vararg, tree.args.kwarg):
            if one is not None:
                self._define(start, one.arg, one)
        if isinstance(tree, ast.Lambda):
            self._evaluate(tree.body, start)
        else:
            self._block(tree.body, start)
        for name in self.late:
            self.reads[name] = frozenset(self.all.get(name.id, {None}))

    # --- statements -------------------------------------------------------------------------------------------------

    def _block(self, body: Iterable[ast.stmt], names: Names | None) -> Names | None:
        for statement in body:
            if names is None:
                return None
            if statement not in self.removed:
                names = self._statement(statement, dict(names))
        return names

    def _statement(self, one: ast.stmt, names: Names) -> Names | None:
        put = self.put.get(one)
        if put is None:
            return self._run(one, names)
        self._read_put(one, put, names)
        left: Names | None = names
        if self.behind:
            left = self._run(one, names)
        if left is not None and put.name is not None and not (self.behind and isinstance(one, ast.AugAssign)):
            self._define(left, put.name, one.target if isinstance(one, ast.AugAssign) else one)
        return left

    def _run(self, one: ast.stmt, names: Names) -> Names | None:
        if isinstance(one, ast.If):
            self._evaluate(one.test, names)
            known = self.known(one.test)
            ways = [self._block(one.body, names)] if known is not False else []
            ways += [self._block(one.orelse, names)] if known is not True else []
            return _either(ways)
        if isinstance(one, (ast.For, ast.AsyncFor, ast.While)):
            return self._loop(one, names)
        if isinstance(one, (ast.With, ast.AsyncWith)):
            for item in one.items:
                self._evaluate(item.context_expr, names)
                self._bind(item.optional_vars, names)
            after, anywhere = self._left_anywhere(one.body, names)
            return _either([after, anywhere])  # a context may end what is raised in it
        if isinstance(one, ast.Try):
            return self._try(one, names)
        if isinstance(one, ast.Match):
            self._evaluate(one.subject, names)
            ways = [names]
            for case in one.cases:
                taken = dict(names)
                for part in ast.walk(case.pattern):
                    for name in (getattr(part, "name", None), getattr(part, "rest", None)):
                        if isinstance(name, str):
                            self._define(taken, name, part)
                if case.guard is not None:
                    self._evaluate(case.guard, taken)
                found = self._block(case.body, taken)
                ways += [found] if found is not None else []
            return _either(ways)
        if isinstance(one, (ast.Break, ast.Continue)):
            (self.loops[-1].left if isinstance(one, ast.Break) else self.loops[-1].again).append(names)
            return None
        if isinstance(one, _SCOPES):
            self._hold(one)
            self._define(names, one.name, one)
            return names
        if isinstance(one, (ast.Import, ast.ImportFrom)):
            for alias in one.names:
                self._define(names, (alias.asname or alias.name).partition(".")[0], alias)
            return names
        for part in ast.iter_child_nodes(one):
            if isinstance(part, ast.expr):
                self._evaluate(part, names)
        if isinstance(one, ast.AugAssign) and isinstance(one.target, ast.Name):
            self._read(one.target, names)
        for gone in one.targets if isinstance(one, ast.Delete) else ():
            if isinstance(gone, ast.Name):  # which has to have a value
                self._read(gone, names)
        if isinstance(one, (ast.Return, ast.Raise)):
            return None
        if isinstance(one, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            self._write(one, names)
        targets = one.targets if isinstance(one, (ast.Assign, ast.Delete)) else [getattr(one, "target", None)]
        if not (isinstance(one, ast.AnnAssign) and one.value is None):
            for target in targets:
                self._bind(target, names)
        return names

    def _loop(self, loop: ast.For | ast.AsyncFor | ast.While, names: Names) -> Names | None:
        if not isinstance(loop, ast.While):
            self._evaluate(loop.iter, names)
        self.loops.append(_Loop())
        start: Names = names
        while True:
            state = dict(start)
            if isinstance(loop, ast.While):
                self._evaluate(loop.test, state)
            else:
                self._bind(loop.target, state)
            once = self._block(loop.body, state)
            further = _either([start, once, *self.loops[-1].again])
            if further == start or further is None:
                break
            start = further
        left = self.loops.pop().left
        return _either([self._block(loop.orelse, start), *left])

    def _try(self, one: ast.Try, names: Names) -> Names | None:
        after, anywhere = self._left_anywhere(one.body, names)
        ways: list[Names | None] = [self._block(one.orelse, after)]
        for handler in one.handlers:
            caught = dict(anywhere)
            if handler.name is not None:
                self._define(caught, handler.name, handler)
            ways.append(self._block(handler.body, caught))
        ended = _either(ways)
        if one.finalbody:  # which runs whatever happened before
            self._block(one.finalbody, _either([anywhere, *ways]))
        return self._block(one.finalbody, ended)

    def _left_anywhere(self, body: list[ast.stmt], names: Names) -> tuple[Names | None, Names]:
        """What holds behind some statements, and where they may be left."""
        self.within.append({})
        after = self._block(body, dict(names))
        made = self.within.pop()
        return after, {**names, **{name: names.get(name, frozenset({None})) | by for name, by in made.items()}}

    # --- expressions ------------------------------------------------------------------------------------------------

    def _evaluate(self, node: ast.expr, names: Names) -> None:
        """Note all reads in an expression, and what it assigns on the way."""
        assigned = [n for n in ast.walk(node) if isinstance(n, ast.NamedExpr)]
        for walrus in assigned:  # before or behind the other reads in the expression
            self._define(names, walrus.target.id, walrus.target, perhaps=True)
        self._visit(node, names)
        self._write(node, names)

    def _write(self, text: ast.AST, names: Names) -> None:
        for name in self.writes(text):
            self._define(names, name, text, perhaps=True)

    def _visit(self, node: ast.AST, names: Names) -> None:
        put = self.put.get(node)
        if put is not None:
            self._read_put(node, put, names)
            if not self.behind:
                return
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                self._read(node, names)
        elif isinstance(node, ast.IfExp) and (known := self.known(node.test)) is not None:
            self._visit(node.test, names)
            self._visit(node.body if known else node.orelse, names)
        elif isinstance(node, _SCOPES):
            self._hold(node)
        elif isinstance(node, _COMPREHENSIONS):
            inner = dict(names)
            for part in node.generators:
                for target in ast.walk(part.target):
                    if isinstance(target, ast.Name):
                        inner[target.id] = frozenset({target})
            for child in ast.iter_child_nodes(node):
                self._visit(child, inner)
        else:
            for child in ast.iter_child_nodes(node):
                self._visit(child, names)

    def _read_put(self, place: ast.AST, put: Put, names: Names) -> None:
        if isinstance(put.base, str):
            self.reads[place] = self.reads.get(place, frozenset()) | names.get(put.base, frozenset({None}))
        elif not self.behind:
            self._visit(put.base, names)

    def _read(self, name: ast.Name, names: Names) -> None:
        self.reads[name] = self.reads.get(name, frozenset()) | names.get(name.id, frozenset({None}))

    def _hold(self, scope: ast.AST) -> None:
        self.late += [n for n in ast.walk(scope) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]

    def _bind(self, target: ast.AST | None, names: Names) -> None:
        for node in ast.walk(target) if target is not None else ():
            if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
                self._define(names, node.id, node)

    def _define(self, names: Names, name: str, by: ast.AST, perhaps: bool = False) -> None:
        before = names.get(name, frozenset({None})) if perhaps else frozenset()
        names[name] = before | {by}
        for made in self.within:
            made.setdefault(name, set()).add(by)
        self.all.setdefault(name, set()).add(by)


def _either(ways: Iterable[Names | None]) -> Names | None:
    """What holds after any of several ways."""
    known = [way for way in ways if way is not None]
    if not known:
        return None
    return {name: frozenset[Definition]().union(*(way.get(name, {None}) for way in known)) for name in _all(known)}


def _all(ways: Iterable[Names]) -> Iterator[str]:
    yield from dict.fromkeys(name for way in ways for name in way)
