"""Answers to questions that a forward asks of traced values, where there is only one.

* `assert x.shape[1] == 3`, and `if x.shape[1] != self.channels: raise ...`, is asked of inputs that the model takes: it
  does not raise.
* `for y in x.chunk(2, 1)`, `list(...)`, `len(...)`, `*x.shape` have as many items as shapes say.
"""

from __future__ import annotations

import ast
import functools
import linecache
from types import FrameType
from typing import Any

import torch
from torch import fx

from structrep.graph.operations import torch_name
from structrep.graph.shapes import argument, channels, rank
from structrep.modules.paths import may_catch

Span = tuple[int | None, int | None, int | None, int | None]


def spared(frame: FrameType) -> bool | None:
    """What the condition that a frame is evaluating must be for the code not to raise; None if neither way raises."""
    positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    span = (positions[0], positions[1], positions[2], positions[3])
    for branch in _raising(frame.f_code.co_filename):
        if isinstance(branch, ast.Assert):
            wanted, whole = True, (branch.lineno, branch.end_lineno, branch.col_offset, branch.end_col_offset)
            if span == whole:  # as pytest writes it
                return True
        else:
            wanted = not _only_raises(branch.body)
        answer = _answer(branch.test, span, wanted)
        if answer is not None:
            return answer
    return None


@functools.lru_cache(64)
def _raising(filename: str) -> tuple[ast.If | ast.Assert, ...]:
    """The assertions of a file, and the branches of which one way raises and the other does not; what is raised is not
    caught there."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    tried = {inner for node in ast.walk(tree) if may_catch(node) for inner in ast.walk(node)}
    branches = [node for node in ast.walk(tree) if isinstance(node, (ast.If, ast.Assert)) and node not in tried]
    return tuple(b for b in branches if isinstance(b, ast.Assert) or _only_raises(b.body) != _only_raises(b.orelse))


def _only_raises(body: list[ast.stmt]) -> bool:
    leaves = (ast.Return, ast.Break, ast.Continue, ast.Yield, ast.YieldFrom)
    return (
        bool(body)
        and isinstance(body[-1], ast.Raise)
        and not any(isinstance(node, leaves) for statement in body for node in ast.walk(statement))
    )


_PLAIN = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def _answer(test: ast.expr, span: Span, wanted: bool) -> bool | None:
    """What the part of a condition at `span` must be, for the whole to be as wanted; None if it may be either."""
    if (test.lineno, test.end_lineno, test.col_offset, test.end_col_offset) == span:
        one_question = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], _PLAIN)
        return wanted if one_question else None
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _answer(test.operand, span, not wanted)
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) == wanted:  # all parts must be so
        found = (_answer(part, span, wanted) for part in test.values)
        return next((answer for answer in found if answer is not None), None)
    return None


def sized(node: fx.Node) -> fx.Node | None:
    """The value whose sizes, some or all, a node gives."""
    name, source = torch_name(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if name == "getitem":
        return sized(source) if isinstance(node.args[1], slice) else None
    whole = (name == "getattr" and node.args[1] == "shape") or (
        name == "size" and len(node.args) == 1 and not node.kwargs
    )
    return source if whole else None


def length(node: fx.Node) -> int | None:
    """How many items a value has that is not a tensor; None if shapes do not say."""
    name = torch_name(node)
    args, source = node.args, node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if name != "getitem" and sized(node) is not None:
        return rank(source)
    if name == "getitem" and isinstance(args[1], slice):
        whole = length(source)
        ends = (args[1].start, args[1].stop, args[1].step)
        known = whole is not None and all(isinstance(end, (int, type(None))) for end in ends)
        return len(range(whole)[args[1]]) if known else None  # type: ignore[arg-type]
    if name == "chunk":
        return _chunks(source, argument(node, 1, "chunks"), argument(node, 2, "dim", 0))
    if name == "split":
        sizes = argument(node, 1, "split_size_or_sections", node.kwargs.get("split_size"))
        return len(sizes) if isinstance(sizes, (list, tuple)) else None
    return None


def _chunks(source: fx.Node, count: Any, dim: Any) -> int | None:
    """`torch.chunk` gives fewer pieces than asked for where the size does not divide."""
    dims = rank(source)
    on_channels = dim == 1 or (dims is not None and dim == 1 - dims)
    size = channels(source) if on_channels else None
    return len(torch.empty(size).chunk(count)) if size and isinstance(count, int) and count > 0 else None
