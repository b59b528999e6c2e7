"""Nodes of a graph that ask a value for its shape, its dtype or its device, and compute nothing of its numbers."""

from __future__ import annotations

from torch import fx

from structrep.graph.facts import COUNTS_SIZES, VALUE
from structrep.graph.shapes import torch_name

_QUERIES = {"shape", "ndim", "dtype", "device", "is_cuda", "size", "dim", "numel", "is_floating_point"}


def asks_shape(node: fx.Node) -> bool:
    """Whether a node is a question about a value's shape or type."""
    return (node.target is getattr and node.args[1] in _QUERIES) or (
        node.op == "call_method" and node.target in _QUERIES
    )


def asks_dtype(node: fx.Node) -> bool:
    """Whether a node is a question about a value's dtype or device, which all values of a model have in common."""
    return node.target is getattr and node.args[1] in ("dtype", "device")


def counts_sizes(node: fx.Node) -> bool:
    """Whether a node is a size of a value, or a number made of sizes."""
    pending = [node]
    while pending:  # no recursion, here and below: a chain of nodes may be longer than Python's stack
        last = pending[-1]
        if not COUNTS_SIZES.known(last):
            made = last.all_input_nodes if torch_name(last) in _SIZE_ARITHMETIC else ()
            inputs = [n for n in made if not VALUE.known(n)]
            if left := [n for n in inputs if not COUNTS_SIZES.known(n)]:
                pending += left
                continue
            sizes = bool(inputs) and all(COUNTS_SIZES.of(n) for n in inputs)
            COUNTS_SIZES.note(last, asks_shape(last) or sizes)
        pending.pop()
    found: bool = COUNTS_SIZES.of(node)
    return found


_SIZE_ARITHMETIC = {"getitem", "add", "sub", "mul", "floordiv", "mod", "neg"}


def asserts_rank(node: fx.Node) -> bool:
    """Whether a node is asked for an assertion only, on what no merge changes: how many dims a value has, its type."""
    return only_asserted(node) and not (node.target in ("size", "numel") or (asks_shape(node) and "shape" in node.args))


def only_asserted(node: fx.Node) -> bool:
    """Whether a node is a question about a shape or type, asked for nothing but an assertion."""
    pending, seen = [node], {node}
    for one in pending:
        name = one.target if isinstance(one.target, str) else getattr(one.target, "__name__", "")
        if name in ("_assert", "_assert_with_msg", "_assert_tensor_metadata"):
            if one.users:
                return False
            continue
        follows = name in (*_COMPARES, "len", "contains") and all(_asked(n) for n in one.all_input_nodes)
        if not (asks_shape(one) or follows):
            return False
        pending += [user for user in one.users if user not in seen]
        seen.update(one.users)
    return True


def _asked(node: fx.Node) -> bool:
    """Whether a node is part of a question about shapes or types."""
    pending, seen = [node], {node}
    for one in pending:
        if not asks_shape(one):
            if torch_name(one) not in _COMPARES or not one.all_input_nodes:
                return False
            pending += [n for n in one.all_input_nodes if n not in seen]
            seen.update(one.all_input_nodes)
    return True


_COMPARES = ("eq", "ne", "ge", "gt", "le", "lt", "not_", "getitem", "mod", "floordiv")
