"""Where the boxes of a drawn graph go: in layers, each below all that leads to it (Sugiyama, Tagawa and Toda, Methods
for Visual Understanding of Hierarchical System Structures, 1981)."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx

ROW, COLUMN, EDGE = 18.0, 14.0, 7.0  # pixels between boxes above each other and beside each other, and around all
SWEEPS = 8  # over all layers, down and up in turn


@dataclass(frozen=True)
class Bend:
    """Where lines of one style that start from one box pass a layer."""

    source: Hashable
    style: str
    layer: int

    size = (4.0, 0.0)


@dataclass
class Layout:
    """Middles of boxes, and lines as SVG paths by style, in pixels."""

    at: dict[Hashable, tuple[float, float]] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    width: float = 0.0
    height: float = 0.0


def layout(graph: nx.DiGraph, sizes: Mapping[Hashable, tuple[float, float]]) -> Layout:
    """Places for the nodes of an acyclic graph, whose edges have a `style`; parts that are not connected go below each
    other.

    Args:
        sizes: widths and heights of the nodes, in pixels.
    """
    result = Layout()
    place = {node: index for index, node in enumerate(graph)}
    components = [sorted(nodes, key=place.__getitem__) for nodes in nx.weakly_connected_components(graph)]
    for nodes in sorted(components, key=lambda nodes: place[nodes[0]]):
        _Component(graph, nodes, sizes, result.height).draw(result)
    return result


class _Component:
    """What is connected: its boxes and the bends of its lines in layers."""

    def __init__(
        self, graph: nx.DiGraph, nodes: list[Hashable], sizes: Mapping[Hashable, tuple[float, float]], top: float
    ) -> None:
        own = graph.subgraph(nodes)
        layer = {node: index for index, found in enumerate(nx.topological_generations(own)) for node in found}
        self.knots: nx.DiGraph = nx.DiGraph()
        self.knots.add_nodes_from(nodes)
        for source, target, style in own.edges(data="style"):
            way = [Bend(source, style, index) for index in range(layer[source] + 1, layer[target])]
            nx.add_path(self.knots, [source, *way, target], style=style)
        self.layers: list[list[Hashable]] = [[] for _ in range(max(layer.values()) + 1)]
        for knot in self.knots:
            self.layers[knot.layer if isinstance(knot, Bend) else layer[knot]].append(knot)
        self.sizes = {knot: Bend.size if isinstance(knot, Bend) else sizes[knot] for knot in self.knots}
        self._order()
        self.x = self._columns()
        self.rows = self._rows(top)

    def _order(self) -> None:
        """Sort each layer by the middles of what its boxes are connected to, so that few lines cross."""
        for sweep in range(SWEEPS):
            beside = self.knots.successors if sweep % 2 else self.knots.predecessors
            before: dict[Hashable, int] = {}
            for layer in reversed(self.layers) if sweep % 2 else self.layers:
                middles = [_mean([before[one] for one in beside(knot)], place) for place, knot in enumerate(layer)]
                layer[:] = [layer[place] for place in sorted(range(len(layer)), key=middles.__getitem__)]
                before = {knot: place for place, knot in enumerate(layer)}

    def _columns(self) -> dict[Hashable, float]:
        """The horizontal places: near those of what a box is connected to, and no two boxes over each other."""
        x: dict[Hashable, float] = dict.fromkeys(self.knots, 0.0)
        for sweep in range(SWEEPS):
            beside = self.knots.successors if sweep % 2 else self.knots.predecessors
            for layer in reversed(self.layers) if sweep % 2 else self.layers:
                self._place(layer, x, {knot: _mean([x[one] for one in beside(knot)], x[knot]) for knot in layer})
        for layer in self.layers:  # lines that could be straight are
            self._place(layer, x, {knot: x[self._above(knot)] for knot in layer})
        left = min(x[knot] - self.sizes[knot][0] / 2 for knot in x) - EDGE
        return {knot: at - left for knot, at in x.items()}

    def _place(self, layer: list[Hashable], x: dict[Hashable, float], wanted: Mapping[Hashable, float]) -> None:
        """Put a layer where it wants to be, as far as there is room."""
        widths = [self.sizes[knot][0] for knot in layer]
        x |= zip(layer, _apart([wanted[knot] for knot in layer], widths), strict=True)

    def _above(self, knot: Hashable) -> Hashable:
        """What alone leads to a box and nowhere else; the box itself if there is nothing like it."""
        above = list(self.knots.predecessors(knot))
        return above[0] if len(above) == 1 and self.knots.out_degree(above[0]) == 1 else knot

    def _rows(self, top: float) -> dict[Hashable, tuple[float, float]]:
        """The upper and the lower side of the layer of each box."""
        rows: dict[Hashable, tuple[float, float]] = {}
        y = top + EDGE
        for layer in self.layers:
            bottom = y + max(self.sizes[knot][1] for knot in layer)
            rows |= dict.fromkeys(layer, (y, bottom))
            y = bottom + ROW
        return rows

    def draw(self, onto: Layout) -> None:
        sides = {knot: self._sides(knot) for knot in self.knots}
        for knot in self.knots:
            if not isinstance(knot, Bend):
                onto.at[knot] = self.x[knot], sum(sides[knot]) / 2
        for source, target, style in self.knots.edges(data="style"):
            (start, x), (end, to) = (sides[source][1], self.x[source]), (sides[target][0], self.x[target])
            middle = (start + end) / 2
            line = f"M{x:.1f} {start:.1f}C{x:.1f} {middle:.1f} {to:.1f} {middle:.1f} {to:.1f} {end:.1f}"
            if isinstance(target, Bend):
                line += f"V{sides[target][1]:.1f}"
            else:
                onto.heads[style] = onto.heads.get(style, "") + f"M{to:.1f} {end:.1f}l-3-5.5h6z"
            onto.lines[style] = onto.lines.get(style, "") + line
        onto.width = max(onto.width, *(self.x[knot] + self.sizes[knot][0] / 2 + EDGE for knot in self.knots))
        onto.height = max(bottom for _, bottom in self.rows.values()) + EDGE

    def _sides(self, knot: Hashable) -> tuple[float, float]:
        """Where lines reach a box and where they leave it; a bend is as tall as its layer."""
        top, bottom = self.rows[knot]
        if isinstance(knot, Bend):
            return top, bottom
        middle, tall = (top + bottom) / 2, self.sizes[knot][1]
        return middle - tall / 2, middle + tall / 2


def _mean(values: Sequence[float], otherwise: float) -> float:
    return statistics.fmean(values) if values else otherwise


def _apart(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """The places nearest to those wanted, in the same order, at which boxes of these widths are apart: isotonic
    regression, by pooling neighbours that would be in each other's way."""
    offsets = [0.0]
    for one, other in itertools.pairwise(widths):
        offsets.append(offsets[-1] + (one + other) / 2 + COLUMN)
    pools: list[list[float]] = []
    for place, offset in zip(wanted, offsets, strict=True):
        pools.append([place - offset])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    level = [statistics.fmean(pool) for pool in pools for _ in pool]
    return [at + offset for at, offset in zip(level, offsets, strict=True)]
