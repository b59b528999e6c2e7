"""Pictures of what a model computes, as SVG: boxes from the input down, merges in the colour of their rules."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import networkx as nx
from torch import nn

from structrep.errors import BadInput
from structrep.guard.sharing import Replicas
from structrep.match.merge import Merge
from structrep.modules.arguments import Example
from structrep.records.base import counted
from structrep.records.markup import filled
from structrep.records.plan import PlanRecord
from structrep.report.layout import Layout, layout
from structrep.report.steps import Graph, Part, Step, deployed, training
from structrep.trace.follow import trace

if TYPE_CHECKING:
    from markupsafe import Markup
# Told apart by all kinds of colour vision (Okabe and Ito, Color Universal Design, 2008); vermilion is for refusals.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999933")
REFUSED = "#D55E00"
BAR = 88.0  # the longest bar of a box that stands for a part of the model
UNIT = 8.0  # of a bar for each step, where there is room
GAP = 4.0  # what is longer in a bar has a gap of a pixel behind it


@dataclass(frozen=True)
class Key:
    """What a merge is marked with: a letter and a colour for its rules, and a number of its own."""

    rules: str
    letter: str
    colour: str


def keys(plan: PlanRecord) -> dict[tuple[str, ...], Key]:
    """The marks of all rules that a plan used, in order."""
    used = dict.fromkeys(merge.rules for merge in plan.merges)
    return {
        rules: Key(" + ".join(rules), _letters(index), COLOURS[index % len(COLOURS)])
        for index, rules in enumerate(used)
    }


def _letters(index: int) -> str:
    """A to Z, AA to AZ and so on."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


@dataclass(frozen=True, eq=False)
class Box:
    """What is drawn as one."""

    text: str
    detail: str = ""
    colour: str = ""  # of a step that is merged
    tag: str = ""
    title: str = ""
    refused: tuple[int, ...] = ()
    count: int = 1  # of operations
    bar: tuple[tuple[float, float, str], ...] = ()  # of them: starts, widths and colours
    to: str = ""  # where a click leads
    width: float = 118.0
    height: float = 36.0


@dataclass(frozen=True)
class Picture:
    """Boxes with their places, and the lines between them by colour."""

    boxes: list[Box]
    layout: Layout

    def svg(self, label: str, standalone: bool = False) -> Markup:
        """The picture as an SVG element.

        Args:
            label: what it shows, for those who cannot see it.
            standalone: whether it stands for itself, so that nothing in it leads elsewhere on a page.
        """
        return filled("picture.svg.j2", picture=self, label=label, standalone=standalone, refused=REFUSED)


class Drawing:
    """Draws parts of a model before and after the merges of a plan."""

    def __init__(
        self,
        plan: PlanRecord,
        replicas: Replicas,
        merges: Sequence[Merge],
        deploy: nn.Module | None,
        example_inputs: Example | None,
    ) -> None:
        self.plan = plan
        self.keys = keys(plan)
        before = training(replicas, merges, plan.refusals)
        after: Graph = nx.DiGraph()
        if deploy is not None:
            layers = [
                where for where in (merge.where for merge in plan.merges if merge.leaves_layer) if where != "(root)"
            ]
            found = trace(deploy, layers=layers)
            if found.untraced or found.unfollowed:  # with sizes more can be followed, and it takes longer
                found = trace(deploy, example_inputs, layers=layers)
            after = deployed(found, plan.merges, plan.refusals)
        self.graphs = before, after
        self.whole = Part(plan.model, "", (list(before), list(after)))

    def draw(self, side: int, inside: str = "") -> str:
        """See `structrep.Plan.draw`.

        Raises:
            BadInput: nothing is computed in a module of that name.
        """
        part = self.whole.within(inside) if inside else self.whole
        if not part.sides[side]:
            raise BadInput(f"nothing is computed in a module named {inside!r}: give the name of one that runs")
        return str(self.picture(part, part.parts(), side, {}).svg(part.name, standalone=True))

    def key(self, merge: int) -> Key:
        return self.keys[self.plan.merges[merge].rules]

    def tag(self, merge: int) -> str:
        """The mark of a merge: the letter of its rules and its number."""
        return f"{self.key(merge).letter}{merge + 1}"

    def picture(self, part: Part, parts: Mapping[Hashable, Part], side: int, to: Mapping[Hashable, str]) -> Picture:
        """One side of a part: 0 is training time, 1 deploy.

        Args:
            parts: the parts that are boxes, as `Part.parts` gives them.
            to: where a click on a box leads, by the key of the part.
        """
        most = max((len(steps) for one in parts.values() for steps in one.sides), default=1)
        owner: dict[Step, Box] = {}
        graph: nx.DiGraph = nx.DiGraph()
        for key, one in parts.items():
            if one.sides[side]:
                box = self._box(part, one, one.sides[side], most, to.get(key, ""))
                owner |= dict.fromkeys(one.sides[side], box)
        graph.add_nodes_from(owner[step] for step in part.sides[side])
        for step in part.sides[side]:
            for source in self.graphs[side].predecessors(step):
                if source not in owner:
                    owner[source] = Box("x", title=f"from {source.path or source.text}", width=30.0, height=22.0)
                if owner[source] is not owner[step]:
                    graph.add_edge(owner[source], owner[step], style=owner[step].colour)
        return Picture(list(graph), layout(graph, {box: (box.width, box.height) for box in graph}))

    def _box(self, around: Part, part: Part, steps: Sequence[Step], most: int, to: str) -> Box:
        refused = tuple(dict.fromkeys(index for step in steps for index in step.refused))
        box = self._of_step(around, steps[0]) if len(steps) == 1 else self._of_part(around, part, steps, most)
        told = [
            f"refused, {one.rule}, {one.kind}: {one.reason}" for one in map(self.plan.refusals.__getitem__, refused)
        ]
        return replace(box, to=box.to or to, refused=refused, title="\n".join([box.title, *told]))

    def _of_step(self, around: Part, step: Step) -> Box:
        if step.kind == "input":
            return Box(step.text, title="an input of the model", width=8.0 * len(step.text) + 26, height=22.0)
        title = f"{step.path or around.name}: {step.text}"
        if step.kind == "+":
            box = Box(step.text, title=title, width=30.0, height=24.0)
        else:
            box = Box(_start(step.text, 15), _end(_within(step.path, around.name), 18), title=title)
        if step.merge is None:
            return box
        merge, tag = self.plan.merges[step.merge], self.tag(step.merge)
        return replace(
            box,
            colour=self.key(step.merge).colour,
            tag=tag,
            title=f"{title}\nmerge {tag}, {' + '.join(merge.rules)}: {merge.before} becomes {merge.after}",
            to=f"#merge-{step.merge + 1}",
            width=box.width + (6.0 * len(tag) if step.kind == "+" else 0.0),
        )

    def _of_part(self, around: Part, part: Part, steps: Sequence[Step], most: int) -> Box:
        """A box for several steps, with a bar of them; `most` are the steps of the longest bar beside it."""
        unit = min(UNIT, BAR / most)
        bar, start = [], 0.0
        for merge, run in itertools.groupby(steps, key=lambda step: step.merge):
            length = unit * len(list(run))
            bar.append((start, length - (length > GAP), "" if merge is None else self.key(merge).colour))
            start += length
        used = Counter(self.key(merge).rules for merge in {step.merge for step in steps} if merge is not None)
        title = [f"{part.name} ({part.module_class}): {len(steps):,} operations"]
        title += [f"{counted(count, 'merge')} by {rules}" for rules, count in used.items()]
        name = _within(part.name, around.name) or part.name
        return Box(
            _end(name, 18), _start(part.module_class, 17), title="\n".join(title), count=len(steps), bar=tuple(bar),
            width=BAR + 120, height=38.0,
        )  # fmt: skip


def _within(path: str, around: str) -> str:
    """A path as seen from a module around it."""
    return "" if path == around else path.removeprefix(f"{around}.")


def _start(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"
