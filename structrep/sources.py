"""What the code of a module's class does with the parts of the module, where that code can be read."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn


def functions(cls: type) -> dict[str, FunctionType]:
    """The functions of a class, as they are inherited, but for torch's own."""
    found: dict[str, FunctionType] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] != "torch":
            found |= {name: f for name, f in vars(base).items() if isinstance(f, FunctionType)}
    return found


@functools.lru_cache(4096)
def _tree(function: Callable[..., Any]) -> tuple[ast.AST, str] | None:
    """The syntax of a method, and what it calls its module; None if that cannot be read."""
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(body, (ast.FunctionDef, ast.AsyncFunctionDef)) or not body.args.args:
        return None
    return body, body.args.args[0].arg


def _attribute(node: ast.AST, itself: str) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == itself


def mentions(cls: type, name: str) -> frozenset[str] | None:
    """The attributes of its module that a method mentions, itself or in methods that it calls.

    None if they may be any: the code cannot be read, or does something else with its module than ask for an attribute.
    """
    known, found, pending = functions(cls), set[str](), [name]
    while pending:
        one = _own_mentions(known[pending.pop()])
        if one is None or any(hasattr(nn.Module, attribute) for attribute in one - known.keys()):
            return None
        pending += [attribute for attribute in one - found if attribute in known]
        found |= one
    return frozenset(found)


@functools.lru_cache(4096)
def _own_mentions(function: FunctionType) -> frozenset[str] | None:
    read = _tree(function)
    if read is None:
        return None
    tree, itself = read
    nodes = list(ast.walk(tree))
    asked = [node for node in nodes if _attribute(node, itself)]
    bare = sum(isinstance(node, ast.Name) and node.id in (itself, "super") for node in nodes) != len(asked)
    return None if bare else frozenset(node.attr for node in asked if isinstance(node, ast.Attribute))


def taken_apart(module: nn.Module) -> set[str]:
    """The parts of a module that its class's code does anything else with than call them or ask whether they are there:
    it may run what is inside them one by one."""
    found: set[str] = set()
    for name, function in functions(type(module)).items():
        if name != "__init__":
            apart = _own_parts(function)
            if apart is None:
                return set(module._modules)
            found |= apart
    return found & module._modules.keys()


@functools.lru_cache(4096)
def _own_parts(function: FunctionType) -> frozenset[str] | None:
    read = _tree(function)
    if read is None:
        return frozenset() if function.__name__ != "forward" else None
    tree, itself = read
    harmless: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            harmless.add(node.func)
        elif isinstance(node, ast.Attribute):
            harmless.add(node.value)  # what is below is looked for by name
        elif isinstance(node, ast.Compare):
            harmless |= {node.left, *node.comparators}
        elif isinstance(node, (ast.If, ast.IfExp)):
            harmless.add(node.test)
        elif isinstance(node, ast.BoolOp):
            harmless.update(node.values)
        elif isinstance(node, ast.UnaryOp):
            harmless.add(node.operand)
    asked = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _attribute(node, itself))
    return frozenset(n.attr for n in asked if isinstance(n.ctx, ast.Load) and n not in harmless)
