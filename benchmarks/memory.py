"""Peak memory of a conversion in place, beside the model: a few times its largest layer, not a second model.

    python benchmarks/memory.py

Each measurement is a process of its own, whose resident memory is sampled while it converts. The allocator is told to
give freed kernels back (MALLOC_MMAP_THRESHOLD_), so that what is sampled is what is held.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import structrep
from structrep.blocks import RepVGGBlock2d

RESULTS = Path(__file__).parent / "results" / "memory.json"
CHANNELS, BLOCKS = 512, 40


def _chain() -> list[nn.Module]:
    return [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]


def _repvgg() -> list[nn.Module]:
    return [RepVGGBlock2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()]


MODELS: dict[str, Callable[[], list[nn.Module]]] = {"conv + norm": _chain, "RepVGG": _repvgg}


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(name: str, inplace: bool) -> dict[str, object]:
    """Convert one model in this process."""
    model = nn.Sequential(*(layer for _ in range(BLOCKS) for layer in MODELS[name]())).eval()
    size = sum(t.numel() * t.element_size() for t in model.parameters()) / 2**20
    gc.collect()
    before, samples, done = _resident_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            samples.append(_resident_mib())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    structrep.reparameterize(model, inplace=inplace)
    done.set()
    watcher.join()
    return {
        "model": name,
        "inplace": inplace,
        "model_mib": round(size),
        "largest_kernel_mib": CHANNELS * CHANNELS * 9 * 4 / 2**20,
        "peak_extra_mib": round(max(samples) - before),
        "torch": torch.__version__,
    }


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], sys.argv[2] == "inplace")))
        return
    lines = []
    for name in MODELS:
        for how in ("copy", "inplace"):
            run = subprocess.run(
                [sys.executable, __file__, name, how],
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
                capture_output=True,
                text=True,
                check=True,
            )
            lines.append(json.loads(run.stdout))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(lines, indent=1) + "\n")
    table = Table("model", "how", "model, MiB", "largest kernel, MiB", "peak beside the model, MiB")
    for line in lines:
        how = "in place" if line["inplace"] else "copy"
        table.add_row(
            line["model"], how, *(f"{line[k]:g}" for k in ("model_mib", "largest_kernel_mib", "peak_extra_mib"))
        )
    Console().print(table)


if __name__ == "__main__":
    main()
