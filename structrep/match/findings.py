"""All that a search has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from structrep.errors import Refusal
from structrep.graph.calls import Traced
from structrep.guard.adapters import Adapters
from structrep.guard.callers import Callers
from structrep.guard.other_forwards import Borders, MethodsByVariant
from structrep.guard.sharing import Replicas
from structrep.match.merge import Merge, Missed
from structrep.registry import Registry

if TYPE_CHECKING:
    from structrep.match.search import Search


@dataclass(eq=False)
class Findings:
    """What planning a traced model gave."""

    traced: Traced
    registry: Registry
    inexact_borders: tuple[str, ...] = ()  # globs: merges that touch such a layer may differ at the border
    beforehand: tuple[Missed, ...] = ()  # refusals from before the search
    blocks: tuple[str, ...] = ()  # modules by path, inside each of which is all that may be merged; () for anywhere
    unwritable: Mapping[tuple[str, str], Refusal] = field(default_factory=dict)  # methods that cannot be written anew
    slower: Mapping[tuple[fx.Node, fx.Node], Refusal] = field(default_factory=dict)  # stretches, by base and root
    excluded: Mapping[str, str] = field(default_factory=dict)  # layers by path that stay as they are, and why
    followed: MethodsByVariant = field(default_factory=dict)
    merges: list[Merge] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)
    replicas: Replicas = field(init=False)
    borders: Borders = field(init=False)
    callers: Callers = field(init=False)
    adapters: Adapters = field(init=False)

    def __post_init__(self) -> None:
        self.callers = Callers(self.traced)
        self.adapters = Adapters(self.traced.model, self.excluded)
        self.look_again()

    def look_again(self) -> None:
        """Forget what was seen of graphs, one of which was changed."""
        self.replicas, self.borders = Replicas(self.traced), Borders(self.traced, self.followed)
