"""`python -m tests.fuzz N`: the property of test_programs.py on N new programs; the counts go to results.json.

A failure is shrunk, and printed as a model.
"""

from __future__ import annotations

import collections
import json
import sys
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, note, seed, settings
from rich.progress import Progress

from tests.fuzz.programs import Program, programs
from tests.fuzz.test_programs import check

RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    start = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    with Progress() as progress:
        bar = progress.add_task("programs", total=count)

        @seed(start)
        @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck), deadline=None)
        @given(programs())
        def run(program: Program) -> None:
            note(repr(program))
            merges = check(program)
            counts["programs"] += 1
            counts["with merges"] += merges > 0
            counts["merges"] += merges
            progress.advance(bar)

        failures = 1
        try:
            run()
            failures = 0
        finally:
            known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
            known.append({"seed": start, "torch": torch.__version__, **counts, "failures": failures})
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{counts['programs']:,} programs, {counts['with merges']:,} with merges, no failure; seed {start}")


if __name__ == "__main__":
    main()
