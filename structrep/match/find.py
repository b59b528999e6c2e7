"""Merges, found: with additions in the order that merges most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from structrep.algebra import ConvMap
from structrep.errors import Refusal
from structrep.graph.calls import Trace
from structrep.graph.observed import Observed
from structrep.graph.operations import rearrangers
from structrep.match.findings import Findings
from structrep.match.gradients import settle_gradients
from structrep.match.merge import Merge, Missed
from structrep.match.search import Search, search
from structrep.match.sum_order import order
from structrep.modules.arguments import Example
from structrep.registry import Registry
from structrep.trace.follow import trace


def find(
    model: nn.Module,
    example_inputs: Example | None,
    registry: Registry,
    *,
    inexact_borders: Iterable[str] = (),
    probed: Mapping[str, ConvMap] | None = None,
    beforehand: Iterable[Missed] = (),
    blocks: tuple[str, ...] = (),
    observed: Observed | None = None,
    excluded: Mapping[str, str] | None = None,
) -> Findings:
    """Trace the model and find all its merges; those of layers that `inexact_borders` names may differ at the border.

    Args:
        model: is ready (`guard.ready`).
        probed: layers by path that are taken to be those maps.
        beforehand: refusals that are there already.
        blocks: modules by path, inside each of which is all that may be merged; () for anywhere.
        observed: what the model was seen to give to its parts.
        excluded: layers by path that stay as they are, and why.

    Raises:
        BadInput: the model cannot be planned as it is.
    """
    traced = trace(model, example_inputs, probed or {}, observed=observed)
    settle_gradients(traced)
    borders, refused = tuple(inexact_borders), tuple(beforehand)
    return _search(Findings(traced, registry, borders, refused, blocks, excluded=excluded or {}))


def again(
    found: Findings,
    unwritable: Mapping[tuple[str, str], Refusal] | None = None,
    slower: Mapping[Merge, Refusal] | None = None,
) -> Findings:
    """What is found if some methods more, by path and name, are left as they are written, and some merges not done."""
    left = {(merge.base, merge.root): reason for merge, reason in (slower or {}).items()}
    findings = Findings(
        found.traced,
        found.registry,
        found.inexact_borders,
        found.beforehand,
        found.blocks,
        {**found.unwritable, **(unwritable or {})},
        {**found.slower, **left},
        found.excluded,
        found.followed,
    )
    return _search(findings)


def _search(findings: Findings) -> Findings:
    for path, reason in findings.traced.untraced.items():
        findings.missed.append(Missed(path or "(root)", "-", "left as it is", reason))
    for path, reason in findings.traced.assumed.items():
        findings.missed.append(Missed(path or "(root)", "-", "followed on one way alone", reason))
    for function, (path, reason) in findings.traced.unfollowed.items():
        if function in rearrangers():
            continue
        findings.missed.append(Missed(path or "(root)", "-", f"{function.__name__}() as it is", reason))
    for one in findings.traced.traces:
        found = _best_order(findings, one)
        findings.searches.append(found)
        findings.merges += found.merges
        findings.missed += found.refused()
    findings.missed += findings.beforehand
    return findings


def _best_order(findings: Findings, one: Trace) -> Search:
    """The search of a graph, with sums in another order where more merges so."""

    def taken(found: Search) -> int:
        return sum(len(merge.nodes) for merge in found.merges)

    first = search(findings, one)
    better = order(one, first.merged, first.merges_sum)
    if better is None:
        return first
    undo = better.take()
    findings.look_again()
    other = search(findings, one)
    if taken(other) > taken(first):
        return other
    undo()
    findings.look_again()
    return search(findings, one)
