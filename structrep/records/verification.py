"""How far two models differ."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field
from rich.table import Table

from structrep.records.base import WORST, Record, as_html, as_text


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

    Examples:
        >>> found = structrep.verify(model, deploy, torch.randn(1, 3, 224, 224))
        >>> print(found.ok, found.error, found.noise)
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
    alone: dict[str, str] = Field(default_factory=dict)  # operators that ran in their own dtype in it, and why
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
        """Whether it holds for all outputs, and if they are all blank for all merged layers."""
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
        """Whether an output, a choice or a merged layer is off by no more than rounding explains."""
        return record.error <= self.slack * record.noise

    def table(self) -> Table:
        """The outputs and the merged layers that are off the most, with their errors and the noise."""
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
