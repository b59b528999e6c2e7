"""Who asks for the type or the settings of a layer, which a merge changes: as the trace ran, or perhaps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import fx, nn

from structrep.graph.calls import Call, Introspection, Traced
from structrep.graph.facts import CALL
from structrep.modules.introspection import FIRST, asks, resolve


class Asking:
    """The questions about the parts of a model.

    Where a forward was followed, those that it asked as it ran. Where it was not, those that it may ask by its source.
    What one that was followed may ask on other paths is no reason to refuse a merge: it is written anew, with guards.
    """

    def __init__(self, traced: Traced) -> None:
        self.found: dict[str, list[Introspection]] = defaultdict(
            list, {k: [*v] for k, v in traced.introspections.items()}
        )
        self.traced = traced
        self.perhaps: dict[tuple[nn.Module, str], frozenset[str]] = {}
        for path in sorted(traced.whole | traced.untraced.keys()):
            module = traced.model.get_submodule(path)
            if isinstance(module, torch.jit.ScriptModule):
                continue  # which asks nothing outside of itself
            methods = {method for where, method in traced.observed.calls if where == path}
            by = [(name, 0) for name in ("forward", "__call__", *sorted(methods))]
            for below, one in asks(module, by, picked=True):
                if one.what != FIRST or not _is_uniform(module):
                    where = ".".join(filter(None, (path, below)))
                    self.found[where].append(Introspection(None, path, one.what, one.file, one.line))

    def otherwise(self, nodes: Iterable[fx.Node]) -> set[Call]:
        """The calls whose code may ask layers of a merge for something, on a path that was not taken."""
        layers = {CALL.of(node) for node in nodes if node.op == "call_module"}
        around = dict.fromkeys(call for layer in layers for call in layer.chain() if not call.leaf)
        around |= dict.fromkeys(self.traced.above(around))
        return {one for one in around if not self._may_ask(one).isdisjoint(layer.path for layer in layers)}

    def _may_ask(self, call: Call) -> frozenset[str]:
        key = call.module, call.method
        if key not in self.perhaps:
            found = set()
            for below, one in asks(call.module, [(call.method, 0)], picked=False):
                part = next(iter(resolve(call.module, tuple(filter(None, below.split("."))))))[1]
                tensor = part._parameters.get(one.what, part._buffers.get(one.what))
                if one.what != FIRST and tensor is None:  # numbers that code uses are another matter
                    found.add(".".join(filter(None, (call.path, below))))
            self.perhaps[key] = frozenset(found)
        return self.perhaps[key]


def _is_uniform(module: nn.Module) -> bool:
    """Whether all parameters of a module are of one dtype and on one device."""
    return len({(parameter.dtype, parameter.device) for parameter in module.parameters()}) <= 1
