"""`python -m tests.law.fuzz N`: the property of test_programs.py on N new programs; the counts go to results.json.

A failure is shrunk, and printed as a model. The counts are written after every CHUNK programs, so that a run cut
short has still shown what it ran.
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

from tests.law.fuzz.programs import Program, programs
from tests.law.fuzz.test_programs import check

RESULTS = Path(__file__).parent / "results.json"
CHUNK = 500


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []

    def record(failures: int) -> None:
        row = {"seed": first, "torch": torch.__version__, **counts, "failures": failures}
        RESULTS.write_text(json.dumps([*known, row], indent=1) + "\n")

    with Progress() as progress:
        bar = progress.add_task("programs", total=count)

        def run(program: Program) -> None:
            note(repr(program))
            merges = check(program)
            counts["programs"] += 1
            counts["with merges"] += merges > 0
            counts["merges"] += merges
            progress.advance(bar)

        for chunk, start in enumerate(range(0, count, CHUNK)):
            chosen = settings(
                max_examples=min(CHUNK, count - start),
                database=None,
                suppress_health_check=list(HealthCheck),
                deadline=None,
            )
            try:
                seed(first + chunk)(chosen(given(programs())(run)))()
            except BaseException as stopped:
                record(failures=int(isinstance(stopped, Exception)))
                raise
            record(failures=0)
    print(f"{counts['programs']:,} programs, {counts['with merges']:,} with merges, no failure; seed {first}")


if __name__ == "__main__":
    main()
