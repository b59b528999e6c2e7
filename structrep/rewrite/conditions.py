"""Conditions on what a module is set to."""

from __future__ import annotations

import ast
import contextlib
from collections import Counter
from types import ModuleType
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
    parts = test.values if isinstance(test, ast.BoolOp) else []
    for one in (test, *parts):
        found = _Settings(tree, space)
        spelt = ast.unparse(found.visit(ast.parse(ast.unparse(one), mode="eval").body))
        if not found.alone:
            continue
        with contextlib.suppress(Exception):  # an attribute that there is none of
            told = bool(eval(spelt, space, {"self": module}))
            if one is test or (isinstance(test, ast.BoolOp) and told == isinstance(test.op, ast.Or)):
                return spelt, told
    return None


class _Settings(ast.NodeTransformer):
    """Puts a condition in terms of a module's attributes, by what its names were given; modules are not trained."""

    def __init__(self, tree: ast.FunctionDef, space: dict[str, Any]) -> None:
        self.itself, self.alone = tree.args.args[0].arg, True
        self.fixed = {name for name, value in space.items() if isinstance(value, (type, ModuleType))}
        stored = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Store, ast.Del))]
        counts = Counter(name.id for name in stored)
        self.fixed -= counts.keys() | {one.arg for one in ast.walk(tree) if isinstance(one, ast.arg)}
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
        elif isinstance(node, ast.Attribute) and node.attr == "training":
            return ast.Constant(False)
        elif isinstance(node, ast.Call):
            asks = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
            if asks and not node.keywords and all(isinstance(one, ast.Constant) for one in node.args[1:]):
                node.args[0] = self.visit(node.args[0])
                return node
        elif isinstance(node, _PLAIN):
            return self.generic_visit(node)
        self.alone = False
        return node
