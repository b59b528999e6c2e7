"""How many dimensions a value of a graph has, where that can be known without running anything.

Convolutions, pools and norms of a known dimensionality are taken to see batches, as their users mean them.
"""

from __future__ import annotations

import operator
import re
from typing import Any, cast

from torch import fx, nn

from structrep.graph.facts import CALL, RANK, SHAPE, VALUE
from structrep.graph.operations import does, keeps_shape, module_does, rearranged_ranks, torch_name
from structrep.graph.table import Is, spatial_dims
from structrep.modules.source import written_in

_MODULE_OF_DIMS = re.compile(
    r"(Conv|ConvTranspose|(Adaptive)?(Avg|Max)Pool|BatchNorm|InstanceNorm)([23])d|(Conv|\w*Pool)1d"
)


def rank(node: fx.Node) -> int | None:
    """Number of dims of a node's value: from example inputs, else from what made it; None if neither says."""
    pending = [node]
    while pending:  # no recursion: a chain of layers may be longer than Python's stack
        last = pending[-1]
        source = _source(last)
        if not RANK.known(last) and source is not None and not RANK.known(source) and not SHAPE.known(last):
            pending.append(source)
            continue
        if RANK.get(last) is None:
            RANK.note(last, len(SHAPE.of(last)) if SHAPE.known(last) else _rank(last, source))
        pending.pop()
    found: int | None = RANK.of(node)
    return found


def channels(node: fx.Node) -> int | None:
    """Size of dim 1 of a node's value, from the layer that made it; None if none says."""
    while True:
        if SHAPE.known(node):
            return int(SHAPE.of(node)[1]) if len(SHAPE.of(node)) > 1 else None
        source = _source(node)
        if node.op == "call_module":
            module = CALL.of(node).module
            if isinstance(module, nn.modules.conv._ConvNd):
                return module.out_channels
            if isinstance(module, nn.modules.batchnorm._NormBase):
                return module.num_features
            same = written_in(type(module)) in ("torch.nn.modules.activation", "torch.nn.modules.dropout")
            if not same or isinstance(module, (nn.MultiheadAttention, nn.GLU)) or source is None:
                return None
        elif node.target is operator.getitem and isinstance(node.args[1], tuple) and len(node.args[1]) > 1:
            batch, some = cast("tuple[Any, Any]", node.args[1][:2])
            first = isinstance(some, slice) and batch == slice(None) and not some.start and some.step in (None, 1)
            return some.stop if first and isinstance(some.stop, int) and some.stop > 0 else None
        elif source is None or not (keeps_shape(node) or does(node, Is.LIKE)):
            return None
        node = source


def spatial_size(node: fx.Node) -> tuple[int, ...] | None:
    """Spatial size of a value of the example, (N, C, *spatial); None if there is no example, or it has none."""
    return SHAPE.get(node, ())[2:] or None


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a call by name or place, as the function's own signature has it."""
    return node.kwargs.get(name, node.args[place] if len(node.args) > place else default)


def sizes_told(node: fx.Node) -> tuple[Any, ...]:
    """The sizes that a reshape is told one by one; () for any other node."""
    told: tuple[Any, ...] = node.args[1:] if does(node, Is.RESHAPES) else ()
    return tuple(told[0]) if len(told) == 1 and isinstance(told[0], (list, tuple)) else told


def _source(node: fx.Node) -> fx.Node | None:
    """The input whose rank matters."""
    inputs = [n for n in node.all_input_nodes if not VALUE.known(n)]
    if does(node, Is.LIKE):
        return inputs[-1]
    return inputs[0] if inputs else None


def _rank(node: fx.Node, source: fx.Node | None) -> int | None:
    given: int | None = RANK.of(source) if source is not None else None
    if node.op == "placeholder":
        return next((known for user in node.users if (known := _demanded(user)) is not None), None)
    if (ranks := rearranged_ranks(node)) is not None:
        return ranks[1]
    if node.op == "call_module":
        return rank_of_module(CALL.of(node).module, given)
    if node.op not in ("call_function", "call_method"):
        return None
    name = torch_name(node).strip("_")
    rest: tuple[Any, ...] = node.args[1:]
    if dims := spatial_dims(name):
        return dims + 2
    if name in ("mm", "addmm"):
        return 2
    if does(node, Is.RESHAPES) or name == "permute":
        sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        unknown = node.kwargs or not sizes or (len(rest) == 1 and isinstance(rest[0], fx.Node))
        return None if unknown else len(sizes)
    if name == "flatten":
        start = node.kwargs.get("start_dim", rest[0] if rest else 0)
        end = node.kwargs.get("end_dim", rest[1] if len(rest) > 1 else -1)
        return _flattened(start, end, given)
    if name == "getitem":
        piece = source is not None and does(source, Is.PIECES | Is.RANK)
        return given if piece else _indexed(rest[0], given)
    if does(node, Is.REDUCES):
        over, keep = (
            node.kwargs.get("dim", rest[0] if rest else None),
            node.kwargs.get("keepdim", node.kwargs.get("keepdims", len(rest) > 1 and rest[1])),
        )
        if name in ("norm", "vector_norm") and "dim" not in node.kwargs:
            return None  # the first argument is which norm
        if given is None or over is None or (name in ("std", "var") and len(rest) > 1):
            return None
        gone = len(over) if isinstance(over, (list, tuple)) else 1
        return given if keep else given - gone
    if name in ("unsqueeze", "stack"):
        return None if given is None else given + 1
    same = keeps_shape(node) or does(node, Is.RANK) or does(node, Is.LIKE)
    return given if same else None


def _demanded(user: fx.Node) -> int | None:
    """How many dims a layer needs that is given a value."""
    if (ranks := rearranged_ranks(user)) is not None:
        return ranks[0]
    if user.op == "call_module":
        return rank_of_module(CALL.of(user).module, None)
    dims = spatial_dims(torch_name(user)) if user.op == "call_function" else None
    return dims + 2 if dims else None


def rank_of_module(module: nn.Module, given: int | None) -> int | None:
    if isinstance(module, nn.Flatten):
        return _flattened(module.start_dim, module.end_dim, given)
    for base in type(module).__mro__:
        if match := _MODULE_OF_DIMS.fullmatch(base.__name__):
            return int(match[4] or 1) + 2
    elementwise = written_in(type(module)) == "torch.nn.modules.activation" and not isinstance(
        module, nn.MultiheadAttention
    )
    same = elementwise or module_does(module, Is.SHAPE) or module_does(module, Is.RANK)
    return given if same or isinstance(module, (nn.Identity, nn.BatchNorm1d, nn.SyncBatchNorm)) else None


def _is_index(part: Any) -> bool:
    return part is None or part is Ellipsis or (isinstance(part, (int, slice)) and not isinstance(part, bool))


def _flattened(start: Any, end: Any, given: int | None) -> int | None:
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    if end == -1 and start >= 0:
        return start + 1
    return None if given is None else given - (end % given - start % given)


def _indexed(index: Any, given: int | None) -> int | None:
    parts = index if isinstance(index, tuple) else (index,)
    if given is None or not all(map(_is_index, parts)):
        return None
    return given - sum(isinstance(part, int) for part in parts) + sum(part is None for part in parts)
