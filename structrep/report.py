"""What happened, as records and as tables."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from structrep.errors import some
from structrep.markup import filled

WORST = 8  # merged layers that a table of a verification shows


class Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class MergeRecord(Record):
    """One merge: where, by which rules, from which papers or laws, what became what, at which cost."""

    where: str
    rules: tuple[str, ...]
    sources: tuple[str, ...]
    before: str
    after: str
    multiply_adds: tuple[float, float]  # per output pixel, before and after
    parameters: tuple[int, int]  # stored numbers, before and after
    largest: tuple[float, float]  # largest coefficient of a kernel before, of the merged layer
    border: str = ""  # what a layer of its own does for the border, or how far an inexact one is off
    sizes: str = ""  # the input sizes that it holds for, if not for all
    notes: tuple[str, ...] = ()  # what is to be known of its numbers: dead channels, half precision
    seconds: tuple[float, float] | None = None  # before and after, if merges were chosen by measurement


class BorderRecord(Record):
    """How far a merge is off where it reads outside its input, relative to the largest output."""

    size: tuple[int, ...]  # of the input, in pixels
    pixels: int  # of the output, that differ in some channel
    of: int
    error: float

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        return (
            f"inexact, as allowed: of an input of {size} pixels {self.pixels:,} of {self.of:,} output pixels differ, "
            f"by up to {self.error:.1e} of the largest output"
        )


class RefusalRecord(Record):
    """One merge that was not done, and why; `layers` are the paths of the layers that it would have taken in."""

    where: str
    rule: str
    what: str
    kind: str
    reason: str
    layers: tuple[str, ...] = ()


class Explanation(Record):
    """What became of two layers."""

    first: str
    second: str
    merged: str = ""  # where, if they are
    answer: str
    refusals: tuple[RefusalRecord, ...] = ()  # of merges that would have held both
    misses: dict[str, str] = {}  # rule -> what keeps it from matching

    def __str__(self) -> str:
        lines = [f"{self.first} and {self.second}: {self.answer}"]
        lines += [f"  refused, {r.rule}, {r.what} ({r.kind}): {r.reason}" for r in self.refusals]
        lines += [f"  {rule}: {miss}" for rule, miss in self.misses.items()]
        return "\n".join(lines)


class PlanRecord(Record):
    """A whole plan."""

    model: str
    merges: tuple[MergeRecord, ...]
    refusals: tuple[RefusalRecord, ...]
    notes: tuple[str, ...] = ()  # what is to be known of the model: code that cannot be read

    @property
    def nothing(self) -> str:
        """What is to be said of a plan without merges."""
        return f"there is nothing to merge in {self.model}{self.reasons}"

    @property
    def reasons(self) -> str:
        """The refusals, a line each, as part of an error; of many the first."""
        return "".join(f"\n  {line}" for line in some(f"{r.where}, {r.what}: {r.reason}" for r in self.refusals))


class ErrorRecord(Record):
    """One value of a model against the float64 truth, relative to the value's largest number."""

    error: float  # of the deploy model
    noise: float  # of the training-time model: its own rounding

    @property
    def ratio(self) -> float:
        return self.error / self.noise if self.noise else float("inf") if self.error else 0.0


class OutputRecord(ErrorRecord):
    """One output of a model, in order."""

    name: str
    shape: tuple[int, ...]


class RegionRecord(ErrorRecord):
    """What one merged layer gives as the whole model runs."""

    where: str
    rules: tuple[str, ...]


class Verification(Record):
    """A deploy model against its training-time model, both against the truth: what that computes in float64.

    It holds where the deploy model errs no more than `slack` times as much as the training-time model's own rounding
    does.
    """

    device: str
    dtype: str
    autocast: str | None = None
    channels_last: bool = False
    tf32: bool
    cudnn: str  # version and settings; "" where it is not used
    seed: int  # of what a model draws as it runs
    torch: str
    slack: float
    truth: str = "float64"  # what the training-time model was run in, for the truth
    failed: str = ""  # the run in float64, if that is not it
    alone: dict[str, str] = {}  # operators that ran in their own dtype in it, and why
    lost: str = ""  # why a comparison in `dtype` shows nothing
    blank: bool = False  # whether no output has a finite number, so that merged layers alone say something
    outputs: tuple[OutputRecord, ...]
    choices: tuple[OutputRecord, ...] = ()  # what the deploy model would choose otherwise by, in order
    regions: tuple[RegionRecord, ...] = ()  # from the input to the output

    @property
    def error(self) -> float:
        """Largest relative error of the deploy model."""
        return max((output.error for output in self.outputs), default=0.0)

    @property
    def noise(self) -> float:
        """Largest relative rounding error of the training-time model."""
        return max((output.noise for output in self.outputs), default=0.0)

    @property
    def ok(self) -> bool:
        shows = not self.blank and math.isfinite(self.noise)
        return all(map(self.holds, (*self.outputs, *self.choices))) and (shows or self.first_off is None)

    @property
    def first_off(self) -> RegionRecord | None:
        """The first merged layer that is farther off than rounding explains."""
        return next((region for region in self.regions if not self.holds(region)), None)

    @property
    def against(self) -> str:
        """What the truth is, and why, in a sentence."""
        run = f"against a {self.truth} run of the training-time model"
        if self.failed:
            return f"{run}: {self.failed}"
        return f"{run}, but for {', '.join(self.alone)}, which has no float64 kernel" if self.alone else run

    def holds(self, record: ErrorRecord) -> bool:
        return record.error <= self.slack * record.noise

    def table(self) -> Table:
        how = [self.device, self.dtype, f"autocast {self.autocast}" if self.autocast else ""]
        how += ["channels last" if self.channels_last else "", f"TF32 {'on' if self.tf32 else 'off'}", self.cudnn]
        table = Table(title=f"verified on {', '.join(filter(None, how))}, torch {self.torch}")
        for heading in ("value", "shape or rule", "error", "rounding noise", "ratio", ""):
            table.add_column(heading, justify="left" if heading in ("value", "shape or rule") else "right")
        worst = sorted(self.regions, key=lambda region: region.ratio, reverse=True)[:WORST]
        rows: list[tuple[str, str, ErrorRecord]] = [
            (f"output {one.name}", "x".join(map(str, one.shape)), one) for one in self.outputs
        ]
        rows += [(f"what {one.name} goes by", "x".join(map(str, one.shape)), one) for one in self.choices]
        rows += [(one.where, " + ".join(one.rules), one) for one in self.regions if one in worst]
        for name, shape, one in rows:
            # a layer that is off and does no harm to the outputs is no reason to doubt the model
            verdict = "ok" if self.holds(one) else "high" if self.ok else "OFF"
            table.add_row(name, shape, f"{one.error:.1e}", f"{one.noise:.1e}", f"{one.ratio:.2f}", verdict)
        most = f"of {len(self.regions)} merged layers the {WORST} with the largest ratios"
        table.caption = "; ".join(filter(None, (self.against, self.lost, most * (len(self.regions) > WORST))))
        return table

    def plot(self, ax: Any = None) -> Any:
        """Error and noise of every merged layer, from the input to the output.

        Args:
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure(figsize=(8, 4), layout="constrained").add_subplot()
        depth = range(1, len(self.regions) + 1)
        ax.plot(depth, [region.noise for region in self.regions], label="rounding noise of the training-time model")
        ax.plot(depth, [region.error for region in self.regions], label="error of the deploy model")
        ax.plot(
            depth,
            [self.slack * region.noise for region in self.regions],
            color="gray",
            linestyle=":",
            label=f"{self.slack:g} times the noise: the limit",
        )
        ax.set(yscale="log", xlabel="merged layer, from the input on", ylabel="largest error, relative")
        ax.set_title(f"{self.device}, {self.autocast or self.dtype}")
        ax.legend()
        return ax

    def _repr_html_(self) -> str:
        return as_html(self.table())

    def __str__(self) -> str:
        return as_text(self.table())


class CheckpointRecord(Record):
    """What was made of a checkpoint."""

    source: str
    out: str
    entries: dict[str, PlanRecord]  # by where the state dict stood: "state_dict_ema", say
    left: tuple[str, ...] = ()  # what was left out, as it fits the training-time model only

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.out}"]
        lines += [
            f"  {entry}: {counted(len(plan.merges), 'merge')}, {counted(len(plan.refusals), 'refusal')}"
            for entry, plan in self.entries.items()
        ]
        return "\n".join([*lines, *([f"  left out: {', '.join(self.left)}"] if self.left else [])])


class Provenance(Record):
    """What a file says of the deploy model in it."""

    source: str  # of the training-time model
    model: str
    weights_sha256: str  # of the training-time model's state dict
    rules: dict[str, int]  # how many merges each has done
    refusals: int
    versions: dict[str, str]
    verification: Verification | None = None


class ExportRecord(Record):
    """A deploy model that was written."""

    out: str
    bytes: int
    merges: int
    provenance: Provenance
    proved: bool  # every merge on its own
    runtime: Verification | None = None  # of the program that was written, .onnx in onnxruntime

    def __str__(self) -> str:
        of = self.provenance
        lines = [f"{counted(self.merges, 'merge')}, {counted(of.refusals, 'refusal')} in {of.model}"]
        if not self.proved:
            lines.append("not proved")
        elif of.verification is None:
            lines.append("every merge proved on its own; give --shape to compare the whole models")
        for what, found in (("outputs", of.verification), ("outputs of the program", self.runtime)):
            if found is not None:
                lines.append(
                    f"{what} compared on {found.device}, {found.dtype}: relative error {found.error:.1e}, rounding "
                    f"noise of the original {found.noise:.1e}, {'; '.join(filter(None, (found.against, found.lost)))}"
                )
        return "\n".join([*lines, f"{self.bytes:,} bytes in {self.out}"])


class Latency(Record):
    """How long one model takes."""

    seconds: tuple[float, ...]  # of each pass
    median: float
    faster: float  # how many times as fast as the first model, the median over pairs of passes


class LatencyRecord(Record):
    """How long models take that ran in turn."""

    device: str
    torch: str
    models: dict[str, Latency]

    def __str__(self) -> str:
        return as_text(self.table())

    def table(self) -> Table:
        table = Table("model", title=f"latency on {self.device}, torch {self.torch}")
        for heading in ("median", "smallest", "largest", "times as fast"):
            table.add_column(heading, justify="right")
        for name, one in self.models.items():
            spans = (one.median, min(one.seconds), max(one.seconds))
            table.add_row(name, *(f"{1000 * span:.2f} ms" for span in spans), f"{one.faster:.2f}")
        return table


class BranchRecord(Record):
    """One branch of a block, as a kernel of its own."""

    name: str
    share: (
        float  # <branch, merged> / <merged, merged>: the shares of a sum add up to 1, one that works against it is < 0
    )
    norm: float  # of its kernel, relative to the merged kernel's
    dead: bool


class KernelRecord(Record):
    """A merged kernel as the weights are now."""

    where: str
    rules: tuple[str, ...]
    shape: tuple[int, ...]
    norm: float  # Frobenius
    low: float
    high: float
    int8_error: float  # of symmetric rounding with one range for the kernel, relative to its norm
    int8_error_per_channel: float  # with a range for each output channel
    branches: tuple[BranchRecord, ...] = ()


class MonitorRecord(Record):
    """All merged kernels of a model in training, from the input to the output."""

    model: str
    kernels: tuple[KernelRecord, ...]

    @property
    def dead(self) -> tuple[tuple[str, str], ...]:
        """Dead branches: the layer and the branch."""
        return tuple((one.where, branch.name) for one in self.kernels for branch in one.branches if branch.dead)

    def scalars(self, prefix: str = "structrep/") -> dict[str, float]:
        """All numbers under names, for any logger."""
        numbers = {f"{prefix}dead_branches": float(len(self.dead))}
        for one in self.kernels:
            start = f"{prefix}{one.where}/"
            numbers |= {
                f"{start}norm": one.norm,
                f"{start}low": one.low,
                f"{start}high": one.high,
                f"{start}int8_error": one.int8_error,
                f"{start}int8_error_per_channel": one.int8_error_per_channel,
            }
            numbers |= {f"{start}share/{branch.name}": branch.share for branch in one.branches}
        return numbers

    def table(self) -> Table:
        table = Table(title=f"{self.model}: {counted(len(self.kernels), 'merged kernel')}")
        for heading in ("where", "kernel", "range", "int8 error", "by channel", "branches: share of the kernel"):
            table.add_column(heading, justify="right" if heading in ("int8 error", "by channel") else "left")
        for one in self.kernels:
            branches = [f"{b.name} {round(b.share, 2) + 0.0:.0%}{' dead' if b.dead else ''}" for b in one.branches]
            table.add_row(
                one.where,
                "x".join(map(str, one.shape)),
                f"{one.low:.2g} to {one.high:.2g}",
                f"{one.int8_error:.1%}",
                f"{one.int8_error_per_channel:.1%}",
                ", ".join(branches),
            )
        return table

    def plot(self, axes: Any = None) -> Any:
        """The branches' shares, stacked, and the rounding errors of int8, a line for each merged kernel.

        Args:
            axes: two matplotlib axes side by side to draw on; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if axes is None:
            from matplotlib import pyplot

            height = max(3.0, 0.25 * len(self.kernels) + 1.2)
            axes = pyplot.figure(figsize=(11, height), layout="constrained").subplots(1, 2, sharey=True)
        shares, errors = axes
        names = list(dict.fromkeys(branch.name for one in self.kernels for branch in one.branches))
        rows = range(len(self.kernels))
        ends = {True: [0.0] * len(self.kernels), False: [0.0] * len(self.kernels)}  # of the bars, right and left of 0
        for name in names:
            widths = [sum(b.share for b in one.branches if b.name == name) for one in self.kernels]
            starts = [ends[width >= 0][row] for row, width in zip(rows, widths, strict=True)]
            shares.barh(rows, widths, left=starts, label=name)
            for row, width in zip(rows, widths, strict=True):
                ends[width >= 0][row] += width
        shares.set(yticks=list(rows), yticklabels=[one.where for one in self.kernels])
        shares.set_xlabel("share of the merged kernel")
        shares.invert_yaxis()
        above = dict(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
        if names:
            shares.legend(**above)
        errors.plot([100 * one.int8_error for one in self.kernels], rows, "o", label="one range for the kernel")
        errors.plot([100 * one.int8_error_per_channel for one in self.kernels], rows, ".", label="one for each channel")
        errors.set(xlabel="rounding error of the kernel in int8, %")
        errors.set_xlim(left=0.0)
        errors.legend(**above)
        return axes

    def __str__(self) -> str:
        return as_text(self.table())


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def plan_tables(plan: PlanRecord) -> Iterable[Table]:
    """A plan's merges, then its refusals."""
    merges = Table(title=f"{plan.model}: {counted(len(plan.merges), 'merge')}")
    for heading in ("where", "rule", "training time", "deploy", "multiply-adds per output pixel", "parameters"):
        merges.add_column(
            heading, justify="right" if heading in ("multiply-adds per output pixel", "parameters") else "left"
        )
    for merge in plan.merges:
        merges.add_row(
            merge.where,
            " + ".join(merge.rules),
            merge.before,
            merge.after,
            f"{merge.multiply_adds[0]:,.0f} -> {merge.multiply_adds[1]:,.0f}",
            f"{merge.parameters[0]:,} -> {merge.parameters[1]:,}",
        )
    yield merges
    told = [("(root)", "model", note) for note in plan.notes]
    told += [
        (merge.where, about, text)
        for merge in plan.merges
        for about, texts in (
            ("border", [merge.border]),
            ("sizes", [merge.sizes]),
            ("numbers", merge.notes),
            ("time", [" -> ".join(map(milliseconds, merge.seconds))] if merge.seconds else []),
        )
        for text in texts
        if text
    ]
    if told:
        notes = Table(title=counted(len(told), "note"))
        for heading in ("where", "about", "note"):
            notes.add_column(heading)
        for row in told:
            notes.add_row(*row)
        yield notes
    if plan.merges:
        sources = Table(title="sources")
        sources.add_column("rule")
        sources.add_column("source")
        for name, source in dict.fromkeys(
            pair for merge in plan.merges for pair in zip(merge.rules, merge.sources, strict=True)
        ):
            sources.add_row(name, source)
        yield sources
    if plan.refusals:
        refusals = Table(title=counted(len(plan.refusals), "refusal"))
        for heading in ("where", "rule", "what", "kind", "reason"):
            refusals.add_column(heading)
        for refusal in plan.refusals:
            refusals.add_row(refusal.where, refusal.rule, refusal.what, refusal.kind, refusal.reason)
        yield refusals


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def as_text(*tables: Table, width: int = 160) -> str:
    """Tables as plain text."""
    # Cells may hold anything, also what rich would take for markup.
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, emoji=False, highlight=False)
    for table in tables:
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def as_html(*tables: Table) -> str:
    """Tables as HTML, for notebooks."""
    return str(filled("tables.html.j2", tables=tables))
