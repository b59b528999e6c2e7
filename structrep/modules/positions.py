"""Where code stands: the expression that an instruction is of, and the syntax around it."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import textwrap
from types import CodeType
from typing import Any, TypeAlias

from torch import nn

Span: TypeAlias = tuple[int | None, int | None, int | None, int | None]


@functools.lru_cache(4096)
def branches(code: CodeType) -> bool:
    """Whether code may go several ways, loops over what there is apart."""
    jumps = any("JUMP" in one.opname and "IF" in one.opname for one in dis.get_instructions(code))
    given = set(code.co_varnames[: code.co_argcount])
    return jumps or bool(code.co_exceptiontable) or bool(set(code.co_cellvars) - given)


def span(code: CodeType, at: int) -> Span:
    """Where an instruction stands in the source."""
    first, last, start, end = list(_positions(code))[at // 2]
    return first, last, start, end


@functools.lru_cache(1024)
def _positions(code: CodeType) -> tuple[Span, ...]:
    return tuple(code.co_positions())


def place(code: CodeType, at: int) -> ast.AST | None:
    """The expression that an instruction is of; None if the source cannot be read."""
    found, where = definition(code), span(code, at)
    return None if found is None else found[2].get(where, found[2].get(where[::2]))


def argument(code: CodeType, at: int, deep: int) -> tuple[ast.AST, tuple[str, int | str]] | None:
    """The operation that is handed what an instruction gives, as it is, and as which of its arguments.

    Args:
        deep: of how many entries, one in another, it is handed the innermost.
    """
    found, node = definition(code), place(code, at)
    if found is None or node is None:
        return None
    parents = found[1]
    for _ in range(deep):
        inner, node = node, parents[node]
        if not isinstance(node, ast.Subscript) or node.value is not inner:
            return None
    inner, parent = node, parents.get(node)
    if isinstance(parent, ast.keyword) and parent.arg is not None:
        return parents[parent], ("kwargs", parent.arg)
    if isinstance(parent, ast.BinOp):
        return parent, ("args", int(parent.right is inner))
    if (
        isinstance(parent, ast.Call)
        and inner in parent.args
        and not any(isinstance(a, ast.Starred) for a in parent.args)
    ):
        return parent, ("args", parent.args.index(inner))
    return None


def _places(tree: ast.AST) -> dict[Any, ast.AST]:
    """The parts of code by where they stand; calls of methods over several lines by where the method's name does.

    Where a choice stands is what it is made by: all that an instruction does there is to ask that."""
    found: dict[Any, ast.AST] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.expr, ast.AugAssign, ast.If, ast.While)):
            asked = node.test if isinstance(node, (ast.If, ast.IfExp, ast.While)) else node
            found.setdefault((node.lineno, node.end_lineno, node.col_offset, node.end_col_offset), asked)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.end_col_offset is not None:
            name = node.func
            if name.lineno != name.end_lineno:
                found.setdefault((name.end_lineno, node.func.end_col_offset - len(name.attr)), node)
    return found


@functools.lru_cache(64)
def _file(filename: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return None


@functools.lru_cache(64)
def imported(filename: str) -> tuple[str, ...]:
    """The names that a file imports, outside of functions and classes."""
    tree = _file(filename)
    found: list[str] = []
    pending: list[ast.AST] = [tree] if tree is not None else []
    for node in pending:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [(alias.asname or alias.name).partition(".")[0] for alias in node.names if alias.name != "*"]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return tuple(dict.fromkeys(found))


def _block(code: CodeType) -> ast.Module | None:
    """The lines of one function, where the file that they are in is no Python: a page, a cell with commands in it."""
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    text = "".join(inspect.getblock(lines)) if lines else ""
    indent = len(text) - len(text.lstrip())
    try:
        tree = ast.parse(textwrap.dedent(text))
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr, ast.arg, ast.keyword)):
            node.lineno, node.col_offset = node.lineno + code.co_firstlineno - 1, node.col_offset + indent
            node.end_lineno = (node.end_lineno or 0) + code.co_firstlineno - 1
            node.end_col_offset = (node.end_col_offset or 0) + indent
    return tree


def definition(
    code: CodeType,
) -> tuple[ast.FunctionDef | ast.Lambda, dict[ast.AST, ast.AST], dict[Any, ast.AST]] | None:
    """The syntax of code, what each part of it is in, and where it stands; None if it cannot be read."""
    return _definition(code, code.co_filename)


@functools.lru_cache(4096)  # codes of two files may be equal
def _definition(
    code: CodeType, file: str
) -> tuple[ast.FunctionDef | ast.Lambda, dict[ast.AST, ast.AST], dict[Any, ast.AST]] | None:
    tree = _file(code.co_filename) or _block(code)
    kinds = (ast.FunctionDef, ast.Lambda)
    inside = [one for one in _positions(code) if None not in one and one[2] != one[3]]
    ends = [(one[1] or 0, one[3] or 0) for one in inside]
    for node in ast.walk(tree) if tree is not None else ():
        if not isinstance(node, kinds) or getattr(node, "name", "<lambda>") != code.co_name:
            continue
        lines = {node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))}
        last = (node.end_lineno or 0, node.end_col_offset or 0)
        if code.co_firstlineno in lines and all(one <= last for one in ends):  # of several on a line the first
            parents = {child: parent for parent in ast.walk(node) for child in ast.iter_child_nodes(parent)}
            return node, parents, _places(node)
    return None


Syntax: TypeAlias = tuple[ast.AST, dict[ast.AST, ast.AST], dict[Any, ast.AST]]


@functools.lru_cache(4096)
def definition_around(code: CodeType) -> Syntax | None:
    """The syntax of the function whose code it is, or that it stands in, as a generator does; what each part of it is
    in, and where it stands; None if that cannot be read."""
    if (own := definition(code)) is not None or not code.co_name.startswith("<"):
        return own
    tree = _file(code.co_filename)
    spans = [(one[0] or 0, one[2] or 0, one[1] or 0, one[3] or 0) for one in _positions(code) if None not in one]
    spans = [one for one in spans if one[:2] != one[2:]]
    inside = [
        node
        for node in (ast.walk(tree) if tree is not None and spans else ())
        if isinstance(node, (ast.FunctionDef, ast.Lambda))
        and (node.lineno, node.col_offset) <= min(spans)[:2]
        and max(one[2:] for one in spans) <= (node.end_lineno or 0, node.end_col_offset or 0)
    ]
    if not inside:
        return None
    innermost = max(inside, key=lambda one: (one.lineno, one.col_offset))
    parents = {child: parent for parent in ast.walk(innermost) for child in ast.iter_child_nodes(parent)}
    return innermost, parents, _places(innermost)


def place_around(code: CodeType, at: int) -> ast.AST | None:
    """The expression that an instruction is of, in whatever it stands; None if the source cannot be read."""
    found, where = definition_around(code), span(code, at)
    return None if found is None else found[2].get(where, found[2].get(where[::2]))


def parts_of(module: nn.Module) -> frozenset[tuple[str, bool]]:
    """The modules, parameters and buffers of a module by path, and whether there is anything at those paths; not the
    tensors that there are none of, which may be set."""
    return frozenset(
        (f"{path}.{name}" if path else name, part is not None)
        for path, inner in module.named_modules()
        for held in (inner._modules, inner._parameters, inner._buffers)
        for name, part in held.items()
        if part is not None or held is inner._modules
    )
