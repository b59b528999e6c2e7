"""Merges, found: with additions in the order that merges most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from structrep.algebra import ConvMap
from structrep.errors import Refusal
from structrep.graph.calls import Trace
from structrep.graph.observed import Observed
from structrep.guard.other_forwards import Borders
from structrep.guard.ready import check_ready
from structrep.guard.sharing import Replicas
from structrep.match.findings import Findings
from structrep.match.merge import Merge, Missed
from structrep.match.search import Search
from structrep.modules.arguments import Example
from structrep.registry import Registry
from structrep.trace.follow import trace


def find(
    model: nn.Module,
    example_inputs: Example | None,
    registry: Registry,
    inexact_borders: Iterable[str] = (),
    probed: Mapping[str, ConvMap] | None = None,
    beforehand: Iterable[Missed] = (),
    blocks: tuple[str, ...] = (),
    observed: Observed | None = None,
    kept: Mapping[str, str] | None = None,
) -> Findings:
    """Trace the model and find all its merges; those of layers that `inexact_borders` names may differ at the border.

    Args:
        probed: layers by path that are taken to be those maps.
        beforehand: refusals that are there already.
        blocks: modules by path, inside each of which is all that may be merged; () for anywhere.
        observed: what the model was seen to give to its parts.
        kept: layers by path that stay as they are, and why.

    Raises:
        TrainingMode, Uninitialized, Sharded, BadInput: the model cannot be planned as it is.
    """
    check_ready(model)
    traced = trace(model, example_inputs, probed or {}, observed=observed)
    findings = Findings(traced, tuple(inexact_borders), tuple(beforehand), blocks, kept=kept or {})
    return _search(findings, registry)


def again(
    found: Findings,
    unwritable: Mapping[tuple[str, str], Refusal] | None = None,
    slower: Mapping[Merge, Refusal] | None = None,
) -> Findings:
    """What is found if some methods more, by path and name, are left as they are written, and some merges not done."""
    (registry, *_) = (search.registry for search in found.searches)
    left = {(merge.base, merge.root): reason for merge, reason in (slower or {}).items()}
    findings = Findings(
        found.traced,
        found.inexact_borders,
        found.beforehand,
        found.blocks,
        {**found.unwritable, **(unwritable or {})},
        {**found.slower, **left},
        found.kept,
    )
    return _search(findings, registry)


def _search(findings: Findings, registry: Registry) -> Findings:
    for path, reason in findings.traced.untraced.items():
        findings.missed.append(Missed(path or "(root)", "-", "left as it is", reason))
    for path, reason in findings.traced.assumed.items():
        findings.missed.append(Missed(path or "(root)", "-", "followed on one way alone", reason))
    for function, (path, reason) in findings.traced.unfollowed.items():
        findings.missed.append(Missed(path or "(root)", "-", f"{function.__name__}() as it is", reason))
    for one in findings.traced.traces:
        search, merges = _best_order(findings, one, registry)
        search.keep(merges)
        findings.searches.append(search)
    findings.missed += findings.beforehand
    findings.forget()
    return findings


def _best_order(findings: Findings, one: Trace, registry: Registry) -> tuple[Search, list[Merge]]:
    """The merges of a graph, and of sums in another order where more merges so."""

    def searched() -> tuple[Search, list[Merge]]:
        search = Search(findings, one, registry)
        return search, search.run()

    def anew() -> tuple[Search, list[Merge]]:
        findings.replicas, findings.borders = Replicas(findings.traced), Borders(findings.traced)
        return searched()

    def taken(merges: list[Merge]) -> int:
        return sum(len(merge.nodes) for merge in merges)

    search, merges = searched()
    undo = search.reorder(merges)
    if undo is None:
        return search, merges
    other, more = anew()
    if taken(more) > taken(merges):
        return other, more
    undo()
    return anew()
