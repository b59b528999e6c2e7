"""Nodes that hang on no input, as constants."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.algebra.precision import as_stored, doubled
from structrep.algebra.shadows import Shadows
from structrep.graph import constants, dtypes, operations
from structrep.graph.calls import storage
from structrep.graph.facts import FORMULA, RECOMPUTE, STATIC_DTYPE, TO_OWN_DTYPE, UNSTEADY, VALUE
from structrep.graph.queries import asks_dtype
from structrep.graph.run import computed
from structrep.terms.layer import Formula
from structrep.trace.held import owner_of
from structrep.trace.origins import nearest_to
from structrep.trace.tracer import CallTracer


def fold_constants(tracer: CallTracer, whole: nn.Module | None = None) -> None:
    """Note the value of every node that asks its inputs for no more than a device or a dtype.

    `torch.eye(n, device=x.device)` is a constant; inputs are taken to be where the parameters are, and of their dtype.

    Args:
        whole: the model that a module is in, whose parameters tell that where the module has none.
    """
    owner = owner_of(tracer.module)
    if owner is None and whole is not None:
        owner = owner_of(whole)
    asks = any(asks_dtype(node) or node.target == "type_as" for node in tracer.graph.nodes)
    for node in tracer.graph.nodes:
        if owner is None or not asks:
            _fold(node, tracer)
            continue
        if not asks_dtype(node):
            _fold(node, tracer)
        elif node.args[1] == "device" or STATIC_DTYPE.of(node.args[0]) is owner.dtype:
            VALUE.note(node, getattr(owner, node.args[1]))
        dtypes.note(node, owner.dtype)
        if node.target == "type_as" and len(node.args) == 2:
            TO_OWN_DTYPE.note(node, STATIC_DTYPE.of(node.args[1]) is owner.dtype)


def _fold(node: fx.Node, tracer: CallTracer) -> None:
    """Note the value of a node whose inputs' values are known."""
    if node.op == "get_attr" and isinstance(VALUE.get(node), Tensor):
        formula, unsteady = FORMULA.get(node), tracer.constants.unsteady
        made = (VALUE.of(node), *(formula.tensors if formula else ()))
        given = formula.tensors if formula else (VALUE.of(node),)
        # what no module holds, a name of a file or of a class, may be another tensor at the next call
        outside = not all(map(tracer.constants.holds, given))
        UNSTEADY.note(node, outside or any(storage(one) in unsteady for one in made))
    if node.op not in ("call_function", "call_method"):
        return
    inputs = node.all_input_nodes
    if not inputs or not all(VALUE.known(n) for n in inputs):
        return
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    drawn_or_written = operations.draws(node.target, node.args, node.kwargs) or operations.writes(node)
    if drawn_or_written or node.target is torch._assert:
        return
    drawn = torch.get_rng_state()
    with torch.no_grad(), contextlib.suppress(Exception):
        value = computed(node, lambda n: VALUE.of(n))
        if not torch.equal(drawn, torch.get_rng_state()):
            return  # other numbers at every call
        VALUE.note(node, value)
        UNSTEADY.note(node, any(UNSTEADY.get(n) for n in inputs))
        RECOMPUTE.note(node, functools.partial(_recomputed, node))
        formulas = [FORMULA.of(n) for n in inputs if FORMULA.get(n)]
        stored = [VALUE.of(n) for n in inputs if n.op == "get_attr" and not FORMULA.known(n)]
        FORMULA.note(
            node,
            Formula(
                frozenset({str(name).strip("_")}).union(*(f.calls for f in formulas)),
                tuple({id(t): t for t in (*stored, *(t for f in formulas for t in f.tensors))}.values()),
            ),
        )


def _recomputed(node: fx.Node) -> Any:
    """The value of a node, its constants computed in float64."""
    exact = {n: constants.exact(n) for n in node.all_input_nodes if RECOMPUTE.known(n) and not UNSTEADY.get(n)}
    given = [doubled(VALUE.of(n) if exact.get(n) is None else exact[n]) for n in node.all_input_nodes]
    with torch.no_grad(), Shadows() as shadows:
        own = map(as_stored, given, (VALUE.of(n) for n in node.all_input_nodes))
        found = computed(node, dict(zip(node.all_input_nodes, own, strict=True)).__getitem__)
        found = shadows.of(found) if isinstance(found, Tensor) else found
    return nearest_to(found, VALUE.of(node), given)
