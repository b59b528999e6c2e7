"""What `structrep` merges that published conversions leave.

    python -m benchmarks.beyond                        # all models; writes docs/runtimes.md
    python -m benchmarks.beyond --model fastvit_t8
    python -m benchmarks.beyond --quick                # counts of two small models; nothing is written

timm's models bring conversions of their own, which know their blocks. Counted is what one forward pass runs after
timm's conversion and after `structrep`'s: batch norms, scales (products and quotients with one number a channel, or
one number), additions of activations, concatenations, average pools. Then both are timed in turn. At the end there are
models of which no conversion knows anything: an input normalisation in front of one, a head that concatenates 1x1
convolutions, ResNet-D's average pools before 1x1 convolutions, learnable affines behind activations.
"""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import structrep
from benchmarks import engines, measure, plain
from structrep.prove.run import relative_error

PAGE = measure.ROOT / "docs" / "runtimes.md"
ENGINES = ("eager", "onnxruntime")
KINDS = ("convolutions", "norms", "scales", "additions", "concatenations", "average pools", "nodes")
THEIRS, OURS = "timm's deploy", "deploy"
WARM = 3


class Normalised(nn.Module):
    """A model that takes images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model((x - self.mean) / self.std)
        return y


class Detector(nn.Module):
    """Boxes and scores of each place of ResNet-18's last features, by 1x1 convolutions, in one tensor."""

    def __init__(self, anchors: int = 3, classes: int = 80) -> None:
        super().__init__()
        self.backbone = plain.timm_model("resnet18")
        self.neck = nn.Sequential(nn.Conv2d(512, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU())
        self.boxes, self.seen = nn.Conv2d(256, 4 * anchors, 1), nn.Conv2d(256, anchors, 1)
        self.scores = nn.Conv2d(256, classes * anchors, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.neck(self.backbone.forward_features(x))  # type: ignore[operator]
        return torch.cat((self.boxes(features), self.seen(features), self.scores(features)), 1)


CONVERTED = (  # which timm converts
    "repvgg_a0", "mobileone_s1", "repvit_m1", "fastvit_t8", "fastvit_sa12", "repghostnet_100", "ghostnetv3_100",
    "lcnetv2_base", "nextvit_small", "efficientvit_m0", "shvit_s1", "efficientvim_m1", "iformer_t", "levit_128s",
    "tiny_vit_5m_224",
)  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(plain.timm_model, name) for name in CONVERTED},
    "resnet18, images in [0, 1]": lambda: Normalised(plain.timm_model("resnet18")).eval(),
    "convnext_atto, images in [0, 1]": lambda: Normalised(plain.timm_model("convnext_atto")).eval(),
    "resnet18 with a detection head": lambda: Detector().eval().requires_grad_(False),
    "resnet18d": partial(plain.timm_model, "resnet18d"),
    "hgnetv2_b0, learnable affines": partial(plain.timm_model, "hgnetv2_b0"),
}


def measured(name: str, rounds: int) -> dict[str, Any]:
    """Counts of each form, errors, why things are left, and samples of both conversions in each runtime.

    Args:
        rounds: how often each conversion is run; 0 for counts alone.
    """
    torch.manual_seed(0)
    training = MODELS[name]()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *plain.IMAGE, generator=generator)
    plan = structrep.plan(training)
    deploy = plan.apply()
    forms = {"training-time": training, THEIRS: plain.by_timm(training), OURS: deploy}
    with torch.no_grad():
        truth = copy.deepcopy(training).double()(x.double())
        errors = {form: relative_error(model(x), truth) for form, model in forms.items()}
    found: dict[str, Any] = {
        "model": name,
        "counts": {form: dict(engines.executed(model, x)) for form, model in forms.items()},
        "errors": errors,
        "left": dict(Counter(refusal.kind for refusal in plan.refusals)),
        "rules": dict(Counter(rule for merge in plan.merges for rule in merge.rules)),
        "seconds": {},
        "failed": {},
    }
    for engine in ENGINES if rounds else ():
        built = {form: engines.build(engine, forms[form], x) for form in (THEIRS, OURS)}
        for form, one in built.items():
            if isinstance(one, engines.Failed):
                found["failed"][f"{engine}, {form}"] = one.reason
        runs = {form: partial(one.run, x[:1]) for form, one in built.items() if isinstance(one, engines.Built)}
        with torch.no_grad():
            found["seconds"][engine] = measure.in_turn(runs, rounds, WARM)
        del built, runs
        gc.collect()
    return found


COLUMNS = (
    "model", *KINDS, "error / training-time error", "refused", *(f"{engine}: ms, deploy" for engine in ENGINES),
    *(f"{engine}: deploy / timm's" for engine in ENGINES),
)  # fmt: skip


def row(found: dict[str, Any]) -> list[str]:
    counts, errors = found["counts"], found["errors"]
    cells = [found["model"]]
    cells += [" → ".join(f"{counts[form].get(kind, 0)}" for form in ("training-time", THEIRS, OURS)) for kind in KINDS]
    cells.append(", ".join(f"{errors[form] / errors['training-time']:.1f}" for form in (THEIRS, OURS)))
    cells.append(", ".join(f"{kind} {count}" for kind, count in found["left"].items()))
    taken = [found["seconds"].get(engine, {}) for engine in ENGINES]
    cells += [f"{1e3 * median(seconds[OURS]):.2f}" if OURS in seconds else "-" for seconds in taken]
    cells += [str(measure.ratio(seconds, OURS, THEIRS)) if len(seconds) == 2 else "-" for seconds in taken]
    return cells


def table(record: dict[str, Any]) -> str:
    of = record["machine"]
    failed = [f"* {one['model']}, {what}: `{why}`" for one in record["rows"] for what, why in one["failed"].items()]
    return "\n\n".join(
        [
            f"{of['cpu']}, {of['threads']} threads, torch {of['torch']}, onnxruntime {of['onnxruntime']}, timm "
            f"{of['timm']}; float32, 224x224, batch 1. Numbers: as it trains → after timm's conversion → after "
            f"structrep's. Ratios of neighbouring runs: the median and the middle half of {record['rounds']}.",
            measure.markdown(COLUMNS, map(row, record["rows"])),
            *(["What could not be run:", "\n".join(failed)] if failed else []),
        ]
    )


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Counts of two models; nothing is written.")] = False,
    model: Annotated[list[str], typer.Option(help="Only these models.")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="How often each conversion is run; 0: only counts.")] = 30,
    threads: Annotated[int, typer.Option(help="Of every runtime.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    if unknown := set(model) - set(MODELS):
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    names = model or (["lcnetv2_base", "resnet18, images in [0, 1]"] if quick else list(MODELS))
    record: dict[str, Any] = {"machine": measure.machine(*engines.PACKAGES), "rounds": rounds, "rows": []}
    for name in track(names, "models", console=Console(stderr=True)):
        record["rows"].append(measured(name, 0 if quick else rounds))
        if not (quick or model):  # each time: a runtime may take the process down
            measure.save("beyond", record)
            measure.write(PAGE, "benchmarks/beyond.py", table(record))
    measure.show("training-time → timm's → structrep's", COLUMNS, map(row, record["rows"]))


if __name__ == "__main__":
    typer.run(main)
