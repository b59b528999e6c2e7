"""Conditions on what a module is set to, and on how many dims a method is given."""

from __future__ import annotations

import ast
import contextlib
import functools
from collections import Counter
from collections.abc import Mapping
from types import CodeType, ModuleType
from typing import Any

from torch import nn

_LOGIC = (ast.Constant, ast.Tuple, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Not, ast.boolop, ast.cmpop,
          ast.expr_context)  # fmt: skip
_PLAIN = (ast.Attribute, *_LOGIC)


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


def of_rank(test: ast.expr, tree: ast.FunctionDef, ranks: Mapping[str, int]) -> tuple[str, bool] | None:
    """A condition on how many dims the method's arguments have, as they are given, and its answer; None if it goes by
    anything else.

    Args:
        ranks: of the arguments, by name.
    """
    spelt = ast.unparse(test)
    asked = _Ranks(ranks)
    logic = ast.fix_missing_locations(ast.Expression(asked.visit(ast.parse(spelt, mode="eval").body)))
    if not asked.found or not asked.alone or _is_set(asked.found, test, tree):
        return None
    return spelt, bool(eval(compile(logic, "<condition>", "eval"), {}))


def _is_set(names: set[str], test: ast.expr, tree: ast.FunctionDef) -> bool:
    """Whether a condition may see other values by some names than a method was given by them."""
    around = [one for one in ast.walk(tree) if one is not tree and test in set(ast.walk(one))]
    loops = {n for one in around if isinstance(one, (ast.For, ast.AsyncFor, ast.While)) for n in ast.walk(one)}
    stored = (
        n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in names and not isinstance(n.ctx, ast.Load)
    )
    at = test.lineno, test.col_offset
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    return any(isinstance(one, inner) for one in around) or any(
        (n.lineno, n.col_offset) < at or n in loops for n in stored
    )


class _Ranks(ast.NodeTransformer):
    """Puts the ranks of arguments in the place of questions for them."""

    def __init__(self, ranks: Mapping[str, int]) -> None:
        self.ranks, self.alone, self.found = ranks, True, set[str]()

    def visit(self, node: ast.AST) -> Any:
        match node:
            case (
                ast.Attribute(value=ast.Name(id=name), attr="ndim")
                | ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="dim" | "ndimension"), args=[], keywords=[])
                | ast.Call(func=ast.Name(id="len"), args=[ast.Attribute(value=ast.Name(id=name), attr="shape")])
            ) if name in self.ranks:
                self.found.add(name)
                return ast.Constant(self.ranks[name])
            case _ if isinstance(node, _LOGIC):
                return self.generic_visit(node)
        self.alone = False
        return node


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
    own |= {(one.asname or one.name).partition(".")[0] for one in ast.walk(tree) if isinstance(one, ast.alias)}
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
