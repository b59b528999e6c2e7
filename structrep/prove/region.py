"""The parts of a graph that merges change, each as it was traced and as it will be written, to be run side by side.

One side is made of the user's graph alone: no scale is given away in it, no sum in another order, nothing carried. The
other is what the plan makes of that. Both start from the same values and have to end in the same ones, so whatever a
plan believes of a scale, an order or a residual is proved with the merges that follow from it. What has any of these in
common is one part: apart from each other its merges are right for no graph at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.algebra import ConvMap, Ints, precision
from structrep.algebra.shadows import Doubled, Shadows
from structrep.errors import WrongMerge
from structrep.graph.constants import held
from structrep.graph.dtypes import keeps
from structrep.graph.facts import CALL, DTYPE, HELD, IDLE, INDEX, SHAPE, STORED, VALUE
from structrep.graph.operations import does, torch_name
from structrep.graph.queries import asks_shape, counts_sizes, only_asserted
from structrep.graph.run import computed
from structrep.graph.shapes import rank
from structrep.graph.table import Is
from structrep.match.merge import Merge
from structrep.match.pieces import frame
from structrep.match.sum_order import as_traced, reordered
from structrep.modules.copies import moved_copy
from structrep.read.nodes import called, hands_on, is_resized
from structrep.rewrite.norms import end
from structrep.terms.term import geometry

Values = Mapping[fx.Node, Any]
Shapes = Mapping[fx.Node, tuple[int, ...]]
Layers = Mapping[Merge, Callable[[Tensor], Tensor]]


class Region:
    """The part of a graph that some merges change, all that have something in common.

    Attributes:
        inputs: values that it starts from, constants apart, in order.
        outputs: values of it that something else reads.
    """

    def __init__(self, merges: Sequence[Merge], device: torch.device) -> None:
        self.device = device
        self.merges = {merge.root: merge for merge in merges}
        absorbed = {one for merge in merges for one in merge.absorbed}
        carried = {merge.carried for merge in merges if merge.carried is not None}
        self.idle = {one.node: one.source for one in absorbed if not one.ends}
        self.ended = {one.node for one in absorbed if one.ends}
        self.gone = {node for merge in merges for node in merge.nodes} - self.merges.keys()
        self.gone |= {node for one in absorbed for node in one.through}
        inside = {*self.merges, *self.gone, *self.idle, *self.ended}
        inside.update(*(one.between for one in absorbed), *(one.views for one in absorbed))
        inside.update(*(one.were for merge in merges for one in merge.reordered))
        inside.update(*(one.through for one in carried))
        inside.update(merge.base for merge in merges if merge.carried is not None)  # the activations
        inside.update(*(one.apart for one in absorbed))
        inside |= {user for node in inside if does(node, Is.PIECES) for user in node.users}  # no tuple is compared
        before = (hands_on(node) for node in inside)  # a cast that was made before, from what it was made of
        inside |= {one for one in before if one is not None and does(one, Is.CAST)}
        self.nodes = [one for one in sorted(inside, key=lambda n: int(INDEX.of(n))) if not only_asserted(one)]
        self.inside = inside
        made = (made for node in self.nodes for source in (read_as_traced, self.reads) for made in source(node))
        self.inputs = sorted({one for one in made if one not in inside}, key=lambda n: int(INDEX.of(n)))
        outputs = [node for node in self.nodes if self._is_output(node)]
        self.outputs = outputs or [node for node in self.nodes if not node.users and node not in self.gone]
        self.modules: dict[tuple[nn.Module, bool], nn.Module] = {}
        # Code without casts computes in float64 what it is given in float64.
        self.cast = not all(map(keeps, self.nodes))
        self.shadows = Shadows() if self.cast else Doubled()

    def _is_output(self, node: fx.Node) -> bool:
        users = (user for user in node.users if user not in self.inside and not IDLE.get(user))
        return bool(STORED.get(node)) or any(not asks_shape(user) and not only_asserted(user) for user in users)

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads once the merges are done."""
        if node in self.merges:
            return [self.merges[node].base]
        if node in self.gone:
            return []
        return [self.idle[node]] if node in self.idle else _values(node.all_input_nodes)

    def below(self, merge: Merge) -> list[fx.Node]:
        """The outputs that a merge has a part in otherwise than by way of another one."""
        found = {merge.root}
        for node in self.nodes:
            if node not in self.merges and not found.isdisjoint(self.reads(node)):
                found.add(node)
        return [one for one in self.outputs if one in found]

    def before(self, given: Values, dtype: torch.dtype) -> dict[fx.Node, Tensor]:
        """The outputs in float64, of the graph as it was traced; `given` and `dtype` as for `after`."""
        found: dict[fx.Node, Tensor] = {}
        with self.shadows:
            values = self._copies(given, dtype)
            load = partial(self._load, values)
            for node in self.nodes:
                values[node] = _at_own_size(node, load, self._module(node, ended=False))
                if node in self.outputs:
                    found[node] = self.shadows.of(values[node]).clone()  # what comes next may write to it
        return found

    def after(
        self, given: Values, layers: Layers, dtype: torch.dtype, wanted: Iterable[fx.Node] | None = None
    ) -> dict[fx.Node, Tensor]:
        """The outputs in float64, or what else is wanted, of the graph as it will be written.

        Args:
            given: the inputs in float64; of a node inside, what it is taken to give.
            layers: what becomes of each merge.
            dtype: what a value is in as the model runs, where that is not known; float64 is computed beside it.

        Raises:
            WrongMerge: something that is needed is no longer there.
        """
        found: dict[fx.Node, Tensor] = {}
        asked = self.outputs if wanted is None else [*wanted]
        needed = self._needed(asked, given)
        with self.shadows:
            values = self._copies(given, dtype)
            load = partial(self._load, values)
            for node in self.nodes:
                if node not in needed:
                    continue
                if node not in values:
                    values[node] = self._written(node, layers, load)
                if node in asked:
                    found[node] = self.shadows.of(values[node]).clone()
        return found

    def needs(self, known: Iterable[fx.Node]) -> list[fx.Node]:
        """The inputs that the outputs are made of, once the merges are done, beside some values inside."""
        needed = self._needed(self.outputs, {*known})
        return [node for node in self.inputs if node in needed]

    def _needed(self, asked: Iterable[fx.Node], known: Container[fx.Node]) -> set[fx.Node]:
        pending = [*asked]
        found = {*pending}
        while pending:
            node = pending.pop()
            if node in self.gone and node not in known:
                raise WrongMerge(f"{node.name} would vanish, and something else reads it")
            if node in self.inside and node not in known:
                new = [one for one in self.reads(node) if one not in found]
                found.update(new)
                pending += new
        return found

    def _written(self, node: fx.Node, layers: Layers, load: Callable[[fx.Node], Any]) -> Any:
        """What a node gives once the merges are done."""
        if (merge := self.merges.get(node)) is not None:
            base = load(merge.base)
            value = layers[merge](self.shadows.of(base))
            value = value if merge.is_table else value.to(base.dtype)
            for view in _folding(merge):  # which stay where they are
                value = computed(view, dict.fromkeys(view.all_input_nodes, value).__getitem__)
            return value
        if node in self.idle:
            return load(self.idle[node])
        if node in self.ended:
            bare = partial(_without_constants, load) if node.op != "call_module" else load
            return computed(node, bare, self._module(node, ended=True))
        return computed(node, load, self._module(node, ended=False))

    def _copies(self, given: Values, dtype: torch.dtype) -> dict[fx.Node, Any]:
        """Values that may be written to, in the dtypes that they have in the model if that may matter."""
        cast = {node: self.cast and value.is_floating_point() for node, value in given.items()}
        stored = {node: DTYPE.get(node, dtype) if cast[node] else value.dtype for node, value in given.items()}
        return {node: value.to(stored[node], copy=True) for node, value in given.items()}

    def _load(self, values: dict[fx.Node, Any], node: fx.Node) -> Any:
        if HELD.known(node):
            return HELD.of(node)
        if VALUE.known(node):
            value = precision.as_stored(held(node), VALUE.of(node)) if self.cast else precision.doubled(held(node))
            return value.to(self.device) if isinstance(value, Tensor) else value
        if node not in values and counts_sizes(node):
            values[node] = computed(node, partial(self._sized, values))
        if node not in values:
            raise WrongMerge(f"it goes by {node.name}, which is no part of it, so it cannot be run apart")
        return values[node]

    def _sized(self, values: dict[fx.Node, Any], node: fx.Node) -> Any:
        """A value that is asked for its size; one from elsewhere is of the size that the example has."""
        if node not in values and not counts_sizes(node) and SHAPE.known(node):
            return torch.empty(SHAPE.of(node), device="meta")
        return self._load(values, node)

    def _module(self, node: fx.Node, *, ended: bool) -> nn.Module | None:
        """A copy of the module that a node calls, perhaps without the weight and bias that it ends with."""
        if node.op != "call_module":
            return None
        module = CALL.of(node).module
        if (module, ended) not in self.modules:
            dtype = None if self.cast else torch.float64
            copy = self.modules[module, ended] = moved_copy(called(node, exactly=not self.cast), self.device, dtype)
            for tensor, number in zip(_tensors(copy), _tensors(called(node)), strict=True):
                if self.cast and number.dtype != tensor.dtype:
                    self.shadows.give(tensor, number.to(self.device))
            if ended:
                end(copy)
        return self.modules[module, ended]


def _folding(merge: Merge) -> list[fx.Node]:
    """The views inside a merge, if all fold dims; one to the shape of another value takes that back."""
    layers = ((segment.root, segment.term.layer) for segment in merge.segments)
    views = [node for node, layer in layers if layer is not None and layer.kind == "view"]
    return views if all(torch_name(view) == "flatten" for view in views) else []


class Trials:
    """Shapes of the values that a region starts from, on which both of its sides can be run."""

    def __init__(self, region: Region, maps: Mapping[Merge, ConvMap]) -> None:
        self.region, self.maps = region, maps
        # What is no more than added to what a merge gives is of that shape.
        self.added = {node: merge for node in region.inputs if (merge := self._beside(node)) is not None}
        self.reached = {node: self._reached(node) for node in region.inputs if node not in self.added}
        absorbed = {one for merge in maps for one in merge.absorbed if one.shapes}
        self.seen = {node: one.shapes for one in absorbed for node in read_as_traced(one.nodes[0])}

    def usual(self) -> Iterator[Iterator[Shapes]]:
        """Groups of shapes, of which one is enough each: the smallest with an output, and odd ones that are larger and
        differ in every dim; or those for which a merge holds."""
        sized = [(merge.base, *merge.sizes) for merge in self.region.merges.values() if merge.sizes is not None]
        if not sized:
            yield self.of((1, 1, 1))
            yield self.of((5, 6, 7), spare=True)
            return
        yield self.example()
        for base, size, period in sized:
            if self.region.inputs == [base] and all(period):
                yield self.at(base, tuple(n + step for n, step in zip(size, period, strict=True)))

    def rest(self) -> Iterator[Shapes]:
        """What may be taken where none of these is, by values of fixed sizes."""
        yield from self._folded()
        yield from self.example()

    def of(self, least: Ints, spare: bool = False) -> Iterator[Shapes]:
        """Shapes with so many pixels of what comes out, by the number of dims that values may have.

        Args:
            spare: with as many more as strides leave out, and as borders reach that the user has left open.
        """
        if spare:
            open_ = [room(merge) for merge in self.maps if merge.fit.strictness == "inside"]
            far = [max(each) for each in itertools.zip_longest(*open_, fillvalue=0)]
            least = tuple(n + 2 * more for n, more in itertools.zip_longest(least, far, fillvalue=0))
        sizes = self._sizes(least, spare)
        choices = {node: self._choices(node, sizes.get(node, least)) for node in self.reached}
        for index in range(max(map(len, choices.values()), default=0)):
            yield {node: some[min(index, len(some) - 1)] for node, some in choices.items()}

    def at(self, base: fx.Node, size: Ints) -> Iterator[Shapes]:
        """The one value with so many pixels."""
        (merge,) = (merge for merge in self.region.merges.values() if merge.base is base)
        yield {base: (2, self.maps[merge].geometry.in_channels, *size)}

    def given(
        self, shapes: Shapes, layers: Layers, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[fx.Node, Tensor]:
        """Random values of these shapes, and what goes with them, in float64.

        Raises:
            RuntimeError: the layers do not take them.
        """

        def draw(shape: Iterable[int]) -> Tensor:
            x = torch.randn(tuple(shape), dtype=torch.float64, generator=generator, device="cpu")
            return x.to(self.region.device)

        found: dict[fx.Node, Tensor] = {}
        for node, shape in shapes.items():
            rows = self._rows(node, shape, generator)
            found[node] = draw(shape) if rows is None else rows
        for node, merge in self.added.items():
            if node not in found:
                found[node] = draw(self.region.after(found, layers, dtype, [merge.root])[merge.root].shape)
        return found

    def _rows(self, node: fx.Node, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Numbers of rows, where a value is such."""
        merge = self.reached.get(node)
        if merge is None or not merge.is_table:
            return None
        count = self.maps[merge].geometry.in_channels
        return torch.randint(count, shape, generator=generator, device="cpu").to(self.region.device)

    def _beside(self, node: fx.Node) -> Merge | None:
        """What a merge gives that a value is added to, in a sum in another order, if that is all that it is for."""
        users = [user for user in self.region.nodes if node in (*read_as_traced(user), *self.region.reads(user))]
        if not users or not all(map(reordered, users)):
            return None
        sums = {reordered(user) for user in users}
        return next(
            (m for root, m in self.region.merges.items() if reordered(root) in sums and m.base is not node), None
        )

    def _reached(self, node: fx.Node) -> Merge | None:
        """The first merge that a value comes to."""
        found = {node}
        for one in self.region.nodes:
            if not found.isdisjoint(self.region.reads(one)):
                if (merge := self.region.merges.get(one)) is not None:
                    return merge
                found.add(one)
        return None

    def _sizes(self, least: Ints, spare: bool) -> dict[fx.Node, Ints]:
        """How many pixels each value needs to have for what comes out to have so many at least."""
        found: dict[fx.Node, Ints] = {}
        for node in reversed(self.region.nodes):
            size = found.get(node, least)
            if (merge := self.region.merges.get(node)) is not None:
                size = (*self._enough(merge, size, spare), *size[self.maps[merge].geometry.dims :])
            for one in self.region.reads(node):
                found[one] = tuple(map(max, size, found.get(one, size)))
        return found

    def _enough(self, merge: Merge, wanted: Ints, spare: bool) -> Ints:
        """The smallest input of which the output of a merge has so many pixels."""
        map_ = self.maps[merge]
        g, copied = map_.geometry, map_.border != "constant"
        size = []
        for n, over, pad, step in zip(wanted, g.overhang, g.pad, g.stride, strict=False):
            if g.transposed:
                size.append(1 + max(0, -(-(n - 1 + over) // step)))
            else:
                enough = (n - 1) * step + 1 - over + (step - 1) * spare
                size.append(max(1, enough, (max(pad) + 1) * copied))
        return tuple(size)

    def _choices(self, node: fx.Node, size: Ints) -> list[tuple[int, ...]]:
        """Shapes that a value may have: its channels on dim 1, or on the last."""
        merge = self.reached[node]
        if merge is None:
            return [SHAPE.of(node)] if SHAPE.known(node) else [(2,)]
        if node in self.seen:
            return [*self.seen[node]]
        readers = [user for user in self.region.nodes if node in self.region.reads(user)]
        if all(map(frame, readers)):  # which take any number of numbers that makes whole pieces
            return [(2, *frame(readers[0]))]
        g = self.maps[merge].geometry
        if merge.base is node and g.dims:
            return [(2, g.in_channels, *size[: g.dims])]
        if merge.is_table:
            return [(64,), (2, 5), (2, 3, 4)]
        known = rank(node)
        ranks = (known,) if known is not None else (g.dims + 2, *range(2, 6)) if g.dims else range(2, 6)
        if merge.base is node:
            return [(*range(2, max(2, dims) + 1), g.in_channels) for dims in ranks]
        # No other dim of as many, nor of one, which would be spread: dims that are taken for others are not taken.
        free = [max(2, n) + (max(2, n) == g.in_channels) for n in (2, *size, *size)]
        first = [(free[0], g.in_channels, *free[1:])[:dims] for dims in ranks]
        last = [(*free[: dims - 1], g.in_channels) for dims in ranks]
        return [shape for pair in zip(first, last, strict=True) for shape in dict.fromkeys(pair)]

    def example(self) -> Iterator[Shapes]:
        """The shapes of the example, if there is one."""
        shapes = {node: SHAPE.get(node, ()) for node in self.region.inputs}
        if all(shapes.values()):
            yield shapes

    def _folded(self) -> Iterator[Shapes]:
        """Shapes of values that are folded to sizes that are written down."""
        written: set[int] = set()
        pending = [node for node in self.region.nodes if does(node, Is.RESHAPES) or torch_name(node) == "unflatten"]
        for node in pending:
            sizes = (size for arg in node.args[1:] for size in (arg if isinstance(arg, (list, tuple)) else [arg]))
            written.update(size for size in sizes if type(size) is int and size > 1)
            pending += [one for one in node.all_input_nodes if counts_sizes(one) and one not in pending]
        some = sorted({2, *written, *(a * b for a in written for b in written)})[:FOLDS]
        for dims in range(2, 6) if written else ():
            for free in itertools.islice(itertools.product(some, repeat=dims - 1), FOLDS**2):
                yield {
                    node: (*free, self.maps[merge].geometry.in_channels)
                    for node, merge in self.reached.items()
                    if merge is not None
                }


FOLDS = 12  # sizes that are tried for a dim


def room(merge: Merge) -> tuple[int, ...]:
    """How far from the border of its input something that a merge reads or crops may reach, per dim."""
    dims = geometry(merge.term).dims
    shapes = [layer.shape(layer.in_channels or 1, dims) for layer in merge.term.leaves()]
    step = math.prod(max(shape.stride, default=1) for shape in shapes)
    return tuple(step * sum(max(map(abs, shape.pad[dim])) for shape in shapes) for dim in range(dims))


def _at_own_size(node: fx.Node, load: Callable[[fx.Node], Any], module: nn.Module | None) -> Any:
    """What a node gave as it was traced; a transposed convolution that was told the size of its output, at the one that
    it has else."""
    if module is not None and is_resized(node):
        return module(load(node.args[0]))  # type: ignore[arg-type]
    return given_as_traced(node, load, module)


def given_as_traced(node: fx.Node, load: Callable[[fx.Node], Any], module: nn.Module | None = None) -> Any:
    """What a node gave as it was traced; `load` and `module` as for `computed`."""
    op, target, args = as_traced(node)
    if args is node.args:
        return computed(node, load, module)
    left, right = map(load, args)
    return getattr(left, target)(right) if op == "call_method" else target(left, right)


def read_as_traced(node: fx.Node) -> list[fx.Node]:
    """The values that a node read as it was traced, constants and sizes apart."""
    _, _, args = as_traced(node)
    return _values(node.all_input_nodes if args is node.args else args)


def _values(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if not VALUE.known(node) and not HELD.known(node) and not counts_sizes(node)]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _without_constants(load: Callable[[fx.Node], Any], node: fx.Node) -> Any:
    return None if VALUE.known(node) else load(node)
