"""Which channel each number is of, behind what moves and averages numbers: read off from numbers that tell them apart.

A map of each channel alone, `y = s x + t`, goes through whatever gives each number as a weighted mean of numbers of one
channel: permutations, reshapes, shuffles, upsampling, average pools. Where every channel is a constant, what comes out
shows which channel went where; anything else than these constants (a border of zeros, channels that are mixed) shows
that it does not. Largest values are as good as means, for a scale that is positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from structrep.graph.facts import CALL, SHAPE, STORED, UNFOLLOWED, VALUE
from structrep.graph.operations import does, module_does, rearranges, torch_name
from structrep.graph.queries import asked_of, counts_sizes
from structrep.graph.run import computed
from structrep.graph.shapes import rank
from structrep.graph.table import Is

MOST = 1 << 23  # numbers that are moved to see where they go
_SIZED = {"expand", "repeat", "unflatten", "interpolate", "expand_as", "view_as", "reshape_as",
          *(f"adaptive_avg_pool{dims}d" for dims in (1, 2, 3))}  # fmt: skip
_PASSES = (Is.MOVES, Is.AVERAGES, Is.PADS)  # a border of others is seen (`_agreed`)
_TURNS = {"T", "mT", "H", "mH"}
_SIZES = ((2, 5, 6, 7), (3, 4, 9, 2), (2, 14, 7, 28), (1, 8, 16, 4))  # of dims of which nothing else is known


@dataclass(frozen=True)
class Moved:
    """Where the channels of a value go.

    Args:
        of: for each channel behind, the one before it.
        shapes: of the value, for which that was seen.
    """

    of: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


def passes(node: fx.Node) -> bool:
    """Whether a node may only move, average or compare numbers of one value."""
    given = [one for one in node.all_input_nodes if not counts_sizes(one)]
    if STORED.get(node) or sum(not VALUE.known(one) for one in given) != 1:
        return False
    if any(isinstance(VALUE.get(one), Tensor) for one in given if VALUE.known(one)):
        return False  # an order in a buffer may be another one later
    if not all(_is_size(one, node) for one in node.all_input_nodes if counts_sizes(one)):
        return False
    if node.op == "call_module" and not rearranges(node):
        found: Callable[[Is], bool] = lambda what: module_does(CALL.of(node).module, what)  # noqa: E731
        return not UNFOLLOWED.get(node) and any(map(found, (*_PASSES, Is.MAXIMUM)))
    return rearranges(node) or permutes(node) or any(does(node, what) for what in _PASSES) or compares(node)


def _is_size(told: fx.Node, node: fx.Node) -> bool:
    """Whether a number that is made of sizes is the size of something, and nothing that numbers are moved by."""
    if not (does(node, Is.RESHAPES) or torch_name(node) in _SIZED):
        return False
    pending = [told]
    for one in pending:
        if asked_of(one) or torch_name(one) == "getitem":
            continue
        sizes = [n for n in one.all_input_nodes if counts_sizes(n)]
        whole = torch_name(one) == "mul" or (torch_name(one) == "floordiv" and sizes == [one.args[0]])
        if not whole:
            return False
        pending += sizes
    return True


def permutes(node: fx.Node) -> bool:
    """Whether a node exchanges the dims of a value in a way that no name of an operation tells."""
    if node.target is getattr:
        return node.args[1] in _TURNS
    if node.target is torch.einsum:
        given, _, found = str(node.args[0]).replace(" ", "").partition("->")
        return len(node.args) == 2 and len(set(given)) == len(given) and sorted(given) == sorted(found)
    return False


def compares(node: fx.Node) -> bool:
    """Whether a node gives the largest of numbers."""
    return module_does(CALL.of(node).module, Is.MAXIMUM) if node.op == "call_module" else does(node, Is.MAXIMUM)


def channels_behind(
    chain: Sequence[fx.Node], source: fx.Node, axis: int, count: int, behind: int, wanted: int
) -> Moved | None:
    """Where the channels of a value come to behind some nodes; None if nothing tells, or they are mixed.

    Args:
        axis, count: the dim of the value's channels, from the end, and how many there are.
        behind, wanted: the dim of the channels behind the nodes, and how many have to be there.
    """

    def seen(numbers: Tensor, channel: Tensor) -> tuple[int, ...] | None:
        rows = numbers.movedim(behind, 0).flatten(1)
        same = _near(rows[:, :1], channel)
        return same if same is not None and bool((rows - channel[list(same), None]).abs().max() < _SAME) else None

    return _agreed(chain, source, (axis, count), (behind, wanted), seen, folded=max(1, wanted // count))


def channels_before(
    chain: Sequence[fx.Node], source: fx.Node, axis: int, count: int, behind: int, wanted: int
) -> Moved | None:
    """The same the other way round: for each channel of the value, the one behind that all its numbers come to."""

    def seen(numbers: Tensor, channel: Tensor) -> tuple[int, ...] | None:
        rows = numbers.movedim(behind, 0).flatten(1)
        found = _near(rows.reshape(-1, 1), channel)
        if found is None:
            return None
        places = torch.arange(wanted, device="cpu").repeat_interleave(rows.shape[1])
        goes = torch.full((count,), -1, device="cpu").scatter(0, torch.tensor(found, device="cpu"), places)
        return tuple(goes.tolist()) if bool((goes[list(found)] == places).all()) and int(goes.min()) >= 0 else None

    return _agreed(chain, source, (axis, count), (behind, wanted), seen)


_SAME = 1e-9


def _near(numbers: Tensor, channel: Tensor) -> tuple[int, ...] | None:
    """The channels whose constants some numbers are; None if one is none."""
    ordered, order = channel.sort()
    places = torch.searchsorted(ordered, numbers.flatten() - _SAME).clamp(max=len(channel) - 1)
    near = bool((ordered[places] - numbers.flatten()).abs().max() < _SAME)
    return tuple(order[places].tolist()) if near else None


def _agreed(
    chain: Sequence[fx.Node],
    source: fx.Node,
    before: tuple[int, int],
    there: tuple[int, int],
    seen: Callable[[Tensor, Tensor], tuple[int, ...] | None],
    folded: int = 1,
) -> Moved | None:
    """What is seen for all shapes that a value may have, if it is the same for all of them.

    Args:
        before, there: the dim of the channels of the value and behind the nodes, and how many there are.
        folded: how many numbers of each channel are taken together, where no example tells sizes.
    """
    (axis, count), (behind, wanted) = before, there
    generator = torch.Generator("cpu").manual_seed(0)
    channel = torch.rand(count, dtype=torch.float64, generator=generator, device="cpu") + 1
    found: tuple[int, ...] | None = None
    shapes: list[tuple[int, ...]] = []
    for shape in _shapes(source, axis, count, folded):
        if math.prod(shape) > MOST:
            continue
        numbers = channel.reshape(-1, *[1] * (-axis - 1)).expand(shape).clone()
        try:
            given = _run(chain, source, numbers)
        except Exception:  # of this shape, nothing can be asked
            if shape == SHAPE.get(source):
                return None
            continue
        if not isinstance(given, Tensor) or not given.numel():
            continue
        if given.dim() < -behind or given.shape[behind] != wanted:
            continue
        one = seen(given, channel)
        if one is None or found not in (None, one):
            return None
        found = one
        shapes.append(shape)
    # One shape alone shows nothing, but where there is no other of as many numbers.
    free = {tuple(size for place, size in enumerate(shape) if place not in (0, len(shape) + axis)) for shape in shapes}
    told = len(free) > 1 or all(len(sizes) < 2 and 1 not in sizes for sizes in free)
    return Moved(found, tuple(shapes)) if found is not None and told else None


def _shapes(source: fx.Node, axis: int, count: int, folded: int) -> Iterator[tuple[int, ...]]:
    """Shapes that a value may have: that of the example and others, some of as many numbers, else such as come to the
    channels behind."""
    shape = tuple(SHAPE.of(source)) if SHAPE.known(source) else None
    known = len(shape) if shape is not None else rank(source)
    if known is None or known < max(2, -axis) or (shape is not None and shape[axis] != count):
        return  # other dims would be swapped where there are more
    own = [size for place, size in enumerate(shape) if place != known + axis] if shape is not None else None
    batch, *free = own or (2, *_SIZES[0][1:])[: known - 1]
    numbers = math.prod(free) if own else folded
    tried = [own] if own else []
    if len(free) > 1:
        parts = (1, *(part for part in (2, 3, 4, 5, 7, 8) if numbers % part == 0), numbers)
        same = [[part, *[1] * (len(free) - 2), numbers // part] for part in parts]
        tried += [[batch, *free[::-1]], *([batch, *sizes] for sizes in same)]
    tried += [[2 * batch, *free], [batch + 1, *free], [batch, *(2 * size for size in free)]]
    for place, size in enumerate(free):
        others = (2 * size, size + 1, size + 2, size + 3)
        tried += [[batch, *free[:place], other, *free[place + 1 :]] for other in others]
    for sizes in (*tried, *(list(some[: known - 1]) for some in _SIZES)):
        sizes.insert(known + axis, count)
        yield tuple(sizes)


def _run(chain: Sequence[fx.Node], source: fx.Node, numbers: Tensor) -> Any:
    """What some nodes make of numbers."""
    values: dict[fx.Node, Any] = {source: numbers}

    def load(node: fx.Node) -> Any:
        if node not in values:
            if VALUE.known(node):
                return VALUE.of(node)
            if not counts_sizes(node):
                raise LookupError(f"{torch_name(node)} is of something else")
            values[node] = computed(node, load)
        return values[node]

    for node in chain:
        values[node] = computed(node, load)
    return values[chain[-1]]
