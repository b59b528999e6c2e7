"""The merges that a plan does: of those that were found, the ones that can be written back, and were not left since."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from structrep import process
from structrep.algebra import precision
from structrep.deployed.layers import Sizes
from structrep.errors import ExampleOnly, Refusal
from structrep.graph.names import layers_of
from structrep.match.find import again
from structrep.match.findings import Findings
from structrep.match.isolation import named
from structrep.match.merge import Merge, Missed, together
from structrep.match.residuals import carried
from structrep.prove.differential import border, prove
from structrep.records.plan import NOTHING, MergeRecord, Way
from structrep.rewrite.draft import Draft
from structrep.rewrite.units import fallen
from structrep.terms.term import geometry

Seconds = tuple[float, float]  # that the layers of a merge take, and the merged one


@dataclass(frozen=True, eq=False)
class Selection:
    """What is merged and how the model is changed for that, and what is not merged and why.

    Args:
        findings: what the search gave.
        reserve: globs, of modules whose residuals may be carried.
        draft: of the merges that are done.
        missed: refusals.
    """

    findings: Findings
    reserve: tuple[str, ...]
    draft: Draft
    missed: tuple[Missed, ...]

    @property
    def merges(self) -> Sequence[Merge]:
        return self.draft.merges

    @property
    def merged(self) -> dict[str, Merge]:
        """The merges by the paths that their layers will have; without what becomes no layer."""
        return {self.draft.where(merge): merge for merge in self.merges if not merge.idle}

    @property
    def inexact(self) -> bool:
        """Whether some merge differs from the model at the border, as the user allowed."""
        return any(merge.fit.strictness == "inside" for merge in self.merges)

    def records(self, seconds: Callable[[Merge], Seconds | None]) -> tuple[MergeRecord, ...]:
        """The merges as records.

        Args:
            seconds: how long one takes, as measured, if it was.
        """
        group_of = {merge: group for group in together(self.merges) for merge in group}
        draft = self.draft
        return tuple(
            _idle_record(one, draft.where(one), draft.way(one))
            if one.idle
            else _record(one, draft.where(one), group_of[one], seconds(one), draft.way(one))
            for one in self.merges
        )

    def faster(self, slower: Mapping[Merge, Refusal]) -> Selection:
        """What is selected if some merges are left, and what they are made of may be in others."""
        return select(again(self.findings, slower=slower), self.reserve)

    def proved(self) -> Selection:
        """What is left once every merge was proved on its own region in float64."""
        wrong: dict[Merge, Refusal] = {}
        with process.same_chance(), precision.whole():
            for group in together(self.merges):
                if not (layers := [merge for merge in group if not merge.idle]):
                    continue
                try:
                    prove(layers)
                except Refusal as reason:
                    wrong |= dict.fromkeys(group, reason)
        return self.without(wrong)

    def without(self, refused: Mapping[Merge, Refusal]) -> Selection:
        """What is left if some merges are refused, and those that stand and fall with them."""
        lost = fallen(self.merges, refused)
        if not lost:
            return self
        missed = [_missed(merge, reason, self.draft.where(merge)) for merge, reason in lost.items()]
        draft = self.draft.without(lost)
        return replace(self, draft=draft, missed=(*self.missed, *missed, *_unwritten(draft)))


def select(findings: Findings, reserve: tuple[str, ...]) -> Selection:
    """The merges that were found, or are found without the methods that cannot be written, and can be written back."""
    (draft, missed), narrowed = _drafted(findings, reserve), set[tuple[str, str]]()
    while left := _left(draft, findings, narrowed):
        findings = again(findings, *left)  # what stands apart from them may merge still
        draft, missed = _drafted(findings, reserve)
    return Selection(findings, reserve, draft, (*findings.missed, *missed, *_unwritten(draft)))


def _drafted(findings: Findings, reserve: tuple[str, ...]) -> tuple[Draft, list[Missed]]:
    merges, missed = carried(findings, reserve)
    return Draft.of(findings.traced, findings.replicas, findings.borders, merges), missed


def _left(
    draft: Draft, findings: Findings, narrowed: set[tuple[str, str]]
) -> tuple[dict[tuple[str, str], Refusal], dict[Merge, Refusal]] | None:
    """The methods and the merges, not known yet, that have to be left; None if all could be written.

    Args:
        narrowed: methods that do what they do for the example alone. The first time such a one fails, the merge alone
            is left, for what takes less of it may be an edit; the next time, all that has to be written in it.
    """
    # with a scale that is given to it a merge may fail, and be right without
    refused = ((one, why) for one, why in draft.refused if isinstance(why, ExampleOnly) and not one.absorbed)
    merges: dict[Merge, Refusal] = {one: why for one, why in refused if (one.base, one.root) not in findings.slower}
    methods = {where: why for where, why in draft.unwritable.items() if where not in findings.unwritable}
    if merges:
        first = {where for where, why in methods.items() if isinstance(why, ExampleOnly)} - narrowed
        narrowed |= first
        methods = {where: why for where, why in methods.items() if where not in first}
    return (methods, merges) if methods or merges else None


def _unwritten(draft: Draft) -> list[Missed]:
    """The merges that cannot be written back."""
    return [_missed(merge, reason, merge.owner.path or "(root)") for merge, reason in draft.refused]


def _missed(merge: Merge, reason: Refusal, where: str) -> Missed:
    return Missed(where, merge.rules[-1], str(merge.term), reason, layers_of(merge.nodes), merge)


def _record(merge: Merge, where: str, group: Sequence[Merge], seconds: Seconds | None, way: Way) -> MergeRecord:
    shape, (before, after) = geometry(merge.term), merge.fit.costs
    taps = "x".join(map(str, shape.kernel))
    sizes = ""
    if merge.sizes is not None:
        sizes = f"holds for inputs of {Sizes(*merge.sizes).extra_repr()}"
    return MergeRecord(
        where=where,
        rules=merge.rules,
        sources=merge.sources,
        before=str(merge.term),
        after=f"conv {taps}" if taps else "table" if merge.is_table else "linear",
        multiply_adds=(before.multiply_adds, after.multiply_adds),
        parameters=(before.parameters, after.parameters),
        largest=merge.fit.largest,
        border=str(border(merge, group)) if merge.fit.strictness == "inside" else merge.fit.remedy,
        sizes=sizes,
        notes=merge.fit.notes,
        seconds=seconds,
        edit=way,
    )


def _idle_record(merge: Merge, where: str, way: Way) -> MergeRecord:
    before, after = merge.fit.costs
    return MergeRecord(
        where=where,
        rules=merge.rules,
        sources=merge.sources,
        before=named(merge.root) if merge.term.op == "one" else str(merge.term),
        after=NOTHING,
        multiply_adds=(before.multiply_adds, after.multiply_adds),
        parameters=(before.parameters, after.parameters),
        largest=merge.fit.largest,
        edit=way,
    )
