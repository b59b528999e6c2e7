"""Layers with adapters, whose own `merge` puts these into the weights once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx, nn

from structrep.errors import Hooked, Shared
from structrep.graph.calls import Call
from structrep.graph.facts import CALL, VALUE
from structrep.graph.queries import asks_dtype, counts_sizes, only_asserted
from structrep.modules.parametrized import hooks
from structrep.modules.wrappers import stands_in


class Adapters:
    """The layers with adapters in a model: they are merged whole, or not at all.

    Args:
        kept: layers by path that stay as they are, and why.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, str]) -> None:
        self.kept = kept
        self.any = bool(kept) or any(map(stands_in, model.modules()))

    def check(self, changed: set[fx.Node], inside: set[fx.Node], same: Callable[[fx.Node], bool]) -> None:
        """Raise if a layer with adapters would be merged in part: its own `merge` would do that part again.

        Args:
            changed: nodes that a merge takes away.
            inside: those, and nodes between that do nothing.
            same: whether a node does nothing.

        Raises:
            Shared: it would be, or it is to stay as it is.
            Hooked: it has a hook.
        """
        if not self.any:
            return
        around = [set(CALL.of(node).chain()) for node in changed]
        for call in set[Call]().union(*around):
            if call.path in self.kept and (stands_in(call.module) or any(call not in one for one in around)):
                raise Shared(self.kept[call.path])
            if not stands_in(call.module):
                continue
            if hooks(call.module):
                raise Hooked(f"{call.path} has a forward hook, and adapters, which are merged with it or not at all")
            rest = [n for n in call.nodes() if n not in inside and not VALUE.known(n) and not only_asserted(n)]
            if not all(asks_dtype(n) or counts_sizes(n) or same(n) for n in rest):
                raise Shared(f"{call.path} would be merged in part, and its own merge() does that part again")
