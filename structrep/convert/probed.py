"""Layers whose code is not read, as maps: those that the user names, and layers of peft's with adapters."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from structrep.algebra import ConvMap
from structrep.convert.selection import Selection
from structrep.errors import Refusal, Unreadable
from structrep.graph.facts import CALL
from structrep.graph.observed import Observed
from structrep.match.merge import Missed
from structrep.modules.parametrized import hooks
from structrep.modules.wrappers import base_of, stands_in
from structrep.read.probe import probe

Maps = dict[str, ConvMap]


def probed(model: nn.Module, observed: Observed) -> tuple[Maps, list[Missed]]:
    """The maps that layers were found to be, of which the arguments were captured, and why others were not."""
    found: Maps = {}
    refused: list[Missed] = []
    for path in sorted(observed.capture):
        given = observed.captured.get(path, ())
        layer = model.get_submodule(path)
        try:
            if len(given) != 1:
                raise Unreadable("the model does not call it with one argument for the example inputs")
            example = _rows(*given) if stands_in(layer) and not _is_conv(layer) else given[0]
            found[path] = probe(layer, example)
        except Refusal as reason:
            refused.append(Missed(path, "-", "probed", reason, (path,)))
    return found, refused


def unmerged_adapters(model: nn.Module, selection: Selection) -> Collection[str]:
    """The paths of layers with adapters that are not merged, and might be one layer: they are made to be linear."""
    calls = (call for merge in selection.merges for node in merge.nodes for call in CALL.of(node).chain())
    merged = {call.path for call in calls if stands_in(call.module)}
    kept = selection.findings.excluded.keys() | merged
    layers = ((path, one) for path, one in model.named_modules() if stands_in(one) and path not in kept)
    return [path for path, one in layers if not hooks(one) and not isinstance(base_of(one), nn.Embedding)]


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(base_of(layer), nn.modules.conv._ConvNd)


def _rows(example: Any) -> Any:
    """An input of a layer of the last dim as (N, C)."""
    return example.flatten(0, -2) if isinstance(example, Tensor) and example.ndim > 2 else example
