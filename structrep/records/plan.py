"""What is merged, and what is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal, TypeAlias

from pydantic import Field
from rich.table import Table

from structrep.errors import some
from structrep.records.base import Record, counted
from structrep.records.latency import milliseconds

NOTHING = "nothing"  # what becomes of what is run for nothing
Way: TypeAlias = Literal["swap", "edit", "rewrite"]


class MergeRecord(Record):
    """One merge: where, by which rules, from which papers or laws, what became what, at which cost."""

    where: str
    rules: tuple[str, ...]
    sources: tuple[str, ...]
    before: str
    after: str
    multiply_adds: tuple[float, float]  # per output pixel, before and after
    parameters: tuple[int, int]  # stored numbers, before and after
    largest: tuple[float, float]  # largest coefficient of a kernel before, of the merged layer
    border: str = ""  # what a layer of its own does for the border, or how far an inexact one is off
    sizes: str = ""  # the input sizes that it holds for, if not for all
    notes: tuple[str, ...] = ()  # what is to be known of its numbers: dead channels, half precision
    seconds: tuple[float, float] | None = None  # before and after, if merges were chosen by measurement
    edit: Way = "swap"  # by modules alone, by an edit of a forward's own text, or by a
    # forward that is cut out of the trace

    @property
    def leaves_layer(self) -> bool:
        """Whether a layer does what was merged; of what is run for nothing none does."""
        return self.after != NOTHING


class BorderRecord(Record):
    """How far a merge is off where it reads outside its input, relative to the largest output."""

    size: tuple[int, ...]  # of the input, in pixels
    pixels: int  # of the output, that differ in some channel
    of: int
    error: float

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        return (
            f"inexact, as allowed: of an input of {size} pixels {self.pixels:,} of {self.of:,} output pixels differ, "
            f"by up to {self.error:.1e} of the largest output"
        )


class RefusalRecord(Record):
    """One merge that was not done, and why; `layers` are the paths of the layers that it would have taken in."""

    where: str
    rule: str
    what: str
    kind: str
    reason: str
    layers: tuple[str, ...] = ()


class Explanation(Record):
    """What became of two layers."""

    first: str
    second: str
    merged: str = ""  # where, if they are
    answer: str
    refusals: tuple[RefusalRecord, ...] = ()  # of merges that would have held both
    misses: dict[str, str] = Field(default_factory=dict)  # the nearest rules -> what keeps each from matching

    def __str__(self) -> str:
        lines = [f"{self.first} and {self.second}: {self.answer}"]
        lines += [f"  refused, {r.rule}, {r.what} ({r.kind}): {r.reason}" for r in self.refusals]
        lines += [f"  {rule}: {miss}" for rule, miss in self.misses.items()]
        return "\n".join(lines)


class PlanRecord(Record):
    """A whole plan."""

    model: str
    merges: tuple[MergeRecord, ...]
    refusals: tuple[RefusalRecord, ...]
    notes: tuple[str, ...] = ()  # what is to be known of the model: code that cannot be read

    @property
    def nothing(self) -> str:
        """What is to be said of a plan without merges."""
        return f"there is nothing to merge in {self.model}{self.reasons}"

    @property
    def reasons(self) -> str:
        """The refusals, a line each, as part of an error; of many the first."""
        return "".join(f"\n  {line}" for line in some(f"{r.where}, {r.what}: {r.reason}" for r in self.refusals))


def plan_tables(plan: PlanRecord) -> Iterable[Table]:
    """A plan's merges, then its refusals."""
    ways: dict[Way, str] = {
        "swap": "by modules alone",
        "edit": "by edits of forwards",
        "rewrite": "by forwards written anew",
    }
    counts = Counter(merge.edit for merge in plan.merges)
    how = [f"{counts[way]} {text}" for way, text in ways.items() if counts[way]]
    by = f" ({', '.join(how)})" if how else ""
    merges = Table(title=f"{plan.model}: {counted(len(plan.merges), 'merge')}{by}")
    for heading in ("where", "rule", "training time", "deploy", "multiply-adds per output pixel", "parameters"):
        merges.add_column(
            heading, justify="right" if heading in ("multiply-adds per output pixel", "parameters") else "left"
        )
    for merge in plan.merges:
        merges.add_row(
            merge.where,
            " + ".join(merge.rules),
            merge.before,
            merge.after,
            f"{merge.multiply_adds[0]:,.0f} -> {merge.multiply_adds[1]:,.0f}",
            f"{merge.parameters[0]:,} -> {merge.parameters[1]:,}",
        )
    yield merges
    told = [("(root)", "model", note) for note in plan.notes]
    told += [
        (merge.where, about, text)
        for merge in plan.merges
        for about, texts in (
            ("border", [merge.border]),
            ("sizes", [merge.sizes]),
            ("numbers", merge.notes),
            ("time", [" -> ".join(map(milliseconds, merge.seconds))] if merge.seconds else []),
        )
        for text in texts
        if text
    ]
    if told:
        notes = Table(title=counted(len(told), "note"))
        for heading in ("where", "about", "note"):
            notes.add_column(heading)
        for row in told:
            notes.add_row(*row)
        yield notes
    if plan.merges:
        sources = Table(title="sources")
        sources.add_column("rule")
        sources.add_column("source")
        for name, source in dict.fromkeys(
            pair for merge in plan.merges for pair in zip(merge.rules, merge.sources, strict=True)
        ):
            sources.add_row(name, source)
        yield sources
    if plan.refusals:
        refusals = Table(title=counted(len(plan.refusals), "refusal"))
        for heading in ("where", "rule", "what", "kind", "reason"):
            refusals.add_column(heading)
        for refusal in plan.refusals:
            refusals.add_row(refusal.where, refusal.rule, refusal.what, refusal.kind, refusal.reason)
        yield refusals
