"""A norm behind a sum of layers of several inputs: each takes its scale, and one its shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from structrep.algebra import ConvMap
from structrep.match.absorption import Absorption, axis_of, is_alone, layer_behind, maker_of, users_of
from structrep.match.pieces import spread
from structrep.terms.layer import Blend, Concat, Layer, Readings, Sum


def by_summands(
    node: fx.Node, scale: Layer, readings: Readings, found: Mapping[fx.Node, Absorption]
) -> Absorption | None:
    """What is scaled are layers of several inputs, added, and of use to nothing else: one takes the shift too."""
    assert scale.source is not None
    sum_ = maker_of(scale.source, readings)
    if not isinstance(readings.get(sum_), Sum) or not is_alone(sum_, node, scale, readings):
        return None
    parts = _summands(sum_, readings)
    shifted = next((part for part, sign, _ in parts if sign == 1.0), None)
    behind: dict[fx.Node, Layer] = {}
    turns = moves = False
    for part, _, user in parts:
        maker = maker_of(part, readings)
        given = scale if part is shifted else _without_shift(scale)
        taken = _itself(maker, given, axis_of(node, scale), readings) or layer_behind(
            maker, given, axis_of(node, scale), readings, found
        )
        if shifted is None or users_of(maker, readings) != [user] or taken is None or taken[0] in behind:
            return None
        maker, (behind[maker], of) = taken
        turns |= of not in (None, tuple(range(len(of or ()))))
        moves |= of is not None
    bases = [_linear(maker, readings) for maker in behind]
    if len(frozenset.intersection(*bases)):
        return None  # as a whole they may be one layer
    return Absorption(node, scale.source, scale.through, {}, behind, turns=turns, moves=moves)


def _itself(
    maker: fx.Node, scale: Layer, axis: int | None, readings: Readings
) -> tuple[fx.Node, tuple[Layer, None]] | None:
    """What is scaled is a scale already, of a layer before it perhaps."""
    layer = readings.get(maker)
    if not isinstance(layer, Layer) or not layer.scales or axis is None or scale.in_channels is None:
        return None
    return maker, (spread(scale, scale.in_channels, -axis - 1), None)


def _summands(sum_: fx.Node, readings: Readings) -> list[tuple[fx.Node, float, fx.Node]]:
    """What is added up, by way of other sums that nothing else reads, each with its coefficient and what adds it."""
    found = []
    pending = [(sum_, 1.0)]
    for one, sign in pending:
        reading = readings[one]
        assert isinstance(reading, Sum)
        for part, coefficient in reading.parts:
            maker = maker_of(part, readings)
            inner = isinstance(readings.get(maker), Sum) and users_of(maker, readings) == [one]
            if inner:
                pending.append((maker, sign * coefficient))
            else:
                found.append((part, sign * coefficient, one))
    return found


def _linear(node: fx.Node, readings: Readings) -> frozenset[fx.Node]:
    """What a value is a linear map of, and all that stands between."""
    pending, seen = [node], {node}
    for one in pending:
        reading = readings.get(one)
        sources = (
            [part for part, _ in reading.parts] if isinstance(reading, (Sum, Blend))
            else reading.parts if isinstance(reading, Concat)
            else [reading.source] if reading is not None and reading.source is not None
            else []
        )  # fmt: skip
        new = [source for source in sources if source not in seen]
        seen.update(new)
        pending += new
    return frozenset(seen)


def _without_shift(scale: Layer) -> Layer:
    def load(c: int, d: int) -> ConvMap:
        return ConvMap.scale(scale.load(c, d).kernel.flatten(), dims=d)

    return replace(scale, load=load, shifts=False)
