"""Values that code gives away on a path that a trace has not taken, by its source.

`y = self.conv(x)`; `if self.low: return y`; `return relu(self.norm(y))`: where the norm is merged into the convolution,
`y` is no longer what the first return gives. Judged by reaching definitions: from where a value is made, which of the
names that hold it are read, on any path, other than by what has taken the value as the trace ran.
"""

from __future__ import annotations

import ast
import functools
from types import CodeType
from typing import TypeAlias

from structrep.modules.boxes import BOXES, CHANGES, FILLS, HANDING_ON, boxed
from structrep.modules.positions import Span, branches, definition
from structrep.modules.presence import presence
from structrep.modules.settable import written

Holders: TypeAlias = tuple[frozenset[str], frozenset[str]]  # names that may hold a value, and that surely do
State: TypeAlias = Holders | None  # None where code does not get to
_HARMLESS = {"isinstance", "hasattr", "type", "print", "is_tensor", "callable", "id", "len"}
_PASSES = (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Starred, ast.keyword, ast.Attribute, ast.Subscript,
           ast.ListComp, ast.GeneratorExp, ast.comprehension)  # fmt: skip
_SHOWN = (ast.Dict, ast.List, ast.Tuple)
_TORCHS = {"torch", "F", "nn", "functional", "super", "range", "reversed", "int", "float", "bool", "str"}
_INVARIANT = {"ndim", "dtype", "device", "is_cuda", "requires_grad"}
_GOING_THROUGH = HANDING_ON | {"range", "len", "children", "named_children", "values", "items", "keys", "zip"}
NOT, MAYBE, SURELY = range(3)  # whether something holds the value


@functools.lru_cache(4096)  # blocks of a class mostly do the same
def strays(
    code: CodeType,
    made: Span | None,
    given: frozenset[str],
    taken: frozenset[Span | None],
    returned: bool,
    parts: frozenset[tuple[str, bool]],
    single: bool = False,
    counted: bool = False,
) -> bool:
    """Whether other code than what has taken a value may read it, or what has taken it may read another.

    Args:
        code: what has made the value, or was given it.
        made: where it was made; None if it was given.
        given: arguments that it was given as.
        taken: where the trace has taken it; None of a place that is not known.
        returned: whether it is what the code has returned.
        parts: the modules and tensors of the module whose code it is, by path, and whether they are there: conditions
            on that are known.
        single: whether what was made or given is the value itself, and nothing that holds it.
        counted: whether how often a loop goes round may hang on the input, and was told for an example.
    """
    names = given
    if None in taken or (made is None and not names):
        return True
    found = definition(code)
    if found is None:
        return counted or branches(code)
    tree, parents, at = found
    takers = {at.get(one, at.get(one[::2])) for one in taken if one is not None}
    site = None if made is None else at.get(made, at.get(made[::2]))
    several = counted or branches(code) or _picks(tree) or _picks_rounds(tree) or _hands(tree, code)
    if not several and not _loops_apart(tree, {site, *takers}):
        return False
    if None in takers or (site is None and not names):
        return True
    if sets_what_runs(tree, {site, *takers}):
        return True
    if takers == {site} and not returned and _is_forward(site):
        return False  # which it has never left
    walk = _Walk(tree, parents, site, takers, dict(parts), single, counted)
    walk.run(names)
    leaves = len(walk.returns) > 1 or bool(walk.returns) != returned or (returned and walk.gives_others)
    return walk.exposed or leaves or walk.met != takers


def _loops_apart(tree: ast.AST, steps: set[ast.AST | None]) -> bool:
    """Whether code has a loop in which the trace did nothing with a value: over nothing, up to now."""
    return any(map(steps.isdisjoint, _loops(tree)))


@functools.lru_cache(4096)
def _loops(tree: ast.AST) -> tuple[frozenset[ast.AST], ...]:
    """What is in each loop."""
    return tuple(frozenset(ast.walk(one)) for one in ast.walk(tree) if isinstance(one, ast.For))


@functools.lru_cache(4096)
def _hands(tree: ast.AST, code: CodeType) -> bool:
    """Whether code calls by name what is none of torch's, and may pick between what it is given."""
    for node in ast.walk(tree):
        owner = node.func if isinstance(node, ast.Call) else None
        if isinstance(owner, ast.Attribute) and owner.attr.startswith("__"):
            return True
        while isinstance(owner, ast.Attribute):
            owner = owner.value
        name = owner.id if isinstance(owner, ast.Name) else "" if owner is None else None
        if name is None:
            if isinstance(owner, ast.Lambda):
                return True
        elif name and name not in code.co_varnames and name not in _TORCHS | HANDING_ON | _HARMLESS:
            return True
    return False


def may_catch(node: ast.AST) -> bool:
    """Whether a statement may catch what is raised in it: a context may, torch's own do not."""
    if not isinstance(node, (ast.With, ast.AsyncWith)):
        return isinstance(node, ast.Try)
    return not all(ast.unparse(item.context_expr).startswith("torch.") for item in node.items)


def swallows(node: ast.AST) -> bool:
    """Whether a context, or what is done finally, may go on behind what its code raises."""
    if isinstance(node, ast.Try):
        return any(
            isinstance(n, (ast.Return, ast.Break, ast.Continue)) for one in node.finalbody for n in ast.walk(one)
        )
    return isinstance(node, ast.With) and may_catch(node) and any(isinstance(n, ast.Raise) for n in ast.walk(node))


def sets_what_runs(tree: ast.AST, steps: set[ast.AST | None]) -> bool:
    """Whether code sets an attribute that some of its steps call: `self.norm = self.other`."""
    stored = {one.attr for one in ast.walk(tree) if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store)}
    asked = (one for step in steps if stored and isinstance(step, ast.Call) for one in ast.walk(step.func))
    return any(isinstance(one, ast.Attribute) and one.attr in stored for one in asked)


def _is_forward(node: ast.AST | None) -> bool:
    """Whether code calls a forward by that name: `self.parts[0].forward(x)`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "forward"


@functools.lru_cache(4096)
def _picks(tree: ast.AST) -> bool:
    """Whether code takes a part, or so many rounds, as an attribute or an argument says, perhaps by another name."""
    names: set[str] = set()
    arguments = _arguments(tree)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) else None
        if value is not None and any(_of_first(inner, tree) for inner in ast.walk(value)):
            names.update(n.id for one in targets if one is not None for n in ast.walk(one) if isinstance(n, ast.Name))
    for node in ast.walk(tree):
        asked: list[ast.expr] = [node.slice] if isinstance(node, ast.Subscript) else []
        keys = asked if isinstance(getattr(node, "value", None), (ast.Name, *_SHOWN)) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            asked = keys = node.args[:1]
        if any(isinstance(one, ast.Name) and one.id in arguments for one in keys):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            asked = [one for one in node.args if not isinstance(one, ast.Call)]  # of `len(self.layers)`
        parts = [inner for one in asked for inner in ast.walk(one)]
        if any(isinstance(part, ast.Attribute) or getattr(part, "id", None) in names for part in parts):
            return True
    return False


def _chooses(tree: ast.AST, iterated: ast.expr) -> bool:
    """Whether a loop may go through more or less than all of some parts: through what a function picks, or a list that
    code changes."""
    inner = list(ast.walk(iterated))
    called = {node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
              for node in inner if isinstance(node, ast.Call)}  # fmt: skip
    names = {node.id for node in inner if isinstance(node, ast.Name)}
    functions = {one.id for node in inner if isinstance(node, ast.Call)
                 for one in ast.walk(node.func) if isinstance(one, ast.Name)}  # fmt: skip
    outside = names - functions - _local(tree)
    return not called <= _GOING_THROUGH or not names.isdisjoint(_changed(tree)) or bool(outside)


@functools.lru_cache(4096)
def _picks_rounds(tree: ast.AST) -> bool:
    """Whether code has a loop that may go through more or less than all of some parts."""
    return any(isinstance(one, ast.For) and _chooses(tree, one.iter) for one in ast.walk(tree))


@functools.lru_cache(4096)
def _local(tree: ast.AST) -> frozenset[str]:
    """The names of code's own."""
    nodes = list(ast.walk(tree))
    stored = {one.id for one in nodes if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Load)}
    return frozenset(stored.union(one.arg for one in nodes if isinstance(one, ast.arg)))


@functools.lru_cache(4096)
def _changed(tree: ast.AST) -> frozenset[str]:
    """The names of lists that code takes something out of, or puts in order."""
    found: set[str] = set()
    for node in ast.walk(tree):
        taken = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Del)
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES
        held = node.value if taken else node.func.value if called else None  # type: ignore[attr-defined]
        if isinstance(held, ast.Name):
            found.add(held.id)
    return frozenset(found)


def _arguments(tree: ast.AST) -> set[str]:
    """The names that a function is given things by, but for the first."""
    given = tree.args if isinstance(tree, (ast.FunctionDef, ast.Lambda)) else None
    return {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)[1:]} if given else set()


def _of_first(node: ast.AST, tree: ast.AST) -> bool:
    """Whether an expression is an attribute of what a function is given first, which is itself called by no name."""
    arguments = tree.args.args if isinstance(tree, (ast.FunctionDef, ast.Lambda)) else []
    while isinstance(inner := node, ast.Attribute):
        node = inner.value
        if isinstance(node, ast.Name):
            return bool(arguments) and node.id == arguments[0].arg
    return False


@functools.lru_cache(4096)
def _names(tree: ast.AST) -> tuple[frozenset[str], frozenset[str], bool]:
    """The names that functions inside of a function know, those by which nobody else has anything, and whether its
    names may be set or read in ways that no walk follows."""
    nodes = list(ast.walk(tree))
    inner = (n for n in nodes if n is not tree and isinstance(n, (ast.FunctionDef, ast.Lambda)))
    known = {name.id for one in inner for name in ast.walk(one) if isinstance(name, ast.Name)}
    given = {one.arg for one in nodes if isinstance(one, ast.arg)}
    stored = {one.id for one in nodes if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    odd = (ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom, ast.Await)
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    exposed = any(isinstance(node, odd) for node in nodes) or bool(called & {"locals", "vars", "eval", "exec", "dir"})
    return frozenset(known), frozenset(stored - given), exposed


class _Walk:
    """A walk along all paths of a function, with the names that may hold one value and those that surely do."""

    def __init__(
        self,
        tree: ast.FunctionDef | ast.Lambda,
        parents: dict[ast.AST, ast.AST],
        site: ast.AST | None,
        takers: set[ast.AST | None],
        parts: dict[str, bool],
        single: bool,
        counted: bool,
    ) -> None:
        self.tree, self.parents, self.site, self.takers, self.parts = tree, parents, site, takers, parts
        self.single, self.counted = single, counted
        self.boxed = boxed(tree)
        # what the value is made of: a layer that does nothing any more hands it on
        self.bases = {one.id for one in getattr(site, "args", ()) if isinstance(one, ast.Name)}
        self.met: set[ast.AST | None] = set()  # of what has taken the value
        self.returns: set[ast.AST] = set()
        self.gives_others = False  # whether it may return something else
        self.loops: list[tuple[list[State], list[State]]] = []  # where each is left, where each goes on to the next
        self.rounds = 0  # loops around that hand the value on from round to round
        self.arguments = tree.args.args
        self.inner, self.own, self.exposed = _names(tree)

    def run(self, given: frozenset[str]) -> None:
        self.exposed |= bool(given & self.inner)
        if not isinstance(self.tree, ast.Lambda):
            self._block(self.tree.body, (given, given))
        elif self._use(self.tree.body, (given, given)):
            self.returns.add(self.tree)

    # --- statements -------------------------------------------------------------------------------------------------

    def _block(self, body: list[ast.stmt], state: State) -> State:
        for statement in body:
            if state is None:
                return None
            state = self._statement(statement, state)
        return state

    def _statement(self, one: ast.stmt, state: Holders) -> State:
        if isinstance(one, ast.If):
            self.exposed |= bool(self._use(one.test, state))
            known = self._known(one.test)
            self.exposed |= bool(self.rounds) and known is None
            ways = [self._block(one.body, state)] if known is not False else []
            ways += [self._block(one.orelse, state)] if known is not True else []
            return _either(*ways)
        if isinstance(one, (ast.For, ast.While)):
            return self._loop(one, state)
        if isinstance(one, ast.With):
            for item in one.items:
                self.exposed |= bool(self._use(item.context_expr, state))
            self.exposed |= swallows(one)
            return self._block(one.body, state)
        if isinstance(one, ast.Try):
            after: State = state
            reached: State = state
            for inner in one.body:
                after = self._statement(inner, after) if after is not None else None
                reached = _either(reached, after)
            self.exposed |= swallows(one)
            ways = [self._block(one.orelse, after), *(self._block(handler.body, reached) for handler in one.handlers)]
            return self._block(one.finalbody, _either(*ways))
        if isinstance(one, ast.Match):
            self.exposed |= bool(self._use(one.subject, state))
            return _either(state, *(self._block(case.body, state) for case in one.cases))
        if isinstance(one, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            return state
        if isinstance(one, (ast.Break, ast.Continue)):
            self.loops[-1][isinstance(one, ast.Continue)].append(state)
            return None
        if isinstance(one, ast.Assign) and (pairs := _pairs(one)):
            return self._each(pairs, state)
        held = self._use(one, state)
        self.exposed |= bool(state[0]) and any(not self.bases.isdisjoint(written(node)) for node in ast.walk(one))
        if isinstance(one, (ast.Return, ast.Raise)):
            if held and isinstance(one, ast.Return):
                self.returns.add(one)
            self.gives_others |= isinstance(one, ast.Return) and held != SURELY
            return None
        targets = one.targets if isinstance(one, (ast.Assign, ast.Delete)) else [getattr(one, "target", None)]
        changed = [n for target in targets if target is not None for n in ast.walk(target)]
        stored = {n.id for n in changed if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Store, ast.Del))}
        if held:
            kept = any(isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) for n in changed)
            self.exposed |= kept or bool(self.inner & stored) or not self._filled(one) <= self.own
        new = frozenset((stored | self._filled(one)) if held else ())
        return (state[0] - stored) | new, (state[1] - stored) | (new if held == SURELY else frozenset())

    def _each(self, pairs: list[tuple[ast.expr, ast.expr]], state: Holders) -> State:
        """What holds the value after names are given as many values at once: `x, y = self.a(x), x`."""
        held = [(target, self._use(value, state)) for target, value in pairs]
        stored = frozenset(one.id for one, _ in held if isinstance(one, ast.Name))
        maybe, surely = (frozenset(one.id for one, holds in held if isinstance(one, ast.Name) and holds >= least)
                         for least in (MAYBE, SURELY))  # fmt: skip
        self.exposed |= any(holds and not isinstance(one, ast.Name) for one, holds in held) or bool(self.inner & maybe)
        return (state[0] - stored) | maybe, (state[1] - stored) | surely

    def _loop(self, loop: ast.For | ast.While, state: Holders) -> State:
        parts = list(ast.walk(loop))
        within = any(node is self.site for node in parts)
        handed = within and any(n in self.takers for n in parts)
        perhaps = isinstance(loop, ast.While) or (
            self.counted and not self._of_parts(loop.iter)
        )  # any number of rounds
        chosen = isinstance(loop, ast.For) and _chooses(self.tree, loop.iter)
        self.exposed |= within and (perhaps or chosen or _picks(self.tree))
        self.exposed |= handed and self._may_skip(loop)
        before = state
        if isinstance(loop, ast.For):
            held = self._use(loop.iter, state)
            self.exposed |= bool(held) and self.single and getattr(loop.iter, "id", None) not in {None, *self.boxed}
            names = frozenset(n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name))
            state = (state[0] | names, state[1] | names) if held else (state[0] - names, state[1] - names)
        else:
            self.exposed |= bool(self._use(loop.test, state))
        self.rounds += handed
        self.loops.append(([], []))
        once = self._block(loop.body, state)
        if handed or not within or perhaps:
            for _ in range(2):  # the next rounds
                state = _either(state, once, *self.loops[-1][1]) or state
                once = _either(once, self._block(loop.body, state))
        self.rounds -= handed
        left, further = self.loops.pop()
        # What a next round has taken is not what the last one leaves.
        leaving = before if handed else _either(*([] if within and not perhaps else [before]), once, *further)
        return _either(self._block(loop.orelse, leaving), *left)

    def _may_skip(self, loop: ast.For | ast.While) -> bool:
        """Whether some round may do otherwise with what a loop hands on, by what picks between values."""
        inside = list(ast.walk(loop))
        given = {one.id for one in inside if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
        for one in inside:
            picks = isinstance(one, (ast.IfExp, ast.Match, ast.Try))
            if picks and not (isinstance(one, ast.IfExp) and self._known(one.test) is not None):
                names = {inner.id for inner in ast.walk(one) if isinstance(inner, ast.Name)}
                if names & given:
                    return True
        return False

    def _of_parts(self, iterated: ast.expr) -> bool:
        """Whether what a loop goes through is told by the module alone."""
        names = {node.id for node in ast.walk(iterated) if isinstance(node, ast.Name)}
        own = {self.arguments[0].arg} if self.arguments else set()
        return names <= own | HANDING_ON | {"range", "len"}

    def _known(self, test: ast.expr) -> bool | None:
        """The answer to whether a part is there; None to other questions."""
        return presence(test, self.arguments[0].arg, self.parts) if self.arguments else None

    # --- expressions ------------------------------------------------------------------------------------------------

    def _use(self, inside: ast.AST, state: Holders) -> int:
        """Look at all that reads the value in a statement or expression; tells whether that still holds it."""
        holds = NOT
        for node in ast.walk(inside):
            name = node.id if isinstance(node, ast.Name) else ""
            reads = name in state[0] and (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
            reads |= name in state[0] and isinstance(inside, ast.AugAssign) and node is inside.target
            if reads or node is self.site:
                holds = max(holds, self._holds(node, inside, not reads or name in state[1] or bool(self.rounds)))
        return holds

    def _holds(self, node: ast.AST, outermost: ast.AST, surely: bool) -> int:
        """Whether what a statement gives away still holds the value that a part of it does."""
        itself = self.single and not (isinstance(node, ast.Name) and node.id in self.boxed)
        while node is not outermost:
            inner, node = node, self.parents[node]
            if node in self.takers:
                self.met.add(node)
                self.exposed |= not surely
                return NOT
            if itself and self._asks(node):
                return NOT
            if itself and self._takes_some(node, inner):
                self.exposed = True
                return NOT
            itself &= not isinstance(node, (*BOXES, ast.Call))
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Return)):
                return SURELY if surely else MAYBE
            if isinstance(node, (ast.Delete, ast.Assert, ast.Raise)):
                return NOT
            if isinstance(node, ast.Expr):
                return SURELY if self._filled(node) else NOT
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if name in _HARMLESS and inner is not node.func:
                    return NOT
                if name in HANDING_ON or (name in FILLS and inner is not node.func):
                    continue
            if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
                return NOT
            if isinstance(node, ast.IfExp) and inner is not node.test:
                surely &= self._known(node.test) is not None  # it may be the other
                continue
            if not isinstance(node, _PASSES):
                self.exposed = True
                return NOT
        return SURELY if surely else MAYBE

    def _asks(self, node: ast.AST) -> bool:
        """Whether code asks a value what a merge changes of none, or was seen to take its shape apart."""
        if not isinstance(node, ast.Attribute):
            return False
        around = self.parents[node]
        unpacked = node.attr == "shape" and isinstance(around, ast.Assign) and self.takers.intersection(around.targets)
        self.met |= unpacked or set()
        return bool(unpacked) or node.attr in _INVARIANT

    def _takes_some(self, node: ast.AST, inner: ast.AST) -> bool:
        """Whether code makes another tensor of one without a call, or writes to it: `y[:, 0]`, `y.T`, `a, b = y`."""
        if isinstance(node, (ast.Subscript, ast.Attribute)):
            parent = self.parents[node]
            called = isinstance(parent, ast.Call) and parent.func is node
            return node.value is inner and not called
        unpacked = isinstance(node, ast.Assign) and any(isinstance(one, (ast.Tuple, ast.List)) for one in node.targets)
        return unpacked or isinstance(node, ast.Starred)

    def _filled(self, statement: ast.AST) -> set[str]:
        """The names of what a statement puts something into: `found.append(x)`, `found["a"] = x`."""
        found: set[str] = set()
        for node in ast.walk(statement):
            inner: ast.AST | None = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FILLS:
                inner = node.func.value
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                inner = node.value
            while isinstance(inner, (ast.Attribute, ast.Subscript)):
                inner = inner.value
            if isinstance(inner, ast.Name):
                found.add(inner.id)
        return found


def _pairs(one: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """The targets of an assignment with the value of each, where both are written out; none otherwise."""
    target, value = one.targets[0], one.value
    both = (ast.Tuple, ast.List)
    if len(one.targets) != 1 or not isinstance(target, both) or not isinstance(value, both):
        return []
    starred = any(isinstance(inner, ast.Starred) for inner in (*target.elts, *value.elts))
    return (
        list(zip(target.elts, value.elts, strict=True)) if len(target.elts) == len(value.elts) and not starred else []
    )


def _either(*states: State) -> State:
    """What holds after any of several ways."""
    known = [state for state in states if state is not None]
    if not known:
        return None
    maybe, surely = zip(*known, strict=True)
    return frozenset.union(*maybe), frozenset.intersection(*surely)
