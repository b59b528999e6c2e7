"""How long two models take."""

from __future__ import annotations

from rich.table import Table

from structrep.records.base import Record, as_text


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


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
