"""Writes docs/benchmarks.md and its plots from benchmarks/results/*.json; what has no results there is left out.

    python -m benchmarks.page

A section says what is aimed at, how it was measured, what was found, and what was missed and by how much.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks import beyond, latency, measure, measured
from benchmarks.growth import Point, Series
from benchmarks.measure import ROOT, Ratio, load, markdown, ratio

PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "images" / "benchmarks"
FEW = 8  # largest layers, which is four of them in the float64 that merges are computed in
OPENING = """\
# Benchmarks

Written by `python -m benchmarks.page` from the raw samples in `benchmarks/results`. `make bench` runs small sizes of
each script; `make bench-full` runs all of it, and writes this page. What is compared takes turns in one process,
A B A B, and a ratio is that of neighbouring runs: the median of the pairs, in brackets their middle half. So a machine
that is slow for a while is slow for both.
"""


NAMED = 8  # missed aims, the worst


# --- aims -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """A bound, and what was found beside it, by name."""

    what: str
    limit: float
    found: Mapping[str, float]

    def missed(self) -> dict[str, float]:
        return {name: value for name, value in self.found.items() if not value <= self.limit}

    def __str__(self) -> str:
        aim = f"{self.what}: at most {self.limit:g} was aimed at. "
        if missed := self.missed():
            times = "" if self.limit == 1 else " times the aim"
            worst = sorted(((value / self.limit, name) for name, value in missed.items()), reverse=True)
            named = ", ".join(f"{name} {value:.2f}{times}" for value, name in worst[:NAMED])
            rest = worst[NAMED:]
            more = f", and {len(rest)} more, none above {rest[0][0]:.2f}{times}" if rest else ""
            return f"{aim}Missed in {len(missed)} of {len(self.found)}: {named}{more}."
        return f"{aim}Kept in all {len(self.found)}; the most is {max(self.found.values()):.2f}."


# --- plots ----------------------------------------------------------------------------------------

INK, PAPER, GRID = "#1d2330", "#fefefe", "#c9ced8"
DARK = {INK: "#e4e8ef", PAPER: "#1b2029", GRID: "#414a5a"}
COLOURS = ("#3f87c9", "#d9652b", "#2a9d78", "#b565a7", "#8f8f2c", "#7a6fd0")  # seen on light and on dark
MARKS = "osD^vP"
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER),
    "grid.color": GRID,
    "axes.axisbelow": True,
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "svg.hashsalt": "structrep",  # the same names of parts each time
}


@dataclass(frozen=True)
class Dots:
    """A row for each name, with a dot for each series, and a line through its middle half."""

    name: str
    about: str  # for who cannot see it
    axis: str
    rows: tuple[str, ...]
    series: Mapping[str, tuple[Ratio, ...]]
    aims: tuple[float, ...] = ()

    def draw(self) -> Figure:
        figure, axes = _figure(1, 0.9 + 0.32 * len(self.rows))
        for number, (label, values) in enumerate(self.series.items()):
            places = [row + 0.16 * (number - (len(self.series) - 1) / 2) for row in range(len(self.rows))]
            middle = [one.median for one in values]
            spread = [[one.median - one.low for one in values], [one.high - one.median for one in values]]
            axes[0].errorbar(
                middle, places, xerr=spread, fmt=MARKS[number], color=COLOURS[number], markersize=5, label=label
            )
        for aim in self.aims:
            axes[0].axvline(aim, color=INK, linewidth=1, linestyle="--")
        axes[0].set(xscale="log", xlabel=self.axis, yticks=range(len(self.rows)), yticklabels=self.rows)
        axes[0].set_ylim(len(self.rows) - 0.5, -0.5)
        _plain(axes[0].xaxis)
        _legend(axes[0], len(self.series))
        return figure


@dataclass(frozen=True)
class Lines:
    """Seconds by size, both logarithmic; a panel for each size, a line for each series, and one of exponent 1."""

    name: str
    about: str
    panels: Mapping[str, Mapping[str, tuple[tuple[float, float], ...]]]

    def draw(self) -> Figure:
        figure, panels = _figure(len(self.panels), 4.8)
        for axes, (axis, series) in zip(panels, self.panels.items(), strict=True):
            for number, (label, points) in enumerate(series.items()):
                axes.plot(*zip(*points, strict=True), f"{MARKS[number]}-", color=COLOURS[number], label=label)
            sizes = sorted({size for points in series.values() for size, _ in points})
            least = min(seconds for points in series.values() for size, seconds in points if size == sizes[0])
            ends = [sizes[0], sizes[-1]]
            axes.plot(ends, [least * size / sizes[0] for size in ends], color=INK, linestyle="--", label="exponent 1")
            axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
            _plain(axes.xaxis)
            _plain(axes.yaxis)
            _legend(axes, 1)
        return figure


Plot = Dots | Lines


class _Plain(LogFormatter):
    """Numbers as they are, not powers of ten; at every tick on a short axis."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:,g}" if super().__call__(x, pos) else ""


def _figure(panels: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.grid(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain(axis: Any) -> None:
    axis.set_major_formatter(_Plain())
    axis.set_minor_formatter(_Plain(minor_thresholds=(1, 0.5)))


def _legend(axes: Any, columns: int) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False)


def svg(plot: Plot) -> str:
    """The plot, light or dark as its reader likes it, with the digest of what it shows."""
    out = io.StringIO()
    kind = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context(STYLE):
        plot.draw().savefig(out, format="svg", metadata={**kind, "Title": plot.about, "Description": digest(plot)})
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    return re.sub(r"(<svg[^>]*>)", rf"\1{style}", out.getvalue(), count=1)


def digest(plot: Plot) -> str:
    return hashlib.sha256(repr(plot).encode()).hexdigest()


# --- sections -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """What is aimed at, how it was measured, and what was found."""

    title: str
    text: str
    command: str
    machine: Mapping[str, Any]
    tables: Sequence[str]
    aims: Sequence[Aim]
    plots: Sequence[Plot] = ()

    def __str__(self) -> str:
        plots = [f"![{plot.about}](images/benchmarks/{plot.name}.svg)" for plot in self.plots]
        aims = ["\n".join(f"- {aim}" for aim in self.aims if aim.found)]
        how = f"`{self.command}`, on {where(self.machine)}."
        return "\n\n".join([f"## {self.title}", self.text, how, *aims, *plots, *self.tables])


def where(machine: Mapping[str, Any]) -> str:
    """A machine and its versions, in words."""
    known = ("cpu", "cores", "threads", "gpu")
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if version and name not in known)
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    return f"{machine['cpu']}, {_of(machine['cores'], 'core')}, {_of(machine['threads'], 'thread')}{gpu}; {versions}"


def _of(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _alike(values: Sequence[float]) -> tuple[Ratio, ...]:
    """Numbers with no spread."""
    return tuple(Ratio(value, value, value) for value in values)


def conversion(record: Any) -> Section:
    models = record["models"]
    names = [f"{one['model']} ({one['peer']})" for one in models]
    to = {
        what: dict(zip(names, (ratio(one["seconds"], *pair) for one in models), strict=True))
        for what, pair in {
            "structrep / other": ("structrep", "peer"),
            "structrep / copy": ("structrep", "copy"),
            "in place: structrep / other": ("structrep in place", "peer in place"),
            "each merge proved": ("each merge proved", "structrep"),
            "whole model proved": ("whole model proved", "structrep"),
        }.items()
    }
    times = markdown(
        ("model (other)", "copy, ms", "other, ms", "structrep, ms", *list(to)[:3]),
        (
            [
                name,
                *(f"{1e3 * median(one['seconds'][run]):,.0f}" for run in ("copy", "peer", "structrep")),
                *(str(found[name]) for found in list(to.values())[:3]),
            ]
            for name, one in zip(names, models, strict=True)
        ),
    )
    kinds = ("convolutions", "norms", "additions")
    left = markdown(
        ("model (other)", *(f"{kind}: before, other, structrep" for kind in kinds), "error: other, structrep"),
        (
            [
                name,
                *(f"{one[kind]}, {one['left']['peer'][kind]}, {one['left']['structrep'][kind]}" for kind in kinds),
                f"{one['left']['peer']['error']:.0e}, {one['left']['structrep']['error']:.0e}",
            ]
            for name, one in zip(names, models, strict=True)
        ),
    )
    proofs = markdown(
        ("model", "each merge proved / not", "whole model proved / not"),
        (
            [one["model"], str(to["each merge proved"][name]), str(to["whole model proved"][name])]
            for name, one in zip(names, models, strict=True)
        ),
    )
    first = markdown(
        ("model", "copy, ms", "other, ms", "structrep, ms", "structrep / other"),
        (
            [
                name,
                *(f"{1e3 * median(seconds[run]):,.0f}" for run in ("copy", "peer", "structrep")),
                str(ratio(seconds, "structrep", "peer")),
            ]
            for name, seconds in record["first"].items()
        ),
    )
    plotted = {what: tuple(found.values()) for what, found in list(to.items())[:2]}
    return Section(
        "Conversion time",
        "How long `structrep.reparameterize(model, verify=False)` takes, beside what else converts the model: timm's "
        "`reparameterize_model`, where its models bring their own, and `torch.fx.experimental.optimization.fuse`, "
        "where norms stand behind convolutions. Those prove nothing, so here nothing is proved either; what proofs "
        "add is below. Each copies the model first; the copy alone, `copy.deepcopy`, is the floor. In place, each is "
        "given a copy made off the clock.",
        "python -m benchmarks.conversion",
        record["machine"],
        [
            times,
            "They do not do the same work. What one pass runs afterwards, and the largest difference from what the "
            "model computes in float32, relative to the largest output:",
            left,
            "What proofs add: `verify=True` proves each merge in float64; with an example, one image, the whole "
            "model is compared with its float64 self as well, which takes passes of both.",
            proofs,
            "The first conversion of a process, imports done, each in a process of its own:",
            first,
        ],
        [
            Aim("structrep / other", 1.0, {name: one.median for name, one in to["structrep / other"].items()}),
            Aim("structrep / copy", 2.0, {name: one.median for name, one in to["structrep / copy"].items()}),
        ],
        [
            Dots(
                "conversion",
                "Conversion time of structrep over that of others, and over a copy of the model",
                "times as long (middle half; dashed: the aims, 1 and 2)",
                tuple(names),
                plotted,
                (1.0, 2.0),
            )
        ],
    )


def memory(record: Any) -> Section:
    models = record["models"]
    rows = [
        [
            one["model"],
            f"{one['model_mib']:,.0f}",
            f"{one['largest_mib']:,.1f}",
            *(f"{one['peak_mib'][how]:,.0f}" for how in ("copy", "in place")),
            f"{one['peak_mib']['in place'] / one['model_mib']:.2f}",
            f"{one['peak_mib']['in place'] / one['largest_mib']:.1f}",
        ]
        for one in models
    ]
    columns = (
        "model", "model, MiB", "largest layer, MiB", "copy: peak beside it, MiB", "in place: peak beside it, MiB",
        "in place, in models", "in place, in largest layers",
    )  # fmt: skip
    series = {
        "the model": _alike([one["model_mib"] for one in models]),
        "copy": _alike([one["peak_mib"]["copy"] for one in models]),
        "in place": _alike([one["peak_mib"]["in place"] for one in models]),
        f"{FEW} largest layers": _alike([FEW * one["largest_mib"] for one in models]),
    }
    return Section(
        "Memory",
        "What a conversion holds at most beside the model. With `inplace=True` each merged kernel is made, and what it "
        f"was made from given back, before the next: a few of the largest layers, {FEW} at most, not a second model. "
        "Resident memory of a process of its own, by the kernel's record of the most. In it are kernels in float64, "
        "twice their size; up to 32 MiB of merged kernels that are held from the plan until they are placed, so that "
        "they are not computed twice; and the plan's own objects. A small model is above the aim for these alone.",
        "python -m benchmarks.memory",
        record["machine"],
        [markdown(columns, rows)],
        [
            Aim(
                "in place, in largest layers",
                FEW,
                {one["model"]: one["peak_mib"]["in place"] / one["largest_mib"] for one in models},
            )
        ],
        [Dots("memory", "Peak memory of a conversion beside the model", "MiB", tuple(r[0] for r in rows), series)],
    )


def growth(record: Any) -> Section:
    found = [Series(**{**one, "points": [Point(**point) for point in one["points"]]}) for one in record["series"]]
    rows = [
        [
            one.name,
            f"{one.points[-1].blocks:,}",
            f"{one.points[-1].channels:,}",
            f"{one.points[-1].weights:,}",
            f"{one.points[-1].merges:,}",
            f"{median(one.points[-1].plan):.2f}",
            f"{median(one.points[-1].reparameterize):.2f}",
            *(f"{one.exponent(what):.2f}" for what in ("plan", "reparameterize")),
            ", ".join(f"{size:,}" for size in one.left_out),
        ]
        for one in found
    ]
    columns = (
        "models", "blocks", "channels", "weights", "merges", "plan, s", "conversion, s", "exponent: plan",
        "exponent: conversion", "no time for",
    )  # fmt: skip
    panels = {
        by: {
            one.name: tuple(
                (size, median(point.reparameterize)) for size, point in zip(one.sizes(), one.points, strict=True)
            )
            for one in found
            if one.by == by
        }
        for by in ("blocks", "weights")
    }
    return Section(
        "Growth",
        "How the time of `structrep.plan(model)` and of `structrep.reparameterize(model, verify=False)` grows with the "
        "number of blocks, in chains and in trees of modules of 8 channels, and with the number of weights, in one "
        "block that gets wider. The exponent is the slope of log(seconds) over log(size) by least squares, over the "
        "sizes from the largest down to a thirtieth of it: 1 is linear. The row is that of the largest size for which "
        "there was time. The widest blocks have kernels of 1.2 GB in float64: the slope of their plans, which "
        "hold none from one to the next, is that of memory that the system hands out page by page.",
        "python -m benchmarks.growth",
        record["machine"],
        [markdown(columns, rows)],
        [
            Aim(f"exponent of a {called} in {by}", 1.1, {one.name: one.exponent(what) for one in found if one.by == by})
            for by in ("blocks", "weights")
            for what, called in (("plan", "plan"), ("reparameterize", "conversion"))
        ],
        [Lines("growth", "Seconds of a conversion by the number of blocks and by the number of weights", panels)],
    )


def latency_of(device: str, record: Any) -> Section:
    rows = record["rows"]
    names = [
        f"{one['model']}, {one['engine']}, batch {one['batch']}"
        + (f", {one['dtype']}" if one["dtype"] != "float32" else "")
        + (", channels last" if one["channels_last"] else "")
        for one in rows
    ]
    to = {
        pair: {
            name: ratio(one["seconds"], *pair)
            for name, one in zip(names, rows, strict=True)
            if one["seconds"].keys() >= {*pair}
        }
        for pair in latency.PAIRS
    }
    held = {name: latency.aim(one, device) for name, one in zip(names, rows, strict=True)}
    trained = to["training-time", "plain"]
    eager = [
        name
        for name, one in zip(names, rows, strict=True)
        if name in trained and all(one[key] == rows[0][key] for key in ("engine", "dtype", "channels_last"))
    ]
    return Section(
        f"Deploy latency on {'GPU' if device == 'cuda' else 'CPU'}",
        "How long one pass takes: of the training-time model and of what structrep makes of it, over the same network "
        "written plain by hand, and over timm's own deploy form. A deploy form is to be as fast as the plain one, up "
        "to noise: the lower end of the middle half is at most 1."
        + (
            " Eager on a GPU, with small batches, is what Python takes to launch the layers: a deploy model has the "
            "modules that the user wrote, emptied ones too, and the plain network and some of timm's have fewer. "
            "A CUDA graph shows the GPU's own time."
            if device == "cuda"
            else ""
        ),
        f"python -m benchmarks.latency{' --device cuda' if device == 'cuda' else ''}",
        record["machine"],
        [markdown(latency.COLUMNS, [latency.row(one, device) for one in rows])],
        [
            *(
                Aim(f"{of} / {over}, lower end", 1.0, {name: one.low for name, one in to[of, over].items()})
                for of, over in latency.PAIRS[1:]
                if to[of, over]
            ),
            Aim(
                "training-time / plain that it is held to, over what it is",
                1.0,
                {name: aim / trained[name].median for name, aim in held.items() if aim and name in trained},
            ),
        ],
        [
            Dots(
                f"latency-{device}",
                f"Latency over that of the plain network, {rows[0]['engine']}, on {device.upper()}",
                "times as long as plain (middle half)",
                tuple(eager),
                {
                    pair[0]: tuple(to[pair][name] for name in eager)
                    for pair in latency.PAIRS[:2]
                    if to[pair].keys() >= {*eager}
                },
                (1.0,),
            )
        ],
    )


def beyond_published(record: Any) -> Section:
    rows = record["rows"]
    to = {
        engine: {
            one["model"]: ratio(one["seconds"][engine], beyond.OURS, beyond.THEIRS)
            for one in rows
            if one["seconds"].get(engine, {}).keys() >= {beyond.OURS, beyond.THEIRS}
        }
        for engine in beyond.ENGINES
    }
    both = [one["model"] for one in rows if all(one["model"] in found for found in to.values())]
    return Section(
        "Beyond published conversions",
        "What structrep merges and timm's own conversions leave: what one pass runs as the model trains, after timm's "
        "conversion, after structrep's, and how long a pass of one takes over a pass of the other. It is to be no "
        "longer, up to noise: the lower end of the middle half is at most 1. Where it is a little longer in eager, "
        "that is Python's calls of modules: timm puts a fused layer in the place of a block, structrep leaves the "
        "block, with the layer in it and an emptied norm: names and keys stay.",
        "python -m benchmarks.beyond",
        record["machine"],
        [markdown(beyond.COLUMNS, map(beyond.row, rows))],
        [
            Aim(f"deploy / timm's deploy, {engine}, lower end", 1.0, {name: one.low for name, one in found.items()})
            for engine, found in to.items()
            if found
        ],
        [
            Dots(
                "beyond",
                "Latency of what structrep makes of a model over that of what timm makes of it",
                "times as long as timm's deploy form (middle half)",
                tuple(both),
                {engine: tuple(found[name] for name in both) for engine, found in to.items()},
                (1.0,),
            )
        ]
        if both
        else [],
    )


def by_measurement(record: Any) -> Section:
    rows = record["rows"]
    names = tuple(f"{one['model']}, {one['engine']}" for one in rows)
    to = {
        other: tuple(ratio(one["seconds"], measured.CHOSEN, other) for one in rows)
        for other in (measured.NONE, measured.ALL)
    }
    return Section(
        "Chosen by measurement",
        'Which merges pay depends on the runtime. With `cost="measured"`, or `cost=structrep.Measured(runtime)`, both '
        "forms of each merge are timed on the example inputs, what is slower merged is left, and the whole model is to "
        "be no slower than with all merges or with none, up to noise: the lower end of the middle half is at most 1.",
        "python -m benchmarks.measured",
        record["machine"],
        [markdown(measured.COLUMNS, map(measured.row, rows))],
        [
            Aim(f"chosen / {other}, lower end", 1.0, {n: one.low for n, one in zip(names, found, strict=True)})
            for other, found in to.items()
        ],
        [
            Dots(
                "measured",
                "Latency with the merges that were chosen by measurement",
                "times as long as another form (middle half)",
                names,
                to,
                (1.0,),
            )
        ],
    )


def cold_start(record: Any) -> Section:
    seconds = record["seconds"]
    to = {name: ratio(seconds, name, "import torch") for name in seconds if name != "import torch"}
    rows = [
        [
            name,
            f"{median(samples):.2f}",
            str(to[name]) if name in to else "1",
            ", ".join(
                f"{package} {cost:.2f}" for package, cost in record["imports"].get(name, {}).items() if cost > 0.02
            ),
        ]
        for name, samples in seconds.items()
    ]
    return Section(
        "Cold start",
        "What structrep adds to the start of a process. Whole processes, in turn.",
        "python -m benchmarks.cold_start",
        record["machine"],
        [markdown(("process", "seconds", "over `import torch`", "costliest imports beyond torch, s"), rows)],
        [
            Aim(
                "an import / `import torch`",
                1.1,
                {f"`{name}`": one.median for name, one in to.items() if name.startswith("import")},
            )
        ],
        [
            Dots(
                "cold-start",
                "Time of whole processes over that of one that imports torch",
                "times as long as import torch (middle half; dashed: the aim of an import, 1.1)",
                tuple(to),
                {"process": tuple(to.values())},
                (1.1,),
            )
        ],
    )


SECTIONS: dict[str, Callable[[Any], Section]] = {
    "conversion": conversion,
    "memory": memory,
    "growth": growth,
    "latency-cpu": partial(latency_of, "cpu"),
    "latency-cuda": partial(latency_of, "cuda"),
    "beyond": beyond_published,
    "measured": by_measurement,
    "cold-start": cold_start,
}
TRAINING = """\
## Training cost

What a training step costs with each family's blocks, in time and memory, is in
[Training](training.md#what-a-step-costs), written by `python -m benchmarks.training`."""


def sections() -> list[Section]:
    """Those whose results are there, in order."""
    return [make(load(name)) for name, make in SECTIONS.items() if (measure.RESULTS / f"{name}.json").exists()]


def text(found: Sequence[Section]) -> str:
    return "\n\n".join([OPENING.rstrip(), *map(str, found), TRAINING]) + "\n"


def main(page: Path = PAGE, plots: Path = PLOTS) -> None:
    found = sections()
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.svg"):
        old.unlink()
    for plot in (plot for section in found for plot in section.plots):
        (plots / f"{plot.name}.svg").write_text(svg(plot), encoding="utf-8")
    page.write_text(text(found), encoding="utf-8")


if __name__ == "__main__":
    main()
