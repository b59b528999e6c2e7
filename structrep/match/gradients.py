"""Questions whether a value has a gradient, of which it does not matter what the answer is.

Activation checkpointing (`if self.with_cp and x.requires_grad`) and frozen norms ask so, and do the same both ways. A
call is followed once more for each way that its answers may send it. Where all are the same, operation by operation, or
scale and shift what it is given alike, it has asked nothing.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator

import torch
from torch import fx

from structrep.algebra import ConvMap
from structrep.errors import Refusal
from structrep.graph.calls import Call, Traced
from structrep.graph.facts import CALL
from structrep.graph.queries import asks_gradient
from structrep.graph.shapes import rank
from structrep.graph.specializations import Specialization
from structrep.graph.structures import proxies
from structrep.modules.positions import definition_around, place_around
from structrep.read.nodes import read_node
from structrep.terms.layer import Identity, Layer
from structrep.terms.term import ONE, leaf, seq
from structrep.terms.value import value
from structrep.trace.again import retrace
from structrep.trace.comparison import asks_more, differences
from structrep.trace.followed import Followed
from structrep.trace.reads import GRADIENTS

_QUIET = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.If, ast.For, ast.With, ast.Pass, ast.FunctionDef)
_MOST = 3  # questions of one call: each doubles the ways
_OPERATIONS = 8  # that round, of those that a norm is written with


def settle_gradients(traced: Traced) -> None:
    """Forget the questions for gradients of calls that do the same for all answers."""
    for call in list(itertools.chain(*traced.calls.values())):
        if any(one.gradient for one in call.specializations) and _is_same(traced, call):
            call.specializations = [one for one in call.specializations if not one.gradient]
            _forget(call)


def _is_same(traced: Traced, call: Call) -> bool:
    """Whether a call does the same, whatever it is told of gradients."""
    if not all(_only_computes(one) for one in call.specializations if one.gradient):
        return False
    as_followed = Followed.of(traced, call, ())
    known = {(one.code, one.at, one.told) for _, one in call.observed()}
    for again in _ways(traced, call):
        others = () if again is None else (one for _, one in again.call.observed() if not one.gradient)
        if again is None or not known.issuperset((one.code, one.at, one.told) for one in others):
            return False
        if differences(as_followed, again) != [] and not _is_one_scale(as_followed, again):
            return False
    return True


def _is_one_scale(one: Followed, other: Followed) -> bool:
    """Whether two ways to run a call scale and shift what it is given alike, to the rounding of its dtype."""
    dims = rank(next(proxies((one.call.args, one.call.kwargs))).node)
    if dims is None or asks_more(one, other):
        return False
    maps = [_scale(of, dims - 2) for of in (one, other)]
    if maps[0] is None or maps[1] is None or maps[0].geometry != maps[1].geometry:
        return False
    dtypes = [t.dtype for t in one.call.module.state_dict().values() if t.is_floating_point()]
    rounding = _OPERATIONS * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return maps[0].distance(maps[1]) <= rounding * max(maps[0].magnitude, maps[1].magnitude)


def _scale(of: Followed, dims: int) -> ConvMap | None:
    """What a call makes of the one value, of so many spatial dims, that it is given; None if it does more than scale
    and shift it."""
    (given, *more), result = list(proxies((of.call.args, of.call.kwargs))), of.call.result
    if more or not isinstance(result, fx.Proxy):
        return None
    node, term = result.node, ONE
    while node is not given.node:
        reading = read_node(node)
        if not isinstance(reading, Identity) and not (
            isinstance(reading, Layer) and reading.scales and not reading.through
        ):
            return None
        if isinstance(reading, Layer):
            term = seq([leaf(reading), term])
        node = reading.source or node.all_input_nodes[0]
    try:
        return value(term, dims=dims)
    except Refusal:
        return None


def _only_computes(asked: Specialization) -> bool:
    """Whether the code that an answer picks between gives names values and no more: who is told else, no trace sees."""
    found, node = definition_around(asked.code), place_around(asked.code, asked.at)
    if found is None or node is None:
        return False
    tree, parents, _ = found
    while (around := parents.get(node)) is not None and not isinstance(around, (ast.If, ast.While, ast.stmt)):
        node = around
    if not isinstance(around, ast.If):
        return isinstance(around, _QUIET)
    statements = (one for one in ast.walk(tree) if isinstance(one, ast.stmt) and one.lineno >= around.lineno)
    return all(isinstance(one, _QUIET) and _sets_names(one) for one in statements)


def _sets_names(statement: ast.stmt) -> bool:
    """Whether a statement sets no attributes and no entries."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    nodes = (node for target in targets if target is not None for node in ast.walk(target))
    return not any(isinstance(node, (ast.Attribute, ast.Subscript)) for node in nodes)


def _ways(traced: Traced, call: Call) -> Iterator[Followed | None]:
    """The call on each way that its answers may send it; None where it cannot be followed, or is asked too much."""
    pending: list[tuple[bool, ...]] = [()]
    for answers in pending:
        found = retrace(traced, call, {GRADIENTS: answers})
        told = () if found is None else tuple(one.told for one in found[1].specializations if one.gradient)
        if found is None or len(told) > _MOST:
            yield None
            return
        yield Followed.of(*found, ())
        pending += [(*told[:place], not told[place]) for place in range(len(answers), len(told))]


def _forget(call: Call) -> None:
    """Take away the questions that nobody needs an answer to any more."""
    for node in [one for one in call.nodes() if CALL.of(one) is call and asks_gradient(one) and not one.users]:
        call.steps.remove(node)
        node.graph.erase_node(node)
