"""`python -m tests.needs.gpu FOLDER`: docs/gpu.md, of what the tests of this folder have left in that one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.support import ROOT

PAGE = ROOT / "docs" / "gpu.md"


def page(device: str, rows: Iterable[list[Any]]) -> str:
    kinds: dict[str, list[list[Any]]] = {"error": [], "latency": []}
    for kind, *row in sorted(rows):
        kinds[kind].append(row)
    lines = [
        "# On the GPU",
        "",
        f"Written by `make test-gpu` on {device}.",
        "",
        "## Errors",
        "",
        "Largest error of an output, relative to its largest value, against the float64 truth: of the deploy model, "
        "and of the training-time model by its own rounding in the same dtype. The limit is 8 times the latter.",
        "",
        "| model | how | error | noise | ratio |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {m} | {how} | {e:.1e} | {n:.1e} | {e / n if n else 0:.2f} |" for m, how, e, n in kinds["error"]),
        "",
        "## Latency",
        "",
        "Medians of interleaved runs, in milliseconds, batch of 8, nothing else on the device.",
        "",
        "| model | how | training time | deploy | times faster |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {m} | {how} | {a:.3f} | {b:.3f} | {a / b:.2f} |" for m, how, a, b in kinds["latency"]),
        "",
    ]
    return "\n".join(lines)


def main(folder: Path, to: Path = PAGE) -> None:
    rows = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    if not rows:
        raise SystemExit(f"no test in tests/needs/gpu has left a row in {folder}: {to} stays as it is")
    to.write_text(page(json.loads((folder / "device.json").read_text()), rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
