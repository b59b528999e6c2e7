"""What code gives to the parts of its module, by its source."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor

from structrep.modules.boxes import FILLS
from structrep.modules.mentions import mentions
from structrep.modules.source import attribute_of, functions, read_function, syntax, written_in

Site = dict[str, Any]  # the arguments of a call, by parameter


def sites(
    cls: type, way: tuple[str, ...], parameters: tuple[str, ...], near: bool, sure: bool = False
) -> list[Site | None]:
    """What the code of a class around a part may give it: of each call that may be one of the part, the arguments by
    parameter, ... or COMPUTED for what is no literal; None for a call that may give it anything, or for code that
    cannot be read.

    Args:
        way: the names from a module of that class to the part.
        parameters: their names, in order.
        near: whether nothing but containers is between; else calls count that are of a thing of the part's name.
        sure: leave out calls of what may be another part, or none.
    """
    found: list[Site | None] = []
    for name, function in functions(cls).items():
        calls = _own_calls(function)
        if calls is None and name == "forward":
            found.append(None)
        for call in calls or () if name != "__init__" else ():
            there = call.key is None or len(way) < 2 or call.key == way[1]
            itself = near and there and (way[0] in call.of or (_ANY in call.of and not sure))
            if itself or (call.last == way[-1] and not sure):
                plain = call.places is not None and len(call.places) <= len(parameters)
                given = zip(parameters, call.places or (), strict=False)
                found.append({**dict(given), **dict(call.names)} if plain else None)
    return found


def methods_called(cls: type) -> frozenset[str]:
    """The names of what the forward of a class, or what that calls of its own, calls with arguments."""
    known = functions(cls)
    own = {"forward", *(mentions(cls, "forward") or ())} & known.keys() if "forward" in known else set()
    calls = (call for name in own for call in _own_calls(known[name]) or ())
    return frozenset(call.last for call in calls if call.last and call.last not in FILLS and call.places != ())


def asks_what(function: Callable[..., Any], parameter: str) -> bool | None:
    """Whether a function may do something else if an argument is None, or of another type; None if its code cannot be
    read."""
    tree = syntax(inspect.unwrap(function))
    if tree is None:
        return None
    tests: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)):
            tests += [node.left, *node.comparators]
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            tests.append(node.test)
        elif isinstance(node, ast.BoolOp):
            tests += node.values
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            tests.append(node.operand)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "type"):
            tests += node.args[:1]
    return any(isinstance(one, ast.Name) and one.id == parameter for one in tests)


_ANY = "*"  # a part of a module, by a name that is computed
_HANDS_ON = {"enumerate", "iter", "list", "reversed", "sorted", "tuple", "zip"}  # what it is given
_ASKS = {"getattr", "hasattr", "id", "isinstance", "len", "print", "range", "repr", "str", "type"}


@dataclass(frozen=True)
class _CallOf:
    """A call in the code of a method."""

    of: frozenset[str]  # the attributes of its module of which it may be, or of what is in them
    last: str  # the last name on the way there: "block" in `model.block(x)`
    places: tuple[Any, ...] | None  # positional arguments, as `sites` has them; None if there may be any
    names: tuple[tuple[str, Any], ...] = ()
    key: str | None = None  # "0" in `self.blocks[0](x)`


@functools.lru_cache(4096)
def _own_calls(function: FunctionType, callers: frozenset[FunctionType] = frozenset()) -> tuple[_CallOf, ...] | None:
    """The calls in the code of a method, and in functions that it hands its module to; None if it cannot be read."""
    read = read_function(function)
    if read is None:
        return None
    tree, itself = read
    nodes = list(ast.walk(tree))
    known: dict[str, frozenset[str]] = {}
    before: dict[str, frozenset[str]] | None = None
    while known != before:
        before = dict(known)
        for node in nodes:
            if isinstance(node, (ast.For, ast.comprehension)):
                _note_parts(node.target, node.iter, itself, known)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    _note_parts(target, node.value, itself, known)
            elif isinstance(node, ast.NamedExpr):
                _note_parts(node.target, node.value, itself, known)
    found: list[_CallOf] = []
    for node in nodes:
        if isinstance(node, ast.Call):
            callee = node.func
            if isinstance(callee, ast.Attribute) and callee.attr == "forward":
                callee = callee.value
            last = callee.attr if isinstance(callee, ast.Attribute) and not _is_torchs(callee, function) else ""
            stars = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
            places = None if stars else tuple(map(_literal, node.args))
            names = tuple((keyword.arg, _literal(keyword.value)) for keyword in node.keywords if keyword.arg)
            bound = isinstance(callee, ast.Attribute) and not attribute_of(
                callee, itself
            )  # a method of a part, if of one
            index = _literal(callee.slice) if isinstance(callee, ast.Subscript) else ...
            key = str(index) if isinstance(index, (int, str)) else None
            of = frozenset() if bound else _parts_in(callee, itself, known)
            found.append(_CallOf(of, last, places, names, key))
            plain = isinstance(callee, ast.Name) and callee.id in _HANDS_ON | _ASKS
            if any(isinstance(one, ast.Name) and one.id == itself for one in node.args) and not plain:
                helper = function_of(callee, function)
                first = isinstance(node.args[0], ast.Name) and node.args[0].id == itself
                if first and helper is not None and helper not in callers:
                    further = _own_calls(helper, callers | {function})
                    found += further if further is not None else [_CallOf(frozenset({_ANY}), "", None)]
            for one in () if plain else (*node.args, *(keyword.value for keyword in node.keywords)):
                if handed := _parts_in(one, itself, known):
                    found.append(_CallOf(handed, "", None))  # to somebody who may call it with anything
    return tuple(found)


def function_of(callee: ast.expr, function: FunctionType) -> FunctionType | None:
    """The function that code calls by its name, or by that of the module which it is in; not one of torch's."""
    found = named(callee, function)
    return found if isinstance(found, FunctionType) and written_in(found).partition(".")[0] != "torch" else None


def named(callee: ast.expr, function: FunctionType) -> Any:
    """What code calls by its name, or by that of the modules which it is in; None if that is not known."""
    if isinstance(callee, ast.Name) and callee.id in function.__code__.co_freevars:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        with contextlib.suppress(ValueError):  # a cell that has no value yet
            return cells[callee.id].cell_contents
        return None
    return in_space(ast.unparse(callee), function.__globals__)


def in_space(name: str, space: Mapping[str, Any]) -> Any:
    """What a name means, or one behind modules (`cp.checkpoint`), in a namespace; None if that is nothing."""
    first, *inner = name.split(".")
    found = space.get(first)
    for one in inner:
        found = getattr(found, one, None) if isinstance(found, ModuleType) else None
    return found


COMPUTED = object()  # an argument that a forward computes, or chooses


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        chosen = any(isinstance(one, (ast.Call, ast.Compare, ast.IfExp)) for one in ast.walk(node))
        return COMPUTED if chosen else ...


def _is_torchs(callee: ast.Attribute, function: FunctionType) -> bool:
    """Whether a call is of a function in some Python module, or by its name of a tensor's method."""
    base = callee.value
    while isinstance(base, ast.Attribute):
        base = base.value
    if not isinstance(base, ast.Name):
        return hasattr(Tensor, callee.attr)
    return isinstance(function.__globals__.get(base.id), ModuleType) or (
        base is callee.value and base.id not in function.__code__.co_varnames[:1] and hasattr(Tensor, callee.attr)
    )


def _note_parts(target: ast.expr, value: ast.expr, itself: str, known: dict[str, frozenset[str]]) -> None:
    """Note which parts of its module the names that a loop or an assignment gives may be."""
    called = value.func if isinstance(value, ast.Call) else None
    if isinstance(target, (ast.Tuple, ast.List)):
        values: list[ast.expr] = [value] * len(target.elts)
        if isinstance(value, ast.Call) and isinstance(called, ast.Name) and len(target.elts) > 1:
            if called.id == "enumerate":
                values = [ast.Constant(0), *value.args[:1]]
            elif called.id == "zip":
                values = list(value.args)
        elif isinstance(value, (ast.Tuple, ast.List)):
            values = value.elts
        if len(values) != len(target.elts):
            values = [value] * len(target.elts)
        for inner, one in zip(target.elts, values, strict=True):
            _note_parts(inner, one, itself, known)
    elif isinstance(target, ast.Name) and (parts := _parts_in(value, itself, known)):
        known[target.id] = known.get(target.id, frozenset()) | parts


def _parts_in(node: ast.expr, itself: str, known: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """The attributes of its module that a value may be, or be in, or hold."""
    if isinstance(node, ast.Name):
        return known.get(node.id, frozenset())
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == itself:
            return frozenset({_ANY if node.attr == "_modules" else node.attr})
        return _parts_in(node.value, itself, known)
    if isinstance(node, (ast.Subscript, ast.Starred)):
        return _parts_in(node.value, itself, known)
    inner: list[ast.expr] = []
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        inner = node.elts
    elif isinstance(node, ast.Dict):
        inner = node.values
    elif isinstance(node, ast.IfExp):
        inner = [node.body, node.orelse]
    elif isinstance(node, ast.BoolOp):
        inner = node.values
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and node.args:
            whose = node.args[0]
            own = isinstance(whose, ast.Name) and whose.id == itself
            return frozenset({_ANY}) if own else _parts_in(whose, itself, known)
        if isinstance(node.func, ast.Name) and node.func.id in _HANDS_ON:
            inner = node.args
        elif isinstance(node.func, ast.Attribute) and node.func.attr in (
            "items",
            "values",
            "children",
            "named_children",
        ):
            if isinstance(node.func.value, ast.Name) and node.func.value.id == itself:
                return frozenset({_ANY})
            inner = [node.func.value]
    return frozenset().union(*(_parts_in(one, itself, known) for one in inner))
