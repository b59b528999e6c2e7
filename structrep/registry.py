"""Rules, and where they are kept.

A rule declares a training-time pattern and a linear merge function; the driver checks at every match that the function
computes what the pattern matched, so a rule can be wrong without doing harm.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata

from torch import nn

from structrep.algebra import ConvMap
from structrep.errors import BadInput, InvalidRule, Refusal, UnknownRule, WrongMerge, said, warn
from structrep.modules.source import written_in
from structrep.pattern import Captures, Pattern, arguments
from structrep.terms.term import Term, channels_at
from structrep.terms.value import value

Merge = Callable[..., ConvMap]

# Coefficients of two float64 routes to one map differ by rounding only; a real mistake is many orders above this.
COEFFICIENT_ROUNDING = 1e-10


@dataclass(frozen=True)
class Rule:
    """One family of merges.

    Args:
        name: how plans call it.
        pattern: the training-time structure.
        merge: from the captured maps, by name, to the one map of the whole match. An absent optional branch is 0, an
            absent optional stage is 1, a repeated part is a list.
        source: paper and section, or the law.
        example: makes a small module of this structure, in eval mode or not; for tests and the catalogue.
        counter_examples: what is nearly of this structure and must not be merged to it: the kind of the refusal, or ""
            where the pattern is to pass it by, and what makes the module.
        example_shape: of an input of the example, if it takes none of the channels of its layer and of any size.
        published: where a published conversion of this family differs from the merge, and by how much.
        narrower_than: names of rules that match its blocks too and say less of them: it is tried before those, in
            whatever order they were registered, so that a block has the name that fits it best.
        law: whether it holds for every term; laws come after all families.
    """

    name: str
    pattern: Pattern
    merge: Merge
    source: str
    example: Callable[[], nn.Module] | None = None
    counter_examples: tuple[tuple[str, Callable[[], nn.Module]], ...] = ()
    example_shape: tuple[int, ...] | None = None
    published: str = ""
    narrower_than: tuple[str, ...] = ()
    law: bool = False
    proved: set[tuple[object, ...]] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def built_in(self) -> bool:
        """Whether it is one of structrep's own, which give way to those of users."""
        return written_in(self.merge).startswith("structrep.rules.")

    def match(self, term: Term) -> Captures | None:
        """What a term's parts are called, or None if it is not of the pattern's form.

        Raises:
            WrongMerge: a predicate in the pattern raises.
        """
        try:
            return self.pattern.match(term)
        except Exception as error:
            raise WrongMerge(f"the pattern of rule {self.name!r} cannot be matched: {said(error)}") from error

    def merged(self, term: Term, found: Captures) -> ConvMap:
        """The term's value, after the merge function's was proved to be the same; of a built-in rule, once for
        each geometry and set of branches.

        Raises:
            WrongMerge: coefficients differ, or the function does not return a map.
            Inexact, Incompatible, Unreadable: from the algebra.
        """
        at: dict[int, int] = {}
        known: dict[tuple[int, int], ConvMap] = {}  # of the term; what is captured are parts of it
        try:
            truth = value(term, at=at, known=known)
            if not self.law and (truth.geometry, *found) not in self.proved:
                self._prove(truth, found, at, known)
                if self.built_in:  # a user's function may look at the weights
                    self.proved.add((truth.geometry, *found))
            return truth
        finally:
            known.clear()  # what has walked the term is a cycle, which would keep its maps until it is collected

    def _prove(
        self, truth: ConvMap, found: Captures, at: dict[int, int], known: dict[tuple[int, int], ConvMap]
    ) -> None:
        """Raise unless the merge function makes a term's value of what was captured."""
        channels, dims = truth.geometry.in_channels, truth.geometry.dims

        def read(part: Term) -> ConvMap:
            return value(part, channels_at(part, at) or channels, dims, known=known)

        try:
            result = self.merge(**arguments(self.pattern, found, read))
        except Refusal:
            raise
        except Exception as error:
            raise WrongMerge(f"the merge function of rule {self.name!r} fails: {said(error)}") from error
        if not isinstance(result, ConvMap):
            raise WrongMerge(
                f"the merge function of rule {self.name!r} returned {type(result).__name__}, not a ConvMap"
            )
        gap = truth.distance(result)
        if not gap <= COEFFICIENT_ROUNDING * max(truth.magnitude, result.magnitude):
            raise WrongMerge(
                f"rule {self.name!r} merges to {result}, the matched term is {truth}: coefficients differ by "
                f"{gap:.1e}; its merge function does not compute its pattern"
            )


@dataclass
class Registry:
    """An ordered collection of rules: yours are tried before the built-in ones, laws last, else earlier ones first; but
    what is narrower than another, as it says itself, before that one.

    Iterating gives the rules in the order in which they are tried.

    Examples:
        >>> mine = Registry()
        >>> mine.add(rule)
        >>> structrep.plan(model, rules=mine)

    Raises:
        InvalidRule: by what adds rules, of one that cannot be registered.
        UnknownRule: by what looks one up.
    """

    _rules: dict[str, Rule] = field(default_factory=dict)

    def add(self, rule: Rule) -> Rule:
        """Register a rule.

        Raises:
            InvalidRule: its name is taken or none, it has no source, its merge function does not take what its pattern
                captures, its pattern matches a plain convolution, so that it would match its own output for ever, or
                it is narrower than a rule that is narrower than it.
        """
        if rule.name.strip() in ("", "<lambda>"):
            raise InvalidRule(
                f"{rule.name!r} is no name for a rule, by which plans and rules=[...] call it: give name=..., or "
                f"decorate a function that has one"
            )
        if not rule.source.strip():
            raise InvalidRule(
                f"rule {rule.name!r} has no source: say the paper and section, or where it is written down, source=..."
            )
        if rule.name in self._rules:
            other = self._rules[rule.name]
            raise InvalidRule(
                f"there are two rules named {rule.name!r}: {other.source!r}, registered first, and {rule.source!r}; "
                f"rename one"
            )
        captured = rule.pattern.names()
        if twice := {name for name in captured if captured.count(name) > 1}:
            raise InvalidRule(
                f"the pattern of rule {rule.name!r} uses the name {sorted(twice)[0]!r} twice: {rule.pattern}"
            )
        parameters = inspect.signature(rule.merge).parameters.values()
        takes = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        required = {
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        missing, unknown = sorted(required - set(captured)), sorted(set(captured) - set(takes))
        if missing or (unknown and not takes_any):
            raise InvalidRule(
                f"the merge function of rule {rule.name!r} takes ({', '.join(takes)}), its pattern captures "
                f"({', '.join(captured)}): "
                + "; ".join(
                    [f"nothing in the pattern is named {name!r}" for name in missing]
                    + [f"the function does not take {name!r}" for name in unknown]
                )
            )
        if not rule.law and rule.pattern.fits_plain_conv():
            raise InvalidRule(
                f"the pattern of rule {rule.name!r} matches a plain convolution, which is what it merges to, so it "
                f"would match its own output: {rule.pattern}; a stage that only training has must not be Optional"
            )
        if rule.name in self.wider_than(rule):
            raise InvalidRule(
                f"rule {rule.name!r} is narrower than {' and '.join(rule.narrower_than)}, and so than itself, as the "
                f"rules say: one of them is not"
            )
        self._rules[rule.name] = rule
        return rule

    def wider_than(self, rule: Rule) -> set[str]:
        """The names of all rules that a rule is narrower than, as it says or as those say that it names."""
        found: set[str] = set()
        left = list(rule.narrower_than)
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += self._rules[name].narrower_than if name in self._rules else ()
        return found

    def rule(
        self,
        pattern: Pattern,
        *,
        source: str,
        name: str | None = None,
        example: Callable[[], nn.Module] | None = None,
        counter_examples: Iterable[tuple[str, Callable[[], nn.Module]]] = (),
        example_shape: tuple[int, ...] | None = None,
        published: str = "",
        narrower_than: Iterable[str] = (),
    ) -> Callable[[Merge], Merge]:
        """Decorator: register a merge function under its own name.

        Args:
            pattern, source: what it merges, whose names are the arguments of the function, and where it is from.
            name: another name than the function's.
            example, counter_examples, example_shape, published, narrower_than: as for `Rule`.

        Raises:
            InvalidRule: as `add`.

        Examples:
            >>> registry = Registry()
            >>> @registry.rule(Sum(conv_norm().named("a"), conv_norm().named("b")), source="my paper, section 3")
            ... def twins(a, b):
            ...     return a + b
        """

        def register(merge: Merge) -> Merge:
            found = Rule(
                name or merge.__name__,
                pattern,
                merge,
                source,
                example,
                tuple(counter_examples),
                example_shape,
                published,
                tuple(narrower_than),
            )
            self.add(found)
            return merge

        return register

    def law(self, pattern: Pattern, *, source: str) -> Callable[[Merge], Merge]:
        """Decorator: register a law, which holds for every term of that form; its merge is the term's own value."""

        def register(merge: Merge) -> Merge:
            self.add(Rule(merge.__name__, pattern, merge, source, law=True))
            return merge

        return register

    def __iter__(self) -> Iterator[Rule]:
        return iter(_narrower_first(sorted(self._rules.values(), key=lambda rule: (rule.law, rule.built_in))))

    def __len__(self) -> int:
        return len(self._rules)

    def __contains__(self, name: str) -> bool:
        return name in self._rules

    def __getitem__(self, name: str) -> Rule:
        """The rule of that name.

        Raises:
            UnknownRule: there is none; says which there are.
        """
        if name not in self._rules:
            near = difflib.get_close_matches(name, self._rules, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(self._rules))}"
            raise UnknownRule(f"no rule is named {name!r}: {hint}")
        return self._rules[name]

    def select(self, rules: Iterable[str | Rule]) -> Registry:
        """A registry of some rules, by name or as they are; one that is given twice is one.

        Raises:
            UnknownRule: a name is not registered.
            InvalidRule: two rules have one name.
            BadInput: neither a name nor a rule.
        """
        chosen = Registry()
        for rule in dict.fromkeys(rules):
            if not isinstance(rule, (str, Rule)):
                raise BadInput(f"rules has {rule!r}: give names of registered rules, and rules")
            chosen.add(rule if isinstance(rule, Rule) else self[rule])
        return chosen


def _narrower_first(rules: Iterable[Rule]) -> list[Rule]:
    """Rules in their order, but each behind those that are narrower than it."""
    ordered = list(rules)
    narrower: dict[str, list[Rule]] = {}
    for rule in ordered:
        for name in rule.narrower_than:
            narrower.setdefault(name, []).append(rule)
    placed: dict[str, Rule] = {}

    def place(rule: Rule) -> None:
        for other in narrower.get(rule.name, ()):
            if other.name not in placed:
                place(other)
        placed.setdefault(rule.name, rule)

    for rule in ordered:
        place(rule)
    return list(placed.values())


class _Default(Registry):
    """The built-in rules, imported when rules are first looked at, and those of users."""

    @property
    def _rules(self) -> dict[str, Rule]:
        importlib.import_module("structrep.rules")
        known: dict[str, Rule] = self.__dict__.setdefault("known", {})
        return known

    @_rules.setter
    def _rules(self, rules: dict[str, Rule]) -> None:
        self.__dict__["known"] = rules


default: Registry = _Default()
rule = default.rule
RULES, READERS = "structrep.rules", "structrep.readers"  # groups of entry points
_loaded: set[str] = set()


def load_plugins() -> None:
    """Import, once, what installed packages contribute: entry points of the groups `structrep.rules` and
    `structrep.readers`. Each is a module, whose decorators register what is in it, or a `Rule` or `Registry`.

    One that cannot be loaded is told by a warning that names it and its package; the rest goes on.
    """
    for group in {RULES, READERS} - _loaded:
        _loaded.add(group)
        for point in metadata.entry_points(group=group):
            try:
                found = point.load()
                for one in found if isinstance(found, Registry) else [found] if isinstance(found, Rule) else ():
                    default.add(one)
            except Exception as error:
                package = point.dist.name if point.dist else "an installed package"
                warn(
                    f"{group} of {package}, {point.name} = {point.value}, could not be loaded and is left out: "
                    f"{type(error).__name__}: {error}"
                )


def resolve(rules: Registry | Iterable[str | Rule] | None) -> Registry:
    """The registry that `rules=` means: all rules for None, one of a user's, or some rules by name or themselves.

    Raises:
        UnknownRule: a name that is not in the default registry.
        InvalidRule: two rules have one name.
        BadInput: neither a registry nor rules.
    """
    if not (rules is None or isinstance(rules, (Registry, Rule, str, Iterable))):
        raise BadInput(f"rules={rules!r}: give a structrep.Registry, or names of registered rules and rules")
    load_plugins()
    if rules is None:
        return default
    if isinstance(rules, Registry):
        return rules
    return default.select([rules] if isinstance(rules, (str, Rule)) else rules)
