"""What code asks about the parts of its module, by its source: methods that a trace has not run, and what code that it
has run does with a part which it got."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from structrep.modules.call_sites import function_of
from structrep.modules.mentions import HOLDS_ALL
from structrep.modules.positions import definition, definition_around, place_around
from structrep.modules.source import asked_of_names, attribute_of, functions, syntax

WHAT = "what it is"  # what is asked about a part that is handed to somebody, or met on a walk
TYPE = "its type"
CLASS = "whether it is of a class"
FIRST = "its first parameter"  # of which no more than dtype and device are asked
MODULES = {
    "modules": "*",
    "named_modules": "*",
    "apply": "*",
    "state_dict": "*",
    "children": "+",
    "named_children": "+",
}
TENSORS = frozenset({"parameters", "named_parameters", "buffers", "named_buffers"})
BY_NAME = "get_submodule"
GEOMETRY = frozenset({"stride", "padding", "kernel_size", "dilation", "groups", "padding_mode"})
_TELL = {"str", "repr", "format", "vars", "dir"}  # all that there is in what they are given
_OF_TYPES = {"type": TYPE, "isinstance": CLASS}
_EACH = {"map", "filter"}
_INSIDE = {"values", "items"}
_LOOPS = {"enumerate", "zip", "reversed", "list", "tuple", "iter", "chain", "islice", "sorted"}
_INVARIANT = {"dtype", "device"}  # what no merge changes, where all parameters have the same

Names = tuple[
    str | None, ...
]  # a way from a module: names of parts, None for any; "+" for all parts, "*" for all below


class Ask(NamedTuple):
    """A question about a part: the way there, for what, and where it stands."""

    way: Names
    what: str
    file: str
    line: int


class Handed(NamedTuple):
    """A part that is given away: the way to it, in which line, and as which argument of which function, by the name
    that code calls it by, or of which method of the module whose code it is."""

    way: Names
    line: int
    what: str = WHAT
    place: int = -1
    helper: str = ""
    method: str = ""


# --- methods ----------------------------------------------------------------------------------------------------------


def asks(module: nn.Module, by: Iterable[tuple[Any, int]], picked: bool) -> Iterator[tuple[str, Ask]]:
    """What code may ask about a module and its parts, itself or in what it calls of the module's own, of its parts and
    of functions that it hands them to: their settings (`self.norm.eps`), their types (`isinstance(self.norm, ...)`), or
    hand them to somebody. Branches that are taken in training mode alone are left out. Gives the path of what is asked
    about with the question.

    Args:
        by: names of methods, and functions, with the place of the argument that is the module.
        picked: whether parts count that are got by a computed name.
    """
    pending: list[tuple[str, nn.Module, Any, int]] = [("", module, one, place) for one, place in by]
    seen = set[tuple[str, FunctionType, int]]()
    while pending:
        path, owner, called, place = pending.pop()
        cls: Any = type(owner)
        known = methods_of(cls)
        function = known.get(called) if isinstance(called, str) else called
        if not isinstance(function, FunctionType) or (path, function, place) in seen:
            continue
        seen.add((path, function, place))
        own = _own(function, place)
        pending += [(path, owner, one, 0) for one in own.named]
        pending += [
            (path, owner, one, 0) for one in known if any(_may_be(one, known[one], way) for way in own.computed)
        ]
        for way, receiver, where in own.hands:
            receiver = known.get(receiver) if isinstance(receiver, str) else receiver
            pending += [(_joined(path, below), part, receiver, where) for below, part in resolve(owner, way)]
        for ask in (*own.asks, *((Ask(("+",), WHAT, *own.picks),) if picked and own.picks else ())):
            for below, part in resolve(owner, ask.way):
                of: Any = type(part)
                if ask.what in methods_of(of):
                    pending.append((_joined(path, below), part, ask.what, 0))
                elif ask.what not in part._modules:
                    yield _joined(path, below), ask


def resolve(module: nn.Module, way: Names) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a way leads to, by path."""
    found = [("", module)]
    for name in way:
        if name == "*":
            found = [(_joined(path, below), one) for path, part in found for below, one in part.named_modules()]
        else:
            every = name is None or name == "+"
            found = [
                (_joined(path, key), one)
                for path, part in found
                for key, one in part._modules.items()
                if one is not None and (every or key == name)
            ]
    yield from found


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


@functools.lru_cache(4096)
def methods_of(cls: Any) -> dict[str, FunctionType]:
    """The functions of a class and those behind its properties, but for torch's own."""
    known = functions(cls)
    for base in reversed(cls.__mro__[: cls.__mro__.index(nn.Module)]):
        for name, value in vars(base).items():
            if isinstance(value, property) and isinstance(value.fget, FunctionType):
                known[name] = value.fget
    return known


class _Computed(NamedTuple):
    """A call of what has a computed name: how that begins, and with how many arguments, None if that is not known."""

    starts: str
    given: int | None


def _may_be(name: str, function: FunctionType, called: _Computed) -> bool:
    """Whether a method may be what is called by a computed name."""
    if not name.startswith(called.starts) or name.startswith("__") or hasattr(nn.Module, name):
        return False
    try:
        inspect.signature(function).bind(*[None] * (1 + (called.given or 0)))
    except TypeError:
        return called.given is None
    return True


class _Own(NamedTuple):
    """What the code of one function asks about the parts of a module, which attributes of it it names, what it calls by
    computed names, to which functions and methods it hands what, and where it computes the name of something that it
    does not call."""

    asks: tuple[Ask, ...] = ()
    named: frozenset[str] = frozenset()
    computed: frozenset[_Computed] = frozenset()
    hands: tuple[tuple[Names, Any, int], ...] = ()
    picks: tuple[str, int] | None = None


@functools.lru_cache(4096)
def _own(function: FunctionType, place: int) -> _Own:
    """What a function does with the module that it is given at a place."""
    plain: Any = inspect.unwrap(function)
    found = definition(plain.__code__) if isinstance(plain, FunctionType) else None
    if found is None or place >= len(found[0].args.args):
        return _Own()
    tree, parents, _ = found
    file, itself = plain.__code__.co_filename, tree.args.args[place].arg
    nodes = list(_in_eval(tree, itself))
    others: dict[str, Names] = {itself: ()}  # names of the module and, of its parts, those given in passing
    for node in nodes:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if isinstance(node, ast.Assign) and isinstance(target, ast.Name):
            others |= {target.id: names} if (names := _names(node.value, {itself: ()})) else {}
    asked: list[Ask] = []
    named: set[str] = set()
    computed: set[_Computed] = set()
    hands: list[tuple[Names, Any, int]] = []
    picks: list[int] = []
    run = {node.func for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        line = getattr(node, "lineno", 0)
        if (told := _tells(node)) is not None and (names := _names(told, others)) is not None:
            asked.append(Ask((*names, "*"), WHAT, file, line))
        if isinstance(node, ast.Attribute) and not isinstance(parents.get(node), ast.Attribute):
            names = _names(node, others) or ()
            last = names[-1] if names else None
            if node in run and (last in MODULES or last in TENSORS):
                if last in TENSORS and _asks_first(parents[node], parents, nodes):
                    asked.append(Ask((*names[:-1], "*"), FIRST, file, line))
                elif not _only_runs(parents[node], parents, nodes):
                    asked.append(Ask((*names[:-1], MODULES.get(str(last), "*")), WHAT, file, line))
            elif (all_of := _stored(names)) is not None:
                if not (node in run and (last == "get" or _only_runs(parents[node], parents, nodes))):
                    asked.append(Ask((*all_of, "*"), WHAT, file, line))
            elif len(names) == 1:
                named.add(str(last))
            elif names and not (node in run and last == "forward"):
                asked.append(Ask(names[:-1], str(last), file, line))
        given: list[ast.expr] = []
        what = WHAT
        if isinstance(node, ast.Call):
            what = _OF_TYPES.get(node.func.id, WHAT) if isinstance(node.func, ast.Name) else WHAT
            helper = plain.__globals__.get(node.func.id) if isinstance(node.func, ast.Name) else None
            given = [one for place, one in enumerate(node.args) if not asks_for_geometry(helper, place)]
            given += [keyword.value for keyword in node.keywords]
            if _gets(node, itself):
                name = node.args[1]
                if isinstance(name, ast.Constant):
                    named.add(str(name.value))
                elif node in run:
                    computed.add(_Computed(beginning(name), _count(parents[node])))
                else:
                    picks.append(line)
            else:
                hands += _receivers(node, others, itself, plain)
                asked += [Ask(way, name, file, line) for way, name in _got(node, others)]
        elif isinstance(node, ast.Match):
            given, what = [node.subject], CLASS
        for one in given:
            names = _names(one, others)
            if names or (names == () and what != WHAT):
                asked.append(Ask(names, what, file, line))
    return _Own(
        tuple(dict.fromkeys(asked)),
        frozenset(named),
        frozenset(computed),
        tuple(hands),
        (file, picks[0]) if picks else None,
    )


def _count(call: ast.AST) -> int | None:
    """How many arguments a call gives; None if that is not known."""
    plain = isinstance(call, ast.Call) and not call.keywords and not any(isinstance(a, ast.Starred) for a in call.args)
    return len(call.args) if isinstance(call, ast.Call) and plain else None


def _receivers(
    call: ast.Call, others: dict[str, Names], itself: str, function: FunctionType
) -> Iterator[tuple[Names, Any, int]]:
    """The module and the parts that a call hands to a function or a method, and at which place that takes them."""
    own = isinstance(call.func, ast.Attribute) and attribute_of(call.func, itself)
    receiver = call.func.attr if isinstance(call.func, ast.Attribute) and own else function_of(call.func, function)
    for place, one in enumerate(call.args):
        if receiver is not None and (names := _names(one, others)) is not None:
            yield names, receiver, place + own


def _in_eval(tree: ast.AST, itself: str) -> Iterator[ast.AST]:
    """The parts of code but for what runs in training mode alone."""
    pending = [tree]
    while pending:
        node = pending.pop(0)
        yield node
        skipped: list[ast.AST] = []
        if isinstance(node, ast.Raise):
            skipped = list(ast.iter_child_nodes(node))  # what an error says is no answer
        if isinstance(node, (ast.If, ast.IfExp)):
            test = node.test
            if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and _is_mode(test.operand, itself):
                skipped = [*node.orelse] if isinstance(node, ast.If) else [node.orelse]
            elif any(_is_mode(one, itself) for one in _all_of(test)):
                skipped = [*node.body] if isinstance(node, ast.If) else [node.body]
        pending += [child for child in ast.iter_child_nodes(node) if child not in skipped]


def _all_of(test: ast.expr) -> list[ast.expr]:
    """What must all hold for a condition to."""
    return test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]


def _is_mode(node: ast.expr, itself: str) -> bool:
    return _names(node, {itself: ()}) == ("training",)


def _gets(call: ast.Call, itself: str) -> bool:
    """Whether a call is `getattr(self, ...)`."""
    plain = isinstance(call.func, ast.Name) and call.func.id == "getattr" and len(call.args) > 1
    return plain and isinstance(call.args[0], ast.Name) and call.args[0].id == itself


def _got(call: ast.Call, others: dict[str, Names]) -> Iterator[tuple[Names, str]]:
    """What `getattr(self.part, ...)` asks a part for, by a name that is written there."""
    plain = isinstance(call.func, ast.Name) and call.func.id == "getattr" and len(call.args) > 1
    names = _names(call.args[0], others) if plain else None
    name = str(getattr(call.args[1], "value", "")) if names else ""
    if names and name:
        walks = name in MODULES or name in TENSORS or name in HOLDS_ALL
        yield ((*names, "*"), WHAT) if walks else (names, name)


def _tells(node: ast.AST) -> ast.expr | None:
    """What a text is made of that shows all that there is in it: `str(self.part)`, `f"{self}"`."""
    if isinstance(node, ast.FormattedValue):
        return node.value
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _TELL
    return node.args[0] if isinstance(node, ast.Call) and named and node.args else None


def _stored(names: Names) -> Names | None:
    """The way to what code asks for all that it has: `self.part._modules.values()`; None if it does not."""
    first = next((place for place, name in enumerate(names) if name in HOLDS_ALL), len(names))
    entries = first + 1 == len(names) and names[first:] != ("__dict__",)  # of which one is picked, or looked for
    return None if first == len(names) or entries else names[:first]


def beginning(name: ast.expr) -> str:
    """How a computed name begins, as far as is known: "by_" of `f"by_{how}"`."""
    first = name.values[0] if isinstance(name, ast.JoinedStr) and name.values else name
    while isinstance(first, ast.BinOp) and isinstance(first.op, ast.Add):
        first = first.left
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def _asks_first(walk: ast.AST, parents: dict[ast.AST, ast.AST], nodes: list[ast.AST]) -> bool:
    """Whether of what a walk over parameters gives, the first is asked for its dtype or device, and nothing else."""
    node, taken = walk, False
    while isinstance(parent := parents.get(node), ast.Call) and isinstance(parent.func, ast.Name):
        if parent.func.id not in ("next", "iter") or parent.args[:1] != [node]:
            return False
        node, taken = parent, taken or parent.func.id == "next"
    if isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
        name = parent.targets[0].id
        uses = [n for n in nodes if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
        return taken and all(_is_invariant(parents.get(one)) for one in uses)
    return taken and _is_invariant(parent)


def _is_invariant(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in _INVARIANT


def _only_runs(walk: ast.AST, parents: dict[ast.AST, ast.AST], nodes: list[ast.AST]) -> bool:
    """Whether a loop over what a call gives does no more with each than to call it: `for block in self.children()`."""
    loop = parents.get(walk)
    if not isinstance(loop, ast.For) or loop.iter is not walk:
        return False
    target = loop.target.elts[-1] if isinstance(loop.target, ast.Tuple) else loop.target
    if not isinstance(target, ast.Name):
        return False
    run = {node.func for node in nodes if isinstance(node, ast.Call)}
    uses = {n for n in nodes if isinstance(n, ast.Name) and n.id == target.id and n is not target}
    return bool(uses) and uses <= run


def asks_for_geometry(function: Any, place: int) -> bool:
    """Whether all that a function asks of an argument is how a convolution moves, as one that computes pads does."""
    return isinstance(function, FunctionType) and _asks_for_geometry(function, place)


@functools.lru_cache(4096)
def _asks_for_geometry(function: FunctionType, place: int) -> bool:
    tree = syntax(function)
    if not isinstance(tree, ast.FunctionDef) or place >= len(tree.args.args):
        return False
    asked = asked_of_names({tree.args.args[place].arg}, tree)
    return asked is not None and bool(asked) and GEOMETRY.issuperset(asked)


def _names(node: ast.AST, known: dict[str, Names]) -> Names | None:
    """("a", "b") of `self.a.b`, and of `c.b` where c is known to be self.a; None of anything else. An index counts as a
    name, if it is a number."""
    names: list[str | None] = []
    inner = node
    while isinstance(inner, (ast.Attribute, ast.Subscript)):
        if isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
        elif isinstance(inner.slice, ast.Constant) and isinstance(inner.slice.value, int):
            names.insert(0, str(inner.slice.value))
        else:
            return None
        inner = inner.value
    return (*known[inner.id], *names) if isinstance(inner, ast.Name) and inner.id in known else None


# --- code that ran ----------------------------------------------------------------------------------------------------


@functools.lru_cache(4096)
def only_runs(code: CodeType, at: int) -> bool:
    """Whether code that looks up a walk over parts loops over it, and does no more with each than to call it."""
    found, node = definition_around(code), place_around(code, at)
    if found is None or node is None:
        return False
    tree, parents, _ = found
    call = parents.get(node)
    return isinstance(call, ast.Call) and call.func is node and _only_runs(call, parents, list(ast.walk(tree)))


@functools.lru_cache(4096)
def handed(code: CodeType, at: int) -> frozenset[Handed]:
    """What code does with a part that an instruction gets, apart from calling it and asking for its attributes: to whom
    it hands it, or something in it, by whatever name, and where it takes it for a class of things or sets its
    attributes."""
    found, node = definition_around(code), place_around(code, at)
    return frozenset(_Part(*found[:2]).handed(node, (), 0)) if found is not None and node is not None else frozenset()


def given_away(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[Handed]:
    """The same of the part that an expression gives."""
    tree = node
    while tree in parents:
        tree = parents[tree]
    yield from _Part(tree, parents).handed(node, (), 0)


class _Part:
    """What a function does with a part."""

    def __init__(self, tree: ast.AST, parents: dict[ast.AST, ast.AST]) -> None:
        self.tree, self.parents = tree, parents
        self.seen: set[tuple[str, Names, int]] = set()

    def handed(self, node: ast.AST, way: Names, boxed: int) -> Iterator[Handed]:
        """Where an expression ends that gives the part, or what is inside of it.

        Args:
            boxed: in how many tuples and lists it stands.
        """
        while (parent := self.parents.get(node)) is not None:
            line = getattr(node, "lineno", 0)
            if (call := self._looking_inside(node)) is not None:
                node = call
                continue
            if isinstance(parent, ast.Subscript) and parent.value is node:
                if not isinstance(parent.slice, ast.Slice):
                    key = str(parent.slice.value) if isinstance(parent.slice, ast.Constant) else None
                    way, boxed = (way, boxed - 1) if boxed else ((*way, key), 0)
            elif isinstance(parent, ast.Attribute):
                if not isinstance(parent.ctx, ast.Load):
                    yield Handed(way, line)
                return
            elif isinstance(parent, ast.Call) and parent.func is not node:
                called = parent.func
                of_itself = isinstance(called, ast.Attribute) and self._is_itself(called.value)
                helper, method = ast.unparse(called), getattr(called, "attr", "")
                if method in _LOOPS or helper in _LOOPS:
                    node = parent
                    continue
                helper, method = ("", method) if of_itself else (helper, "")
                place = parent.args.index(node) if node in parent.args else -1
                way = (*way, None) if helper in _EACH and not boxed else way
                yield Handed(way, line, _OF_TYPES.get(helper, WHAT), place, helper, method)
                return
            elif isinstance(parent, ast.Match) and parent.subject is node:
                yield Handed(way, line, CLASS)
                return
            elif isinstance(parent, (ast.For, ast.comprehension)) and parent.iter is node:
                yield from self._as(parent.target, *((way, boxed - 1) if boxed else ((*way, None), 0)))
                return
            elif isinstance(parent, (ast.Tuple, ast.List)):
                boxed += 1
            elif isinstance(parent, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
                for target in parent.targets if isinstance(parent, ast.Assign) else [parent.target]:
                    yield from self._as(target, way, boxed)
                if not isinstance(parent, ast.NamedExpr):
                    return
            elif not isinstance(parent, (ast.BoolOp, ast.keyword, ast.IfExp)) or node is getattr(parent, "test", None):
                return
            node = parent

    def _as(self, target: ast.AST, way: Names, boxed: int) -> Iterator[Handed]:
        """What is done with it by a name that it was given."""
        for inner in target.elts if isinstance(target, (ast.Tuple, ast.List)) else ():
            yield from self._as(inner, way, max(boxed - 1, 0))
        if isinstance(target, ast.Name) and (target.id, way, boxed) not in self.seen and len(way) + boxed < 5:
            self.seen.add((target.id, way, boxed))
            for one in ast.walk(self.tree):
                if isinstance(one, ast.Name) and one.id == target.id and isinstance(one.ctx, ast.Load):
                    yield from self.handed(one, way, boxed)

    def _looking_inside(self, node: ast.AST) -> ast.AST | None:
        """The call behind a container that gives what is in it (`layers.values()`), or that is a walk by name."""
        parent = self.parents.get(node)
        if isinstance(parent, ast.Attribute) and parent.attr in _INSIDE:
            node, parent = parent, self.parents.get(parent)
        elif not isinstance(node, ast.Attribute) or node.attr != BY_NAME:
            return None
        return parent if isinstance(parent, ast.Call) and parent.func is node else None

    def _is_itself(self, node: ast.AST) -> bool:
        """Whether a name is that of the module whose method it is."""
        given = self.tree.args.args if isinstance(self.tree, (ast.FunctionDef, ast.Lambda)) else []
        return isinstance(node, ast.Name) and bool(given) and node.id == given[0].arg
