"""Why two layers did not merge: what stands between them, which law forbids it, which rule came nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import networkx as nx
from torch import fx

from structrep.errors import BadInput, Refusal
from structrep.graph.facts import CALL, INDEX, VALUE
from structrep.match.findings import Findings
from structrep.match.isolation import named
from structrep.match.merge import Merge, Missed
from structrep.match.search import Search
from structrep.match.stretch import Stretch
from structrep.records.plan import Explanation, RefusalRecord
from structrep.terms.term import Term

NEAREST = 3  # families that are told


def why(findings: Findings, merges: Iterable[tuple[str, Merge]], first: str, second: str) -> Explanation:
    """What became of two layers, or parts of the model, given by their paths.

    Args:
        merges: those of the plan, with the paths that the merged layers will have.

    Raises:
        BadInput: the model has no module or parameter of that name.
    """
    for path in (first, second):
        _demand_module(findings, path)
    if f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
        raise BadInput(f"{first} and {second} are one, or hold one another: name two layers, beside each other")
    found = [(search, _nodes(search, first), _nodes(search, second)) for search in findings.searches]
    for where, merge in merges:
        inside = {*merge.nodes, *(node for one in merge.absorbed for node in one.nodes)}
        for _, ones, others in found:
            if inside.intersection(ones) and inside.intersection(others):
                what = f"they are merged, at {where}, by {' + '.join(merge.rules)}: {merge.term}"
                return Explanation(first=first, second=second, merged=where, answer=what)
    told = tuple(refusal(miss) for miss in findings.missed if _covers(miss, first) and _covers(miss, second))
    together = [(search, ones, others) for search, ones, others in found if ones and others]
    if not together:
        lost = [path for path in (first, second) if not any(_nodes(search, path) for search in findings.searches)]
        return Explanation(first=first, second=second, answer=_not_seen(findings, lost), refusals=told)
    answer, term = "", None
    for search, ones, others in together:
        answer, term = _between(search, ones, others)
    misses = {} if term is None else _nearest(findings, term)
    return Explanation(first=first, second=second, answer=answer, refusals=told, misses=misses)


def _nearest(findings: Findings, term: Term) -> dict[str, str]:
    """The families that a term is almost of, nearest first, and what keeps it from being so."""
    families = (rule for rule in findings.registry if not rule.law and rule.pattern.match(term) is None)
    misses = {rule.name: rule.pattern.miss(term) for rule in families}
    nearest = sorted(misses.items(), key=lambda one: one[1].parts)
    return {name: str(miss) for name, miss in nearest[:NEAREST]}


def _demand_module(findings: Findings, path: str) -> None:
    names = [name for name, _ in findings.traced.model.named_modules() if name]
    if path not in names:
        near = difflib.get_close_matches(path, names, 3)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise BadInput(f"the model has no module named {path!r}{hint}")


def _nodes(search: Search, path: str) -> list[fx.Node]:
    """The nodes that a module made, in order."""
    return [
        node
        for node in search.trace.nodes
        if CALL.of(node) is not None and f"{CALL.of(node).path}.".startswith(f"{path}.") and node.op != "get_attr"
    ]


def _covers(miss: Missed, path: str) -> bool:
    return any(f"{layer}.".startswith(f"{path}.") for layer in miss.layers)


def refusal(miss: Missed) -> RefusalRecord:
    """A refusal as a record."""
    return RefusalRecord(
        where=miss.where,
        rule=miss.rule,
        what=miss.what,
        kind=miss.reason.kind,
        reason=str(miss.reason),
        layers=miss.layers,
    )


def _not_seen(findings: Findings, lost: list[str]) -> str:
    if not lost:
        return "they are in parts of the model that were traced apart, for what holds both cannot be followed: " + (
            "; ".join(f"{path or 'the model'}: {reason}" for path, reason in findings.traced.untraced.items())
        )
    around = [
        f"{path or 'the model'}: {reason}"
        for path, reason in (findings.traced.untraced | findings.traced.assumed).items()
        if any(f"{one}.".startswith(f"{path}.") or not path for one in lost)
    ]
    what = f"{' and '.join(lost)} {'is' if len(lost) == 1 else 'are'} not called in the forward with its defaults"
    return f"{what}, or in a part that is left as it is: {'; '.join(around)}" if around else what


def _between(search: Search, ones: list[fx.Node], others: list[fx.Node]) -> tuple[str, Term | None]:
    """What keeps two parts of one graph apart, and the term that holds both, if there is one."""
    graph = nx.DiGraph((source, node) for node in search.trace.nodes for source in node.all_input_nodes)
    if INDEX.of(ones[0]) > INDEX.of(others[0]):
        ones, others = others, ones
    early, late = ones[-1], others[-1]
    if graph.has_node(early) and graph.has_node(late) and nx.has_path(graph, early, late):
        return _chain(search, graph, early, late)
    return _parallel(search, graph, early, late)


def _chain(search: Search, graph: nx.DiGraph, early: fx.Node, late: fx.Node) -> tuple[str, Term | None]:
    way = (nx.descendants(graph, early) & nx.ancestors(graph, late)) | {early, late}
    unread = _unread(search, way)
    if unread:
        return f"{_told(unread)} between them, which is no linear map that structrep reads", None
    stretch = search.segments.stretch(early, late)
    if stretch is None:
        return "what lies between them does not all come through one value, so it is no map of one input", None
    return _stretch(search, stretch)


def _parallel(search: Search, graph: nx.DiGraph, early: fx.Node, late: fx.Node) -> tuple[str, Term | None]:
    meeting = next(
        (node for node in search.trace.nodes if graph.has_node(node) and _reaches(graph, (early, late), node)), None
    )
    if meeting is None or meeting.op == "output":
        return "they are on paths that never meet: nothing adds or stacks what they give", None
    way = nx.ancestors(graph, meeting) & (nx.descendants(graph, early) | nx.descendants(graph, late) | {early, late})
    unread = _unread(search, way)
    if meeting not in search.readings:
        return f"their paths meet in {named(meeting)}, which neither adds nor stacks them", None
    if unread:
        return f"{_told(unread)} between them and {named(meeting)}, where their paths meet, and is no linear map", None
    segment = search.segments.segment(meeting)
    if segment is None or not {early, late} <= set(segment.nodes):
        return f"their paths meet in {named(meeting)}, but do not start from one value", None
    return _stretch(search, Stretch((segment,)))


def _unread(search: Search, way: set[fx.Node]) -> list[fx.Node]:
    """What of some nodes is no linear map, in order."""
    return [
        node for node in search.trace.nodes if node in way and node not in search.readings and not VALUE.known(node)
    ]


def _reaches(graph: nx.DiGraph, sources: Iterable[fx.Node], node: fx.Node) -> bool:
    return all(source is not node and nx.has_path(graph, source, node) for source in sources)


def _stretch(search: Search, stretch: Stretch) -> tuple[str, Term]:
    """What forbids a stretch to be one layer."""
    term, leak = stretch.term, stretch.leak()
    if leak is not None:
        users = sorted({named(user) for user in leak.users if user not in stretch.nodes})
        return f"{named(leak)} would vanish, but {' and '.join(users) or 'its module'} uses what it gives too", term
    try:
        search.demand(stretch)
    except Refusal as reason:
        return f"{term} is not merged ({reason.kind}): {reason}", term
    return f"{term} could be one layer, but a larger or cheaper merge takes a part of it", term


def _told(nodes: list[fx.Node]) -> str:
    names = list(dict.fromkeys(named(node) for node in nodes))
    return f"{', '.join(names[:4])}{' and more' * (len(names) > 4)} stand{'s' * (len(names) == 1)}"
