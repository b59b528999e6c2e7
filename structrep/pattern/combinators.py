"""Patterns of patterns: in a row, summed, stacked, there or not, many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from structrep.algebra import Ints
from structrep.pattern.base import Captures, Combined, Miss, Pattern, joined, label, layers_in
from structrep.pattern.leaves import Affine, Conv, Kernel, Leaf, Pad
from structrep.terms.layer import Layer
from structrep.terms.term import Term, seq


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

    def count(self) -> int:
        return 0

    def fits_nothing(self) -> bool:
        return True

    def __str__(self) -> str:
        return label(f"[{self.part}]", self)


@dataclass(eq=False)
class Many(Pattern):
    """One or more: stages in a sequence, branches in a sum or concat. Its name captures a list.

    Args:
        least: how many there must be.
        alike: whether the kernels of branches must be of one size and dilation.
    """

    part: Pattern = field(default_factory=Leaf)
    least: int = 1
    alike: bool = False
    repeats = True

    def count(self) -> int:
        return self.least * self.part.count()

    def fits(self, branches: Sequence[Term]) -> bool:
        """Whether these are branches that it takes, all of them."""
        enough = len(branches) >= self.least and not (self.alike and len(set(map(_taps, _kernels(branches)))) > 1)
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
        return label(f"{self.part} x{self.least}+", self)


def _kernels(branches: Sequence[Term]) -> Iterator[Layer]:
    return (layer for branch in branches for layer in branch.leaves() if layer.weight is not None)


def _taps(layer: Layer) -> tuple[Ints, Ints]:
    """The size and the dilation of a kernel."""
    geometry = layer.shape(layer.in_channels or 1, layer.dims or 0)
    return geometry.kernel, geometry.dilation


class Seq(Combined):
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

    def miss(self, term: Term) -> Miss:
        items = term.parts if term.op == "seq" else (term,)
        reached = [max((taken for taken, _ in self._rest(self.parts[:count], items)), default=None)
                   for count in range(len(self.parts) + 1)]  # fmt: skip
        if (whole := reached[-1]) is not None:
            return Miss(f"it ends before {seq(items[whole:])}", layers_in(*items[whole:]))
        part = reached.index(None) - 1  # the last that could be reached
        before = reached[part] or 0
        wanted = sum(later.count() for later in self.parts[part + 1 :])
        return self._stops(self.parts[part], items[:before], items[before:], wanted)

    def _stops(self, part: Pattern, before: tuple[Term, ...], rest: tuple[Term, ...], wanted: int) -> Miss:
        """That a part is not what comes next; `wanted` is what those behind it want."""
        said = f"{f'behind {seq(before)}' if before else 'first'} it wants {part}, and there is"
        if not rest:
            return Miss(f"{said} nothing", part.count() + wanted)
        inner = part.miss(rest[0])
        why = f": {inner}" if isinstance(part, Combined) and rest[0].op in ("sum", "concat") else ""
        return Miss(f"{said} {rest[0]}{why}", inner.parts + abs(layers_in(*rest[1:]) - wanted))

    def fits_nothing(self) -> bool:
        return all(part.fits_nothing() for part in self.parts)

    def __str__(self) -> str:
        return label(joined(" -> ", self.parts), self)


class Sum(Combined):
    """Branches on one input, added, in any order; a `Many` takes what the other patterns leave.

    Raises:
        ValueError: no patterns, or more than one `Many`.
    """

    def __init__(self, *parts: Pattern) -> None:
        super().__init__(*parts)
        if sum(isinstance(part, Many) for part in parts) > 1:
            raise ValueError(f"{self} has several Many, and of branches in any order one takes what the others leave")

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        if items and items[0].op == "sum":
            for found in _assign(self.parts, items[0].parts):
                yield 1, found

    def miss(self, term: Term) -> Miss:
        if term.op != "sum":
            return Miss(f"{term} is no sum of branches", self.count() + layers_in(term))
        return _missing_branches(self.parts, term.parts)

    def fits_plain_conv(self) -> bool:
        return False  # a plain convolution is no sum, not even of one

    def __str__(self) -> str:
        return label(joined(" + ", self.parts), self)


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


class Concat(Combined):
    """Branches on one input, stacked on the channels, in order; a `Many` takes all of them.

    Raises:
        ValueError: no patterns, or a `Many` beside others.
    """

    def __init__(self, *parts: Pattern) -> None:
        super().__init__(*parts)
        if len(parts) > 1 and any(isinstance(part, Many) for part in parts):
            raise ValueError(f"{self} has a Many beside others: it takes all that is stacked, or none")

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

    def miss(self, term: Term) -> Miss:
        if term.op != "concat":
            return Miss(f"{term} stacks no branches", self.count() + layers_in(term))
        return _missing_branches(self.parts, term.parts)

    def fits_plain_conv(self) -> bool:
        return False

    def __str__(self) -> str:
        return label(joined(" | ", self.parts), self)


def _missing_branches(patterns: tuple[Pattern, ...], branches: tuple[Term, ...]) -> Miss:
    """Which branches are of no pattern, and which patterns are of no branch."""
    inner = [p.part if isinstance(p, (Many, Optional)) else p for p in patterns]
    strange = [b for b in branches if all(p.match(b) is None for p in inner)]
    wanted = [
        p for p, whole in zip(inner, patterns, strict=True)
        if not isinstance(whole, Optional) and all(p.match(b) is None for b in branches)
    ]  # fmt: skip
    texts = [f"no branch is {p}" for p in wanted] + [f"branch {b} is none of its" for b in strange]
    if texts:
        return Miss("; ".join(texts), sum(p.count() for p in wanted) + layers_in(*strange))
    many = next((p for p in patterns if isinstance(p, Many)), None)
    said = f"branches are not {many}, beside what else it wants" if many else f"branches where it wants {len(patterns)}"
    return Miss(f"it has {len(branches)} {said}", max(1, abs(len(branches) - len(patterns))))


def conv_norm(kernel: Kernel | None = None, depthwise: bool | None = None) -> Pattern:
    """A convolution, and whatever scales and shifts follow it: the branch of nearly every paper. It may read a
    padded or cropped input, which only moves its taps."""
    return Seq(Optional(Pad()), Conv(kernel, depthwise=depthwise), Optional(Affine()))
