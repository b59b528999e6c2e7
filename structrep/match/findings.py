"""All that a search has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from structrep.algebra import ConvMap
from structrep.errors import Refusal
from structrep.graph.calls import Traced
from structrep.guard.callers import Callers
from structrep.guard.other_forwards import Borders
from structrep.guard.sharing import Replicas
from structrep.match.merge import Merge, Missed, Segment
from structrep.modules.wrappers import stands_in

KEPT = 2**25  # bytes of merged maps that are held until they are placed, if that is done at once

if TYPE_CHECKING:
    from structrep.match.search import Search


@dataclass(eq=False)
class Findings:
    """What planning a traced model gave."""

    traced: Traced
    inexact_borders: tuple[str, ...] = ()  # globs: merges that touch such a layer may differ at the border
    beforehand: tuple[Missed, ...] = ()  # refusals from before the search
    blocks: tuple[str, ...] = ()  # modules by path, inside each of which is all that may be merged; () for anywhere
    unwritable: Mapping[tuple[str, str], Refusal] = field(default_factory=dict)  # methods that cannot be written anew
    slower: Mapping[tuple[fx.Node, fx.Node], Refusal] = field(default_factory=dict)  # stretches, by base and root
    kept: Mapping[str, str] = field(default_factory=dict)  # layers by path that stay as they are, and why
    merges: list[Merge] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)
    replicas: Replicas = field(init=False)
    borders: Borders = field(init=False)
    callers: Callers = field(init=False)

    def __post_init__(self) -> None:
        self.replicas, self.borders = Replicas(self.traced), Borders(self.traced)
        self.callers = Callers(self.traced)
        self.adapted = bool(self.kept) or any(map(stands_in, self.traced.model.modules()))
        self.forget()

    def hold(self, stretch: Sequence[Segment], map_: ConvMap) -> None:
        """Keep a stretch's map at hand, in the place of an earlier one, while there is room."""
        ends = stretch[0].base, stretch[-1].root
        if (old := self.made.pop(ends, None)) is not None:
            self.room += old.kernel.nbytes
        if map_.kernel.nbytes <= self.room:
            self.made[ends] = map_
            self.room -= map_.kernel.nbytes

    def forget(self) -> None:
        """Hold no map any more."""
        self.made: dict[tuple[fx.Node, fx.Node], ConvMap] = {}  # of stretches, by base and root
        self.room = KEPT
