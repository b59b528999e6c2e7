"""What the benchmarks share: runs in turn in one process, ratios pair by pair, results as JSON, pages made of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
END = "<!-- end -->"


def machine(*packages: str) -> dict[str, Any]:
    """Where this runs: processor, threads, GPU, and the versions of torch and of more packages, None for none."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", *packages)},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int, warm: int = 1, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each run, one after the other, `rounds` times: A B C A B C, so that what slows one down slows all.

    Args:
        runs: by name.
        rounds: how often each counts.
        warm: how often each runs first, uncounted.
        before: runs before each, uncounted.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warm + rounds):
        for name, run in runs.items():
            before()
            seconds = timed(run)
            if index >= warm:
                samples[name].append(seconds)
    return samples


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run, to the end of what it left to the GPU."""
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of neighbouring runs, and the middle half of them."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(samples: Mapping[str, Sequence[float]], of: str, to: str) -> Ratio:
    """How many times as long `of` takes as `to`, pair by pair."""
    pairs = sorted(a / b for a, b in zip(samples[of], samples[to], strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
    return Ratio(middle, low, high)


def save(name: str, record: Any) -> None:
    """To benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def write(page: Path, name: str, text: str) -> None:
    """Put text into a page, between `<!-- NAME -->` and `<!-- end -->`."""
    before, rest = page.read_text(encoding="utf-8").split(f"<!-- {name} -->")
    page.write_text(f"{before}<!-- {name} -->\n{text}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
