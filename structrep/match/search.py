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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import networkx as nx
import torch
from torch import fx

from structrep.algebra import ConvMap, Rigour
from structrep.errors import (
    Costlier,
    Hooked,
    Incompatible,
    Inexact,
    Isolated,
    Mutated,
    Overflow,
    Refusal,
    Shared,
    Unreadable,
)
from structrep.graph.aliases import aliases, writers
from structrep.graph.calls import Call, Trace
from structrep.graph.facts import AUTOCAST, CALL, KEPT, VALUE
from structrep.graph.names import is_lone_layer, layer_of, layers_of, path_of
from structrep.graph.queries import asks_kind, asks_shape, asserts_rank, counts_sizes, only_asserted
from structrep.graph.shapes import channels, spatial_size, torch_name
from structrep.guard.sharing import written_in_forwards
from structrep.match import sum_order
from structrep.match.findings import Findings
from structrep.match.isolation import isolation
from structrep.match.merge import Fit, Merge, Missed, Segment, check_contexts, nodes_of
from structrep.match.shared_scales import Absorption, absorptions
from structrep.modules.parametrized import about_hooks, hooks
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

FARTHEST = 32  # how many dominators back a merge may reach
LONGEST, DEEPEST = 64, 8  # how many steps a branch of a sum may have, and sums inside each other


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
                    told = replace(kept, where=path_of(one.node) or "(root)", layers=(*kept.layers, layer_of(one.node)))
                    self.known += ((one.node, told),)
        return merges

    def keep(self, merges: list[Merge]) -> None:
        """What was found is what is to be done."""
        self.findings.merges += merges
        merged = {node for merge in merges for node in merge.nodes}
        lone = {CALL.of(node).module for merge in merges if is_lone_layer(merge.nodes) for node in merge.nodes}
        again = {n for n in self.nodes if n.op == "call_module" and CALL.of(n).module in lone}
        covered = merged.union(again, *(one.nodes for one in self.absorptions))
        self._isolated(covered)
        self.findings.missed += [miss for node, miss in self.missed if node not in covered or self._matters(miss)]

    def reorder(self, merges: list[Merge]) -> Callable[[], None] | None:
        """Put sums of which a part would merge into an order in which it does; what undoes it, if there were any."""
        return sum_order.reorder(self.trace, {node for merge in merges for node in merge.nodes}, self._adds)

    def _adds(self, addends: Sequence[fx.Node], additions: Sequence[fx.Node]) -> bool:
        """Whether some addends of a sum would merge; `additions` are its own, the last of which is the sum."""
        root = additions[-1]
        if len(self.replicas.bodies(CALL.of(root))) > 1:
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
            if VALUE.known(node) or AUTOCAST.of(node) or self.replicas.repeats(node):
                continue
            try:
                reading = read_node(node)
            except Unreadable as reason:
                self._miss([node], "-", str(CALL.of(node).path), reason)
                continue
            if reading is not None:
                readings[node] = reading
            elif node.op == "call_module" and hooks(CALL.of(node).module):
                self._miss([node], "-", "layer with a hook", Hooked(about_hooks(CALL.of(node).module)))
        return readings

    def _endings(self) -> dict[fx.Node, Layer]:
        """The scales that norms of each value end with; one that is a map as a whole is no such norm."""
        found = {
            node: read_ending(node)
            for node in self.nodes
            if not (VALUE.known(node) or node in self.readings)
            and not AUTOCAST.of(node)
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
        paths = {next((c.path for c in CALL.of(n).chain() if c.path in blocks), None) for n in nodes_of(stretch)}
        return len(paths) == 1 and None not in paths

    def leak(self, stretch: list[Segment]) -> fx.Node | None:
        """A node that would vanish but is used elsewhere."""
        inside = set(nodes_of(stretch))
        for index, segment in enumerate(stretch):
            for node in segment.nodes:
                users = [user for user in node.users if user not in inside and not _vanishes(user, inside)]
                if node is stretch[-1].root:
                    continue
                if KEPT.get(node):
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
                    self._miss(nodes_of(stretch), rule.name, str(self.term(stretch)), reason)
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
                self._miss(nodes_of(stretch), rule.name, str(term), reason)
                continue
            saved = before.multiply_adds - after.multiply_adds
            choices.append((saved, len(choices), rule, stretch, (before, after)))
        for _, _, rule, stretch, costs in sorted(choices, key=lambda choice: choice[:2], reverse=True):
            try:
                fit = self._law_fit(stretch, costs)
            except Refusal as reason:
                self._miss(nodes_of(stretch), rule.name, str(self.term(stretch)), reason)
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
        paths = {path for node in nodes_of(stretch) for path in (path_of(node),) if path}
        if any(fnmatch.fnmatchcase(path, glob) for path in paths for glob in self.findings.inexact_borders):
            yield "inside"

    def _matters(self, miss: Missed) -> bool:
        """Whether a refusal is worth telling where a smaller merge was done: a family's, for more than the price."""
        law = miss.rule in self.registry and self.registry[miss.rule].law
        return not law and miss.rule != "-" and not isinstance(miss.reason, Costlier)

    def _whole_families(self, stretch: list[Segment]) -> bool:
        """Whether a stretch cuts through nothing that a family merges."""
        inside = set(nodes_of(stretch))
        return all(inside.issuperset(s.nodes) for n in inside if n in self.families for s in self.families[n][1])

    def _settle(self, root: fx.Node) -> Merge | None:
        """What a family merges and no law took further."""
        if root not in self.families:
            return None
        _, stretch, fit = self.families[root]
        return self._merge(stretch, fit)

    def _merge(self, stretch: list[Segment], fit: Fit, law: Rule | None = None) -> Merge:
        inside = set(nodes_of(stretch))
        families = [self.families[node][:2] for node in reversed(nodes_of(stretch)) if node in self.families]
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
            for call in CALL.of(stretch[-1].root).chain():
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
        inside = set(nodes_of(stretch))
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
        check_contexts(changed)
        for where in written_in_forwards(changed):
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
        around = [set(CALL.of(node).chain()) for node in changed]
        for call in set[Call]().union(*around):
            if call.path in self.findings.kept and (stands_in(call.module) or any(call not in one for one in around)):
                raise Shared(self.findings.kept[call.path])
            if not stands_in(call.module):
                continue
            if hooks(call.module):
                raise Hooked(f"{call.path} has a forward hook, and adapters, which are merged with it or not at all")
            rest = [n for n in call.nodes() if n not in inside and not VALUE.known(n) and not only_asserted(n)]
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
            chain = list(CALL.of(node).homes())
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
            if norm and layer_of(node) not in told:
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
