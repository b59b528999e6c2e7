"""All merges and refusals for one graph, before anything is changed.

Families are tried first, and may be taken up in turn by a law that merges more (a norm after the sum of a RepVGG
block). A merge is done only if nothing else uses what vanishes (`stretch`), if it can be taken out of the model
(`legality`), if it is not dearer than what it replaces (`fit`), and if the algebra finds it exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import fx, nn

from structrep.errors import Costlier, Isolated, Refusal
from structrep.graph.calls import Trace, Traced
from structrep.graph.facts import CALL, INDEX
from structrep.graph.names import is_lone_layer, layer_of, path_of
from structrep.match.absorption import Absorption
from structrep.match.findings import Findings
from structrep.match.fit import Fit, fit, fit_value, price
from structrep.match.idle import identities, unread
from structrep.match.isolation import isolated
from structrep.match.legality import Legality, owner_of
from structrep.match.maps import MergedMaps
from structrep.match.merge import Merge, Missed
from structrep.match.readings import endings, read, readable, refuse_autocast
from structrep.match.refusals import Refusals
from structrep.match.segments import Segments
from structrep.match.shared_scales import absorptions
from structrep.match.stretch import Stretch
from structrep.registry import Rule
from structrep.terms.cost import Cost
from structrep.terms.layer import Layer, Readings
from structrep.terms.term import Term
from structrep.terms.value import value


def search(findings: Findings, trace: Trace) -> Search:
    """Search a graph; again without the scales that were not absorbed by all that they were given to."""
    nodes, refusals = readable(trace, findings.replicas), Refusals()
    refuse_autocast(trace, refusals)
    readings = read(nodes, refusals)
    given: list[Absorption] = []
    for found in absorptions(readings, endings(nodes, readings)) if not findings.blocks else ():
        if isinstance(found, Absorption):
            given.append(found)
        else:
            node, reason = found
            refusals.note([node], "fold_prenorm", "norm -> several", reason)
    everywhere = _called_again(readings, findings.traced)
    while True:
        made = Search(findings, trace, readings, given, Refusals(refusals.missed), frozenset(everywhere))
        made.run()
        merged = made.merged
        left = [one for one in given if not one.takers <= merged]
        kept_calls = [module for module, nodes in everywhere.items() if not nodes <= merged]
        if not left and not kept_calls:
            return made
        given = [one for one in given if one not in left]
        everywhere = {module: nodes for module, nodes in everywhere.items() if module not in kept_calls}
        for one in left:
            kept = next((miss for node, miss in made.refusals.missed if node in one.takers - merged), None)
            if kept is not None:
                told = replace(kept, where=path_of(one.node) or "(root)", layers=(*kept.layers, layer_of(one.node)))
                refusals.add(one.node, told)


def _called_again(readings: Readings, traced: Traced) -> dict[nn.Module, set[fx.Node]]:
    """The norms that are called several times, with all their calls: each of these may be merged into another layer."""
    found: dict[nn.Module, set[fx.Node]] = {}
    for node, reading in readings.items():
        if node.op == "call_module" and isinstance(reading, Layer) and reading.kind == "norm":
            found.setdefault(CALL.of(node).module, set()).add(node)
    return {module: nodes for module, nodes in found.items() if 1 < len(nodes) == len(traced.calls[module, "forward"])}


Choice: TypeAlias = tuple[
    Rule, Stretch, tuple[Cost, Cost]
]  # what a law may merge, and what that costs before and after


@dataclass(frozen=True)
class Family:
    """A stretch that a family merges."""

    rule: Rule
    stretch: Stretch
    fit: Fit


class Search:
    """The merges of one graph, if certain scales are given to the layers that take them.

    Args:
        readings: what the nodes of the graph are.
        absorptions: those scales.
        refusals: those that there are already; gets those of this search.
        everywhere: layers that are to vanish at each of their calls.
    """

    def __init__(
        self,
        findings: Findings,
        trace: Trace,
        readings: Readings,
        absorptions: Sequence[Absorption],
        refusals: Refusals,
        everywhere: frozenset[nn.Module],
    ) -> None:
        self.findings = findings
        self.trace = trace
        self.readings = readings
        self.refusals = refusals
        self.segments = Segments(trace.nodes, readings, absorptions)
        self.everywhere = everywhere
        self.legality = Legality(findings, self.segments, everywhere)
        self.given = set[fx.Node]().union(*(one.nodes for one in absorptions))  # with all that the scales are made of
        self.families: dict[fx.Node, Family] = {}  # by the root of what is merged
        self.merges: list[Merge] = []
        self.maps = MergedMaps()

    @property
    def merged(self) -> set[fx.Node]:
        """All nodes that are part of a merge."""
        return {node for merge in self.merges for node in merge.nodes}

    def run(self) -> None:
        """Find the merges: families, then laws, outermost first."""
        families = [rule for rule in self.findings.registry if not rule.law]
        laws = [rule for rule in self.findings.registry if rule.law]
        nodes = [*self.readings]
        self.merges += unread(nodes, self.readings, self.trace, self.legality)
        taken = self.given | self.merged
        for node in reversed(self.trace.nodes):
            if node not in taken and (found := self._family(node, families)) is not None:
                self.families[node] = found
                taken.update(found.stretch.nodes)
        taken = self.given | self.merged
        for node in reversed(self.trace.nodes):
            if node not in taken and (merge := self._law(node, laws) or self._settle(node)) is not None:
                self.merges.append(merge)
                taken.update(merge.nodes)
        self.merges.reverse()
        self.merges += identities(nodes, self.readings, self.trace, self.legality, taken)
        self.merges.sort(key=lambda merge: INDEX.of(merge.root))
        self.maps = MergedMaps()  # those of merges are cached there

    def refused(self) -> list[Missed]:
        """The refusals that matter beside what was merged; also, of every norm that stays and that none is about, what
        it stands between."""
        lone = {CALL.of(node).module for merge in self.merges if is_lone_layer(merge.nodes) for node in merge.nodes}
        again = {n for n in self.trace.nodes if n.op == "call_module" and CALL.of(n).module in lone}
        covered = self.merged | self.given | again
        refusals = Refusals(self.refusals.missed)
        if not self.findings.blocks:  # or norms stay because blocks alone are to be merged
            told = {layer for _, miss in refusals.missed for layer in miss.layers}
            for node, reason in isolated(self.readings, covered, told):
                refusals.note([node], "-", "norm", Isolated(reason))
        return [miss for node, miss in refusals.missed if node not in covered or self._matters(miss)]

    def merges_sum(self, addends: Sequence[fx.Node], additions: Sequence[fx.Node]) -> bool:
        """Whether some addends of a sum would merge; `additions` are its own, the last of which is the sum."""
        if len(self.findings.replicas.bodies(CALL.of(additions[-1]))) > 1:
            return False  # all calls of a forward have to do the same
        stretch = self.segments.sum_of(addends, additions)
        if stretch is None or stretch.leak() is not None:
            return False
        try:
            self._price(stretch)
            value(stretch.term)
        except Refusal:
            return False
        return True

    def demand(self, stretch: Stretch) -> None:
        """Raise whatever keeps a stretch from being merged by a law.

        Raises:
            Refusal: it is not exact, dearer, or cannot be cut out.
        """
        self.legality.check(stretch)
        costs = self._price(stretch)
        if self._as_family(stretch) is None:
            fit_value(stretch, costs, self.findings.inexact_borders)

    def _price(self, stretch: Stretch) -> tuple[Cost, Cost]:
        return price(stretch, self.trace, self.findings.traced)

    def _stretches(self, root: fx.Node) -> list[Stretch]:
        """Stretches that end at root and could become one layer, shortest first."""
        return [one for one in self.segments.stretches(root) if self.legality.in_one_block(one)]

    def _family(self, root: fx.Node, families: Sequence[Rule]) -> Family | None:
        """The largest stretch that ends at root and is merged by the first family that merges any."""
        if self.segments.is_addend(root):
            return None  # a family is judged by all branches of its block
        stretches = self._stretches(root)
        for rule in families:
            for stretch in reversed(stretches):
                try:
                    found = rule.match(stretch.term)
                    if found is None:
                        continue
                    self.legality.check(stretch)
                    costs = self._price(stretch)
                    map_ = rule.merged(stretch.term, found)
                    fitted = fit(map_, stretch, costs)
                except Refusal as reason:
                    self.refusals.note(stretch.nodes, rule.name, str(stretch.term), reason)
                    continue
                self.maps.hold(stretch, map_)
                return Family(rule, stretch, fitted)
        return None

    def _law(self, root: fx.Node, laws: Sequence[Rule]) -> Merge | None:
        """The best exact merge that ends at root, by saving."""
        choices: list[tuple[float, Choice]] = []
        for stretch in self._stretches(root):
            if not self._whole_families(stretch):
                continue
            term = stretch.term
            rule = next((law for law in laws if _says_something(term) and law.pattern.match(term) is not None), None)
            if rule is None:
                continue
            try:
                self.legality.check(stretch)
                before, after = self._price(stretch)
            except Refusal as reason:
                self.refusals.note(stretch.nodes, rule.name, str(term), reason)
                continue
            saved = before.multiply_adds - after.multiply_adds
            choices.append((saved, (rule, stretch, (before, after))))
        choices.reverse()  # of those that save the same, the one that takes most is first
        ordered = [choice for _, choice in sorted(choices, key=lambda one: one[0], reverse=True)]
        for place, choice in enumerate(ordered):
            fitted = self._fitted(*choice)
            if fitted is not None:
                rule, stretch, _ = choice
                for other in self._without_a_start(stretch, ordered[place + 1 :], laws):
                    if (fits := self._fitted(*other)) is not None:
                        (rule, stretch, _), fitted = other, fits
                        break
                return self._merge(stretch, fitted, rule)
        return None

    def _fitted(self, rule: Rule, stretch: Stretch, costs: tuple[Cost, Cost]) -> Fit | None:
        """How a stretch fits that a law merges; None if it is not exact, which is noted."""
        fitted = self._as_family(stretch)
        if fitted is None:
            try:
                map_, fitted = fit_value(stretch, costs, self.findings.inexact_borders)
            except Refusal as reason:
                self.refusals.note(stretch.nodes, rule.name, str(stretch.term), reason)
                return None
            self.maps.hold(stretch, map_)
        return fitted

    def _without_a_start(self, best: Stretch, others: Sequence[Choice], laws: Sequence[Rule]) -> Iterator[Choice]:
        """Stretches without the norm that one starts with, if that merges as well into the layer before it, and then no
        forward changes in which both are called."""
        start = [one for one in itertools.takewhile(lambda one: one.keeps_shape, best.segments) if one.term.op != "one"]
        if not start:
            return
        around, norms = owner_of({*best.nodes, *best.scales}), {node for segment in start for node in segment.nodes}
        apart = [
            choice
            for choice in others
            if norms.isdisjoint(choice[1].nodes) and owner_of({*choice[1].nodes, *choice[1].scales}) is not around
        ]
        back = self._law(start[-1].root, laws) if apart else None
        if back is not None and back.owner is not around:
            yield from apart

    def _settle(self, root: fx.Node) -> Merge | None:
        """What a family merges and no law took further."""
        family = self.families.get(root)
        return None if family is None else self._merge(family.stretch, family.fit)

    def _as_family(self, stretch: Stretch) -> Fit | None:
        """How a stretch fits that a family merges as a whole; None if none does."""
        family = self.families.get(stretch.root)
        whole = family is not None and len(family.stretch.segments) == len(stretch.segments)
        return family.fit if family is not None and whole else None

    def _whole_families(self, stretch: Stretch) -> bool:
        """Whether a stretch cuts through nothing that a family merges."""
        inside = set(stretch.nodes)
        return all(inside.issuperset(self.families[node].stretch.nodes) for node in inside if node in self.families)

    def _merge(self, stretch: Stretch, fitted: Fit, law: Rule | None = None) -> Merge:
        families = [self.families[node] for node in reversed(stretch.nodes) if node in self.families]
        named = list(dict.fromkeys(family.rule for family in families))
        if law and not any(len(family.stretch.segments) == len(stretch.segments) for family in families):
            named.append(law)
        return Merge(
            tuple(rule.name for rule in named),
            tuple(rule.source for rule in named),
            stretch.term,
            stretch,
            owner_of({*stretch.nodes, *stretch.scales}),
            self.trace,
            fitted,
            everywhere=self.everywhere & {CALL.of(node).module for node in stretch.nodes},
            cached=self.maps.get(stretch),
        )

    def _matters(self, miss: Missed) -> bool:
        """Whether a refusal is worth telling where a smaller merge was done: a family's, for more than the price."""
        registry = self.findings.registry
        law = miss.rule in registry and registry[miss.rule].law
        return not law and miss.rule != "-" and not isinstance(miss.reason, Costlier)


def _says_something(term: Term) -> bool:
    return term.op != "leaf" or (term.layer is not None and term.layer.computes)
