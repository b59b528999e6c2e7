"""Conditions that only ask whether a module has a part."""

from __future__ import annotations

import ast
from collections.abc import Mapping


def presence(test: ast.expr, itself: str, parts: Mapping[str, bool]) -> bool | None:
    """The answer to whether a part is there; None to other questions.

    Args:
        itself: what the code calls its module.
        parts: the modules and tensors of that module by path, and whether they are there.
    """
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = presence(test.operand, itself, parts)
        return None if inner is None else not inner
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], (ast.Is, ast.IsNot)):
        nothing = isinstance(test.comparators[0], ast.Constant) and test.comparators[0].value is None
        there = parts.get(path_to(test.left, itself) or "") if nothing else None
        return None if there is None else there == isinstance(test.ops[0], ast.IsNot)
    return None


def path_to(node: ast.expr, itself: str) -> str | None:
    """The path of what code asks its module for by attributes alone; None of anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return ".".join(names) if isinstance(node, ast.Name) and node.id == itself else None
