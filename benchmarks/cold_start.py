"""What structrep adds to the start of a process: its import, its first plan, its first conversion.

    python -m benchmarks.cold_start [ROUNDS]

Each run is a process of its own, and the kinds take turns. Ratios are those of neighbouring runs. The costliest imports
come from `python -X importtime`, which is slower than without, so their sum is more than the difference of the runs.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections import defaultdict
from typing import Any

from benchmarks.measure import Ratio, in_turn, machine, ratio, save, show

MODEL = """
import torch
from torch import nn

import structrep
from structrep.blocks import RepVGGBlock2d

model = nn.Sequential(RepVGGBlock2d(3, 16, 3, padding=1), nn.ReLU(), RepVGGBlock2d(16, 16, 3, padding=1)).eval()
"""
PROGRAMS = {
    "import torch": "import torch",
    "import structrep": "import structrep",
    "import torch, structrep": "import torch, structrep",
    "blocks": MODEL,
    "first plan": MODEL + "structrep.plan(model)",
    "first conversion": MODEL + "structrep.reparameterize(model)",
    "first conversion, with an example": MODEL + "structrep.reparameterize(model, torch.randn(1, 3, 32, 32))",
}
COSTLIEST = 8
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True)


def imports(program: str) -> dict[str, float]:
    """Seconds that each module itself takes to import."""
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], check=True, capture_output=True, text=True
    ).stderr
    return {name: int(microseconds) / 1e6 for microseconds, name in IMPORT.findall(told)}


def costliest(program: str) -> dict[str, float]:
    """The packages of the modules that a program imports beyond those of torch's own import; torch's by two names."""
    known = imports(PROGRAMS["import torch"])
    found: dict[str, float] = defaultdict(float)
    for name, seconds in imports(program).items():
        if name not in known:
            parts = name.split(".")
            found[".".join(parts[: 2 if parts[0] == "torch" else 1])] += seconds
    return dict(sorted(found.items(), key=lambda one: -one[1])[:COSTLIEST])


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    samples = in_turn({name: functools.partial(run, program) for name, program in PROGRAMS.items()}, rounds)
    ratios: dict[str, Ratio] = {name: ratio(samples, name, "import torch") for name in PROGRAMS}
    costs = {name: costliest(program) for name, program in PROGRAMS.items() if name != "import torch"}
    record: dict[str, Any] = {
        "machine": machine("networkx", "pydantic", "rich"),
        "seconds": samples,
        "ratios": {name: vars(found) for name, found in ratios.items()},
        "imports": costs,
    }
    save("cold-start", record)
    rows = [
        (
            name,
            f"{sorted(seconds)[len(seconds) // 2]:.2f}",
            str(ratios[name]),
            ", ".join(f"{package} {cost:.2f}" for package, cost in costs.get(name, {}).items() if cost >= 0.02),
        )
        for name, seconds in samples.items()
    ]
    show("start of a process", ("process", "seconds, median", "times import torch", "costliest imports, s"), rows)


if __name__ == "__main__":
    main()
