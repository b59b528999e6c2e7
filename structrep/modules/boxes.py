"""Names in code that hold no value itself but what holds some, by its source."""

from __future__ import annotations

import ast
import functools

BOXES = (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
HANDING_ON = {"list", "tuple", "zip", "reversed", "enumerate", "dict", "set", "iter", "next", "sum"}
FILLS = {"append", "extend", "insert", "add", "update", "setdefault"}
CHANGES = {"pop", "popitem", "popleft", "remove", "insert", "rotate", "reverse", "sort", "clear"}


def _is_box(node: ast.AST, known: set[str]) -> bool:
    """Whether an expression may give what holds something, given the names that may."""
    if isinstance(node, ast.Name):
        return node.id in known
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in HANDING_ON
    if isinstance(node, (ast.Subscript, ast.Attribute, ast.NamedExpr)):
        return _is_box(node.value, known)
    inner = ast.iter_child_nodes(node) if isinstance(node, (ast.IfExp, ast.BoolOp, ast.BinOp)) else ()
    return isinstance(node, BOXES) or any(_is_box(one, known) for one in inner)


@functools.lru_cache(4096)
def boxed(tree: ast.AST) -> frozenset[str]:
    """The names in code that may hold what holds a value."""
    found: set[str] = set()
    bound: list[tuple[list[ast.expr], ast.AST]] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and node.value is not None:
            bound.append((node.targets if isinstance(node, ast.Assign) else [node.target], node.value))
        elif isinstance(node, (ast.For, ast.comprehension)):
            bound.append(([node.target], ast.List([])))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FILLS:
            bound.append(([node.func.value], ast.List([])))
    before = -1
    while len(found) > before:
        before = len(found)
        for targets, value in bound:
            for one in targets if _is_box(value, found) else ():
                found |= {name.id for name in ast.walk(one) if isinstance(name, ast.Name)}
    return frozenset(found)
