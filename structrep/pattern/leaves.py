"""Patterns of single layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from structrep.errors import InvalidRule
from structrep.pattern.base import Captures, One, Pattern, label
from structrep.terms.layer import KINDS, SCALES, Formula, Layer
from structrep.terms.term import Term

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
class Leaf(One):
    """Any single layer, or one of a kind.

    Args:
        kind: as `terms.layer.Layer` has it: "slice", say.

    Raises:
        ValueError: there is no such kind.
    """

    kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no kind of layer: {', '.join(KINDS)} are")

    def accept(self, term: Term) -> Captures | None:
        known = term.op == "leaf" and term.layer is not None and self.kind in (None, term.layer.kind)
        return {} if known else None

    def fits_plain_conv(self) -> bool:
        return self.kind in (None, "conv", "linear")

    def __str__(self) -> str:
        return label(self.kind or "layer", self)


@dataclass(eq=False)
class Conv(One):
    """A convolution or Linear.

    Args:
        kernel: a predicate on the kernel size; None takes any.
        depthwise: whether it must be, or must not be, one filter a channel; None takes either.
        keeps_channels: whether it must give, or must not give, as many channels as it takes; None takes either.
        formula: a predicate on how the kernel is computed from parameters, for families that live in weight space; None
            takes any kernel, computed or not.
    """

    kernel: Kernel | None = None
    formula: Callable[[Formula], bool] | None = None
    depthwise: bool | None = None
    keeps_channels: bool | None = None

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
        if self.keeps_channels is not None and self.keeps_channels != _keeps_channels(term.layer):
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
        width = {None: "", True: "channel-keeping", False: "channel-changing"}[self.keeps_channels]
        return label(" ".join(word for word in (kind, shape, sort, width, "conv") if word), self)


def _keeps_channels(layer: Layer) -> bool:
    return layer.in_channels is not None and layer.in_channels == layer.out_channels


def _is_depthwise(layer: Layer) -> bool:
    return layer.weight is not None and layer.weight.shape[1] == 1 and layer.in_channels not in (None, 1)


@dataclass(eq=False)
class Unrolled(Leaf):
    """A convolution of pieces of a fixed size, as a matrix on all their numbers."""

    kind: str | None = "unrolled"

    def __str__(self) -> str:
        return label("unrolled conv", self)


@dataclass(eq=False)
class Pool(Leaf):
    """An average pool."""

    kind: str | None = "pool"


_SORTS = {None: "", True: "learned ", False: "fixed "}


@dataclass(eq=False)
class Scalar(One):
    """One number that scales or shifts all channels.

    Args:
        learned: whether it must be, or must not be, a number that the model stores; None takes either.
    """

    learned: bool | None = None

    def accept(self, term: Term) -> Captures | None:
        layer = term.layer
        if layer is None or layer.kind != "affine" or layer.in_channels is not None:
            return None
        return {} if self.learned in (None, layer.parameters > 0) else None

    def fits_plain_conv(self) -> bool:
        return False

    def __str__(self) -> str:
        return label(f"{_SORTS[self.learned]}scalar", self)


@dataclass(eq=False)
class Scale(One):
    """One scale, per channel or of all, that shifts nothing."""

    def accept(self, term: Term) -> Captures | None:
        layer = term.layer
        return {} if layer is not None and layer.kind == "affine" and not layer.shifts else None

    def fits_plain_conv(self) -> bool:
        return False

    def __str__(self) -> str:
        return label("scale", self)


@dataclass(eq=False)
class Shift(One):
    """One constant, per channel or of all, that is added, and no scale.

    Args:
        learned: as of `Scalar`.
    """

    learned: bool | None = None

    def accept(self, term: Term) -> Captures | None:
        if term.layer is None or not term.layer.adds:
            return None
        return {} if self.learned in (None, term.layer.parameters > 0) else None

    def fits_plain_conv(self) -> bool:
        return False

    def __str__(self) -> str:
        return label(f"{_SORTS[self.learned]}shift", self)


@dataclass(eq=False)
class Norm(Leaf):
    """A batch norm with fixed statistics."""

    kind: str | None = "norm"


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
        return label(type(self).__name__.lower(), self)


class Affine(_Run):
    """One or more scales and shifts per channel: norms in any dress, layer scales, signs."""

    kinds = frozenset(SCALES)


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
        return label("x", self)


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
        return label("...", self)


def square(kernel: tuple[int, ...]) -> bool:
    """More than one tap along both axes."""
    return len(kernel) == 2 and min(kernel) > 1
