"""Refusals: what was not merged, where, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from structrep.errors import Refusal
from structrep.graph.names import layers_of, path_of
from structrep.match.merge import Missed


class Refusals:
    """Refusals of a search, each with the node that it is about; the first for each node and rule counts.

    Args:
        known: those that there are already.
    """

    def __init__(self, known: Iterable[tuple[fx.Node, Missed]] = ()) -> None:
        self.missed = [*known]
        self._noted = {(node, miss.rule) for node, miss in self.missed}

    def note(self, nodes: Sequence[fx.Node], rule: str, what: str, reason: Refusal) -> None:
        """Note a refusal of what ends at the last of these nodes."""
        root = nodes[-1]
        reason.__traceback__ = reason.__context__ = None  # whose frames hold kernels
        if (root, rule) not in self._noted:
            self.add(root, Missed(path_of(root) or "(root)", rule, what, reason, layers_of(nodes)))

    def add(self, node: fx.Node, miss: Missed) -> None:
        """Note one more, whatever is known of that node."""
        self.missed.append((node, miss))
        self._noted.add((node, miss.rule))
