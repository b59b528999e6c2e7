"""The value of a term, and its geometry."""

from __future__ import annotations

from typing import Literal

from structrep import algebra
from structrep.algebra import ConvMap, Strictness
from structrep.terms.layer import Layer
from structrep.terms.term import Term, evaluate, geometry_in


def value(
    term: Term,
    channels: int | None = None,
    dims: int | None = None,
    strictness: Strictness = "exact",
    at: dict[int, int] | None = None,
    known: dict[tuple[int, int], ConvMap] | None = None,
) -> ConvMap:
    """The map a term computes.

    Args:
        channels, dims: input channels and spatial dims, for terms whose layers leave them open.
        strictness: how the border law is kept, see `ConvMap.then`.
        at: notes how many channels there are before each layer, by the id of its term.
        known: the maps of parts of terms that are there still, by id and channels; gets those that this one has.

    Raises:
        Inexact, Incompatible, Unreadable: it is not one map, or not known which.
    """

    def load(layer: Layer, c: int, d: int) -> ConvMap:
        return layer.load(c, d)

    def then(first: ConvMap, second: ConvMap) -> ConvMap:
        return first.then(second, strictness)

    return evaluate(term, load, ConvMap.identity, then, algebra.concat, channels, dims, [], at, known)


def sized(term: Term) -> Literal["any", "period", "size"]:
    """Whether a term is one map for inputs of any size, for those that differ from the example's by multiples of its
    stride, or for the example's alone."""
    found = {layer.sized for layer in term.leaves()}
    widened: list[Term] = []
    geometry_in(term, None, None, widened)
    return "size" if "size" in found else "period" if widened or "period" in found else "any"
