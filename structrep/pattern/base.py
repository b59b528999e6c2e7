"""What a pattern is: what a term may look like, and what its parts are called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from structrep.terms.term import Term, seq

Captures = dict[str, "Term | list[Term]"]


@dataclass(frozen=True)
class Miss:
    """What keeps a term from being of a form.

    Args:
        reason: as far as the form goes.
        parts: how many layers of the term, and parts of the form, find no counterpart: the fewer, the nearer it is.
    """

    reason: str
    parts: int

    def __str__(self) -> str:
        return self.reason


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

    def miss(self, term: Term) -> Miss:
        """What keeps a term from being of this form."""
        return Miss(f"{term} is not {self}", self.count() + layers_in(term))

    def count(self) -> int:
        """How many layers it wants at least, as far as it says."""
        return max(1, sum(part.count() for part in self.inside()))

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


class One(Pattern):
    """A pattern that takes exactly one item."""

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        if items and (found := self.accept(items[0])) is not None:
            yield 1, found

    def accept(self, term: Term) -> Captures | None:
        raise NotImplementedError


@dataclass(eq=False)
class Either(Pattern):
    """One pattern or another."""

    options: tuple[Pattern, ...] = ()

    def _take(self, items: tuple[Term, ...]) -> Iterator[tuple[int, Captures]]:
        for option in self.options:
            yield from option.take(items)

    def inside(self) -> tuple[Pattern, ...]:
        return self.options

    def count(self) -> int:
        return min(option.count() for option in self.options)

    def fits_plain_conv(self) -> bool:
        return any(option.fits_plain_conv() for option in self.options)

    def fits_nothing(self) -> bool:
        return any(option.fits_nothing() for option in self.options)

    def __str__(self) -> str:
        return label(" or ".join(map(str, self.options)), self)


class Combined(Pattern):
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


def layers_in(*terms: Term) -> int:
    """How many layers terms have; the input itself counts as one."""
    return sum(max(1, sum(1 for _ in term.leaves())) for term in terms)


def label(text: str, pattern: Pattern) -> str:
    return f"{pattern.name}: {text}" if pattern.name else text


def joined(glue: str, parts: tuple[Pattern, ...]) -> str:
    """Parts of a combinator; a single repeated one shows by dots what it is repeated with."""
    texts = [f"({p})" if p.name or isinstance(p, (Combined, Either)) else str(p) for p in parts]
    return glue.join(texts) + (f"{glue}..." if len(parts) == 1 and parts[0].repeats else "")
