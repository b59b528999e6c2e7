"""Functions that do no more with what they are given than to call it."""

from __future__ import annotations

import ast
import functools
import sys
from types import FunctionType
from typing import Any

from structrep.modules.call_sites import named
from structrep.modules.source import syntax


@functools.lru_cache(4096)
def only_calls(function: Any, place: int) -> bool:
    """Whether a function only calls what it is given at a place, as activation checkpointing does, or hands it to such
    functions."""
    pending, seen = [(function, place)], set[tuple[Any, int]]()
    while pending:
        one = called, at = pending.pop()
        if one in seen or (called is _checkpoint() and at == 0):
            continue
        seen.add(one)
        tree = syntax(called) if isinstance(called, FunctionType) else None
        if not isinstance(tree, ast.FunctionDef) or not 0 <= at < len(tree.args.args):
            return False
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        name = tree.args.args[at].arg
        for use in (node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name):
            around = parents[use]
            if not isinstance(around, ast.Call) or not (around.func is use or use in around.args):
                return False
            if around.func is not use:
                pending.append((named(around.func, called), around.args.index(use)))
    return True


def _checkpoint() -> Any:
    return getattr(sys.modules.get("torch.utils.checkpoint"), "checkpoint", ...)
