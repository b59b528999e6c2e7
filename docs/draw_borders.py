"""The pictures of the border law: `python docs/draw_borders.py`. The numbers in them are what `ConvMap` computes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle
from torch import Tensor

from structrep import ConvMap

PICTURES = Path(__file__).parent / "images"
PAPER, INK, FAINT = "#f8f8fa", "#212121", "#616161"  # a sheet of its own, so that light and dark pages look alike
PLAIN, OUTSIDE, RIGHT, WRONG = "#d4dcf5", "#ffffff", "#bfe3c4", "#f7b9b5"
BRANCHES = {"3x3": "#3f51b5", "3x1": "#00897b", "1x1": "#c2410c", "identity": "#6d4c41"}
WIDTH = 5.2  # inches: letters are still readable where a phone shows it at two thirds

PIXELS = torch.tensor([3.0, 1.0, 2.0, 4.0])
FIRST = ConvMap(torch.full((1, 1, 1), 2.0), torch.tensor([1.0]))
SECOND = ConvMap(torch.ones(1, 1, 3), pad=1)


def sheet(name: str, left: float, right: float, bottom: float) -> tuple[Figure, Axes]:
    """An empty picture, one unit a pixel; rows go down from 0."""
    matplotlib.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 11, "text.color": INK})
    figure = pyplot.figure(figsize=(WIDTH, WIDTH * bottom / (right - left)), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(left, right), ylim=(bottom, 0), aspect="equal")
    axes.axis("off")
    return figure, axes


def written(figure: Figure) -> bytes:
    """The picture as SVG, the same on every run."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", facecolor=PAPER, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return re.sub(rb"[ \t]+\n", b"\n", out.getvalue())


def cell(axes: Axes, x: float, y: float, text: str = "", colour: str = PLAIN, dashed: bool = False) -> None:
    style = "--" if dashed else "-"
    axes.add_patch(Rectangle((x - 0.46, y - 0.4), 0.92, 0.8, facecolor=colour, edgecolor=FAINT, linestyle=style))
    axes.text(x, y, text, ha="center", va="center")


def row(axes: Axes, y: float, label: str, values: Mapping[int, str], colours: Mapping[int, str] | None = None) -> None:
    """Numbers by their place, those outside the input dashed, under a line that says what they are."""
    axes.text(-1.46, y - 0.68, label, va="center")
    for place, text in values.items():
        outside = not 0 <= place < len(PIXELS)
        cell(axes, place, y, text, (colours or {}).get(place, OUTSIDE if outside else PLAIN), dashed=outside)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color=FAINT, linewidth=0.8))


def number(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def read(values: Tensor, outside: float | None = None) -> dict[int, str]:
    """A row of pixels as text, by place; with one more on each side, if something is read there."""
    texts = {place: number(value) for place, value in enumerate(values.tolist())}
    return texts if outside is None else {-1: number(outside), **texts, len(values): number(outside)}


def run(*maps: ConvMap) -> Tensor:
    x = PIXELS.reshape(1, 1, -1)
    for one in maps:
        x = one(x)
    return x.flatten()


def stretch(axes: Axes, top: float, title: str, rows: Iterable[tuple[str, dict[int, str], dict[int, str]]]) -> None:
    """Rows of pixels, one below the other, and which three of the last but one make the first of the last."""
    axes.text(-1.46, top, title, weight="bold", va="center")
    for index, (label, values, colours) in enumerate(rows):
        y = top + 1.35 + 1.85 * index
        row(axes, y, label, values, colours)
        last = len(PIXELS) - 1
        for place in (last - 1, last, last + 1) if index == 2 else ():
            arrow(axes, (place, y - 1.45), (last, y - 0.4))


def ends(colour: str) -> tuple[dict[int, str], dict[int, str]]:
    """The places next to the border in that colour: outside, and inside."""
    last = len(PIXELS) - 1
    return {-1: colour, last + 1: colour}, {0: colour, last: colour}


def zeros() -> Figure:
    """A 1x1 with a bias, then a 3x3 that pads with zeros: two layers, and one convolution."""
    one = FIRST.then(SECOND, "padded")
    naive = ConvMap(one.kernel, one.bias, pad=1)
    figure, axes = sheet("border-zeros", -1.75, 4.75, 12.4)
    outside, inside = ends(RIGHT)
    layers = [
        ("x", read(PIXELS), {}),
        ("y = 2x + 1; the second layer reads 0 outside", read(run(FIRST), float(SECOND.fill)), outside),
        ("sums of three of them", read(run(FIRST, SECOND)), inside),
    ]
    outside, inside = ends(WRONG)
    merged = [
        ("x; the layer reads 0 outside", read(PIXELS, 0), {}),
        ("2x + 1, which outside is 2 \N{MULTIPLICATION SIGN} 0 + 1", read(run(FIRST), float(FIRST.bias)), outside),
        ("sums of three of them", read(run(naive)), inside),
    ]
    stretch(axes, 0.6, "Two layers", layers)
    stretch(axes, 6.7, "One convolution that pads with zeros: wrong ends", merged)
    return figure


def solved() -> Figure:
    """The same two layers as one convolution that pads with what the first turns into 0."""
    one = FIRST.then(SECOND, "padded")
    assert torch.equal(run(one), run(FIRST, SECOND))
    figure, axes = sheet("border-solved", -1.75, 4.75, 6.3)
    outside, inside = ends(RIGHT)
    fill = float(one.fill)
    beyond = float(FIRST.kernel) * fill + float(FIRST.bias)
    merged = [
        (f"x; the layer reads {number(fill)} outside", read(PIXELS, fill), outside),
        (f"2x + 1, which outside is 2 \N{MULTIPLICATION SIGN} ({number(fill)}) + 1", read(run(FIRST), beyond), outside),
        ("sums of three of them", read(run(one)), inside),
    ]
    stretch(axes, 0.6, f"One convolution that pads with {number(fill)}: exact", merged)
    return figure


def taps() -> Figure:
    """Where the taps of smaller kernels lie in a 3x3."""
    maps = {
        "3x3": ConvMap(torch.ones(1, 1, 3, 3), pad=1),
        "3x1": ConvMap(torch.ones(1, 1, 3, 1), pad=((1, 1), (0, 0))),
        "1x1": ConvMap(torch.ones(1, 1, 1, 1)),
        "identity": ConvMap.identity(1),
    }
    total = ConvMap.identity(1) * 0.0
    for one in maps.values():
        total = total + one
    figure, axes = sheet("border-taps", -1.3, 17.5, 11.4)
    size = 1.2
    for index, (name, one) in enumerate(maps.items()):
        left = 0.3 + 4.6 * index
        axes.text(left + size, 0.9, name, ha="center", va="center", weight="bold", color=BRANCHES[name])
        grid(axes, left, 2.2, size, {name: one.framed(total.geometry)})
        axes.text(left - 1.1, 2.2 + size, "+" if index else "", ha="center", va="center", size=14)
    left, top = 3.2, 6.6
    axes.text(left - 1.5, top + size, "=", ha="center", va="center", size=14)
    grid(axes, left, top, size, {name: one.framed(total.geometry) for name, one in maps.items()})
    for offset in (-1, 0, 1):
        axes.text(left + size * (offset + 1), top + 3.2, number(offset), ha="center", va="center")
    for index, line in enumerate(("Each tap has the place", "of what it reads, counted", "from the output pixel.")):
        axes.text(left + 3.9, top + 0.2 + index, line, va="center")
    return figure


def grid(axes: Axes, left: float, top: float, size: float, maps: Mapping[str, ConvMap]) -> None:
    """A 3x3, and in each place a dot for each map that has a tap there."""
    for down in range(3):
        for across in range(3):
            x, y = left + size * across, top + size * down
            axes.add_patch(Rectangle((x - size / 2, y - size / 2), size, size, facecolor=OUTSIDE, edgecolor=FAINT))
            here = [name for name, one in maps.items() if one.kernel[0, 0, down, across]]
            for place, name in enumerate(here):
                shift = 0.3 if len(here) > 1 else 0.0
                at = (x + shift * (-1, 1, -1, 1)[place], y + shift * (-1, -1, 1, 1)[place])
                axes.add_patch(Circle(at, 0.2 if shift else 0.3, color=BRANCHES[name]))


def strides() -> Figure:
    """What a 3-tap kernel behind a stride of 2 reads, and sizes that two branches of stride 2 have."""
    first, second = ConvMap(torch.ones(1, 1, 1), stride=2), ConvMap(torch.ones(1, 1, 3), pad=1)
    both = (first >> second).geometry
    (lo, _), step = both.pad[0], both.dilation[0]
    reads = [step * tap - lo for tap in range(both.kernel[0])]
    figure, axes = sheet("border-stride", -3.4, 9.4, 19.4)
    axes.text(-3.0, 0.8, "1 tap with stride 2, then 3 taps that pad", weight="bold", va="center")
    axes.text(-3.0, 2.0, "x", va="center")
    for place in range(reads[0], 9):
        outside = not 0 <= place < 8
        colour = RIGHT if place in reads else OUTSIDE if outside else PLAIN
        cell(axes, place, 3.0, number(place), colour, dashed=outside)
    axes.text(-3.0, 4.6, "y", va="center")
    for place in range(-1, 5):
        outside = not 0 <= place < 4
        colour = RIGHT if 2 * place in reads else OUTSIDE if outside else PLAIN
        cell(axes, 2 * place, 5.6, number(place), colour, dashed=outside)
        arrow(axes, (2 * place, 3.4), (2 * place, 5.2))
    cell(axes, 0, 8.0, "0", PLAIN)
    for place in reads:
        arrow(axes, (place, 6.0), (0, 7.6))
    found = ", ".join(number(place) for place in reads)
    axes.text(1.0, 7.8, f"reads x at {found}: one kernel", va="center")
    axes.text(1.0, 8.7, f"of {both.kernel[0]} taps, dilation {step}, stride {both.stride[0]}", va="center")

    pool, conv = ConvMap(torch.ones(1, 1, 2), stride=2), ConvMap(torch.ones(1, 1, 3), stride=2, pad=1)
    axes.text(-3.0, 10.6, "Two branches with stride 2", weight="bold", va="center")
    for index, pixels in enumerate((8, 7)):
        top = 11.8 + 4.0 * index
        sizes = [one.geometry.output_size([pixels])[0] for one in (conv, pool)]
        what = "they add" if sizes[0] == sizes[1] else "they do not add"
        axes.text(-3.0, top, f"{pixels} pixels: {sizes[0]} windows of 3, {sizes[1]} of 2; {what}", va="center")
        for place in range(-1, 8):
            outside = not 0 <= place < pixels
            cell(axes, place, top + 1.0, colour=OUTSIDE if outside else PLAIN, dashed=outside)
        for one, colour, y, count in ((conv, BRANCHES["3x3"], 1.75, sizes[0]), (pool, BRANCHES["1x1"], 2.35, sizes[1])):
            for window in range(count):
                start = 2 * window - one.geometry.pad[0][0]
                level = top + y + 0.2 * (window % 2)
                axes.plot([start - 0.4, start + one.geometry.reach[0] + 0.4], [level] * 2, color=colour, linewidth=3)
    return figure


def main() -> None:
    for name, draw in (("zeros", zeros), ("solved", solved), ("taps", taps), ("stride", strides)):
        (PICTURES / f"border-{name}.svg").write_bytes(written(draw()))


if __name__ == "__main__":
    main()
