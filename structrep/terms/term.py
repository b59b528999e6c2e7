"""What a piece of a model computes: layers in a row, summed, stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Literal, TypeVar

from torch import fx

from structrep.algebra import ConvMap, Geometry, Ints
from structrep.errors import Incompatible, Unreadable
from structrep.graph.shapes import rank
from structrep.terms.layer import Layer
from structrep.terms.layers import scale_layer


@dataclass(frozen=True, eq=False)
class Term:
    """An expression over layers, of one input."""

    op: Literal["one", "leaf", "seq", "sum", "concat"]
    parts: tuple[Term, ...] = ()
    layer: Layer | None = None
    node: fx.Node | None = None  # where it was written: an addition, a concatenation
    dim: int = 1  # of a concat
    size: Ints | None = None  # spatial size of the example at the input of a sum or concat

    @cached_property
    def shape(self) -> Geometry:
        """What its value will look like, from its layers alone; raises what `geometry` does."""
        return geometry_in(self, None, None, [])

    @cached_property
    def depth(self) -> int:
        """How many sums and stacks it has inside each other."""
        return (self.op in ("sum", "concat")) + max((part.depth for part in self.parts), default=0)

    def leaves(self) -> Iterator[Layer]:
        if self.layer is not None:
            yield self.layer
        for part in self.parts:
            yield from part.leaves()

    def __str__(self) -> str:
        if self.op == "leaf":
            return str(self.layer)
        if self.op == "one":
            return "x"
        glue = {"seq": " -> ", "sum": " + ", "concat": " | "}[self.op]
        return "(" + glue.join(map(str, self.parts)) + ")"


ONE = Term("one")


def leaf(layer: Layer) -> Term:
    return Term("leaf", layer=layer, node=layer.node)


def seq(parts: Sequence[Term]) -> Term:
    """One after another; nested sequences are flattened, identities vanish."""
    flat = [item for part in parts for item in (part.parts if part.op == "seq" else (part,)) if item.op != "one"]
    return ONE if not flat else flat[0] if len(flat) == 1 else Term("seq", tuple(flat))


def sum_terms(parts: Sequence[Term], node: fx.Node | None = None, size: Ints | None = None) -> Term:
    """Branches added; nested sums are flattened."""
    flat = [item for part in parts for item in (part.parts if part.op == "sum" else (part,))]
    return Term("sum", tuple(flat), node=node, size=size)


def signed(term: Term, sign: float) -> Term:
    """A term times a number."""
    flip = scale_layer(sign) if sign != 1.0 else None
    return seq([term, leaf(flip)]) if flip else term


def concat_terms(parts: Sequence[Term], node: fx.Node | None = None, dim: int = 1, size: Ints | None = None) -> Term:
    """Branches stacked on the channels."""
    return Term("concat", tuple(parts), node=node, dim=dim, size=size)


T = TypeVar("T", ConvMap, Geometry)


def geometry(term: Term, channels: int | None = None, dims: int | None = None) -> Geometry:
    """The geometry of `value(term)`, without touching a weight."""
    return term.shape if channels is None and dims is None else geometry_in(term, channels, dims, [])


def geometry_in(term: Term, channels: int | None, dims: int | None, widened: list[Term]) -> Geometry:
    """See `geometry`; notes the sums whose branches are of one size for the example only."""

    def one(c: int, d: int) -> Geometry:
        return Geometry(c, c, (1,) * d, groups=c)

    def join(parts: list[Geometry]) -> Geometry:
        return reduce(Geometry.concat, parts)

    def shape(layer: Layer, c: int, d: int) -> Geometry:
        return layer.shape(c, d)

    return evaluate(term, shape, one, Geometry.__rshift__, join, channels, dims, widened)


def evaluate(
    term: Term,
    read: Callable[[Layer, int, int], T],
    one: Callable[[int, int], T],
    then: Callable[[T, T], T],
    join: Callable[[list[T]], T],
    channels: int | None,
    dims: int | None,
    widened: list[Term],
    at: dict[int, int] | None = None,
    known: dict[tuple[int, int], T] | None = None,
) -> T:
    """The value of a term over maps or over geometries: the same expression either way."""
    dims = dims_of(term, dims)
    maps: dict[tuple[int, int], T] = {} if known is None else known  # a layer on two branches is read once

    def walk(part: Term, c: int) -> T:
        if (id(part), c) not in maps:
            maps[id(part), c] = step(part, c)
        return maps[id(part), c]

    def step(part: Term, c: int) -> T:
        if part.op == "one":
            return one(c, dims)
        if part.op == "leaf":
            assert part.layer is not None
            if at is not None:
                at.setdefault(id(part), c)
            if part.layer.in_channels not in (None, c):
                raise Incompatible(f"a value of {c} channels meets a layer of {part.layer.in_channels}")
            return read(part.layer, c, dims)
        if part.op == "seq":
            result = walk(part.parts[0], c)
            for item in part.parts[1:]:
                result = then(result, walk(item, result.out_channels))
            return result
        branches = [walk(branch, c) for branch in part.parts]
        if (aligned := _aligned(branches, part.size)) is not branches:
            branches = aligned
            widened.append(part)
        if part.op == "sum":
            return reduce(lambda a, b: a + b, branches)
        _check_concat_dim(part, dims)
        return join(branches)

    found = _in_channels(term) if channels is None else channels
    if found is None:
        raise Unreadable("no layer of the merge tells how many channels there are")
    try:
        return walk(term, found)
    finally:
        if known is None:
            maps.clear()  # functions that call each other are a cycle, which would keep each map until it is collected


def _aligned(branches: list[T], size: Ints | None) -> list[T]:
    """Branches whose outputs are of one size for the example, made to be so for all inputs."""
    shapes = list(map(_shape, branches))
    first = shapes[0]
    if size is None or not all((s.dims, s.stride, s.transposed) == (len(size), first.stride, False) for s in shapes):
        return branches
    if len({s.overhang for s in shapes}) == 1 or len({s.output_size(size) for s in shapes}) > 1:
        return branches
    overhang = tuple(map(max, *(shape.overhang for shape in shapes)))
    return [branch.widened(overhang) for branch in branches]


def _shape(of: ConvMap | Geometry) -> Geometry:
    return of if isinstance(of, Geometry) else of.geometry


def _check_concat_dim(term: Term, dims: int) -> None:
    """Channels are dim 1 of a batch; of a Linear's output, the last."""
    if dims == 0 and term.dim != -1:
        known = rank(term.node) if term.node is not None else None
        if known is None or term.dim != known - 1:
            raise Unreadable(f"a concatenation along dim {term.dim}, where features are on the last")
    elif dims and term.dim not in (1, -(dims + 1)):
        raise Unreadable(f"a concatenation along dim {term.dim}, where channels are on dim 1")


def dims_of(term: Term, given: int | None) -> int:
    """Spatial dims that all layers agree on."""
    found = {layer.dims for layer in term.leaves() if layer.dims is not None} | (
        {given} if given is not None else set()
    )
    if len(found) != 1:
        raise Incompatible(
            f"layers of {' and '.join(map(str, sorted(found)))} spatial dims meet"
            if found
            else "no layer tells how many spatial dims there are"
        )
    dims = found.pop()
    if dims == 0:
        for layer in term.leaves():
            if layer.kind != "norm" or (known := rank(layer.node) if layer.node is not None else None) == 2:
                continue
            told = f"has {known} dims" if known else "is not known to be one; pass example_inputs"
            raise Unreadable(
                "a batch norm after a Linear normalises dim 1, the Linear acts on the last: they agree only on 2-d "
                f"values, and this value {told}"
            )
    return dims


def _in_channels(term: Term) -> int | None:
    """Input channels, from the first layer on any path that says so."""
    if term.op == "leaf":
        assert term.layer is not None
        return term.layer.in_channels
    if term.op == "seq":
        for part in term.parts:
            found = _in_channels(part)
            if found is not None or not _keeps_channels(part):
                return found
        return None
    return next((found for part in term.parts if (found := _in_channels(part)) is not None), None)


def channels_at(term: Term, at: dict[int, int]) -> int | None:
    """How many channels there are before a part of a term that was evaluated."""
    return at.get(id(term)) or next((c for part in term.parts if (c := channels_at(part, at)) is not None), None)


def _keeps_channels(term: Term) -> bool:
    if term.op == "leaf":
        assert term.layer is not None
        return term.layer.in_channels is None and term.layer.out_channels is None and term.layer.keeps_channels
    return term.op != "concat" and all(_keeps_channels(part) for part in term.parts)
