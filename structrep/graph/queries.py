"""Nodes of a graph that ask a value for its shape, its dtype or its device, and compute nothing of its numbers."""

from __future__ import annotations

from torch import fx

from structrep.graph.facts import COUNTS_SIZES, VALUE
from structrep.graph.operations import does, torch_name
from structrep.graph.table import QUESTIONS, Is


def asked_of(node: fx.Node) -> str:
    """What a node asks a value for, as `Question.of`; "" if it is no question."""
    name = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else ""
    return QUESTIONS[str(name)].of if name in QUESTIONS else ""


def asks_shape(node: fx.Node) -> bool:
    """Whether a node is a question about a value's shape or type."""
    return asked_of(node) in ("rank", "sizes", "dtype", "kind", "place")


def asks_dtype(node: fx.Node) -> bool:
    """Whether a node is a question about a value's dtype or device, which all values of a model have in common."""
    return node.target is getattr and node.args[1] in ("dtype", "device")


def asks_gradient(node: fx.Node) -> bool:
    """Whether a node is the question whether a value has a gradient."""
    return asked_of(node) == "gradient"


def counts_sizes(node: fx.Node) -> bool:
    """Whether a node is a size of a value, or a number made of sizes."""
    pending = [node]
    while pending:  # no recursion, here and below: a chain of nodes may be longer than Python's stack
        last = pending[-1]
        if not COUNTS_SIZES.known(last):
            made = last.all_input_nodes if does(last, Is.COUNTS) else ()
            inputs = [n for n in made if not VALUE.known(n)]
            if left := [n for n in inputs if not COUNTS_SIZES.known(n)]:
                pending += left
                continue
            sizes = bool(inputs) and all(COUNTS_SIZES.of(n) for n in inputs)
            COUNTS_SIZES.note(last, asks_shape(last) or sizes)
        pending.pop()
    found: bool = COUNTS_SIZES.of(node)
    return found


def asserts_rank(node: fx.Node) -> bool:
    """Whether a node is asked for an assertion only, on what no merge changes: how many dims a value has, its type."""
    return only_asserted(node) and asked_of(node) != "sizes"


def only_asserted(node: fx.Node) -> bool:
    """Whether a node is a question about a shape or type, asked for nothing but an assertion."""
    pending, seen = [node], {node}
    for one in pending:
        if does(one, Is.ASSERTS):
            if one.users:
                return False
            continue
        follows = (_computes(one) or torch_name(one) == "len") and all(_asked(n) for n in one.all_input_nodes)
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
            if not _computes(one) or not one.all_input_nodes:
                return False
            pending += [n for n in one.all_input_nodes if n not in seen]
            seen.update(one.all_input_nodes)
    return True


def _computes(node: fx.Node) -> bool:
    """Whether a node makes an answer of answers."""
    return does(node, Is.COUNTS) or does(node, Is.COMPARES)
