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
from structrep.modules.source import functions, syntax, written_in

_SETTERS = {"setattr", "delattr", "__setattr__", "__delattr__"}
_VIEWS = {"view", "reshape", "flatten", "t", "transpose", "permute", "squeeze", "unsqueeze", "expand", "detach"}
_LOCAL = "local "  # before names that are no attributes
_LIBRARIES = {*(f"{_LOCAL}{name}" for name in ("torch", "nn", "F", "init")), "functional", "init"}


def may_set(module: nn.Module, method: str, path: list[str]) -> bool:
    """Whether a method may, as it runs, set or write to something on a path from its module: `["block", "low"]`.

    Args:
        path: attributes, one of the other.
    """
    held: Any = module
    for depth, name in enumerate(path):
        if not isinstance(held, nn.Module):
            return False
        cls: Any = type(held)
        if not _set_by(cls, "forward" if depth else method).isdisjoint((*path[depth:], "*")):
            return True
        held = getattr(held, name, None)
    return False


@functools.lru_cache(4096)
def _set_by(cls: type, method: str) -> frozenset[str]:
    """The names of all that a method may set, and those that it asks its module for; "*" of a computed name."""
    known, seen, found = functions(cls), {method}, set[str]()
    pending = [method]
    for name in pending:
        if name in known:
            found |= _set_in(known[name], {known[name]})
            asked = {node.attr for node in _nodes(known[name]) if isinstance(node, ast.Attribute)} - seen
            pending += [one for one in asked if one in known]
            seen |= asked
    return frozenset(found)


def _set_in(function: FunctionType, around: Set[FunctionType]) -> set[str]:
    """The names of all that a function may set, and the functions that it calls by their names.

    Args:
        around: the function, and those whose calls have come to it.
    """
    nodes = _nodes(function)
    found = {name for node in nodes for name in _names_set(node)}
    for call in (one for one in nodes if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)):
        helper = function.__globals__.get(call.func.id)  # type: ignore[attr-defined]
        library = written_in(helper).partition(".")[0]
        if isinstance(helper, FunctionType) and helper not in around and library != "torch":
            inner, arguments = _set_in(helper, {*around, helper}), inspect.signature(helper).parameters
            found |= {name for name in inner if not name.startswith(_LOCAL)}
            if not inner.isdisjoint(f"{_LOCAL}{name}" for name in arguments):
                found = found.union(*map(_names, call.args))
    bound: dict[str, set[str]] = {}  # what names stand for
    for node in (one for one in nodes if isinstance(one, (ast.Assign, ast.NamedExpr))):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                bound.setdefault(f"{_LOCAL}{target.id}", set()).update(_viewed(node.value))
    pending = list(found)
    for name in pending:
        new = bound.get(name, set()) - found
        found |= new
        pending += new
    return found


@functools.lru_cache(4096)
def _nodes(function: FunctionType) -> tuple[ast.AST, ...]:
    tree = syntax(inspect.unwrap(function))
    return tuple(node for one in getattr(tree, "body", ()) for node in ast.walk(one))


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
            written.append(own)
        elif "inplace" in given or (name.endswith("_") and not name.endswith("__")):
            of_library = own is None or not _names(own).isdisjoint(_LIBRARIES)
            written += node.args[:1] if of_library or own is None else [own]
        yield from set().union(*map(_names, written))


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
