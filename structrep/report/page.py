"""The report of a plan: one HTML page that needs nothing else."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from structrep.files import imported
from structrep.match.merge import Merge
from structrep.modules.arguments import Example, as_arguments
from structrep.prove.latency import latency
from structrep.prove.run import How
from structrep.records.markup import filled
from structrep.records.verification import Verification
from structrep.report.drawing import REFUSED, Drawing, Key
from structrep.report.kernels import kernel
from structrep.report.steps import Graph, Part

if TYPE_CHECKING:
    from markupsafe import Markup

SECONDS, ROUNDS = 3.0, (3, 20)  # that latencies are measured for, about; fewest and most passes of each model
NARROW = 240  # pixels: two pictures of at most that width stand side by side on a phone
MISSING = "give example inputs"
INK = "#010203"  # stands for the colour of text while a chart is drawn


@dataclass(frozen=True)
class Tile:
    """One number of a model, before and after."""

    name: str
    before: str = ""
    after: str = ""
    ratio: str = ""
    note: str = ""


@dataclass(frozen=True)
class View:
    """A part of the model, before and after, and what is drawn as one in its pictures."""

    anchor: str
    name: str
    module_class: str
    steps: tuple[int, int]
    merges: list[tuple[Key, int]]
    refusals: int
    pictures: list[Markup | None]
    narrow: bool
    views: list[View]


def page(
    drawing: Drawing,
    merges: Mapping[str, Merge],
    inexact: bool,
    models: tuple[nn.Module, nn.Module],
    example_inputs: Example | None,
    verification: Verification | None,
    diff: str = "",
) -> bytes:
    """The page.

    Args:
        merges: by the names of their layers.
        inexact: whether layers may differ at the border.
        models: at training time, and deployed.
        verification: of the two, on the example inputs, if there are any.
        diff: the edited forwards, as a unified diff.

    Raises:
        BadInput: there are example inputs, and matplotlib is not installed.
    """
    demand_plots(example_inputs)
    model, deploy = models
    tiles = [*_counts(drawing.graphs), *_measured(model, deploy, example_inputs), _error(verification)]
    text = filled(
        "page.html.j2",
        plan=drawing.plan,
        torch=torch.__version__,
        tiles=tiles,
        view=_view(drawing, drawing.whole, "graph"),
        drawing=drawing,
        diff=[(_change(line), line) for line in diff.splitlines()],
        kernels=[kernel(where, merge) for where, merge in merges.items()],
        verification=verification,
        chart=_chart(verification) if verification and verification.regions else "",
        inexact=inexact,
        refused=REFUSED,
        missing=MISSING,
    )
    return text.encode()


def _change(line: str) -> str:
    """What a line of a diff is: of a file's name, a place, or what goes, comes or stays; methods that no patch can hold
    are behind `# `."""
    text = line.removeprefix("# ")
    if text.startswith(("--- ", "+++ ")):
        return "file"
    return {"+": "comes", "-": "goes", "@": "place"}.get(text[:1], "stays")


def demand_plots(example_inputs: Example | None) -> None:
    """Raise BadInput where a page with charts cannot be drawn."""
    if example_inputs is not None:
        imported("matplotlib", "pip install 'structrep[plot]'")


def _counts(graphs: tuple[Graph, Graph]) -> list[Tile]:
    kinds = {"convolutions": "conv", "norms": "norm", "additions": "+"}
    counts = {
        name: [sum(step.count for step in graph if step.kind == kind) for graph in graphs]
        for name, kind in kinds.items()
    }
    return [_tile(name, *found) for name, found in counts.items()]


def _measured(model: nn.Module, deploy: nn.Module, example_inputs: Example | None) -> list[Tile]:
    stored = _tile("parameters", *(sum(p.numel() for p in one.parameters()) for one in (model, deploy)))
    if example_inputs is None:
        return [stored, Tile("multiply-adds", note=MISSING), Tile("latency", note=MISSING)]
    how = How.of(model)
    given = how.inputs(example_inputs, model)
    args, kwargs = as_arguments(given)
    models = {"training time": how.model(model), "deploy": how.model(deploy)}
    work, start = [], time.perf_counter()
    with how.running():
        for one in models.values():
            with FlopCounterMode(display=False) as counter:
                one(*args, **kwargs)
            work.append(counter.get_total_flops() // 2)
        rounds = round(SECONDS / (time.perf_counter() - start))
        measured = latency(models, given, min(max(rounds, ROUNDS[0]), ROUNDS[1]))
    before, after = (f"{1000 * one.median:.3g} ms" for one in measured.models.values())
    faster = f"{measured.models['deploy'].faster:.2f} times as fast"
    return [stored, _tile("multiply-adds", *work), Tile("latency", before, after, faster, measured.device)]


def _error(verification: Verification | None) -> Tile:
    if verification is None:
        return Tile("rounding error", note=MISSING)
    error, noise = verification.error, verification.noise
    ratio = f"{error / noise:.2f} times as much; the limit is {verification.slack:g}"
    return Tile("rounding error", f"{noise:.1e}", f"{error:.1e}", ratio, f"of the output, {verification.dtype}")


def _tile(name: str, before: int, after: int) -> Tile:
    if before == after:
        ratio = "as many"
    elif not before or not after:
        ratio = "none left" if before else "none before"
    else:
        word, times = ("fewer", before / after) if after < before else ("more", after / before)
        ratio = f"{times:.2f} times {word}" if times >= 1.1 else f"{100 * abs(1 - after / before):.2g}% {word}"
    note = f"{before:,} → {after:,}" if max(before, after) >= 10_000 else ""
    return Tile(name, _rounded(before), _rounded(after), ratio, note)


def _rounded(number: int) -> str:
    """A number with three digits and a unit, or all of a small one."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= max(size, 10_000):
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _view(drawing: Drawing, part: Part, anchor: str) -> View:
    parts = part.parts()
    anchors = {key: f"{anchor}-{index}" for index, (key, one) in enumerate(parts.items()) if one.size > 1}
    to = {key: f"#{name}" for key, name in anchors.items()}
    before, after = (drawing.picture(part, parts, side, to) for side in (0, 1))
    merges: dict[Key, set[int]] = {}
    for step in (*part.sides[0], *part.sides[1]):
        if step.merge is not None:
            merges.setdefault(drawing.key(step.merge), set()).add(step.merge)
    return View(
        anchor=anchor,
        name=part.name,
        module_class=part.module_class,
        steps=(len(part.sides[0]), len(part.sides[1])),
        merges=[(key, len(found)) for key, found in merges.items()],
        refusals=len({index for steps in part.sides for step in steps for index in step.refused}),
        pictures=[
            picture.svg(f"{part.name}, {side}") if picture.boxes else None
            for picture, side in ((before, "training time"), (after, "deploy"))
        ],
        narrow=max(before.layout.width, after.layout.width) <= NARROW,
        views=[_view(drawing, parts[key], name) for key, name in anchors.items()],
    )


def _chart(verification: Verification) -> Markup:
    """Error and noise by depth, in the colour of the text around."""
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    parts = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = {**dict.fromkeys(parts, INK), "svg.fonttype": "none", "svg.hashsalt": "structrep"}
    settings |= dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False)
    out = io.StringIO()
    with rc_context(settings):
        figure = Figure(figsize=(5.4, 4.0), layout="constrained")
        axes = verification.plot(figure.add_subplot())
        axes.get_legend().remove()
        figure.legend(loc="outside lower center")
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    return Markup(text[text.index("<svg") :].replace(INK, "currentColor"))
