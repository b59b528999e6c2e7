"""The differential test of merges: both forms on random input, each on its own part of the graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx

from structrep.algebra import ConvMap, precision
from structrep.errors import BadInput, WrongMerge, listed, said
from structrep.graph.facts import SHAPE
from structrep.graph.shapes import spatial_size
from structrep.match.merge import Merge
from structrep.prove.region import Region, Shapes, Trials, room
from structrep.prove.run import relative_error
from structrep.read.lower import lower, lower_table
from structrep.records.plan import BorderRecord
from structrep.registry import COEFFICIENT_ROUNDING


def prove(merges: Sequence[Merge]) -> None:
    """Run the part of a graph that some merges change as it was traced, and as it will be written, on random float64
    values of tiny and odd sizes.

    The layers that are run are those that would be written, their pads as modules have them. Where the user allowed
    another border, only what is made of nothing outside the input is compared.

    Args:
        merges: one, or all that have something in common (`merge.together`).

    Raises:
        WrongMerge: the two differ, or there were no sizes that the part itself accepts.
    """
    both = _Both(merges)
    open_ = any(merge.fit.strictness == "inside" for merge in merges)
    found: list[tuple[str, fx.Node, Tensor, Tensor]] = []
    tried: dict[str, None] = {}

    def take_first(shapes: Iterable[Shapes]) -> None:
        for one in shapes:
            what = " and ".join(dict.fromkeys(map(str, one.values())))
            tried[what] = None
            if (compared := both(one, what)) is None:
                continue  # too small for the layers as they were, or of other dims
            for node, (before, after) in compared.items():
                if before.shape != after.shape:
                    shapes_ = f"the layers give {tuple(before.shape)}, merged {tuple(after.shape)}"
                    raise WrongMerge(f"on an input of shape {what} {shapes_}")
                inside = ~torch.isnan(after) if open_ else torch.ones_like(after, dtype=torch.bool)
                found.append((what, node, before[inside], after[inside]))
            return

    for shapes in both.trials.usual():
        take_first(shapes)
    if not found:
        take_first(both.trials.rest())
    # An output of the smallest size may be made of pads alone, and be 0: rounding is relative to all there is.
    peaks: dict[fx.Node, float] = {}
    found = [one for one in found if one[2].numel()]
    for _, node, before, _ in found:
        peaks[node] = max(peaks.get(node, 0.0), float(before.abs().max()))
    for what, node, before, after in found:
        error = float((after - before).abs().max()) / peaks[node] if peaks[node] else relative_error(after, before)
        if not error <= COEFFICIENT_ROUNDING:
            raise WrongMerge(
                f"on an input of shape {what} what is merged is off by {error:.1e}, relative to the largest output"
            )
    if not found:
        known = all(SHAPE.known(node) for node in both.region.inputs)
        raise WrongMerge(
            f"the layers take no input of shape {listed(tried)}, so nothing can be compared"
            + ("" if known else ": pass example_inputs, which tell what they take")
        )


def border(merge: Merge, merges: Sequence[Merge]) -> BorderRecord:
    """How far a merge is off where it reads outside its input, on random input of the example's size, or one of 32.

    Args:
        merges: all that it has something in common with, itself among them.
    """
    both = _Both(merges, everywhere=True)
    base, size = merge.base, spatial_size(merge.base)
    if both.region.inputs == [base]:
        least = next(both.trials.of((5, 6, 7), spare=True))[base][2:]
        trials = both.trials.at(base, size or tuple(max(32, n) for n in least))
    else:
        trials = itertools.chain(both.trials.example(), both.trials.of((32, 33, 34), spare=True))
    for shapes in trials:
        if (compared := both(shapes, str(shapes))) is not None:
            before, after = compared[both.region.below(merge)[0]]
            peak = before.abs().max()
            off = ((after - before).abs() > COEFFICIENT_ROUNDING * peak).flatten(0, 1).any(0)
            return BorderRecord(
                size=shapes.get(base, before.shape)[2:],
                pixels=int(off.sum()),
                of=off.numel(),
                error=float((after - before).abs().max() / peak),
            )
    raise BadInput(f"{merge.term} takes no input of {size or 32} pixels, so its border cannot be looked at")


class _Both:
    """The part of a graph that some merges change, as it was and as it will be, on the same random values.

    Args:
        everywhere: give also what is made of something outside the input, where that may differ, instead of NaN.
    """

    def __init__(self, merges: Sequence[Merge], everywhere: bool = False) -> None:
        maps = {merge: merge.value() for merge in merges}
        weights = [leaf.weight for merge in merges for leaf in merge.term.leaves() if leaf.weight is not None]
        there = next((weight.device for weight in weights), torch.device("cpu"))
        # of what the model is given no dtype is known: that of its weights, or one that it writes down
        self.dtypes = dict.fromkeys([*(weight.dtype for weight in weights), torch.float32])
        self.region = Region(merges, precision.exact(there))
        self.layers = {merge: self._layer(merge, map_, everywhere) for merge, map_ in maps.items()}
        self.trials = Trials(self.region, maps)
        self.generator = torch.Generator().manual_seed(0)

    def _layer(self, merge: Merge, map_: ConvMap, everywhere: bool) -> Callable[[Tensor], Tensor]:
        like = map_.kernel.to(self.region.device)
        layer = lower_table(map_, like) if merge.is_table else lower(map_, like)
        if everywhere or merge.fit.strictness != "inside":
            return layer

        def inside(x: Tensor) -> Tensor:
            found: Tensor = layer(x)
            masked = torch.full_like(found, torch.nan)
            whole, some = (map_.geometry.inside(one, x.shape[2:], room(merge)) for one in (found, masked))
            some.copy_(whole)
            return masked

        return inside

    def __call__(self, shapes: Shapes, what: str) -> dict[fx.Node, tuple[Tensor, Tensor]] | None:
        """Each output, before and after; None if the part takes no values of these shapes.

        Raises:
            WrongMerge: merged it takes none.
        """
        with torch.no_grad():
            for dtype in self.dtypes:
                try:
                    given = self.trials.given(shapes, self.layers, dtype, self.generator)
                    before = self.region.before(given, dtype)
                except (RuntimeError, ValueError, IndexError):
                    continue
                try:
                    after = self.region.after(given, self.layers, dtype)
                except (RuntimeError, ValueError, IndexError) as reason:
                    raise WrongMerge(f"merged it does not take an input of shape {what}: {said(reason)}") from reason
                return {node: (value, after[node]) for node, value in before.items()}
        return None
