"""What the code of a class names of the parts of its module."""

from __future__ import annotations

import ast
import functools
from collections.abc import Set
from types import FunctionType

from torch import nn

from structrep.modules.source import attribute_of, functions, read_function


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


def comes_to(cls: type, name: str | None, methods: Set[str]) -> bool:
    """Whether a call of a method, by a name that a class may have none of, may come to one of some methods."""
    if name is None or name not in functions(cls):
        return False
    found = mentions(cls, name)
    return name in methods or found is None or not found.isdisjoint(methods)


@functools.lru_cache(4096)
def _own_mentions(function: FunctionType) -> frozenset[str] | None:
    read = read_function(function)
    if read is None:
        return None
    tree, itself = read
    nodes = list(ast.walk(tree))
    asked = [node for node in nodes if attribute_of(node, itself)]
    bare = sum(isinstance(node, ast.Name) and node.id in (itself, "super") for node in nodes) != len(asked)
    return None if bare else frozenset(node.attr for node in asked if isinstance(node, ast.Attribute))


def taken_apart(module: nn.Module) -> set[str]:
    """The parts of a module that its class's code does anything else with than call them or ask whether they are there:
    it may run what is inside them one by one."""
    found: set[str] = set()
    cls = type(module)
    own = functions(getattr(cls, "__structrep_base__", cls))  # of a deploy model: converters that are none any more
    for name, function in (*own.items(), *functions(cls).items()):
        if name != "__init__":
            apart = _own_parts(function)
            if apart is None:
                return set(module._modules.keys())
            found |= apart
    return found.intersection(module._modules.keys())  # of a ScriptModule, a list


@functools.lru_cache(4096)
def _own_parts(function: FunctionType) -> frozenset[str] | None:
    read = read_function(function)
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
    asked = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and attribute_of(node, itself))
    return frozenset(n.attr for n in asked if isinstance(n.ctx, ast.Load) and n not in harmless)
