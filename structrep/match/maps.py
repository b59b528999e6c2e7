"""Merged maps, cached, so that they need not be computed once more when they are placed."""

from __future__ import annotations

from torch import fx

from structrep.algebra import ConvMap
from structrep.match.stretch import Stretch

ROOM = 2**25  # bytes of merged maps that a search holds


class MergedMaps:
    """The maps of stretches, by base and root, while there is room."""

    def __init__(self) -> None:
        self._made: dict[tuple[fx.Node, fx.Node], ConvMap] = {}
        self._room = ROOM

    def hold(self, stretch: Stretch, map_: ConvMap) -> None:
        """Cache a stretch's map, in the place of an earlier one."""
        ends = stretch.base, stretch.root
        if (old := self._made.pop(ends, None)) is not None:
            self._room += old.kernel.nbytes
        if map_.kernel.nbytes <= self._room:
            self._made[ends] = map_
            self._room -= map_.kernel.nbytes

    def get(self, stretch: Stretch) -> ConvMap | None:
        return self._made.get((stretch.base, stretch.root))
