"""Terms, which are what a model computes, and patterns, which say what a term looks like.

A `Term` is an expression over layers: `seq` (one after another), `sum` (branches added), `concat` (branches stacked),
`one` (the input itself). `value(term)` evaluates it with the algebra.

A pattern is built from leaves and combinators:

    Conv  Norm  Affine  Scalar  Pool  Pad  Leaf  Identity  Anything   |   Seq  Sum  Concat  Optional  Many

    Sum(conv_norm(spatial).named("dense"), Optional(Norm() | Identity()).named("skip"))

Matching is structural: order matters in `Seq` and `Concat`, not in `Sum`; class and attribute names never do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any, ClassVar, Literal, TypeVar

from torch import fx

from structrep import algebra
from structrep.algebra import ConvMap, Geometry, Ints, Rigour
from structrep.errors import Incompatible, InvalidRule, Unreadable
from structrep.graph.shapes import rank
from structrep.terms.layer import Formula, Layer
from structrep.terms.layers import scale_layer

# --- terms ----------------------------------------------------------------------------------------


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
        return _geometry(self, None, None, [])

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


def total(parts: Sequence[Term], node: fx.Node | None = None, size: Ints | None = None) -> Term:
    """Branches added; nested sums are flattened."""
    flat = [item for part in parts for item in (part.parts if part.op == "sum" else (part,))]
    return Term("sum", tuple(flat), node=node, size=size)


def signed(term: Term, sign: float) -> Term:
    """A term times a number."""
    flip = scale_layer(sign) if sign != 1.0 else None
    return seq([term, leaf(flip)]) if flip else term


def stack(parts: Sequence[Term], node: fx.Node | None = None, dim: int = 1, size: Ints | None = None) -> Term:
    """Branches stacked on the channels."""
    return Term("concat", tuple(parts), node=node, dim=dim, size=size)


T = TypeVar("T", ConvMap, Geometry)


def value(
    term: Term,
    channels: int | None = None,
    dims: int | None = None,
    rigour: Rigour = "exact",
    at: dict[int, int] | None = None,
    known: dict[tuple[int, int], ConvMap] | None = None,
) -> ConvMap:
    """The map a term computes.

    Args:
        channels, dims: input channels and spatial dims, for terms whose layers leave them open.
        rigour: how the border law is kept, see `ConvMap.then`.
        at: notes how many channels there are before each layer, by the id of its term.
        known: the maps of parts of terms that are there still, by id and channels; gets those that this one has.

    Raises:
        Inexact, Incompatible, Unreadable: it is not one map, or not known which.
    """

    def load(layer: Layer, c: int, d: int) -> ConvMap:
        return layer.load(c, d)

    def then(first: ConvMap, second: ConvMap) -> ConvMap:
        return first.then(second, rigour)

    return _evaluate(term, load, ConvMap.identity, then, algebra.concat, channels, dims, [], at, known)


def geometry(term: Term, channels: int | None = None, dims: int | None = None) -> Geometry:
    """The geometry of `value(term)`, without touching a weight."""
    return term.shape if channels is None and dims is None else _geometry(term, channels, dims, [])


def _geometry(term: Term, channels: int | None, dims: int | None, widened: list[Term]) -> Geometry:
    """See `geometry`; notes the sums whose branches are of one size for the example only."""

    def one(c: int, d: int) -> Geometry:
        return Geometry(c, c, (1,) * d, groups=c)

    def join(parts: list[Geometry]) -> Geometry:
        return reduce(Geometry.concat, parts)

    def shape(layer: Layer, c: int, d: int) -> Geometry:
        return layer.shape(c, d)

    return _evaluate(term, shape, one, Geometry.__rshift__, join, channels, dims, widened)


def _evaluate(
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
    dims = _dims(term, dims)
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


def sized(term: Term) -> Literal["any", "period", "size"]:
    """Whether a term is one map for inputs of any size, for those that differ from the example's by multiples of its
    stride, or for the example's alone."""
    found = {layer.sized for layer in term.leaves()}
    widened: list[Term] = []
    _geometry(term, None, None, widened)
    return "size" if "size" in found else "period" if widened or "period" in found else "any"


def _check_concat_dim(term: Term, dims: int) -> None:
    """Channels are dim 1 of a batch; of a Linear's output, the last."""
    if dims == 0 and term.dim != -1:
        known = rank(term.node) if term.node is not None else None
        if known is None or term.dim != known - 1:
            raise Unreadable(f"a concatenation along dim {term.dim}, where features are on the last")
    elif dims and term.dim not in (1, -(dims + 1)):
        raise Unreadable(f"a concatenation along dim {term.dim}, where channels are on dim 1")


def _dims(term: Term, given: int | None) -> int:
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
            if layer.kind == "norm" and (layer.node is None or rank(layer.node) != 2):
                raise Unreadable(
                    "a batch norm after a Linear normalises dim 1, the Linear acts on the last: they agree only on 2-d "
                    "values, and this value is not known to be one; pass example_inputs"
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
        return term.layer.in_channels is None and term.layer.out_channels is None and term.layer.kind != "slice"
    return term.op != "concat" and all(_keeps_channels(part) for part in term.parts)


# --- patterns -------------------------------------------------------------------------------------

Captures = dict[str, "Term | list[Term]"]


class Pattern:
    """What a term may look like. Subclasses say how much of a sequence of terms they take."""

    name: str | None = None
    repeats = False  # captures a list

    def named(self, name: str) -> Pattern:
        """The same pattern, whose match is handed to the merge function under `name`."""
        twin = replace(self)  # type: ignore[type-var]
        twin.name = name
        return twin

    def __or__(self, other: Pattern) -> Pattern:
        return Either((self, other))

    def match(self, term: Term) -> Captures | None:
        """What a term's parts are called, or None if it is not of this form."""
        items = term.parts if term.op == "seq" else () if term.op == "one" else (term,)
        return next((found for taken, found in self.take(items) if taken == len(items)), None)

    def miss(self, term: Term) -> str:
        """What keeps a term from being of this form, as far as it goes."""
        return f"{term} is not {self}"

    def take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        """All ways to match a first stretch of a sequence: how many items, and the names."""
        for taken, found in self._take(items):
            yield taken, found if self.name is None else {**found, self.name: seq(items[:taken])}

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        raise NotImplementedError

    def names(self) -> list[str]:
        """All names it hands to a merge function, in order."""
        return ([self.name] if self.name else []) + [name for part in self.inside() for name in part.names()]

    def inside(self) -> tuple[Pattern, ...]:
        return ()

    def fits_plain_conv(self) -> bool:
        """Whether one plain convolution is of this form: a rule with such a pattern would match its own output."""
        raise NotImplementedError

    def fits_nothing(self) -> bool:
        """Whether the bare input is of this form."""
        return False


class _One(Pattern):
    """A pattern that takes exactly one item."""

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        if items and (found := self.accept(items[0])) is not None:
            yield 1, found

    def accept(self, term: Term) -> Captures | None:
        raise NotImplementedError


Kernel = Callable[[tuple[int, ...]], bool]


def pointwise(kernel: tuple[int, ...]) -> bool:
    """1x1 (or a Linear)."""
    return all(k == 1 for k in kernel)


def spatial(kernel: tuple[int, ...]) -> bool:
    """More than one tap."""
    return not pointwise(kernel)


def large(kernel: tuple[int, ...]) -> bool:
    """More than 5 taps along some dim."""
    return max(kernel, default=1) > 5


def line(kernel: tuple[int, ...]) -> bool:
    """kx1 or 1xk, k > 1."""
    return sum(k > 1 for k in kernel) == 1 and len(kernel) > 1


@dataclass(eq=False)
class Leaf(_One):
    """Any single layer."""

    def accept(self, term: Term) -> Captures | None:
        return {} if term.op == "leaf" else None

    def fits_plain_conv(self) -> bool:
        return True

    def __str__(self) -> str:
        return _label("layer", self)


@dataclass(eq=False)
class Conv(_One):
    """A convolution or Linear.

    Args:
        kernel: a predicate on the kernel size; None takes any.
        depthwise: whether it must be, or must not be, one filter a channel; None takes either.
        formula: a predicate on how the kernel is computed from parameters, for families that live in weight space; None
            takes any kernel, computed or not.
    """

    kernel: Kernel | None = None
    formula: Callable[[Formula], bool] | None = None
    depthwise: bool | None = None

    def __post_init__(self) -> None:
        for what, predicate in (("kernel", self.kernel), ("formula", self.formula)):
            if predicate is not None and not callable(predicate):
                raise InvalidRule(
                    f"Conv({what}={predicate!r}): give a function of it, as in Conv(lambda {what}: {what} == (3, 3))"
                )

    def accept(self, term: Term) -> Captures | None:
        if term.op != "leaf" or term.layer is None or term.layer.weight is None or term.layer.kind == "unrolled":
            return None
        if self.depthwise is not None and self.depthwise != _is_depthwise(term.layer):
            return None
        if self.kernel and not self.kernel(tuple(term.layer.weight.shape[2:])):
            return None
        if self.formula and not (term.layer.formula and self.formula(term.layer.formula)):
            return None
        return {}

    def fits_plain_conv(self) -> bool:
        return self.formula is None

    def __str__(self) -> str:
        kind = self.formula.__name__.replace("_", " ") if self.formula else ""
        shape = self.kernel.__name__ if self.kernel else ""
        sort = {None: "", True: "depthwise", False: "dense"}[self.depthwise]
        return _label(" ".join(word for word in (kind, shape, sort, "conv") if word), self)


def _is_depthwise(layer: Layer) -> bool:
    return layer.weight is not None and layer.weight.shape[1] == 1 and layer.in_channels not in (None, 1)


@dataclass(eq=False)
class Unrolled(_One):
    """A convolution of pieces of a fixed size, as a matrix on all their numbers."""

    def accept(self, term: Term) -> Captures | None:
        return {} if term.op == "leaf" and term.layer is not None and term.layer.kind == "unrolled" else None

    def fits_plain_conv(self) -> bool:
        return False

    def __str__(self) -> str:
        return _label("unrolled conv", self)


@dataclass(eq=False)
class Pool(_One):
    """An average pool."""

    def accept(self, term: Term) -> Captures | None:
        return {} if term.op == "leaf" and term.layer is not None and term.layer.kind == "pool" else None

    def fits_plain_conv(self) -> bool:
        return False

    def __str__(self) -> str:
        return _label("pool", self)


@dataclass(eq=False)
class Scalar(_One):
    """One number that scales or shifts all channels."""

    def accept(self, term: Term) -> Captures | None:
        layer = term.layer
        return {} if layer is not None and layer.kind == "affine" and layer.in_channels is None else None

    def fits_plain_conv(self) -> bool:
        return False

    def __str__(self) -> str:
        return _label("scalar", self)


@dataclass(eq=False)
class Norm(_One):
    """A batch norm with fixed statistics."""

    def accept(self, term: Term) -> Captures | None:
        return {} if term.op == "leaf" and term.layer is not None and term.layer.kind == "norm" else None

    def fits_plain_conv(self) -> bool:
        return False

    def __str__(self) -> str:
        return _label("norm", self)


@dataclass(eq=False)
class _Run(Pattern):
    """One or more layers of certain kinds in a row, the longest run first."""

    kinds: ClassVar[frozenset[str]]

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        alike = itertools.takewhile(lambda item: item.layer is not None and item.layer.kind in self.kinds, items)
        for taken in range(sum(1 for _ in alike), 0, -1):
            yield taken, {}

    def fits_plain_conv(self) -> bool:
        return False

    def __str__(self) -> str:
        return _label(type(self).__name__.lower(), self)


class Affine(_Run):
    """One or more scales and shifts per channel: norms in any dress, layer scales, signs."""

    kinds = frozenset({"norm", "affine"})


class View(_Run):
    """One or more views that fold batch dims together or apart."""

    kinds = frozenset({"view"})


class Pad(_Run):
    """One or more explicit pads or crops."""

    kinds = frozenset({"pad"})


@dataclass(eq=False)
class Identity(Pattern):
    """The input itself."""

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        yield 0, {}

    def fits_plain_conv(self) -> bool:
        return False

    def fits_nothing(self) -> bool:
        return True

    def __str__(self) -> str:
        return _label("x", self)


@dataclass(eq=False)
class Anything(Pattern):
    """Any term at all, the longest first: what the laws are stated over."""

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        for taken in range(len(items), -1, -1):
            yield taken, {}

    def fits_plain_conv(self) -> bool:
        return True

    def fits_nothing(self) -> bool:
        return True

    def __str__(self) -> str:
        return _label("...", self)


@dataclass(eq=False)
class Either(Pattern):
    """One pattern or another."""

    options: tuple[Pattern, ...] = ()

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        for option in self.options:
            yield from option.take(items)

    def inside(self) -> tuple[Pattern, ...]:
        return self.options

    def fits_plain_conv(self) -> bool:
        return any(option.fits_plain_conv() for option in self.options)

    def fits_nothing(self) -> bool:
        return any(option.fits_nothing() for option in self.options)

    def __str__(self) -> str:
        return _label(" or ".join(map(str, self.options)), self)


@dataclass(eq=False)
class Optional(Pattern):
    """A branch or stage that may be absent: then it is 0 in a sum, 1 in a sequence."""

    part: Pattern = field(default_factory=Leaf)

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        yield from self.part.take(items)
        yield 0, {}

    def take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        for taken, found in self.part.take(items):
            yield taken, found if self.name is None else {**found, self.name: seq(items[:taken])}
        yield 0, {}

    def inside(self) -> tuple[Pattern, ...]:
        return (self.part,)

    def fits_plain_conv(self) -> bool:
        return self.part.fits_plain_conv()

    def fits_nothing(self) -> bool:
        return True

    def __str__(self) -> str:
        return _label(f"[{self.part}]", self)


@dataclass(eq=False)
class Many(Pattern):
    """One or more: stages in a sequence, branches in a sum or concat. Its name captures a list.

    Args:
        least: how many there must be.
        alike: whether the kernels of branches must be of one size.
    """

    part: Pattern = field(default_factory=Leaf)
    least: int = 1
    alike: bool = False
    repeats = True

    def fits(self, branches: Sequence[Term]) -> bool:
        """Whether these are branches that it takes, all of them."""
        sizes = {tuple(x.weight.shape[2:]) for branch in branches for x in branch.leaves() if x.weight is not None}
        enough = len(branches) >= self.least and not (self.alike and len(sizes) > 1)
        return enough and all(self.part.match(branch) is not None for branch in branches)

    def take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        for taken, pieces in self._pieces(items, 0):
            if len(pieces) >= self.least:
                yield taken, {} if self.name is None else {self.name: pieces}

    def _pieces(self, items: tuple[Term, ...], depth: int) -> Iterator[tuple[int, list[Term]]]:
        for taken, _ in self.part.take(items):
            if taken:
                for more, pieces in self._pieces(items[taken:], depth + 1):
                    yield taken + more, [seq(items[:taken]), *pieces]
        yield 0, []

    def inside(self) -> tuple[Pattern, ...]:
        return (self.part,)

    def fits_plain_conv(self) -> bool:
        return self.least <= 1 and self.part.fits_plain_conv()

    def __str__(self) -> str:
        return _label(f"{self.part} x{self.least}+", self)


class _Combined(Pattern):
    """A combinator over several patterns."""

    def __init__(self, *parts: Pattern) -> None:
        if not parts:
            raise ValueError(f"{type(self).__name__} of nothing: give it at least one pattern")
        self.parts = parts

    def named(self, name: str) -> Pattern:
        twin = type(self)(*self.parts)
        twin.name = name
        return twin

    def inside(self) -> tuple[Pattern, ...]:
        return self.parts

    def fits_plain_conv(self) -> bool:
        """One part may be the convolution if all others may be absent."""
        return any(
            part.fits_plain_conv() and all(other.fits_nothing() for other in self.parts if other is not part)
            for part in self.parts
        )


class Seq(_Combined):
    """One after another."""

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        yield from self._rest(self.parts, items)

    def _rest(self, parts: tuple[Pattern, ...], items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        if not parts:
            yield 0, {}
            return
        for taken, found in parts[0].take(items):
            for more, rest in self._rest(parts[1:], items[taken:]):
                yield taken + more, {**found, **rest}

    def miss(self, term: Term) -> str:
        items = term.parts if term.op == "seq" else (term,)
        furthest = ""
        for count in range(len(self.parts)):
            reached = max((taken for taken, _ in self._rest(self.parts[:count], items)), default=None)
            if reached is None:
                break
            where = f"behind {seq(items[:reached])}" if reached else "first"
            found = items[reached] if reached < len(items) else "nothing"
            furthest = f"{where} it wants {self.parts[count]}, and there is {found}"
        whole = max((taken for taken, _ in self._rest(self.parts, items)), default=0)
        return f"it ends before {items[whole]}" if whole else furthest

    def fits_nothing(self) -> bool:
        return all(part.fits_nothing() for part in self.parts)

    def __str__(self) -> str:
        return _label(_joined(" -> ", self.parts), self)


class Sum(_Combined):
    """Branches on one input, added, in any order."""

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        if items and items[0].op == "sum":
            for found in _assign(self.parts, items[0].parts):
                yield 1, found

    def miss(self, term: Term) -> str:
        if term.op != "sum":
            return f"{term} is no sum of branches"
        return _missing_branches(self.parts, term.parts)

    def fits_plain_conv(self) -> bool:
        return False  # a plain convolution is no sum, not even of one

    def __str__(self) -> str:
        return _label(_joined(" + ", self.parts), self)


def _assign(patterns: tuple[Pattern, ...], branches: tuple[Term, ...]) -> Iterator[Captures]:
    """All ways to give every branch to one pattern; a Many takes what the others leave."""
    singles = [p for p in patterns if not isinstance(p, Many)]
    many = next((p for p in patterns if isinstance(p, Many)), None)
    if many is None and len(branches) > len(singles):
        return  # before each of many branches is tried for each pattern

    def place(left: list[Pattern], free: tuple[Term, ...], found: Captures) -> Iterator[Captures]:
        if left:
            first = left[0]
            for index, branch in enumerate(free):
                if not (isinstance(first, Optional) and branch.op == "one" and not first.part.fits_nothing()):
                    captured = first.match(branch)
                    if captured is not None:
                        yield from place(left[1:], free[:index] + free[index + 1 :], {**found, **captured})
            if isinstance(first, Optional):
                yield from place(left[1:], free, found)
        elif many is not None:
            if many.fits(free):
                yield found if many.name is None else {**found, many.name: list(free)}
        elif not free:
            yield found

    yield from place(singles, branches, {})


class Concat(_Combined):
    """Branches on one input, stacked on the channels, in order."""

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        if not items or items[0].op != "concat":
            return
        branches = items[0].parts
        if len(self.parts) == 1 and isinstance(self.parts[0], Many):
            many = self.parts[0]
            if many.fits(branches):
                yield 1, {} if many.name is None else {many.name: list(branches)}
        elif len(branches) == len(self.parts):
            found: Captures = {}
            for pattern, branch in zip(self.parts, branches, strict=True):
                captured = pattern.match(branch)
                if captured is None:
                    return
                found |= captured
            yield 1, found

    def miss(self, term: Term) -> str:
        if term.op != "concat":
            return f"{term} stacks no branches"
        return _missing_branches(self.parts, term.parts)

    def fits_plain_conv(self) -> bool:
        return False

    def __str__(self) -> str:
        return _label(_joined(" | ", self.parts), self)


def _missing_branches(patterns: tuple[Pattern, ...], branches: tuple[Term, ...]) -> str:
    """Which branches are of no pattern, and which patterns are of no branch."""
    inner = [p.part if isinstance(p, (Many, Optional)) else p for p in patterns]
    strange = [b for b in branches if all(p.match(b) is None for p in inner)]
    wanted = [
        p for p, whole in zip(inner, patterns, strict=True)
        if not isinstance(whole, Optional) and all(p.match(b) is None for b in branches)
    ]  # fmt: skip
    texts = [f"no branch is {p}" for p in wanted] + [f"branch {b} is none of its" for b in strange]
    return "; ".join(texts) or f"it has {len(branches)} branches where {len(patterns)} are wanted"


def conv_norm(kernel: Kernel | None = None, depthwise: bool | None = None) -> Pattern:
    """A convolution, and whatever scales and shifts follow it: the branch of nearly every paper. It may read a
    padded or cropped input, which only moves its taps."""
    return Seq(Optional(Pad()), Conv(kernel, depthwise=depthwise), Optional(Affine()))


def _label(text: str, pattern: Pattern) -> str:
    return f"{pattern.name}: {text}" if pattern.name else text


def _joined(glue: str, parts: tuple[Pattern, ...]) -> str:
    """Parts of a combinator; a single repeated one shows by dots what it is repeated with."""
    texts = [f"({p})" if p.name or isinstance(p, (_Combined, Either)) else str(p) for p in parts]
    return glue.join(texts) + (f"{glue}..." if len(parts) == 1 and parts[0].repeats else "")


def arguments(pattern: Pattern, found: Captures, read: Callable[[Term], Any]) -> dict[str, Any]:
    """Captures as a merge function takes them: maps by name; absent branches 0, absent stages 1, repeated parts
    lists."""
    result = _absent(pattern, in_sum=False)
    for name, captured in found.items():
        result[name] = [read(term) for term in captured] if isinstance(captured, list) else read(captured)
    return result


def _absent(pattern: Pattern, in_sum: bool) -> dict[str, Any]:
    """The neutral element for every name below a pattern."""
    neutral: Any = [] if pattern.repeats else 0 if in_sum else 1
    result = {pattern.name: neutral} if pattern.name else {}
    inside_sum = isinstance(pattern, (Sum, Concat)) or (in_sum and isinstance(pattern, (Optional, Either, Many)))
    for part in pattern.inside():
        result |= _absent(part, inside_sum)
    return result
