"""All merges and refusals for one model, before anything is changed.

For every graph: read each node; find, for each, the nodes that all its linear paths come through (its dominators, by
networkx); the expression between two of them is a term. Families are tried first and may be taken up in turn by a law
that merges more (a norm after the sum of a RepVGG block). A merge is done only if nothing else uses what vanishes,
if it is not dearer than what it replaces, and if the algebra finds it exact.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import networkx as nx
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from structrep import sums
from structrep.absorb import Absorption, absorptions
from structrep.algebra import ConvMap, Ints, Rigour
from structrep.beside import isolation
from structrep.borders import Borders
from structrep.callers import Callers
from structrep.errors import (
    BadInput,
    Costlier,
    Hooked,
    Incompatible,
    Inexact,
    Isolated,
    Mutated,
    Overflow,
    Refusal,
    Sharded,
    Shared,
    TrainingMode,
    Uninitialized,
    Unreadable,
)
from structrep.graph.aliases import aliases, writers
from structrep.graph.calls import Call, Trace, Traced
from structrep.graph.contexts import Context
from structrep.graph.observed import Observed
from structrep.graph.queries import asks_kind, asks_shape, asserts_rank, counts_sizes, only_asserted
from structrep.graph.shapes import channels, spatial_size, torch_name
from structrep.modules.arguments import Example
from structrep.modules.mentions import questions
from structrep.modules.parametrized import about_hooks, hooks
from structrep.modules.source import names_reached
from structrep.modules.wrappers import stands_in
from structrep.read.endings import read_ending
from structrep.read.lower import remedy
from structrep.read.nodes import read_node
from structrep.registry import Registry, Rule
from structrep.terms import cost
from structrep.terms.cost import Cost
from structrep.terms.layer import Layer, Reading, Same, Stack, Total
from structrep.terms.term import ONE, Term, geometry, leaf, seq, signed, stack, total
from structrep.terms.value import sized, value
from structrep.trace.follow import trace

FARTHEST = 32  # how many dominators back a merge may reach
LONGEST, DEEPEST = 64, 8  # how many steps a branch of a sum may have, and sums inside each other
KEPT = 2**25  # bytes of merged maps that are held until they are placed, if that is done at once


@dataclass(frozen=True, eq=False)
class Segment:
    """The stretch from one node to the nearest that all its linear paths come through."""

    base: fx.Node
    root: fx.Node
    term: Term
    nodes: tuple[fx.Node, ...]  # all between, root included, base not
    absorbed: tuple[Absorption, ...] = ()  # scales that the term does a part of


@dataclass(frozen=True)
class Fit:
    """How a merged map fits into a layer of the dtype that it will have."""

    costs: tuple[Cost, Cost]  # before and after, but for what the border takes
    rigour: Rigour
    remedy: str  # what a layer of its own does for the border
    largest: tuple[float, float]  # largest coefficient of a kernel before, of any after
    notes: tuple[str, ...]  # what is to be told of the numbers


@dataclass(frozen=True, eq=False)
class Carried:
    """A value whose channels widened layers take behind their own, until the last of them adds it."""

    base: fx.Node
    sum: fx.Node  # the addition that goes
    through: tuple[fx.Node, ...]  # what makes the value one that activations leave as it is


@dataclass(eq=False)
class Merge:
    """A stretch of the graph that becomes one layer."""

    rules: tuple[str, ...]
    sources: tuple[str, ...]
    term: Term
    segments: tuple[Segment, ...]  # from base to root
    owner: Call  # the innermost call that holds all of it
    trace: Trace
    fit: Fit
    carried: Carried | None = None
    kept: ConvMap | None = None  # its value, until that is placed

    @property
    def base(self) -> fx.Node:
        return self.segments[0].base

    @property
    def root(self) -> fx.Node:
        return self.segments[-1].root

    @property
    def nodes(self) -> list[fx.Node]:
        return _nodes(self.segments)

    @property
    def absorbed(self) -> set[Absorption]:
        """Scales that this merge does a part of; all merges that do the rest stand and fall with it."""
        return {one for segment in self.segments for one in segment.absorbed}

    @property
    def reordered(self) -> set[sums.Reordered]:
        """The sums in another order that it adds up some of."""
        return {one for one in map(sums.reordered, self.nodes) if one is not None}

    @property
    def shared(self) -> set[object]:
        """What it has in common with others, with all of which it stands and falls: scales that it does a part of, sums
        in another order, a residual that is carried."""
        return {*self.absorbed, *self.reordered, *([] if self.carried is None else [self.carried])}

    def value(self) -> ConvMap:
        """The merged map; read from the weights as they are now, if it was not kept."""
        return self.kept or value(self.term, rigour=self.fit.rigour)

    @property
    def sizes(self) -> tuple[Ints, Ints] | None:
        """A spatial size of the input that it holds for, and by what another may differ; None if it holds for all."""
        holds = sized(self.term)
        if holds == "any":
            return None
        size: Ints = self.base.meta["shape"][2:]
        return size, tuple(step if holds == "period" else 0 for step in geometry(self.term).stride)


def together(merges: Sequence[Merge]) -> list[list[Merge]]:
    """Merges by what they share: each group can be done, or left, whatever becomes of the others."""
    graph = nx.Graph()
    graph.add_nodes_from(merges)
    graph.add_edges_from((merge, one) for merge in merges for one in merge.shared)
    groups = list(nx.connected_components(graph))
    return [[merge for merge in merges if merge in group] for group in groups]


@dataclass(eq=False)
class Missed:
    """A refusal, with its place."""

    where: str
    rule: str
    what: str
    reason: Refusal
    layers: tuple[str, ...] = ()  # paths of the layers that it is about
    of: Merge | None = None  # what was planned first


@dataclass(eq=False)
class Findings:
    """What planning a traced model gave."""

    traced: Traced
    inexact_borders: tuple[str, ...] = ()  # globs: merges that touch such a layer may differ at the border
    beforehand: tuple[Missed, ...] = ()  # refusals from before the search
    blocks: tuple[str, ...] = ()  # modules by path, inside each of which is all that may be merged; () for anywhere
    unwritable: Mapping[tuple[str, str], Refusal] = field(default_factory=dict)  # methods that cannot be written anew
    slower: Mapping[tuple[fx.Node, fx.Node], Refusal] = field(default_factory=dict)  # stretches, by base and root
    kept: Mapping[str, str] = field(default_factory=dict)  # layers by path that stay as they are, and why
    merges: list[Merge] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)
    replicas: Replicas = field(init=False)
    borders: Borders = field(init=False)
    callers: Callers = field(init=False)

    def __post_init__(self) -> None:
        self.replicas, self.borders = Replicas(self.traced), Borders(self.traced)
        self.callers = Callers(self.traced)
        self.adapted = bool(self.kept) or any(map(stands_in, self.traced.model.modules()))
        self.forget()

    def hold(self, stretch: Sequence[Segment], map_: ConvMap) -> None:
        """Keep a stretch's map at hand, in the place of an earlier one, while there is room."""
        ends = stretch[0].base, stretch[-1].root
        if (old := self.made.pop(ends, None)) is not None:
            self.room += old.kernel.nbytes
        if map_.kernel.nbytes <= self.room:
            self.made[ends] = map_
            self.room -= map_.kernel.nbytes

    def forget(self) -> None:
        """Hold no map any more."""
        self.made: dict[tuple[fx.Node, fx.Node], ConvMap] = {}  # of stretches, by base and root
        self.room = KEPT


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


def check_ready(model: nn.Module) -> None:
    """Raise unless norms have fixed statistics and all parameters have values, here.

    Raises:
        BadInput: a module is its own descendant.
        TrainingMode, Uninitialized, Sharded: norms or parameters are not ready.
    """
    try:
        _check_tree(model, "", ())
        list(model.modules())
    except TypeError as error:
        raise BadInput(
            f"the parts of {type(model).__name__} cannot be told apart ({error}): torch's own modules() does not run "
            f"either. A class that has an __eq__ needs a __hash__ too: __hash__ = nn.Module.__hash__"
        ) from error
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
            raise TrainingMode(
                f"{path or 'the model'} ({type(module).__name__}) is in training mode, so it has no fixed scale: "
                f"call model.eval() first{_counted(path, module)}"
            )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and hasattr(tensor, "full_tensor"):
                raise Sharded(
                    f"{path + '.' if path else ''}{name} is a {type(tensor).__name__} of shape {tuple(tensor.shape)}, "
                    f"spread over processes: load the full state dict into an unsharded model, and reparameterize that"
                )
            if tensor is not None and tensor.is_meta:
                raise Uninitialized(
                    f"{path + '.' if path else ''}{name} of {type(module).__name__} is on the meta device, which holds "
                    f"no values: load the weights first"
                )
            if tensor is not None and nn.parameter.is_lazy(tensor):
                raise Uninitialized(
                    f"{path + '.' if path else ''}{name} of {type(module).__name__} has no shape yet: "
                    f"run the model once on a batch, then try again"
                )


def _counted(path: str, norm: nn.Module) -> str:
    """What the counter of a norm in training mode says of its statistics."""
    count = norm._buffers.get("num_batches_tracked")
    if count is None or count.is_meta or hasattr(count, "full_tensor") or not int(count):
        return ""
    return (
        f". Every forward in this mode changes the statistics, and {path + '.' if path else ''}num_batches_tracked has "
        f"counted {int(count):,}: if these were not all of its training (a converted model counts from 0), load or "
        f"convert the weights anew"
    )


def _check_tree(module: nn.Module, path: str, around: tuple[nn.Module, ...]) -> None:
    if module in around:
        raise BadInput(
            f"{path} is a module that holds it, so the model has no end, and torch's own eval(), to() and state_dict() "
            f"do not return: keep such a reference out of the modules, self.__dict__['{path.rpartition('.')[2]}'] = ..."
        )
    for name, child in module._modules.items():
        if child is not None and (child in around or child._modules):
            _check_tree(child, f"{path}.{name}" if path else name, (*around, module))


class Search:
    """The merges of one graph."""

    def __init__(self, findings: Findings, trace_: Trace, registry: Registry) -> None:
        self.findings = findings
        self.traced = findings.traced
        self.trace = trace_
        self.registry = registry
        self.nodes = trace_.nodes
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.replicas = findings.replicas
        self.memory: dict[fx.Node, tuple[set[fx.Node], set[fx.Node]]] = {}
        self.refused: set[tuple[fx.Node, str]] = set()
        self.missed: list[tuple[fx.Node, Missed]] = []
        self.readings = self._read()
        self.absorptions: list[Absorption] = []
        for found in absorptions(self.readings, self._endings()) if not findings.blocks else ():
            if isinstance(found, Absorption):
                self.absorptions.append(found)
            else:
                self._miss([found[0]], "fold_prenorm", "norm -> several", found[1])
        self.known = tuple(self.missed)

    def run(self) -> list[Merge]:
        """Search; again without the scales that were not absorbed by all that they were given to."""
        while True:
            merges = self._merges()
            merged = {node for merge in merges for node in merge.nodes}
            left = [one for one in self.absorptions if not one.takers <= merged]
            if not left:
                break
            self.absorptions = [one for one in self.absorptions if one not in left]
            for one in left:
                kept = next((miss for node, miss in self.missed if node in one.takers - merged), None)
                if kept is not None:
                    told = replace(
                        kept, where=path_of(one.node) or "(root)", layers=(*kept.layers, _layer_of(one.node))
                    )
                    self.known += ((one.node, told),)
        return merges

    def keep(self, merges: list[Merge]) -> None:
        """What was found is what is to be done."""
        self.findings.merges += merges
        merged = {node for merge in merges for node in merge.nodes}
        lone = {node.meta["call"].module for merge in merges if _lone(merge.nodes) for node in merge.nodes}
        again = {n for n in self.nodes if n.op == "call_module" and n.meta["call"].module in lone}
        covered = merged.union(again, *(one.nodes for one in self.absorptions))
        self._isolated(covered)
        self.findings.missed += [miss for node, miss in self.missed if node not in covered or self._matters(miss)]

    def reorder(self, merges: list[Merge]) -> Callable[[], None] | None:
        """Put sums of which a part would merge into an order in which it does; what undoes it, if there were any."""
        return sums.reorder(self.trace, {node for merge in merges for node in merge.nodes}, self._adds)

    def _adds(self, addends: Sequence[fx.Node], additions: Sequence[fx.Node]) -> bool:
        """Whether some addends of a sum would merge; `additions` are its own, the last of which is the sum."""
        root = additions[-1]
        if len(self.replicas.bodies(root.meta["call"])) > 1:
            return False  # all calls of a forward have to do the same
        above = [{one: None, **dict.fromkeys(step.base for step in self.walk(one, None))} for one in addends]
        base = next((node for node in above[0] if all(node in other for other in above)), None)
        if base is None:
            return False
        found = self._branches([(one, 1.0) for one in addends], base)
        if found is None:
            return False
        nodes, branches = found
        whole = Segment(base, root, total(branches, root, spatial_size(base)), (*nodes, *additions))
        if any(layer.kind == "view" for layer in whole.term.leaves()) or self.leak([whole]) is not None:
            return False
        try:
            self._price([whole])
            value(whole.term)
        except Refusal:
            return False
        return True

    def _merges(self) -> list[Merge]:
        self.missed, self.refused = list(self.known), {(node, miss.rule) for node, miss in self.known}
        self.absorbed = {one.node: one for one in self.absorptions if not one.ends}
        self.taker_of: dict[fx.Node, list[Absorption]] = {}
        for one in self.absorptions:
            for taker in one.takers:
                self.taker_of.setdefault(taker, []).append(one)
        self.dominator = self._dominators()
        self.segments: dict[fx.Node, Segment | None] = {}
        for node in self.nodes:
            self.segment(node)  # in order, so that each finds those before it: a chain of sums may be long
        self.findings.forget()  # what a first search made may be other maps
        self.terms: dict[tuple[Segment, Segment], Term] = {}
        self.ending: dict[fx.Node, list[list[Segment]]] = {}
        self.families: dict[fx.Node, tuple[Rule, list[Segment], Fit]] = {}  # root of what a family merges
        families = [rule for rule in self.registry if not rule.law]
        laws = [rule for rule in self.registry if rule.law]
        given = set[fx.Node]().union(*(one.nodes for one in self.absorptions))  # to others, with all that it is made of
        taken = set(given)
        for node in reversed(self.nodes):
            if node not in taken:
                found = self._family(node, families)
                if found:
                    self.families[node] = found
                    taken.update(n for segment in found[1] for n in segment.nodes)
        taken = set(given)
        merges: list[Merge] = []
        for node in reversed(self.nodes):
            if node not in taken:
                merge = self._law(node, laws) or self._settle(node)
                if merge:
                    merges.append(merge)
                    taken.update(merge.nodes)
        return merges[::-1]

    # --- the graph as terms -----------------------------------------------------------------------

    def _read(self) -> dict[fx.Node, Reading]:
        readings: dict[fx.Node, Reading] = {}
        for node in self.nodes:
            if "value" in node.meta or node.meta["autocast"] or self.replicas.repeats(node):
                continue
            try:
                reading = read_node(node)
            except Unreadable as reason:
                self._miss([node], "-", str(node.meta["call"].path), reason)
                continue
            if reading is not None:
                readings[node] = reading
            elif node.op == "call_module" and hooks(node.meta["call"].module):
                self._miss([node], "-", "layer with a hook", Hooked(about_hooks(node.meta["call"].module)))
        return readings

    def _endings(self) -> dict[fx.Node, Layer]:
        """The scales that norms of each value end with; one that is a map as a whole is no such norm."""
        found = {
            node: read_ending(node)
            for node in self.nodes
            if not ("value" in node.meta or node in self.readings)
            and not node.meta["autocast"]
            and not self.replicas.repeats(node)
        }
        return {node: scale for node, scale in found.items() if scale is not None}

    def _dominators(self) -> dict[fx.Node, fx.Node | None]:
        """For every node that can be read, the nearest node that all its linear paths come through."""
        start = object()
        graph: nx.DiGraph = nx.DiGraph()
        for node in self.nodes:
            inputs = _inputs(self._reading(node))
            graph.add_edges_from((source, node) for source in inputs or (start,))
        found = nx.immediate_dominators(graph, start) if start in graph else {}
        return {
            node: None if found[node] is start else found[node]
            for node in self.nodes
            if node in self.readings and node in found
        }

    def _reading(self, node: fx.Node) -> Reading | None:
        """What a node is; a scale that others have absorbed is nothing any more, and what was read by way of it, no
        more what it was."""
        if node in self.absorbed:
            return Same(self.absorbed[node].source)
        reading = self.readings.get(node)
        made = reading.through if isinstance(reading, (Layer, Total)) else ()
        return None if any(part in self.absorbed for part in made) else reading

    def segment(self, root: fx.Node) -> Segment | None:
        if root not in self.segments:
            self.segments[root] = self._build(root)
        return self.segments[root]

    def _build(self, root: fx.Node) -> Segment | None:
        reading, base = self._reading(root), self.dominator.get(root)
        if reading is None or base is None:
            return None
        if isinstance(reading, Layer):
            taken = tuple(self.taker_of.get(root, ()))
            term = seq([*(leaf(one.before[root]) for one in taken if root in one.before), leaf(reading)])
            for one in taken:
                if root in one.behind:
                    term = seq([term, leaf(one.behind[root])])
                elif root in one.beside:
                    term = total([term, one.beside[root]])
            return Segment(base, root, term, (*reading.through, root), taken)
        if isinstance(reading, Same):
            return Segment(base, root, ONE, (root,))
        parts = [(n, 1.0) for n in reading.parts] if isinstance(reading, Stack) else reading.parts
        found = self._branches(parts, base)
        if found is None:
            return None
        nodes, branches = found
        if any(layer.kind == "view" for branch in branches for layer in branch.leaves()):
            return None  # views stay where they are, and so must what they are views of
        if any(torch_name(node) == "detach" for node in nodes):
            return None  # one branch has no gradient
        if isinstance(reading, Total):
            nodes.update(dict.fromkeys(reading.through))
        size = spatial_size(base)
        term = stack(branches, root, reading.dim, size) if isinstance(reading, Stack) else total(branches, root, size)
        ordered = sorted(nodes, key=self.place.__getitem__)
        absorbed = dict.fromkeys(one for node in ordered for one in self.taker_of.get(node, ()))
        return Segment(base, root, term, (*ordered, root), tuple(absorbed))

    def _branches(
        self, parts: Iterable[tuple[fx.Node, float]], base: fx.Node
    ) -> tuple[dict[fx.Node, None], list[Term]] | None:
        """Between a value and others made of it: the nodes, and a term for each, times a number; None if there is
        too much."""
        nodes: dict[fx.Node, None] = {}
        branches = []
        for source, sign in parts:
            steps = list(itertools.islice(self.walk(source, base), LONGEST + 1))
            if len(steps) > LONGEST or any(step.term.depth >= DEEPEST for step in steps):
                return None
            nodes.update(dict.fromkeys(n for step in steps for n in step.nodes))
            branches.append(signed(seq([step.term for step in reversed(steps)]), sign))
        return nodes, branches

    def walk(self, node: fx.Node, base: fx.Node | None) -> Iterator[Segment]:
        """Segments from a node back to `base`, or as far as they go."""
        while node is not base:
            segment = self.segment(node)
            if segment is None:
                return
            yield segment
            node = segment.base

    # --- matching ---------------------------------------------------------------------------------

    def term(self, stretch: Sequence[Segment]) -> Term:
        ends = stretch[0], stretch[-1]
        if ends not in self.terms:
            self.terms[ends] = seq([segment.term for segment in stretch])
        return self.terms[ends]

    def _stretches(self, root: fx.Node) -> list[list[Segment]]:
        """Stretches that end at root and could vanish into one layer, shortest first; each from base to root."""
        if root not in self.ending:
            self.ending[root] = self._find_stretches(root)
        return self.ending[root]

    def _find_stretches(self, root: fx.Node) -> list[list[Segment]]:
        stretches: list[list[Segment]] = []
        reading = self._reading(root)
        if isinstance(reading, Same) or (isinstance(reading, Layer) and reading.kind == "pad"):
            return stretches  # what feeds it ends a stretch just as well; a pad belongs to what reads it
        taken: list[Segment] = []
        for segment in self.walk(root, None):
            taken.insert(0, segment)
            first = segment.term.layer
            cut = first is not None and first.kind == "slice"  # a layer of all channels costs more than one of some
            if segment.term.op != "one" and not cut and self._in_one_block(taken) and self.leak(taken) is None:
                stretches.append(list(taken))
            if len(taken) == FARTHEST:
                break
        return stretches

    def _in_one_block(self, stretch: list[Segment]) -> bool:
        """Whether a stretch is where it may be merged."""
        blocks = self.findings.blocks
        if not blocks:
            return True
        paths = {next((c.path for c in n.meta["call"].chain() if c.path in blocks), None) for n in _nodes(stretch)}
        return len(paths) == 1 and None not in paths

    def leak(self, stretch: list[Segment]) -> fx.Node | None:
        """A node that would vanish but is used elsewhere."""
        inside = set(_nodes(stretch))
        for index, segment in enumerate(stretch):
            for node in segment.nodes:
                users = [user for user in node.users if user not in inside and not _vanishes(user, inside)]
                if node is stretch[-1].root:
                    continue
                if node.meta.get("kept"):
                    return node
                # Before the merged layer stands its input, behind it its output: their shapes may be those asked for.
                shape_stays = all(map(_keeps_shape, stretch[: index + 1])) or all(
                    map(_keeps_shape, stretch[index + 1 :])
                )
                asked = all(asks_shape(user) or only_asserted(user) for user in users)
                if users and not (len(segment.nodes) == 1 and shape_stays and asked):
                    return node
        return None

    def _family(self, root: fx.Node, families: list[Rule]) -> tuple[Rule, list[Segment], Fit] | None:
        if self._is_addend(root):
            return None
        stretches = self._stretches(root)
        for rule in families:
            for stretch in reversed(stretches):
                try:
                    found = rule.match(self.term(stretch))
                    if found is None:
                        continue
                    self.check(stretch)
                    costs = self._price(stretch)
                    fit = self.fit(rule.merged(self.term(stretch), found), stretch, costs)
                except Refusal as reason:
                    self._miss(_nodes(stretch), rule.name, str(self.term(stretch)), reason)
                    continue
                return rule, stretch, fit
        return None

    def _is_addend(self, node: fx.Node) -> bool:
        """Whether a sum is only a partial one: a family is judged by all branches of its block."""
        pending = list(node.users) if isinstance(self._reading(node), Total) else []
        while pending:
            user = pending.pop()
            reading = self._reading(user)
            if isinstance(reading, Same):
                pending += user.users
            elif isinstance(reading, Total) and self.dominator.get(user) is self.dominator.get(node):
                return True
        return False

    def _law(self, root: fx.Node, laws: list[Rule]) -> Merge | None:
        """The best exact merge that ends at root, by saving."""
        choices: list[tuple[float, int, Rule, list[Segment], tuple[Cost, Cost]]] = []
        for stretch in self._stretches(root):
            if not self._whole_families(stretch):
                continue
            term = self.term(stretch)
            rule = next((law for law in laws if _says_something(term) and law.pattern.match(term) is not None), None)
            if rule is None:
                continue
            try:
                self.check(stretch)
                before, after = self._price(stretch)
            except Refusal as reason:
                self._miss(_nodes(stretch), rule.name, str(term), reason)
                continue
            saved = before.multiply_adds - after.multiply_adds
            choices.append((saved, len(choices), rule, stretch, (before, after)))
        for _, _, rule, stretch, costs in sorted(choices, key=lambda choice: choice[:2], reverse=True):
            try:
                fit = self._law_fit(stretch, costs)
            except Refusal as reason:
                self._miss(_nodes(stretch), rule.name, str(self.term(stretch)), reason)
                continue
            return self._merge(stretch, fit, rule)
        return None

    def _law_fit(self, stretch: list[Segment], costs: tuple[Cost, Cost]) -> Fit:
        """How a stretch's value fits; where its border forbids one plain layer, with the remedy that helps.

        Raises:
            Refusal: it does not, whatever is done about the border.
        """
        _, family, fit = self.families.get(stretch[-1].root, (None, [], None))
        if fit is not None and len(family) == len(stretch):
            return fit  # a family merges the same
        term = self.term(stretch)
        forbidden: Inexact | None = None
        for rigour in self._rigours(stretch):
            try:
                return self.fit(value(term, rigour=rigour), stretch, costs, rigour)
            except Inexact as reason:
                forbidden = forbidden or reason
        assert forbidden is not None
        raise forbidden

    def _rigours(self, stretch: list[Segment]) -> Iterator[Rigour]:
        """How a border may be treated, best first."""
        yield "exact"
        if len(stretch) > 1 and _has_kernel(stretch[0]):
            yield "padded"  # what a border takes is a pass over the input, and has to save a convolution
        paths = {path for node in _nodes(stretch) for path in (path_of(node),) if path}
        if any(fnmatch.fnmatchcase(path, glob) for path in paths for glob in self.findings.inexact_borders):
            yield "inside"

    def _matters(self, miss: Missed) -> bool:
        """Whether a refusal is worth telling where a smaller merge was done: a family's, for more than the price."""
        law = miss.rule in self.registry and self.registry[miss.rule].law
        return not law and miss.rule != "-" and not isinstance(miss.reason, Costlier)

    def _whole_families(self, stretch: list[Segment]) -> bool:
        """Whether a stretch cuts through nothing that a family merges."""
        inside = set(_nodes(stretch))
        return all(inside.issuperset(s.nodes) for n in inside if n in self.families for s in self.families[n][1])

    def _settle(self, root: fx.Node) -> Merge | None:
        """What a family merges and no law took further."""
        if root not in self.families:
            return None
        _, stretch, fit = self.families[root]
        return self._merge(stretch, fit)

    def _merge(self, stretch: list[Segment], fit: Fit, law: Rule | None = None) -> Merge:
        inside = set(_nodes(stretch))
        families = [self.families[node][:2] for node in reversed(_nodes(stretch)) if node in self.families]
        named = list(dict.fromkeys(rule for rule, _ in families))
        if law and not any(len(part) == len(stretch) for _, part in families):
            named.append(law)
        return Merge(
            tuple(rule.name for rule in named),
            tuple(rule.source for rule in named),
            self.term(stretch),
            tuple(stretch),
            self.owner(inside | _scales(stretch)),
            self.trace,
            fit,
            kept=self.findings.made.get((stretch[0].base, stretch[-1].root)),
        )

    # --- conditions -------------------------------------------------------------------------------

    def _price(self, stretch: list[Segment]) -> tuple[Cost, Cost]:
        """Cost before and after.

        Raises:
            Costlier: more multiply-adds or more stored numbers after than before.
        """
        term = self.term(stretch)
        if not any(layer.weight is not None for layer in term.leaves()):
            raise Costlier(f"{term} holds no convolution or Linear: as one it would take more work than it does")
        if sized(term) != "any":
            if self.trace.root.module is not self.traced.model:
                raise Shared(
                    f"{term} holds for inputs of some sizes only, and code that cannot be followed calls "
                    f"{self.trace.path}: it may give it others"
                )
            if not any(segment.term.op in ("sum", "concat") for segment in stretch):
                raise Costlier(f"{term} would hold for inputs of some sizes only, and spares no branch")
            for call in stretch[-1].root.meta["call"].chain():
                if len(self.traced.calls[call.module, call.method]) > 1:
                    raise Shared(
                        f"{call.path} is called more than once, and {term} holds for inputs of some sizes only"
                    )
        before, after = cost.of_term(term), cost.of_map(geometry(term), any(layer.shifts for layer in term.leaves()))
        if after.multiply_adds > before.multiply_adds:
            raise Costlier(
                f"{term} takes {before.multiply_adds:,.0f} multiply-adds per output pixel, as one layer it would take "
                f"{after.multiply_adds:,.0f}"
            )
        if after.parameters > before.parameters + geometry(term).out_channels:  # a bias more is no reason
            raise Costlier(
                f"{term} stores {before.parameters:,} numbers, as one layer it would store {after.parameters:,}"
            )
        return before, after

    def fit(
        self,
        map_: ConvMap,
        stretch: list[Segment],
        costs: tuple[Cost, Cost],
        rigour: Rigour = "exact",
        at_any_price: bool = False,
    ) -> Fit:
        """How the merged map fits into a layer.

        Raises:
            Overflow: a coefficient does not fit the dtype of the layers it replaces.
            Unreadable: no layer pads so.
            Costlier: what stays a layer of its own for the border takes what the merge would save.
        """
        leaves = [layer for segment in stretch for layer in segment.term.leaves()]
        kernels = [layer.weight for layer in leaves if layer.weight is not None]
        dtype = kernels[0].dtype
        if dtype.itemsize == 1:  # torch itself has no layer that runs in it
            raise Overflow(
                f"a merged kernel would be rounded to {str(dtype).removeprefix('torch.')}, which keeps "
                f"{1 - round(math.log2(torch.finfo(dtype).eps))} bits: cast the model to float32 or bfloat16 first"
            )
        if map_.magnitude > torch.finfo(dtype).max:
            raise Overflow(
                f"a merged coefficient of {map_.magnitude:.3g} does not fit {str(dtype).removeprefix('torch.')}, whose "
                f"largest value is {torch.finfo(dtype).max:.3g}: reparameterize the model in float32, or use bfloat16"
            )
        apart = remedy(map_)
        before, after = costs
        if apart or (map_.border != "constant" and self.term(stretch).op != "leaf"):  # which has it already
            after += cost.of_border(map_)
        saved = before.multiply_adds - after.multiply_adds + before.parameters - after.parameters
        if not at_any_price and (saved < 0 or (not saved and before.operations <= after.operations)):
            term = self.term(stretch)
            border = apart or ("a copy of pixels" if map_.border != "constant" else "")
            raise Costlier(
                f"{term} saves nothing" + (f": what its border takes, {border}, would stay" if border else "")
            )
        largest = max(float(kernel.detach().abs().max()) for kernel in kernels), map_.magnitude
        self.findings.hold(stretch, map_)
        return Fit(costs, rigour, apart, largest, tuple(_notes(map_, leaves, dtype)))

    def stretch(self, early: fx.Node, late: fx.Node) -> list[Segment] | None:
        """The shortest stretch that ends at one node and holds another; None if none does."""
        taken: list[Segment] = []
        for segment in self.walk(late, None):
            taken.insert(0, segment)
            if early in segment.nodes:
                return taken
        return None

    def demand(self, stretch: list[Segment]) -> None:
        """Raise whatever keeps a stretch from being merged by a law.

        Raises:
            Refusal: it is not exact, dearer, or cannot be cut out.
        """
        self.check(stretch)
        self._law_fit(stretch, self._price(stretch))

    def check(self, stretch: list[Segment]) -> None:
        """Raise unless the stretch can be cut out of the graph and of the modules that it is written in."""
        base, root = stretch[0].base, stretch[-1].root
        if (base, root) in self.findings.slower:
            raise self.findings.slower[base, root]
        inside = set(_nodes(stretch))
        same, writing = self._memory(base)
        for writer in writing:
            at = self.place[writer]
            readers = (user for alias in same for user in alias.users)
            if writer in inside and any(self.place[other] > at for other in readers if other not in inside):
                raise Mutated(f"{writer.name} overwrites the input of the merge, which is read again later")
            if writer in inside and any(alias.op == "placeholder" for alias in same):
                raise Mutated(f"{writer.name} writes to what the model is given, which its caller may look at again")
            if writer not in inside and at < self.place[root] and any(self.place[n] < at for n in inside):
                raise Mutated(f"{writer.name} overwrites the input of the merge before the merged layer would read it")
        given = channels(base)
        if given is not None and any(layer.dims for segment in stretch for layer in segment.term.leaves()):
            wanted = geometry(self.term(stretch)).in_channels
            if given != wanted:
                raise Incompatible(
                    f"a value of {given} channels is spread over {wanted} by a scale, and no layer does so"
                )
        changed = {n for n in inside if not isinstance(self._reading(n), Same)} | _scales(stretch)
        _check_contexts(changed)
        for where in _written_in(changed):
            if where in self.findings.unwritable:
                raise Unreadable(str(self.findings.unwritable[where]))
            if (doubt := self.findings.callers.doubt(*where)) is not None:
                raise Unreadable(doubt)
        owner = self.owner(inside | _scales(stretch))
        self._check_adapters(changed, inside)
        self.replicas.check(changed, owner)
        self.findings.borders.check(inside, root, owner)
        for one in {one for segment in stretch for one in segment.absorbed}:
            self.findings.borders.check(one.changed, None, owner)

    def _check_adapters(self, changed: set[fx.Node], inside: set[fx.Node]) -> None:
        """Raise if a layer with adapters would be merged in part: its own `merge` would do that part again."""
        if not self.findings.adapted:
            return
        around = [set(node.meta["call"].chain()) for node in changed]
        for call in set[Call]().union(*around):
            if call.path in self.findings.kept and (stands_in(call.module) or any(call not in one for one in around)):
                raise Shared(self.findings.kept[call.path])
            if not stands_in(call.module):
                continue
            if hooks(call.module):
                raise Hooked(f"{call.path} has a forward hook, and adapters, which are merged with it or not at all")
            rest = [n for n in call.nodes() if n not in inside and "value" not in n.meta and not only_asserted(n)]
            if any(not asks_kind(n) and not isinstance(self._reading(n), Same) for n in rest):
                raise Shared(f"{call.path} would be merged in part, and its own merge() does that part again")

    def _memory(self, base: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
        """What looks at the memory of a value, and what writes to it; once for all branches that read it."""
        if base not in self.memory:
            same = aliases(base)
            self.memory[base] = same, writers(same)
        return self.memory[base]

    def owner(self, nodes: Iterable[fx.Node]) -> Call:
        """The innermost call that holds all nodes, and is no single layer."""
        common: list[Call] | None = None
        for node in nodes:
            chain = list(node.meta["call"].homes())
            common = chain if common is None else [call for call in common if call in chain]
        assert common
        return common[0]

    def _miss(self, nodes: list[fx.Node], rule: str, what: str, reason: Refusal) -> None:
        """Note a refusal for a stretch that ends at the last of these nodes; the first one for each rule counts."""
        root = nodes[-1]
        reason.__traceback__ = reason.__context__ = None  # whose frames hold kernels
        if (root, rule) not in self.refused:
            self.refused.add((root, rule))
            self.missed.append((root, Missed(path_of(root) or "(root)", rule, what, reason, layers_of(nodes))))

    def _isolated(self, covered: set[fx.Node]) -> None:
        """Say of every norm that stays, and that no refusal is about, what it stands between; not of those that stay
        because blocks alone are to be merged."""
        if self.findings.blocks:
            return
        told = {layer for _, miss in self.missed for layer in miss.layers}
        for node, reading in self.readings.items():
            norm = isinstance(reading, Layer) and reading.kind == "norm" and node not in covered
            if norm and _layer_of(node) not in told:
                told_of = isolation(node, _inputs(reading)[0], self.readings)
                self._miss([node], "-", "norm", Isolated(told_of))


def _notes(map_: ConvMap, leaves: Iterable[Layer], dtype: torch.dtype) -> Iterator[str]:
    """What half precision, or a norm that saw no variance, does to the numbers of a merge."""
    if dtype == torch.float16:
        tiny = torch.finfo(dtype).smallest_normal
        lost = sum(int(((t != 0) & (t.abs() < tiny)).sum()) for t in (map_.kernel, map_.bias))
        if lost:
            numbers = map_.kernel.numel() + len(map_.bias)
            yield f"{lost} of {numbers} merged numbers are below float16's normal range, {tiny:.1e}"
    for layer in leaves:
        if layer.probed:
            yield f"{path_of(layer.node) if layer.node else 'a layer'} was probed, not read"
        if dead := layer.dead():
            norm = path_of(layer.node) if layer.node else "a norm"
            yield f"{norm}: {dead} of its channels have a variance below eps, dead in training and scaled by eps alone"


def _check_contexts(changed: Set[fx.Node]) -> None:
    """Raise if what is merged runs in several contexts; modules that are swapped are cast wherever they stand."""
    swapped = all(node.op == "call_module" for node in changed)
    around: dict[tuple[Context, ...], fx.Node] = {}
    for node in sorted(changed, key=lambda n: int(n.meta["index"])):
        around.setdefault(tuple(one for one in node.meta["contexts"] if not (swapped and one.casts)), node)
    if len(around) > 1:
        told = (f"{node.name} in {' in '.join(one.code for one in found) or 'none'}" for found, node in around.items())
        raise Unreadable(f"one layer runs in one context, and {', '.join(told)}")


def path_of(node: fx.Node) -> str:
    """The path of the module that a node is, or is written in."""
    return node.meta["call"].path if node.meta["call"] else ""


def _layer_of(node: fx.Node) -> str:
    """The path of the layer that a node is, or is written in."""
    call = node.meta["call"]
    return call.path if call and isinstance(call.module, _LAYERS) else ""


def layers_of(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The paths of the layers among some nodes."""
    return tuple(dict.fromkeys(filter(None, map(_layer_of, nodes))))


_LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear)


def _lone(nodes: Collection[fx.Node]) -> bool:
    """Whether nodes are a call of one layer, which computes its weights."""
    return len(nodes) == 1 and all(node.op == "call_module" and node.meta["computed"] for node in nodes)


def _turns(layer: nn.Module) -> bool:
    """Whether a layer is a transposed convolution that is an ordinary one, its kernel turned around."""
    return isinstance(layer, nn.modules.conv._ConvTransposeNd) and set(layer.stride) == {1}


def _nodes(stretch: Iterable[Segment]) -> list[fx.Node]:
    return [node for segment in stretch for node in segment.nodes]


def _scales(stretch: Iterable[Segment]) -> set[fx.Node]:
    """The scales that a stretch does a part of."""
    return {node for segment in stretch for one in segment.absorbed for node in one.nodes}


def _keeps_shape(segment: Segment) -> bool:
    """Whether a value is of the same shape after a segment as before, on every input."""
    layer = segment.term.layer
    return segment.term.op == "one" or (layer is not None and layer.kind in ("norm", "affine"))


def _has_kernel(segment: Segment) -> bool:
    return any(layer.weight is not None for layer in segment.term.leaves())


def _vanishes(user: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a question about a value is of no use to anything that stays, or has its answer elsewhere too."""
    return asserts_rank(user) or asks_kind(user) or _sizes_inside(user, inside)


def _sizes_inside(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a node is a size that only what vanishes goes by."""
    pending, seen = [node], {node}
    for one in pending:
        if not counts_sizes(one) or not one.users:
            return False
        pending += [user for user in one.users if user not in inside and user not in seen]
        seen.update(one.users)
    return True


def _says_something(term: Term) -> bool:
    return term.op != "leaf" or (term.layer is not None and term.layer.formula is not None)


def _inputs(reading: Reading | None) -> tuple[fx.Node, ...]:
    if isinstance(reading, Layer):
        return (reading.source,) if reading.source is not None else ()
    if isinstance(reading, Same):
        return (reading.source,)
    if isinstance(reading, Total):
        return tuple(node for node, _ in reading.parts)
    return reading.parts if isinstance(reading, Stack) else ()


class Replicas:
    """Modules called more than once: a merge inside is done once for all calls, if all calls do the same."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.prints: dict[Call, tuple[object, ...]] = {}
        untraced = {path: traced.model.get_submodule(path) for path in traced.untraced}
        self.unread = {
            path: names_reached(module)
            for path, module in untraced.items()
            if not isinstance(module, torch.jit.ScriptModule)  # which reaches for nothing outside of itself
        }
        self.asked: dict[str, list[tuple[str, str]]] = {}  # path -> forwards that ask it for something, and for what
        for path, question in _asked(traced.model):
            self.asked.setdefault(path, []).append(question)
        self.listed = {
            part
            for module in traced.model.modules()
            for key, value in module.__dict__.items()
            if key != "_modules"
            for part in pytree.tree_leaves(value)
            if isinstance(part, nn.Module)
        }

    def bodies(self, of: Call) -> list[Call]:
        """All calls of the same forward that were followed."""
        return [call for call in self.traced.calls[of.module, of.method] if not call.leaf]

    def repeats(self, node: fx.Node) -> bool:
        """Whether a node was made by a later call that does what the first did."""
        return node.meta["call"] is not None and self.is_repeat(node.meta["call"])

    def is_repeat(self, call: Call) -> bool:
        """Whether a call is, or is part of, a later call that does what the first did, and is merged as that was."""
        for outer in call.homes():
            bodies = self.bodies(outer)
            if len(bodies) > 1 and outer is not bodies[0] and self.alike(bodies):
                return True
        return False

    def alike(self, bodies: list[Call]) -> bool:
        return len({self.fingerprint(body) for body in bodies}) == 1

    def check(self, inside: set[fx.Node], owner: Call) -> None:
        """Raise unless every module of the merge is called just as often as its owner, each time in the same way."""
        bodies = self.bodies(owner)
        if len(bodies) > 1 and not self.alike(bodies):
            raise Shared(f"{owner.path or 'the model'} is called {len(bodies)} times, and not always in the same way")
        touched = {call for node in inside for call in node.meta["call"].chain() if owner in call.chain()}
        anew = _written_in(inside)
        self._check_computed(inside)
        for call in touched - {owner}:
            self._check_reach(call, touched, anew, inside)
            if call.inlined:
                continue  # written out in its caller
            calls = self.traced.calls[call.module, call.method]
            if _lone(inside):  # a layer that is the same at every call, and is so still
                if call is calls[0]:
                    continue
                raise Shared(f"{call.path} is merged where it is called first")
            homes = {next((body for body in bodies if body in one.chain()), None) for one in calls}
            if len(calls) != len(bodies) or None in homes or len(homes) != len(bodies):
                raise Shared(
                    f"{call.path or 'the model'} is used {len(calls)} times: merged here, its other uses would change"
                )

    def _check_reach(self, call: Call, touched: set[Call], anew: set[tuple[str, str]], inside: set[fx.Node]) -> None:
        """Raise where code that will stay uses what a merge takes from a module, other than by calling it.

        Args:
            anew: the paths and methods that will be written anew, without what vanishes.
        """
        if call.module in self.listed:
            raise Shared(f"{call.path} is also held in a list or attribute that is none of torch's")
        stays = _lone(inside) and not _turns(call.module)  # the very layer, with all its settings
        for asker, what in self.asked.get(call.path, ()) if call.leaf else ():
            if asker not in {path for path, _ in anew} and not (stays and what in call.module.__dict__):
                asks = f"{asker or 'the model'} asks for {what} of {call.path} in its forward"
                raise Shared(f"{asks}: a merge would change it")
        held = {**call.module._parameters, **call.module._buffers} if call.leaf else {}
        for name, tensor in held.items():
            for other in self.traced.reached.get(f"{call.path}.{name}", ()):
                if site(next(other.homes())) not in anew or self._needed(tensor, inside):
                    raise Shared(f"{other.path or 'the model'} uses {call.path}.{name} itself")
        for other in self.traced.reached.get(call.path, ()):
            if other not in touched:
                raise Shared(f"{other.path or 'the model'} reaches into {call.path}, which would no longer be there")
        if (caller := self.traced.handled.get(call.path)) is not None:
            raise Shared(f"{caller or 'the model'}, whose code cannot be followed, calls {call.path} itself")
        parent, _, name = call.path.rpartition(".")
        for path, names in self.unread.items():
            if name in names and path != parent and (not path or f"{parent}.".startswith(f"{path}.")):
                raise Shared(f"{path or 'the model'}, whose forward cannot be followed, mentions .{name} of a child")

    def _check_computed(self, inside: set[fx.Node]) -> None:
        """Raise where what a layer of a merge computes before its calls is of use elsewhere."""
        for node in inside:
            for name, one in (node.meta.get("computed") or {}).items():
                path = f"{path_of(node)}.{name}"
                made = (tensor for tensor in one.formula.tensors if isinstance(tensor, nn.Parameter))
                held = (
                    n for one in self.traced.traces for n in one.graph.find_nodes(op="get_attr") if n.target == path
                )
                if any(not inside.issuperset(n.users) for n in held) or any(self._needed(t, inside) for t in made):
                    raise Shared(f"{path}, or what it is computed of, is of use elsewhere too")

    def _needed(self, tensor: Tensor | None, inside: set[fx.Node]) -> bool:
        """Whether a constant made of a tensor is of use to a node that stays."""
        for trace_ in self.traced.traces:
            for node in trace_.graph.find_nodes(op="get_attr"):
                formula = node.meta.get("formula")
                made = formula.tensors if formula else (node.meta.get("value"),)
                if any(one is tensor for one in made) and not inside.issuperset(node.users):
                    return True
        return False

    def fingerprint(self, call: Call) -> tuple[object, ...]:
        """What a call does, in terms of its inputs."""
        if call not in self.prints:
            self.prints[call] = tuple(_marks(call))
        return self.prints[call]


def site(call: Call) -> tuple[str, str]:
    """Whose method a call is of; the same for every trace."""
    return call.path, call.method


def _written_in(nodes: Iterable[fx.Node]) -> set[tuple[str, str]]:
    """The methods that some nodes are written in, which change if these vanish; a layer that is called is swapped,
    unless its caller computes its numbers."""
    return {site(next(n.meta["call"].homes())) for n in nodes if n.op != "call_module" or n.meta["assigned"]}


def _asked(model: nn.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """Paths of modules that a forward asks for more than to run: by whom, and for what."""
    for path, module in model.named_modules():
        for names in questions(module):
            part: Any = module
            *way, what = names
            for name in way:
                part = part._modules.get(name) if isinstance(part, nn.Module) else None
            if part is None:
                continue
            where = ".".join(filter(None, (path, *way)))
            if what in ("*", "+"):
                for name, _ in part.named_children() if what == "+" else part.named_modules():
                    yield ".".join(filter(None, (where, name))), (path, "what it is")
            elif what not in part._modules:
                yield where, (path, what)


def _marks(call: Call) -> Iterator[object]:
    """What a call was given, did and gave, values numbered in order of appearance: equal programs give equal marks."""
    numbers: dict[fx.Node, str] = {}

    def mark(value: fx.Node) -> str:
        return f"={value.target}" if value.op == "get_attr" else numbers.setdefault(value, f"%{len(numbers)}")

    def structure(value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            return mark(value.node)
        if isinstance(value, (list, tuple)):
            return [type(value).__name__, *map(structure, value)]
        if isinstance(value, dict):
            return {key: structure(item) for key, item in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return [type(value).__name__, *(structure(getattr(value, f.name)) for f in fields(value))]
        return (
            value if isinstance(value, (bool, int, float, str, type(None))) else f"{type(value).__name__} {id(value)}"
        )

    yield repr(structure((call.args, call.kwargs)))
    for node in call.nodes():
        args, kwargs = fx.node.map_arg(node.args, mark), fx.node.map_arg(node.kwargs, mark)
        dims = len(node.meta["shape"]) if "shape" in node.meta else None  # a merge may go by it
        yield (node.op, str(node.target), repr(args), repr(kwargs), mark(node), dims)
    yield repr(structure(call.result))
