"""What each branch of a block is worth."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from structrep.records.base import Record, as_text, counted


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
