"""Conditions on what a module is set to."""

from __future__ import annotations

import ast
import contextlib
import functools
from collections import Counter
from types import CodeType, ModuleType
from typing import Any

from torch import nn

_PLAIN = (ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Not, ast.boolop, ast.cmpop,
          ast.expr_context)  # fmt: skip


def answer(test: ast.AST, tree: ast.FunctionDef, space: dict[str, Any], module: nn.Module) -> tuple[str, bool] | None:
    """A condition, or what decides it, in terms of a module's attributes and of constants alone, and its answer; None
    if it goes by anything else.

    Args:
        tree: the method that has it.
        space: the names outside.
    """
    fixed = frozenset(name for name in _names(tree) if isinstance(space.get(name), (type, ModuleType)))
    for spelt, code, decides in _spelt(test, tree, fixed):
        with contextlib.suppress(Exception):  # an attribute that there is none of
            told = bool(eval(code, space, {"self": module}))
            if decides is None or told == decides:
                return spelt, told
    return None


@functools.lru_cache(4096)  # blocks of a class ask the same
def _spelt(test: ast.AST, tree: ast.FunctionDef, fixed: frozenset[str]) -> list[tuple[str, CodeType, bool | None]]:
    """A condition, and each part that may decide it, in terms of settings alone, and with which answer it does."""
    found: list[tuple[str, CodeType, bool | None]] = []
    decides = isinstance(test.op, ast.Or) if isinstance(test, ast.BoolOp) else None
    for one in (test, *(test.values if isinstance(test, ast.BoolOp) else ())):
        settings = _Settings(tree, fixed)
        spelt = ast.unparse(settings.visit(ast.parse(ast.unparse(one), mode="eval").body))
        if settings.alone:
            found.append((spelt, compile(spelt, "<condition>", "eval"), None if one is test else decides))
    return found


@functools.lru_cache(4096)
def _names(tree: ast.FunctionDef) -> frozenset[str]:
    """The names that a method asks its file for."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    own = {one.arg for one in ast.walk(tree) if isinstance(one, ast.arg)}
    own |= {name.id for name in names if not isinstance(name.ctx, ast.Load)}
    return frozenset(name.id for name in names if name.id not in own)


class _Settings(ast.NodeTransformer):
    """Puts a condition in terms of a module's attributes, by what its names were given."""

    def __init__(self, tree: ast.FunctionDef, fixed: frozenset[str]) -> None:
        self.itself, self.alone, self.fixed = tree.args.args[0].arg, True, fixed
        stored = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Store, ast.Del))]
        counts = Counter(name.id for name in stored)
        self.known = {
            one.targets[0].id: one.value
            for one in ast.walk(tree)
            if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name) and counts[one.targets[0].id] == 1
        }

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Name):
            if node.id == self.itself:
                return ast.Name("self")
            if node.id in self.fixed:
                return node
            if node.id in self.known:
                return self.visit(ast.parse(ast.unparse(self.known.pop(node.id)), mode="eval").body)
        elif isinstance(node, ast.Call):
            asks = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
            if asks and not node.keywords and all(isinstance(one, ast.Constant) for one in node.args[1:]):
                node.args[0] = self.visit(node.args[0])
                return node
        elif isinstance(node, _PLAIN) and getattr(node, "attr", "") != "training":
            return self.generic_visit(node)
        self.alone = False
        return node
