"""Dtypes of the values of a graph, where that can be known: from example inputs, else from what made them."""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from structrep.algebra.shadows import STEPS
from structrep.graph import operations
from structrep.graph.facts import AUTOCAST, CALL, DTYPE, STATIC_DTYPE, UNFOLLOWED, VALUE
from structrep.graph.operations import does, torch_name
from structrep.graph.queries import asks_dtype, counts_sizes
from structrep.graph.shapes import argument
from structrep.graph.table import CASTS, Is
from structrep.modules.parametrized import torch_class


def note(node: fx.Node, own: torch.dtype) -> None:
    """Note the dtype of a node's value, or None, as `STATIC_DTYPE`; inputs are taken to be of the parameters' dtype."""
    if not STATIC_DTYPE.known(node) or (STATIC_DTYPE.of(node) is None and DTYPE.known(node)):  # told since
        given = torch.int64 if _is_index(node) else own
        STATIC_DTYPE.note(node, DTYPE.get(node) or (given if node.op == "placeholder" else _static_dtype(node)))


def _is_index(node: fx.Node) -> bool:
    """Whether rows of a table are looked up by a value, which is of integers then."""
    return any(
        user.target is F.embedding
        or (user.op == "call_module" and isinstance(CALL.of(user).module, (nn.Embedding, nn.EmbeddingBag)))
        for user in node.users
    )


def _static_dtype(node: fx.Node) -> torch.dtype | None:
    value = VALUE.get(node)
    if isinstance(value, (Tensor, torch.dtype)):
        return value if isinstance(value, torch.dtype) else value.dtype
    if node.op == "output" or AUTOCAST.get(node):
        return None
    sources = [n for n in node.all_input_nodes if asks_dtype(n) or not counts_sizes(n)]
    dtypes = {STATIC_DTYPE.of(n) for n in sources}
    if node.op == "call_module":
        module = CALL.of(node).module
        dtypes |= {p.dtype for p in module.parameters()} if torch_class(module) else {None}
        return _only(dtypes)
    if node.target is getattr:  # of a question, that of the value which it is asked of
        return STATIC_DTYPE.of(sources[0]) if sources and node.args[1] in ("dtype", "T", "mT") else None
    if (to := cast_to(node)) is not None:
        return to
    if does(node, Is.CAST):
        return _cast(node, sources)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _item(node.args[0], node.args[1])
    if does(node, Is.DTYPE):
        return None if _is_told(node) else _only(dtypes)
    return _computed(node) if operations.is_pointwise(node.target) else None


def _is_told(node: fx.Node) -> bool:
    """Whether a call may be told a dtype."""
    given = [*node.args, *node.kwargs.values()]
    given = [VALUE.get(one, one) if isinstance(one, fx.Node) else one for one in given]
    return any(isinstance(one, torch.dtype) or (isinstance(one, fx.Node) and one.target is getattr) for one in given)


def keeps(node: fx.Node) -> bool:
    """Whether a node computes in the dtype of the floats that it is given, whatever that is."""
    if AUTOCAST.get(node) or UNFOLLOWED.get(node):
        return False
    if node.op == "call_module":
        return torch_class(CALL.of(node).module) is not None
    if node.target in (operator.getitem, *operations.AUGMENTED):
        return True
    known = does(node, Is.DTYPE) or operations.is_pointwise(node.target)
    given = any(isinstance(VALUE.get(n, ...), (Tensor, type(...))) for n in node.all_input_nodes)
    return known and given and not _is_told(node) and torch_name(node) not in STEPS


def _only(dtypes: set[torch.dtype | None]) -> torch.dtype | None:
    """The one dtype of floats that there is; integers beside them are indices, or of no account."""
    floats = [one for one in dtypes if one is None or one.is_floating_point or one.is_complex]
    return floats[0] if len(floats) == 1 else None


def _cast(node: fx.Node, sources: list[fx.Node]) -> torch.dtype | None:
    """The dtype of a cast to what another value has."""
    asked = [n for n in sources[1:] if n.target is not getattr or n.args[1] != "device"]
    given = [one for one in (*node.args[1:], *node.kwargs.values()) if not isinstance(one, (fx.Node, torch.device))]
    if given or len(asked) > 1:
        return None
    return STATIC_DTYPE.of((asked or sources)[0])


def _item(source: fx.Node, index: Any) -> torch.dtype | None:
    """The dtype of a part of a value, or of one of several."""
    several = source.op == "call_module" or operations.gives(source.target, source.args, source.kwargs) != "tensor"
    one = source.op == "placeholder" or not isinstance(index, int) or does(source, Is.PIECES)
    return STATIC_DTYPE.of(source) if one or not several or index == 0 else None


def _computed(node: fx.Node) -> torch.dtype | None:
    """The dtype of what an operation makes of single numbers, which it makes of all others too."""
    given = [n for n in node.all_input_nodes if not counts_sizes(n)]
    dtypes = {STATIC_DTYPE.of(n) for n in given if isinstance(VALUE.get(n, ...), (Tensor, type(...)))}
    floats = [one for one in dtypes if one is not None and one.is_floating_point]
    if len(floats) > 1 or (None in dtypes and not floats):
        return None  # where floats are mixed, dims count that nothing tells

    def load(one: fx.Node) -> Any:
        value = VALUE.get(one, 1 if counts_sizes(one) else None)
        # a part that is not followed gives no wider floats
        dtype = STATIC_DTYPE.of(one) or (floats[0] if floats else None)
        return torch.ones(1, dtype=dtype) if value is None or isinstance(value, Tensor) else value

    with torch.no_grad(), contextlib.suppress(Exception):
        args: tuple[Any, ...] = fx.node.map_arg(node.args, load)
        kwargs: dict[str, Any] = fx.node.map_arg(node.kwargs, load)
        function: Any = getattr(args[0], node.target) if isinstance(node.target, str) else node.target
        made = function(*args[isinstance(node.target, str) :], **kwargs)
        return made.dtype if isinstance(made, Tensor) else None
    return None


def cast_to(node: fx.Node) -> torch.dtype | None:
    """The dtype that a cast gives, if it does no more."""
    if len(node.args) + len(node.kwargs) == 1:
        return CASTS.get(torch_name(node))
    if len(node.args) + len(node.kwargs) > 2 or torch_name(node) not in ("to", "type"):
        return None
    to = argument(node, 1, "dtype")
    to = VALUE.get(to) if isinstance(to, fx.Node) else to
    if isinstance(to, str):  # `x.type("torch.FloatTensor")`
        to = getattr(getattr(torch, to.removeprefix("torch."), None), "dtype", None)
    return to if isinstance(to, torch.dtype) else None
