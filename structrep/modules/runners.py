"""Functions that do no more with what they are given than to call it."""

from __future__ import annotations

import ast
import functools
import sys
from types import FunctionType
from typing import Any

from structrep.modules.call_sites import named
from structrep.modules.source import syntax


def only_calls(function: Any, place: int) -> bool:
    """Whether a function only calls what it is given at a place, as activation checkpointing does, or hands it to such
    functions."""
    return isinstance(function, FunctionType) and _only_calls(function, place)


@functools.lru_cache(4096)
def _only_calls(function: FunctionType, place: int) -> bool:
    pending: list[tuple[Any, int]] = [(function, place)]
    for called, at in pending:
        if called is _checkpoint() and at == 0:
            continue
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
                further = named(around.func, called), around.args.index(use)
                pending += [further] if not any(one is further[0] and n == further[1] for one, n in pending) else []
    return True


def _checkpoint() -> Any:
    return getattr(sys.modules.get("torch.utils.checkpoint"), "checkpoint", ...)
