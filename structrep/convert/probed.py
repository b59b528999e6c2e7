"""Layers whose code is not read, as maps: those that the user names, and layers of peft's with adapters."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from structrep.algebra import ConvMap
from structrep.convert.selection import Selection
from structrep.errors import Refusal, Unreadable, said
from structrep.graph.facts import CALL
from structrep.graph.observed import Observed
from structrep.match.merge import Missed
from structrep.modules.copies import own_copy
from structrep.modules.parametrized import hooks
from structrep.modules.wrappers import base_of, is_own, stands_in
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
            found[path] = _of_adapter(layer, *given) if stands_in(layer) else probe(layer, *given)
        except Refusal as reason:
            refused.append(Missed(path, "-", "probed", reason, (path,)))
    return found, refused


def unmerged_adapters(model: nn.Module, selection: Selection) -> Collection[str]:
    """The paths of peft's own layers with adapters that are not merged, and might be one layer: they are made to be
    linear, and of classes of others nobody knows that."""
    calls = (call for merge in selection.merges for node in merge.nodes for call in CALL.of(node).chain())
    merged = {call.path for call in calls if stands_in(call.module)}
    kept = selection.findings.excluded.keys() | merged
    layers = ((path, one) for path, one in model.named_modules() if stands_in(one) and path not in kept)
    linear = ((path, one) for path, one in layers if not isinstance(base_of(one), nn.Embedding))
    return [path for path, one in linear if is_own(one) and not hooks(one)]


def _of_adapter(layer: nn.Module, example: Any) -> ConvMap:
    """The map of a layer of peft's; one of the last dim is given rows.

    Raises:
        Unreadable: it is none, or not for rows, or writes to its weights as it runs.
    """
    conv = isinstance(base_of(layer), nn.modules.conv._ConvNd)
    rows = example if conv or not isinstance(example, Tensor) or example.ndim <= 2 else example.flatten(0, -2)
    twin = own_copy(layer)
    held = (*twin.parameters(), *twin.buffers())
    before = [tensor._version for tensor in held]
    try:
        with torch.no_grad():
            twin(rows)
        if [tensor._version for tensor in held] != before:
            raise Unreadable(f"{type(layer).__name__} writes to its weights as it runs")
        return probe(twin, rows)
    except Refusal:
        raise
    except Exception as error:  # of code that wants its input in another shape
        raise Unreadable(f"{type(layer).__name__} cannot be probed: {said(error)}") from error
