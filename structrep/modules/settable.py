"""What code may set, or write to in place, while it runs: what was asked when it began may be another in its middle."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator, Set
from types import FunctionType
from typing import Any

from torch import nn

from structrep.modules.boxes import CHANGES, FILLS
from structrep.modules.positions import definition
from structrep.modules.source import functions, written_in

_SETTERS = {"setattr", "delattr", "__setattr__", "__delattr__"}
_ASKS = {"getattr", "hasattr", "isinstance", "super", "type", "id", "len", "bool", "print", *_SETTERS}
_VIEWS = {"view", "reshape", "flatten", "t", "transpose", "permute", "squeeze", "unsqueeze", "expand", "detach"}
_MAKES = {"clone", *(f"new_{kind}" for kind in ("empty", "zeros", "ones", "full", "tensor"))}
_OPERATORS = {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or",
                                      "xor", "lshift", "rshift", "concat")}  # fmt: skip
OTHERS = "**"
_FILLED = "filled "  # before those of lists and the like that are given something, or lose it
_LOCAL = "local "  # before names that are no attributes
_LIBRARIES = {*(f"{_LOCAL}{name}" for name in ("torch", "nn", "F", "init")), "functional", "init"}


@functools.lru_cache(4096)
def calm(cls: type) -> frozenset[str]:
    """The methods of a class that write to nothing in place and set no attribute."""
    return frozenset(name for name in functions(cls) if all(one.startswith(_FILLED) for one in set_by(cls, name)))


def may_set(
    module: nn.Module, method: str, path: list[str], others: bool, gone: frozenset[ast.AST] = frozenset()
) -> bool:
    """Whether a method may, as it runs, set or write to something on a path from its module: `["block", "low"]`.

    Args:
        path: attributes, one of the other.
        others: whether what others may do counts too, who are given the module.
        gone: parts of the method that do not run.
    """
    any_ = ("*", OTHERS) if others else ("*",)
    held: Any = module
    for depth, name in enumerate(path):
        if not isinstance(held, nn.Module):
            return False
        cls: Any = type(held)
        found = {one.removeprefix(_FILLED) for one in set_by(cls, *(("forward",) if depth else (method, gone)))}
        if not found.isdisjoint((*path[depth:], *any_)):
            return True
        held = getattr(held, name, None)
    return False


@functools.lru_cache(4096)
def set_by(cls: type, method: str, gone: frozenset[ast.AST] = frozenset()) -> frozenset[str]:
    """The names of all that a method may set, and those that it asks its module for; "*" of a computed name,
    `OTHERS` of what others may set; of parts of the method that do not run nothing."""
    known, seen, found = functions(cls), {method}, set[str]()
    pending = [method]
    for name in pending:
        if name in known:
            function = known[name]
            found |= _set_in(function, {function}, {*inspect.unwrap(function).__code__.co_varnames[:1]}, gone)
            asked = {one.attr for one in _nodes(function) if isinstance(one, ast.Attribute) and one not in gone} - seen
            pending += [one for one in asked if one in known]
            seen |= asked
    return frozenset(found)


def own_writes(function: FunctionType, static: bool = False) -> set[str]:
    """The names and attributes of all that a method may set or write to, or fill; `OTHERS` of what others may that its
    module is given to.

    Args:
        static: whether it is not given that module.
    """
    found = _set_in(function, {function}, {*function.__code__.co_varnames[: not static]})
    return {name.removeprefix(_FILLED).removeprefix(_LOCAL) for name in found}


def _set_in(
    function: FunctionType, around: Set[FunctionType], itself: Set[str] = frozenset(), gone: Set[ast.AST] = frozenset()
) -> set[str]:
    """The names of all that a function may set, and the functions that it calls by their names.

    Args:
        around: the function, and those whose calls have come to it.
        itself: what a method calls its module: who else is given that may set anything.
        gone: parts of it that do not run.
    """
    if not (nodes := _nodes(function)):
        return {OTHERS}  # nobody knows what it does
    nodes = tuple(one for one in nodes if one not in gone) if gone else nodes
    found = {name for node in nodes for name in _names_set(node)}
    for call in (one for one in nodes if isinstance(one, ast.Call)):
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        helper = function.__globals__.get(name)
        if isinstance(helper, FunctionType) and written_in(helper).partition(".")[0] != "torch":
            if helper in around:
                continue
            inner, arguments = _set_in(helper, {*around, helper}), inspect.signature(helper).parameters
            found |= {one for one in inner if not one.startswith(_LOCAL)}
            writes = {one for one in arguments if f"{_LOCAL}{one}" in inner}
            found = found.union(*map(_names, _given_to(writes, call, list(arguments.values()))))
        elif name not in _ASKS and any(isinstance(one, ast.Name) and one.id in itself for one in call.args):
            found.add(OTHERS)
    bound: dict[str, set[str]] = {}  # what names stand for
    for node in (one for one in nodes if isinstance(one, (ast.Assign, ast.NamedExpr))):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                bound.setdefault(f"{_LOCAL}{target.id}", set()).update(_viewed(node.value))
    pending = list(found)
    for name in pending:
        kind = _FILLED if name.startswith(_FILLED) else ""
        new = {f"{kind}{one}" for one in bound.get(name.removeprefix(kind), ())} - found
        found |= new
        pending += new
    return found


def _given_to(names: Set[str], call: ast.Call, parameters: list[inspect.Parameter]) -> list[ast.expr]:
    """What a call gives to parameters of some names; all that it gives, where that is not plain to see."""
    packed = any(isinstance(one, ast.Starred) for one in call.args) or any(one.arg is None for one in call.keywords)
    if names and (packed or any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters)):
        return [*call.args, *(one.value for one in call.keywords)]
    given = [(one.name, value) for one, value in zip(parameters, call.args, strict=False)]
    given += [(one.arg or "", one.value) for one in call.keywords]
    return [value for name, value in given if name in names]


@functools.lru_cache(4096)
def _nodes(function: FunctionType) -> tuple[ast.AST, ...]:
    found = definition(inspect.unwrap(function).__code__)
    body = found[0].body if found is not None else ()
    return tuple(node for one in (body if isinstance(body, (list, tuple)) else [body]) for node in ast.walk(one))


def _names_set(node: ast.AST) -> Iterator[str]:
    """The names and attributes that a node, its parts left out, may set or write to; "*" if it may be any."""
    if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
        yield from _names(node.value)
        yield from [node.attr] if isinstance(node, ast.Attribute) else ()
    elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        yield f"{_LOCAL}{node.target.id}"
    elif isinstance(node, ast.Call):
        own = node.func.value if isinstance(node.func, ast.Attribute) else None
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        written: list[ast.expr] = [given["out"]] if "out" in given else []
        if name in _SETTERS:
            yield next((str(one.value) for one in node.args if isinstance(one, ast.Constant)), "*")
        elif name in FILLS | CHANGES and own is not None:
            yield from (f"{_FILLED}{one}" for one in _names(own))
        elif "inplace" in given or _in_place(name):
            of_library = own is None or not _names(own).isdisjoint(_LIBRARIES)
            written += node.args[:1] if of_library or own is None else [own]
        elif name == "getattr" and len(node.args) > 1 and _in_place(str(getattr(node.args[1], "value", ""))):
            written += node.args[:1]
        yield from set().union(*map(_viewed, written))
    elif isinstance(node, ast.Attribute) and _in_place(node.attr) and not _is_new(node.value):
        yield from _names(node.value)  # a method that somebody calls later


def _is_new(node: ast.AST) -> bool:
    """Whether a value is made where it stands, and nobody else has it: `x.new_empty(shape)`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MAKES


def _in_place(name: str) -> bool:
    """Whether what an operation of this name does, it does to what it is given: `mul_`, `__imul__`, `operator.imul`."""
    own = name.strip("_")
    return (name.endswith("_") and not name.endswith("__")) or own in _OPERATORS


def written(node: ast.AST) -> set[str]:
    """The names of what a node, its parts left out, writes to in place, or sets something of: `x += 1`, `x.mul_(2)`."""
    found = {name.removeprefix(_FILLED) for name in _names_set(node)}
    return {name.removeprefix(_LOCAL) for name in found if name.startswith(_LOCAL)}


def _viewed(node: ast.AST) -> set[str]:
    """The names of what an expression is a view of; none if it is new."""
    found: set[str] = set()
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        if isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS):
                return set()
            node = node.func.value
            continue
        found |= {node.attr} if isinstance(node, ast.Attribute) else set()
        node = node.value
    return found | ({f"{_LOCAL}{node.id}"} if isinstance(node, ast.Name) else set())


def _names(node: ast.AST) -> set[str]:
    """All attributes and local names in an expression; "*" if it is of all that something has."""
    found = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    found |= {f"{_LOCAL}{n.id}" for n in ast.walk(node) if isinstance(n, ast.Name)}
    return found | ({"*"} if not found.isdisjoint(("__dict__", f"{_LOCAL}vars")) else set())
