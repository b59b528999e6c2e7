"""A layer on the last dim between a flattening of the dims before it and its inverse, as transformers' `Conv1D` is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from structrep.errors import Refusal
from structrep.graph.facts import VALUE
from structrep.graph.operations import keeps_shape, torch_name
from structrep.graph.queries import counts_sizes
from structrep.graph.run import computed
from structrep.graph.shapes import rank
from structrep.read.arguments import Arguments, reads
from structrep.read.transposed import scale_of_last_dim
from structrep.terms.layer import Identity, Layer, Reading

MOST_BETWEEN = 8  # nodes that do nothing, on the way
# Sizes of the dims before the last that both are tried on, by how many there are: what fits all of them fits any.
_TRIED: list[list[tuple[int, ...]]] = [[(6,), (5,), (1,)], [(2, 3), (5, 7), (4, 1)], [(2, 3, 4), (5, 3, 7), (1, 6, 2)]]


@reads("view", "reshape", torch.reshape, "unflatten", torch.unflatten)
def _(a: Arguments) -> Layer | None:
    through: list[fx.Node] = []
    inner = _made_by(a, a.node.args[0] if a.node.args else None, through)
    layer = _read(a, inner) if inner is not None else None
    if inner is None or not isinstance(layer, Layer) or layer.through or layer.probed:
        return None
    of_last = layer.kind == "norm" or layer.dims == 0  # a constant of (C, 1) is one of each row
    if layer.kind != "linear" and not (layer.scales and of_last and rank(inner) == 2):
        return None
    through.append(inner)
    flattening = _made_by(a, layer.source, through)
    if flattening is None or torch_name(flattening) not in ("view", "reshape", "flatten") or not flattening.args:
        return None
    source = flattening.args[0]
    if not isinstance(source, fx.Node) or not _are_inverse(a, flattening, source, layer):
        return None
    found = layer if layer.kind == "linear" else scale_of_last_dim(lambda c: layer.load(c, 0), layer.in_channels)
    return replace(found, source=source, through=(flattening, *through))


def _are_inverse(a: Arguments, flattening: fx.Node, source: fx.Node, layer: Layer) -> bool:
    """Whether a reshape makes one dim of the dims of a source before its last, and the one that is read undoes that
    behind a layer: for however many dims the source may have."""
    dims = rank(source)
    if layer.in_channels is None or layer.out_channels is None:
        return False
    before = _before(a, source, layer.in_channels)
    found: list[Any] = []
    for some in _TRIED if dims is None else [one for one in _TRIED if len(one[0]) == dims - 1]:
        pairs = []
        for leading in some:
            given = {node: torch.empty(*leading, channels, device="meta") for node, channels in before.items()}
            rows = math.prod(leading)
            flat = _reshaped(flattening, given, given[source])
            made = _reshaped(a.node, given, torch.empty(rows, layer.out_channels, device="meta"))
            pairs.append((flat, made, (rows, layer.in_channels), (*leading, layer.out_channels)))
        if dims is None and all(flat is None or made is None for flat, made, _, _ in pairs):
            continue  # the model itself raises for so many dims
        found += pairs
    return bool(found) and all(
        flat is not None and made is not None and [flat.shape, made.shape] == wanted for flat, made, *wanted in found
    )


def _before(a: Arguments, source: fx.Node, channels: int) -> dict[fx.Node, int]:
    """A value and those that it is made of, with other numbers of channels perhaps, and how many those are."""
    found, node = {source: channels}, source
    while len(found) < MOST_BETWEEN:
        reading = _read(a, node)
        if isinstance(reading, Identity):
            node = reading.source
        elif isinstance(reading, Layer) and reading.kind == "linear" and reading.source and reading.in_channels:
            node, channels = reading.source, reading.in_channels
        elif keeps_shape(node):
            node = node.all_input_nodes[0]
        else:
            break
        found[node] = channels
    return found


def _read(a: Arguments, node: fx.Node) -> Reading | None:
    with contextlib.suppress(Refusal):  # a norm of each batch
        return a.read(node)
    return None


def _made_by(a: Arguments, node: Any, through: list[fx.Node]) -> fx.Node | None:
    """What makes a value, but for nodes that do nothing, which are added to `through`."""
    while isinstance(node, fx.Node) and len(through) < MOST_BETWEEN:
        reading = _read(a, node)
        if not isinstance(reading, Identity):
            return node
        through.append(node)
        node = reading.source
    return None


def _reshaped(node: fx.Node, given: Mapping[fx.Node, Tensor], value: Tensor) -> Tensor | None:
    """What a reshape makes of a value, if it goes by the sizes of given ones alone."""
    known: dict[fx.Node, Any] = dict(given)

    def load(one: fx.Node) -> Any:
        if one not in known:
            if not VALUE.known(one) and not counts_sizes(one):
                raise ValueError("it is no size of what is given")
            known[one] = VALUE.of(one) if VALUE.known(one) else computed(one, load)
        return known[one]

    try:
        args: Any = fx.node.map_arg(node.args[1:], load)
        kwargs: Any = fx.node.map_arg(node.kwargs, load)
        found = getattr(Tensor, torch_name(node))(value, *args, **kwargs)
    except Exception:  # sizes that do not fit
        return None
    return found if isinstance(found, Tensor) else None
