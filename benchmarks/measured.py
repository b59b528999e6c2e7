"""Merges chosen by measurement, in several runtimes: never slower than all merges, or than none.

    python -m benchmarks.measured            # writes results/measured.json
    python -m benchmarks.measured --quick    # one case, one runtime; nothing is written

What a large depthwise kernel takes beside its branches depends on the runtime. For each case and runtime there are
three forms: the training-time model, the deploy model with all merges, and that with the merges that
`cost=structrep.Measured(runtime)` has left. They run in turn.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import structrep
from benchmarks import engines, measure, plain
from structrep.blocks import LargeKernelBlock2d

ENGINES = ("eager", "onnxruntime", "OpenVINO")
NONE, ALL, CHOSEN = "as it is", "all merged", "chosen"
COLUMNS = (
    "model",
    "runtime",
    "merges: all",
    "chosen",
    "all merged / as it is",
    "chosen / as it is",
    "chosen / all merged",
)
WARM = 3


class Strips(nn.Module):
    """A large depthwise kernel as SLaK trains it, arXiv:2207.03620: two strips and a small square, each with a norm."""

    def __init__(self, channels: int, long: int, short: int) -> None:
        super().__init__()
        sizes = ((long, short), (short, long), (short, short))
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, size, padding=(size[0] // 2, size[1] // 2), groups=channels, bias=False),
                nn.BatchNorm2d(channels),
            )
            for size in sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (branch(x) for branch in self.branches)
        return sum(others, first)


CASES = {
    **{name: partial(plain.CASES[name].training) for name in ("dbb_stack", "replknet_stack")},
    "large_kernel_stack": partial(
        plain.training_stack, partial(LargeKernelBlock2d, 64, 64, 31, padding=15, groups=64, branches=((5, 1),))
    ),
    "strips_stack": partial(plain.training_stack, partial(Strips, 64, 51, 5)),
}


def run_by(engine: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A model in a runtime of benchmarks/engines.py, as `structrep.Measured` takes it."""
    (x,) = args
    built = engines.build(engine, model, torch.cat([x, x]))  # whose batch is left open
    if isinstance(built, engines.Failed):
        raise RuntimeError(f"{engine}: {built.reason}")
    return partial(built.run, x)


def compared(name: str, engine: str, rounds: int) -> dict[str, Any]:
    model = CASES[name]().eval()
    x = torch.randn(1, *plain.FEATURES)
    measured = structrep.Measured(partial(run_by, engine))
    every, chosen = structrep.plan(model, x), structrep.plan(model, x, cost=measured)
    forms = {NONE: model, ALL: every.apply(), CHOSEN: chosen.apply()}
    with torch.no_grad():
        runs = {form: run_by(engine, module, (x,), {}) for form, module in forms.items()}
        seconds = measure.in_turn(runs, rounds, WARM)
    return {
        "model": name,
        "engine": engine,
        "merges": [len(every.merges), len(chosen.merges)],
        "seconds": seconds,
        "layers": {key: list(both) for key, both in measured.timings.items()},
    }


def row(found: dict[str, Any]) -> list[str]:
    pairs = ((ALL, NONE), (CHOSEN, NONE), (CHOSEN, ALL))
    ratios = (str(measure.ratio(found["seconds"], *pair)) for pair in pairs)
    return [found["model"], found["engine"], *map(str, found["merges"]), *ratios]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One case, one runtime; nothing is written.")] = False,
    rounds: Annotated[int, typer.Option(help="How often each form counts.")] = 20,
    threads: Annotated[int, typer.Option(help="Of every runtime.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    cases = [("replknet_stack", "eager")] if quick else [(name, engine) for name in CASES for engine in ENGINES]
    record: dict[str, Any] = {"machine": measure.machine(*engines.PACKAGES), "rounds": rounds, "rows": []}
    for name, engine in cases:
        record["rows"].append(compared(name, engine, 5 if quick else rounds))
        if not quick:
            measure.save("measured", record)
    measure.show("ratios: median (middle half)", COLUMNS, map(row, record["rows"]))


if __name__ == "__main__":
    typer.run(main)
