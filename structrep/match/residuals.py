"""Residuals carried through activations: RMNet, arXiv:2111.00687. Meng et al., section 3.

y = B(relu(A(x))) + S(x), where x is what an activation gave, so that relu(x) = x. If A also hands on x, in channels of
its own, these pass the activation unchanged, and the next convolution adds them: [B, S] after relu after [A, I]. The
block is then plain, of wider convolutions. It takes more multiply-adds, never fewer, and no addition: so it is done
only for blocks that are named.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from structrep.algebra import ConvMap, Ints
from structrep.errors import Incompatible, Mutated, Refusal, Shared, Unreadable
from structrep.graph.aliases import aliases, writers
from structrep.graph.calls import Trace
from structrep.graph.facts import CALL, INDEX, STORED
from structrep.graph.names import path_of
from structrep.graph.operations import does, module_does, of_modules, torch_name
from structrep.graph.queries import asks_dtype, only_asserted
from structrep.graph.table import CLAMPS, RANGES, Is
from structrep.guard.other_forwards import Borders
from structrep.match.findings import Findings
from structrep.match.fit import fit
from structrep.match.legality import Legality, owner_of
from structrep.match.merge import Carried, Merge, Missed
from structrep.match.search import Search
from structrep.match.segments import Segments
from structrep.match.stretch import Segment, Stretch
from structrep.modules.parametrized import hooks
from structrep.terms import cost
from structrep.terms.layer import Sum
from structrep.terms.layers import conv_layer, slice_layer
from structrep.terms.term import ONE, Term, concat_terms, geometry, leaf, seq, sum_terms
from structrep.terms.value import value

RULE, SOURCE = "rmnet", "RMNet, arXiv:2111.00687, section 3"


def carried(findings: Findings, globs: Iterable[str]) -> tuple[list[Merge], list[Missed]]:
    """The merges that a search found with the residuals that can be carried, of modules that the globs name; and why
    others cannot."""
    globs, merges, missed = tuple(globs), list(findings.merges), list[Missed]()
    for search in findings.searches if globs else ():
        for node, reading in search.readings.items():
            named = any(fnmatch.fnmatchcase(path_of(node), glob) for glob in globs)
            if not named or not isinstance(reading, Sum) or len(reading.parts) != 2:
                continue
            if any(node in merge.nodes for merge in merges):
                continue  # a sum of branches, which is one layer already
            try:
                merges = _exchanged(merges, _block(search, node, reading))
            except Refusal as reason:
                missed.append(Missed(path_of(node) or "(root)", RULE, "residual", reason))
    return merges, missed


def _exchanged(merges: list[Merge], block: _Block) -> list[Merge]:
    """Merges, with those of the layers of a block exchanged for what these become.

    Raises:
        Refusal: the block cannot be changed so.
    """
    wide, inside = list(block.merges()), block.inside
    gone = [merge for merge in merges if not inside.isdisjoint(merge.nodes)]
    for merge in gone:
        if merge.absorbed or merge.sizes is not None or not inside.issuperset(merge.nodes):
            raise Shared(f"{merge.term} reaches out of the block")
    for one in wide:
        names = [
            (rule, source)
            for m in gone
            if set(m.nodes) <= set(one.nodes)
            for rule, source in zip(m.rules, m.sources, strict=True)
        ]
        one.rules, one.sources = (tuple(dict.fromkeys(each)) for each in zip(*names, (RULE, SOURCE), strict=True))
    return [*(merge for merge in merges if merge not in gone), *wide]


def _block(search: Search, node: fx.Node, sum_: Sum) -> _Block:
    """The block that ends with an addition.

    Raises:
        Refusal: it is no residual block, or its residual would not pass its activations unchanged.
    """
    (first, one), (second, other) = sum_.parts
    if one != 1.0 or other != 1.0 or sum_.through:
        raise Incompatible("only a plain sum of two values is a residual")
    for main, skip in ((first, second), (second, first)):
        added = tuple(reversed(list(search.segments.walk(skip, None))))
        base = added[0].base if added else skip
        found = _steps(search.segments, main, base)
        if found is None:
            continue
        steps, acts = found
        made, through = _range(base)
        block = _Block(search.trace, search.legality, node, Carried(base, node, through), steps, added)
        for act in acts:
            kind = _activation(act)
            if not _unchanged(kind, made):
                raise Incompatible(
                    f"what is added would pass {kind} on its way, which leaves it as it is only if it is one's own "
                    f"output, and it is that of {base.name}"
                )
        _check_uses(block, acts, search.findings.borders)
        return block
    raise Incompatible("no activation stands between its layers, or they do not start where what is added does")


def _steps(
    segments: Segments, node: fx.Node, base: fx.Node
) -> tuple[tuple[tuple[Segment, ...], ...], list[fx.Node]] | None:
    """Layers and activations from a base to a node; None if there are others between."""
    steps: list[tuple[Segment, ...]] = []
    acts: list[fx.Node] = []
    while True:
        step = tuple(reversed(list(segments.walk(node, None))))
        if not any(layer.weight is not None for segment in step for layer in segment.term.leaves()):
            return None
        steps.insert(0, step)
        if step[0].base is base:
            return (tuple(steps), acts) if acts else None
        if _activation(step[0].base) not in CLAMPS:
            return None
        acts.append(step[0].base)
        node = step[0].base.all_input_nodes[0]


def _check_uses(block: _Block, acts: list[fx.Node], borders: Borders) -> None:
    """Raise where a value that will be another is of use elsewhere."""
    changed = block.inside.union(acts)
    for value_ in changed - {block.node}:
        others = [u for u in value_.users if u not in changed and not only_asserted(u) and not asks_dtype(u)]
        if others or STORED.get(value_):
            raise Shared(f"{value_.name}, a value inside the block, is used elsewhere")
    base = block.carried.base
    if any(INDEX.of(writer) > INDEX.of(base) for writer in writers(aliases(base))):
        raise Mutated(f"what is added, {base.name}, is written to after it was made")
    borders.check(changed, block.node, owner_of(changed))


def _activation(node: fx.Node) -> str:
    """What an activation is called; "" for anything else."""
    if node.op == "call_module":
        module = CALL.of(node).module
        name = "" if hooks(module) else of_modules(type(module))
    else:
        name = torch_name(node).strip("_")
    return name if name in RANGES else ""


def _unchanged(clamp: str, made: str) -> bool:
    """Whether an activation leaves what another gives as it is: relu(relu6(x)) = relu6(x)."""
    if clamp not in CLAMPS or made not in RANGES:
        return False
    (low, high), (least, most) = RANGES[clamp], RANGES[made]
    return low <= least and most <= high


def _range(node: fx.Node) -> tuple[str, tuple[fx.Node, ...]]:
    """The activation in whose range a value is, pools seen through, and the nodes from there on."""
    through = [node]
    while True:
        node = through[-1]
        called = node.op == "call_module"
        if not (module_does(CALL.of(node).module, Is.MAXIMUM) if called else does(node, Is.MAXIMUM)):
            return _activation(node), tuple(through)
        through.append(node.all_input_nodes[0])


@dataclass(frozen=True)
class _Block:
    """A residual block: layers with activations between them, and what is added."""

    trace: Trace
    legality: Legality
    node: fx.Node  # the addition
    carried: Carried
    steps: tuple[tuple[Segment, ...], ...]  # the layers between activations
    skip: tuple[Segment, ...]

    @property
    def inside(self) -> set[fx.Node]:
        """All that is no longer what it was, but for activations."""
        return {node for step in (*self.steps, self.skip) for segment in step for node in segment.nodes} | {self.node}

    def merges(self) -> Iterator[Merge]:
        """The wider layers.

        Raises:
            Refusal: strides do not fit, or a layer is none that could be widened.
        """
        terms = [seq([segment.term for segment in step]) for step in self.steps]
        shapes = [geometry(term) for term in terms]
        channels, dims = shapes[0].in_channels, shapes[0].dims
        skip = seq([segment.term for segment in self.skip])
        added = geometry(skip, channels, dims)
        strides = tuple(math.prod(shape.stride[dim] for shape in shapes) for dim in range(dims))
        if not dims or any(shape.groups > 1 or shape.transposed for shape in shapes):
            raise Unreadable(f"only ordinary convolutions of one group are widened, and these are {terms}")
        if added.stride != strides or set(added.kernel) != {1} or any(map(any, added.pad)):
            raise Incompatible(
                f"what is added, {skip}, has strides {added.stride} and kernel {added.kernel}; behind layers of "
                f"strides {strides} it has to be pointwise, of the same"
            )
        for index, (step, term, shape) in enumerate(zip(self.steps, terms, shapes, strict=True)):
            first, last = index == 0, index == len(terms) - 1
            width = shape.in_channels + (0 if first else channels)
            kept = ONE if first else leaf(slice_layer(1, _first(shape.in_channels), width))
            carried = ONE if first else leaf(slice_layer(1, _after(shape.in_channels), width))
            own = seq([kept, term])
            if last:
                wide = sum_terms([own, seq([carried, self._unstrided(skip, channels, dims)])], self.node)
            else:
                wide = concat_terms([own, seq([carried, _identity(channels, shape.stride, step)])])
            yield self._merge(step, term, wide, last)

    def _unstrided(self, skip: Term, channels: int, dims: int) -> Term:
        """What is added, of pixels that were left out by the layers before."""
        if not any(layer.weight is not None for layer in skip.leaves()):
            return skip  # which has no stride either, for it is pointwise
        shape = replace(geometry(skip, channels, dims), stride=(1,) * dims)

        def load(c: int, d: int) -> ConvMap:
            map_ = value(skip, channels, dims)
            return ConvMap.of(shape, map_.kernel, map_.bias)

        learned = next(layer for layer in skip.leaves() if layer.weight is not None)
        shifts = any(layer.shifts for layer in skip.leaves())
        return leaf(
            replace(
                learned, load=load, shape=lambda c, d: shape, in_channels=shape.in_channels,
                out_channels=shape.out_channels, dims=dims, shifts=shifts, formula=None,
            )
        )  # fmt: skip

    def _merge(self, step: tuple[Segment, ...], term: Term, wide: Term, last: bool) -> Merge:
        segments = step
        if last:
            nodes = [node for segment in self.skip for node in segment.nodes]
            segments = (*step, Segment(step[-1].root, self.node, sum_terms([ONE, ONE], self.node), (*nodes, self.node)))
        before, skip = cost.of_term(term), seq([segment.term for segment in self.skip])
        if last and any(layer.weight is not None for layer in skip.leaves()):
            before += cost.of_term(skip)
        costs = before, cost.of_map(geometry(wide))
        fitted = fit(value(wide), Stretch(step), costs, at_any_price=True)
        if fitted.remedy:
            raise Unreadable(f"{term} takes {fitted.remedy}, which the residual would take too")
        stretch = Stretch(segments)
        self.legality.check(stretch)
        return Merge((RULE,), (SOURCE,), wide, stretch, owner_of(stretch.nodes), self.trace, fitted, self.carried)


def _first(count: int) -> Callable[[int], slice]:
    return lambda _: slice(0, count)


def _after(count: int) -> Callable[[int], slice]:
    return lambda _: slice(count, None)


def _identity(channels: int, stride: Ints, step: tuple[Segment, ...]) -> Term:
    """All channels as they are, at the pixels that a stride leaves."""
    like = next(layer.weight for s in step for layer in s.term.leaves() if layer.weight is not None)
    weight = torch.ones(channels, 1, *[1] * len(stride), dtype=like.dtype, device=like.device)
    return leaf(conv_layer(weight, None, stride, 0, 1, channels))
