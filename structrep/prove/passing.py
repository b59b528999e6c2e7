"""Each merged layer by what it passes on, within a run of the whole model."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from structrep.algebra import precision
from structrep.algebra.shadows import Shadows
from structrep.errors import WrongMerge
from structrep.graph.constants import held
from structrep.graph.facts import CALL, HELD, INDEX, SHAPE, VALUE
from structrep.match.merge import Merge, together
from structrep.modules.arguments import Example, as_arguments
from structrep.prove.region import Region, given_as_traced, read_as_traced
from structrep.prove.run import How, relative_error
from structrep.records.verification import RegionRecord


class Passing:
    """What the parts of the training-time model that merges change give as it runs, where the deploy model can be
    compared: the plan's own graph is run, as it was traced; nothing where it was made of other inputs than these."""

    def __init__(self, merges: Mapping[str, Merge], device: torch.device) -> None:
        main = [merge for merge in merges.values() if not merge.trace.path]
        regions = [Region(group, device) for group in together(main)]
        self.trace = main[0].trace if main else None
        self.regions = {merge: region for region in regions for merge in region.merges.values()}
        ordered = sorted(merges.items(), key=lambda item: int(INDEX.of(item[1].root)))
        self.where = {merge: where for where, merge in ordered if merge in self.regions}
        # what a value that the deploy model gives somewhere is added to, or stacked with, on its way out of a part
        self.wanted = {node for region in regions for node in (*region.outputs, *region.needs(region.merges))}

    def run(self, example_inputs: Example, how: How) -> dict[fx.Node, tuple[Tensor, Tensor]]:
        """The values that are wanted, and in float64, in order."""
        if self.trace is None or not self.wanted:
            return {}
        shadows, model, nodes = Shadows(), self.trace.root.module, self.trace.nodes
        inputs = pytree.tree_leaves(as_arguments(how.inputs(example_inputs, model, shadows)))
        given = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        places = [node for node in nodes if node.op == "placeholder"]
        alike = (one.shape[1:] == SHAPE.get(place, one.shape)[1:] for place, one in zip(places, given, strict=False))
        if len(places) != len(given) or not all(alike):
            return {}
        values: dict[fx.Node, Any] = dict(zip(places, given, strict=True))
        modules: dict[nn.Module, nn.Module] = {}
        found: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        uses = Counter(one for node in nodes for one in read_as_traced(node))

        def load(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            one = VALUE.of(node) if VALUE.known(node) else HELD.of(node)
            if not (isinstance(one, Tensor) and one.is_floating_point()):
                return one
            twin = one.detach().to(how.device, how.dtype if how.cast else None, copy=True)
            shadows.give(twin, precision.doubled(held(node)).to(how.device))
            return twin

        with how.running(), contextlib.suppress(Exception):  # a graph may hold for one size of batch alone
            for node in nodes:
                if node.op not in ("placeholder", "get_attr", "output") and not VALUE.known(node):
                    module = CALL.of(node).module if node.op == "call_module" else None
                    if module is not None and module not in modules:
                        modules[module] = how.model(module, shadows)
                    with shadows:
                        values[node] = given_as_traced(node, load, None if module is None else modules[module])
                if node in self.wanted and isinstance(values.get(node), Tensor):
                    value, exact = values[node].detach(), shadows.of(values[node]).detach()
                    found[node] = value.clone(), exact.clone()
                uses.subtract(read := read_as_traced(node))
                for used in read:
                    if not uses[used]:
                        values.pop(used, None)
        return found

    def records(
        self,
        watched: Mapping[str, Tensor],
        found: Mapping[fx.Node, tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        floor: float,
    ) -> Iterator[RegionRecord]:
        """Each merged layer, in order: by what it gives in the deploy model the outputs of its part are made anew."""
        most = floor  # rounding does not get less on the way, as a measure of it in one layer may
        truth = {node: exact for node, (_, exact) in found.items()}
        for merge, where in self.where.items():
            region = self.regions[merge]
            below = [node for node in region.below(merge) if node in truth]
            given = {
                root: precision.doubled(watched[self.where[one]])
                for root, one in region.merges.items()
                if self.where[one] in watched
            }
            try:
                known = {node: truth[node] for node in region.inputs if node in truth}
                ours = region.after({**known, **given}, {}, dtype, below)
            except (WrongMerge, RuntimeError):
                continue  # of another shape, or never run
            pairs = [(ours[node].to(truth[node]), *found[node]) for node in below]
            if pairs and all(mine.shape == right.shape for mine, _, right in pairs):
                most = max(most, *(relative_error(other, right) for _, other, right in pairs))
                error = max(relative_error(mine, right) for mine, _, right in pairs)
                yield RegionRecord(where=where, rules=merge.rules, error=error, noise=most)
