"""Constants that are repeated to the shape of a value that they meet: `p.expand_as(x) + x`, `p.repeat(1, 1, h, w)`,
`torch.ones_like(x) * p`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from structrep.graph.constants import exact
from structrep.graph.operations import torch_name
from structrep.graph.queries import asked_of

Spread = tuple[Tensor | float, tuple[fx.Node, ...]]  # what is repeated, and the nodes that do so
_FILLED = {"ones_like": 1.0, "zeros_like": 0.0}


def spread_out(left: Any, right: Any) -> tuple[Any, Any, tuple[fx.Node, ...]]:
    """Two operands, the constant for one that only repeats it to the shape of the other, and what does so."""
    for value, other, back in ((left, right, False), (right, left, True)):
        if isinstance(value, fx.Node) and value is not other and (found := _repeated(value, other)) is not None:
            held, through = found
            return (other, held, through) if back else (held, other, through)
    return left, right, ()


def _repeated(value: fx.Node, other: Any) -> Spread | None:
    """The constant that a value only repeats to the shape of another."""
    name, args = torch_name(value), value.args
    if name in _FILLED or name == "full_like":
        number = _FILLED.get(name) if name in _FILLED else args[1] if len(args) > 1 else None
        plain = args[0] is other and not value.kwargs and isinstance(number, (int, float))
        return (float(number), (value,)) if plain else None  # type: ignore[arg-type]
    if name in ("mul", "imul", "rmul", "multiply") and len(args) == 2:
        for one, factor in ((args[0], args[1]), (args[1], args[0])):
            inner = _repeated(one, other) if isinstance(one, fx.Node) else None
            known = exact(factor) if inner is not None else None
            if inner is not None and known is not None:
                return torch.as_tensor(inner[0], dtype=torch.float64) * known, (*inner[1], value)
        return None
    if name not in ("expand_as", "expand", "broadcast_to", "repeat", "tile") or (known := exact(args[0])) is None:
        return None
    sizes: Any = args[1:] if len(args) != 2 else args[1]
    if sizes is other and name == "expand_as":
        return known, (value,)
    if isinstance(sizes, fx.Node):
        whole = asked_of(sizes) == "sizes" and sizes.args[0] is other
        return (known, (value,)) if whole and len(sizes.args) + (sizes.op == "call_function") in (1, 3) else None
    sizes = sizes if isinstance(sizes, (tuple, list)) else (sizes,)
    fits = isinstance(known, Tensor) and _are_sizes_of(sizes, known, other, repeats=name in ("repeat", "tile"))
    return (known, (value,)) if fits else None


def _are_sizes_of(sizes: Sequence[Any], held: Tensor, other: Any, repeats: bool) -> bool:
    """Whether a tensor is repeated, along each of its dims, not at all or to the size of another value.

    Args:
        repeats: whether the sizes are how often it is repeated.
    """
    if len(sizes) < held.ndim:
        return False
    own = (1,) * (len(sizes) - held.ndim) + tuple(held.shape)
    for dim, (told, size) in enumerate(zip(sizes, own, strict=True)):
        same = told == 1 if repeats else told in (-1, size)
        whole = (size == 1 or not repeats) and _is_size(told, other, dim, len(sizes))
        if not (isinstance(told, int) and same) and not whole:
            return False
    return True


def _is_size(told: Any, other: Any, dim: int, dims: int) -> bool:
    """Whether a number is the size of a value along a dim."""
    if not isinstance(told, fx.Node):
        return False
    if torch_name(told) == "getitem":
        of, place = told.args
        whole = isinstance(of, fx.Node) and asked_of(of) == "sizes" and of.args[0] is other
        return whole and place in (dim, dim - dims)
    return told.target == "size" and told.args[0] is other and told.args[1:] in ((dim,), (dim - dims,))
