"""The zoo: models of timm and torchvision as they come, reparameterized, counted, and compared with themselves.

    python benchmarks/zoo.py            the smallest variant of each model module
    python benchmarks/zoo.py --all      every architecture
    python benchmarks/zoo.py NAME ...   these

One JSON line a model goes to benchmarks/results/zoo.jsonl; a model that is there already is not run again. The table in
docs/zoo.md is made from those lines. Nothing is downloaded: weights are random, norms have random statistics.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import Progress, track
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import structrep
from structrep.prove.run import relative_error, tensors

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "zoo.jsonl"
PAGE = HERE.parent / "docs" / "zoo.md"
EXACT_BELOW = 30_000_000  # parameters: float64 up to here, float32 above, each against the original's own rounding
LARGEST = 400_000_000  # parameters: what this has room for twice over in float64


def names(everything: bool) -> list[str]:
    """Architectures as `timm:name` and `torchvision:name`, smallest first; one of each module unless `everything`."""
    found = [f"timm:{name}" for name in timm.list_models()]
    try:
        from torchvision import models

        found += [f"torchvision:{name}" for name in models.list_models(module=models)]
    except (ImportError, RuntimeError) as error:
        print(f"torchvision is left out: {error}")
    sizes = {name: _parameters(name) for name in track(found, "looking at sizes")}
    found = sorted((name for name in found if sizes[name] <= LARGEST), key=sizes.__getitem__)
    return found if everything else list({_module(name): name for name in reversed(found)}.values())[::-1]


def _module(name: str) -> str:
    library, _, model = name.partition(":")
    if library == "timm":
        return str(timm.models.model_entrypoint(model).__module__)
    from torchvision import models

    return str(models.get_model_builder(model).__module__)


def _parameters(name: str) -> int:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in _build(name).parameters())
    except Exception:  # some cannot be built without memory
        return sum(p.numel() for p in _build(name).parameters())


def _build(name: str) -> nn.Module:
    library, _, model = name.partition(":")
    if library == "timm":
        return timm.create_model(model, pretrained=False)
    from torchvision import models

    kwargs = {"init_weights": True} if model in ("googlenet", "inception_v3") else {}
    return models.get_model(model, weights=None, **kwargs)


def settled(model: nn.Module) -> nn.Module:
    """Norms as training leaves them; heads that start at zero given values, so that there is an output to compare."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.2, generator=generator)
        elif isinstance(module, nn.Linear) and not module.weight.any():
            module.weight.data.normal_(0, 0.02, generator=generator)
    return model.eval()


def image_for(name: str, model: nn.Module) -> Tensor:
    size = (3, 224, 224)
    if name.startswith("timm:"):
        size = model.default_cfg.get("input_size", size)  # type: ignore[union-attr,operator]
    elif "inception" in name:
        size = (3, 299, 299)
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


class _Operations(TorchDispatchMode):
    """Counts convolutions, batch norms, and additions of two tensors of the same shape: branches and skips, not
    biases."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.convs = self.norms = self.additions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.convs += func.overloadpacket is torch.ops.aten.convolution
        self.norms += "batch_norm" in func.name()
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            both = len(args) > 1 and all(isinstance(a, Tensor) and a.ndim > 1 for a in args[:2])
            self.additions += both and args[0].shape == args[1].shape
        return func(*args, **(kwargs or {}))


class Executed:
    """What a forward pass runs: convolutions, norms with fixed statistics, additions of activations, multiply-adds."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            self.output = next(iter(tensors(model(image))))
        with torch.no_grad(), _Operations() as operations:
            model(image)
        self.multiply_adds = flops.get_total_flops() // 2
        self.convs, self.norms, self.additions = operations.convs, operations.norms, operations.additions
        self.parameters = sum(p.numel() for p in model.parameters())


def measure(name: str) -> dict[str, Any]:
    """Convert one model and say what came of it."""
    torch.manual_seed(0)
    model = settled(_build(name)).requires_grad_(False)
    exact = sum(p.numel() for p in model.parameters()) < EXACT_BELOW
    image = image_for(name, model)
    if exact:
        model, image = model.double(), image.double()
    before = Executed(model, image)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    plan = structrep.plan(model)
    deploy = plan.apply()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    after = Executed(deploy, image)
    verified = structrep.verify(model, deploy, image, device="cpu")
    line: dict[str, Any] = {
        "model": name,
        "dtype": "float64" if exact else "float32",
        "convs": [before.convs, after.convs],
        "norms": [before.norms, after.norms],
        "additions": [before.additions, after.additions],
        "multiply_adds": [before.multiply_adds, after.multiply_adds],
        "parameters": [before.parameters, after.parameters],
        "error": verified.error,
        "noise": verified.noise,
        "holds": verified.ok and after.multiply_adds <= before.multiply_adds,
        "seconds": round(seconds, 3),
        "peak_mib": peak // 1024,
        "rules": dict(Counter(rule for merge in plan.merges for rule in merge.rules)),
        "refusals": dict(Counter(refusal.kind for refusal in plan.refusals)),
        "norms_left": _norms_left(deploy, plan),
    }
    if name.startswith("timm:"):
        try:
            counted = Executed(timm.utils.reparameterize_model(model), image)
        except RuntimeError as error:  # its new layers are float32
            line["timm"] = {"exception": str(error).splitlines()[0][:100]}
        else:
            line["timm"] = {
                "convs": counted.convs,
                "norms": counted.norms,
                "additions": counted.additions,
                "error": relative_error(counted.output, before.output),
            }
    return line


def _norms_left(deploy: nn.Module, plan: structrep.Plan) -> dict[str, int]:
    """Why norms are still there, by the kind of the refusal that is about them."""
    left = [
        path
        for path, m in deploy.named_modules()
        if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None
    ]
    reasons = {layer: refusal.kind for refusal in plan.refusals for layer in refusal.layers}
    return dict(Counter(reasons.get(path, "not reached") for path in left))


def table(lines: list[dict[str, Any]]) -> str:
    """The page, from all lines."""
    good = [line for line in lines if line.get("holds")]
    rows = [
        "# The zoo",
        "",
        "Models of timm and torchvision as they come, random weights and norm statistics, converted by "
        "`structrep.plan(model).apply()` without example inputs. Made by `python benchmarks/zoo.py`, on two shared "
        "cores. Convolutions, norms and additions are those that one forward pass runs; the error is the largest, "
        "relative to the largest output, in float64 where the model has fewer than 30 million parameters, else in "
        "float32.",
        "",
        f"{len(lines)} models, {len(good)} equal to rounding and no dearer, "
        f"{sum('exception' in line for line in lines)} exceptions.",
        "",
        "| model | convs | norms | additions | multiply-adds | error "
        "| timm leaves (convs, norms) | seconds | rules | why norms are left |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in sorted(lines, key=lambda one: str(one["model"])):
        if "exception" in line:
            rows.append(f"| {line['model']} | | | | | {line['exception']} | | | | |")
            continue
        pairs = [f"{line[key][0]:,} → {line[key][1]:,}" for key in ("convs", "norms", "additions", "multiply_adds")]
        theirs = ", ".join(str(line["timm"].get(key, "fails")) for key in ("convs", "norms")) if "timm" in line else ""
        rules = ", ".join(f"{name} {count}" for name, count in line["rules"].items())
        left = ", ".join(f"{name} {count}" for name, count in line["norms_left"].items())
        flag = "" if line["holds"] else " **off**"
        error, seconds = f"{line['error']:.0e}{flag}", f"{line['seconds']:.1f}"
        cells = [line["model"], *pairs, error, theirs, seconds, rules, left]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true", help="every architecture, not one a module")
    arguments = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {line["model"] for line in lines}
    todo = [name for name in arguments.names or names(arguments.all) if name not in done]
    with Progress() as progress, RESULTS.open("a") as out:
        bar = progress.add_task("zoo", total=len(todo))
        for name in todo:
            progress.update(bar, description=name)
            try:
                line = measure(name)
            except Exception as error:
                line = {"model": name, "exception": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            lines.append(line)
            out.write(json.dumps(line) + "\n")
            out.flush()
            progress.advance(bar)
    PAGE.write_text(table(lines))


if __name__ == "__main__":
    main()
