"""How long a conversion takes: structrep beside what else converts the same model, and beside a copy of it.

    python -m benchmarks.conversion            # writes benchmarks/results/conversion.json
    python -m benchmarks.conversion --quick    # two models, nothing is written

The others are `timm.utils.model.reparameterize_model`, which calls what each of timm's models brings along, and
`torch.fx.experimental.optimization.fuse`, which folds the norms that stand right behind a convolution or a Linear. Both
copy the model first, as structrep does, unless told not to. What changes its model gets a copy made off the clock.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import structrep
from benchmarks.measure import ROOT, in_turn, machine, ratio, save, show, timed
from structrep.cli.models import named
from structrep.prove.run import relative_error
from tests.support.vision import import_torchvision

_torchvision_ops = import_torchvision()  # which timm imports
from timm.utils.model import reparameterize_model  # noqa: E402

from benchmarks.zoo import Executed, image_for, settled  # noqa: E402

PEERS: dict[str, Callable[..., nn.Module]] = {"timm": reparameterize_model, "fuse": fuse}
MODELS = {
    "timm:repvgg_a0": "timm",
    "timm:mobileone_s1": "timm",
    "timm:fastvit_t8": "timm",
    "timm:repvit_m1": "timm",
    "timm:repghostnet_100": "timm",
    "timm:resnet18": "fuse",
    "timm:resnet50": "fuse",
    "torchvision:resnet50": "fuse",
}
QUICK = ("timm:repvgg_a0", "timm:resnet18")
FIRST = ("timm:repvgg_a0", "timm:mobileone_s1", "timm:fastvit_t8", "timm:resnet50")  # also in processes of their own
FORMS = ("copy", "peer", "structrep")  # of a first call


@dataclass
class Conversions:
    """The conversions of one model, and a copy of it for those that change it."""

    model: nn.Module
    image: Tensor
    peer: Callable[..., nn.Module]
    spare: nn.Module | None = None

    def renew(self) -> None:
        """A new copy for the next run, and no garbage of the last one."""
        self.spare = copy.deepcopy(self.model)
        gc.collect()

    def runs(self) -> Mapping[str, Callable[[], nn.Module]]:
        ours = structrep.reparameterize
        return {
            "copy": lambda: copy.deepcopy(self.model),
            "peer": lambda: self.peer(self.model),
            "structrep": lambda: ours(self.model, verify=False),
            "each merge proved": lambda: ours(self.model),
            "whole model proved": lambda: ours(self.model, self.image),
            "peer in place": lambda: self.peer(self.spare, inplace=True),
            "structrep in place": lambda: ours(self.spare, verify=False, inplace=True),  # type: ignore[arg-type]
        }


def prepare(source: str, peer: str) -> Conversions:
    model = settled(named(source, {}))
    return Conversions(model, image_for(source, model), PEERS[peer])


def result(conversions: Conversions, convert: Callable[..., nn.Module]) -> dict[str, Any]:
    """What one pass runs after a conversion, and how far it is from the model's own output."""
    ran = Executed(convert(conversions.model), conversions.image)
    with torch.no_grad():
        error = relative_error(ran.output, Executed(conversions.model, conversions.image).output)
    return {"convolutions": ran.convs, "norms": ran.norms, "additions": ran.additions, "error": error}


def measure(source: str, peer: str, rounds: int) -> dict[str, Any]:
    """Seconds of the conversions of one model in turn, and what they leave."""
    conversions = prepare(source, peer)
    before = Executed(conversions.model, conversions.image)
    return {
        "model": source,
        "peer": peer,
        "parameters": before.parameters,
        "convolutions": before.convs,
        "norms": before.norms,
        "additions": before.additions,
        "left": {
            "structrep": result(conversions, partial(structrep.reparameterize, verify=False)),
            "peer": result(conversions, conversions.peer),
        },
        "seconds": in_turn(conversions.runs(), rounds, before=conversions.renew),
    }


def first(source: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a process's first conversion, each in a process of its own, in turn; imports are done before."""

    def elsewhere(form: str) -> float:
        command = [sys.executable, "-m", "benchmarks.conversion", "--first-of", f"{source}/{form}"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"the first conversion of {source} by {form} failed:\n{run.stderr}")
        return float(run.stdout.split()[-1])

    samples: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(rounds):
        for form in FORMS:
            samples[form].append(elsewhere(form))
    return samples


def row(found: dict[str, Any]) -> list[str]:
    seconds = found["seconds"]
    return [
        found["model"],
        found["peer"],
        *(f"{median(seconds[name]):.3f}" for name in ("copy", "peer", "structrep")),
        *(str(ratio(seconds, "structrep", to)) for to in ("peer", "copy")),
        *(str(ratio(seconds, of, "structrep")) for of in ("each merge proved", "whole model proved")),
        str(ratio(seconds, "structrep in place", "peer in place")),
    ]


COLUMNS = (
    "model", "peer", "copy, s", "peer, s", "structrep, s", "structrep / peer", "structrep / copy",
    "merges proved / not", "model proved / not", "in place: structrep / peer",
)  # fmt: skip


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Two models, two rounds, nothing is written.")] = False,
    rounds: Annotated[int, typer.Option(help="How often each conversion counts.")] = 7,
    first_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if first_of:
        source, _, form = first_of.partition("/")
        print(timed(prepare(source, MODELS[source]).runs()[form]))
        return
    models = QUICK if quick else tuple(MODELS)
    found = [
        measure(source, MODELS[source], 2 if quick else rounds)
        for source in track(models, "conversions", console=Console(stderr=True))
    ]
    show("steady state; ratios: median (middle half)", COLUMNS, map(row, found))
    if quick:
        return
    begun = {source: first(source, rounds) for source in track(FIRST, "first calls", console=Console(stderr=True))}
    show(
        "first call in a process; ratios: median (middle half)",
        ("model", *(f"{form}, s" for form in FORMS), "structrep / peer"),
        (
            [source, *(f"{median(seconds[form]):.3f}" for form in FORMS), str(ratio(seconds, "structrep", "peer"))]
            for source, seconds in begun.items()
        ),
    )
    save("conversion", {"machine": machine("timm", "torchvision"), "rounds": rounds, "models": found, "first": begun})


if __name__ == "__main__":
    typer.run(main)
