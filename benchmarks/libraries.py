"""Models of ultralytics, pytorchcv, mmpretrain, mmdet, mmsegmentation, spandrel and speechbrain as they come.

    python -m benchmarks.libraries                     what is installed; a library that is not is skipped
    python -m benchmarks.libraries mmdet ultralytics:  models whose names start with one of these
    python -m benchmarks.libraries --at FOLDER         looks for libraries there too

Weights are random, norms have random statistics; nothing is downloaded. Counted are the convolutions and the norms with
fixed statistics that one forward runs: of the model, of `structrep.plan(model, example).apply()`, and of what the
library's own conversion leaves. One JSON line a model goes to benchmarks/results/libraries.jsonl, as in the zoo; a
model that is there already is not run again. The page docs/libraries.md is made from those lines.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import re
import sys
import time
import warnings
from collections import Counter
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import structrep
from benchmarks import measure
from benchmarks.library_models import LARGEST, LIBRARIES, Library, stand_in
from structrep.prove.run import relative_error, tensors
from tests.support.vision import import_torchvision

RESULTS = measure.RESULTS / "libraries.jsonl"
PAGE = measure.ROOT / "docs" / "libraries.md"
WIDE_BELOW = 60_000_000  # parameters: float64 up to here
EXACT = {"float64": 1e-9, "float32": 1e-4}
_vision = import_torchvision()


def settled(model: nn.Module) -> nn.Module:
    """Norms as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
            assert module.running_mean is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.1, generator=generator)
    model.eval()  # of some, gives nothing back
    return model.requires_grad_(False)


class _Operations(TorchDispatchMode):
    """Counts convolutions, and norms with fixed statistics; notes what reads that which a convolution or Linear gives,
    and whether it is such a norm."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.convs = self.norms = 0
        self.readers: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        norm = "batch_norm" in func.name() and args[5] is not True
        self.norms += norm
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor) and hasattr(one, "readers"):
                one.readers.append(norm)
        given = func(*args, **(kwargs or {}))
        self.convs += func.overloadpacket is torch.ops.aten.convolution
        if func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.addmm):
            given.readers = []
            self.readers.append(given.readers)
        return given


class Executed:
    """What a forward runs; how many norms alone read what a convolution or Linear gives; the norms that ran."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.ran: list[str] = []
        handles = [
            module.register_forward_pre_hook(lambda _, args, path=path: self.ran.append(path))
            for path, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
        ]
        try:
            with torch.no_grad(), _Operations() as operations:
                self.outputs = list(tensors(model(x)))
        finally:
            for handle in handles:
                handle.remove()
        self.counts = {"convs": operations.convs, "norms": operations.norms}
        self.behind = sum(readers == [True] for readers in operations.readers)


def runs(library: Library, name: str) -> tuple[str, nn.Module, Tensor, Executed]:
    """The first of the ways in which a model runs, in float64 if it can."""
    why = ""
    for part, model, shapes in library.ways(name):
        size = sum(p.numel() for p in model.parameters())
        if size > LARGEST:
            raise ValueError(f"{size:,} parameters are too many for here")
        settled(model)
        for dtype in (torch.float64, torch.float32)[size >= WIDE_BELOW :]:
            for shape in shapes:
                x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
                try:
                    return part, model, x, Executed(model.to(dtype), x)
                except Exception as error:
                    why = why or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
    raise ValueError(why)  # of the first way


def error_of(outputs: list[Tensor], truth: list[Tensor]) -> float:
    """Of all outputs; of the first, if there are fewer than there were."""
    pairs = list(zip(outputs, truth, strict=False))
    return max(relative_error(*pair) for pair in (pairs if len(outputs) == len(truth) else pairs[:1]))


def convert(library: Library, name: str) -> dict[str, Any]:
    """One model, converted, and what came of it."""
    torch.manual_seed(0)
    try:
        part, model, x, before = runs(library, name)
    except Exception as error:
        return {"not_run": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    line: dict[str, Any] = {"part": part, "dtype": str(x.dtype).removeprefix("torch."), "input": list(x.shape)}
    line |= {"before": before.counts, "behind": before.behind, "theirs": {}}
    if library.theirs is not None and (hasattr(model, "fuse") or library.needs):
        try:
            fused = Executed(library.theirs(copy.deepcopy(model)), x)
            lost = len(before.outputs) - len(fused.outputs)
            line["theirs"] = {**fused.counts, "error": error_of(fused.outputs, before.outputs), "lost": lost}
        except Exception as error:
            line["theirs"] = {"exception": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"}
    start = time.perf_counter()
    try:
        plan = structrep.plan(model, x)
        deploy = plan.apply()
        line["seconds"] = round(time.perf_counter() - start, 2)
        after = Executed(deploy, x)
        line |= {"after": after.counts, "error": error_of(after.outputs, before.outputs)}
        line["holds"] = line["error"] < EXACT[line["dtype"]] or structrep.verify(model, deploy, x, device="cpu").ok
    except Exception as error:
        return {**line, "exception": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
    told = {one: f"{one.kind}: {one.reason.splitlines()[0]}" for one in plan.refusals}
    for folder in filter(None, sys.path):
        told = {one: reason.replace(f"{folder}/", "") for one, reason in told.items()}
    reasons = {path: reason for one, reason in told.items() for path in one.layers}
    left = Counter(re.sub(r"\d+", "#", reasons.get(path, "not reached")) for path in after.ran)
    return {**line, "rules": dict(Counter(rule for merge in plan.merges for rule in merge.rules)), "left": dict(left)}


def there(library: Library, name: str) -> bool:
    """Whether a library can be imported; where not, it is said."""
    try:
        for module in library.needs:
            import_module(module)
        for module in library.absent:
            stand_in(module)
        if "mmcv" in library.needs:
            vars(import_module("mmcv"))["__version__"] = (
                "2.1.0"  # the newest that mmdet and mmsegmentation say they know
            )
        import_module(name)
    except ImportError as error:
        print(f"{name} is left out: {error}")
        return False
    return True


def dearer(line: dict[str, Any]) -> bool:
    """Whether the library's own conversion, or folding norms into the layers before them, leaves less."""
    theirs, after = line["theirs"], line.get("after", line["before"])
    right = theirs.get("error", 1) < EXACT[line["dtype"]]
    fewer = right and any(theirs[key] < after[key] for key in after if key == "norms" or not theirs["lost"])
    return fewer or line["before"]["norms"] - line["behind"] < after["norms"]


def _pair(line: dict[str, Any], key: str) -> str:
    return f"{line['before'][key]} → {line['after'][key]}" if "after" in line else str(line["before"][key])


def _own(line: dict[str, Any]) -> str:
    theirs = line["theirs"]
    if "convs" not in theirs:
        return str(theirs.get("exception", ""))
    off = "" if theirs["error"] < EXACT[line["dtype"]] else f", off by {theirs['error']:.0e}"
    fewer = f", without {theirs['lost']} of the outputs" if theirs["lost"] else ""
    return f"{theirs['convs']}, {theirs['norms']}{off}{fewer}"


def table(lines: list[dict[str, Any]]) -> str:
    head = ("model", "convs", "norms", "behind a layer", "its own conversion leaves (convs, norms)", "error", "seconds",
            "why norms are left")  # fmt: skip
    rows = []
    for line in sorted(lines, key=lambda one: str(one["model"])):
        if "not_run" in line:
            continue
        error = (
            line["exception"] if "exception" in line else f"{line['error']:.0e}{'' if line['holds'] else ' **off**'}"
        )
        left = "<br>".join(f"{count} × {reason}" for reason, count in line.get("left", {}).items())
        name = f"{line['model']} ({line['part']})" if line["part"] else line["model"]
        rows.append((name, _pair(line, "convs"), _pair(line, "norms"), str(line["behind"]), _own(line), error,
                     str(line.get("seconds", "")), left.replace("|", "\\|")))  # fmt: skip
    return measure.markdown(head, rows)


def summary(lines: list[dict[str, Any]]) -> str:
    head = ("library", "models", "equal to rounding", "convs", "norms", "its own conversion", "own is off or raises",
            "more left than by its own, or by folding behind a layer", "raised", "could not run here")  # fmt: skip
    rows = []
    for library in dict.fromkeys(str(line["model"]).partition(":")[0] for line in lines):
        mine = [line for line in lines if str(line["model"]).partition(":")[0] == library]
        ran = [line for line in mine if "after" in line]
        convs, norms = (
            [sum(one[when][key] for one in ran) for when in ("before", "after")] for key in ("convs", "norms")
        )
        own = [one["theirs"] for one in ran if "convs" in one["theirs"]]
        kept = [sum(one[key] for one in own) for key in ("convs", "norms")]
        bad = sum("exception" in one["theirs"] or one["theirs"].get("error", 0) >= EXACT[one["dtype"]] for one in ran)
        rows.append((
            library, str(len(mine)), f"{sum(one['holds'] for one in ran)} of {len(ran)}",
            f"{convs[0]:,} → {convs[1]:,}", f"{norms[0]:,} → {norms[1]:,}",
            f"{kept[0]:,} and {kept[1]:,}, of {len(own)}" if own else "",
            str(bad), str(sum(map(dearer, ran))),
            *(str(sum(key in one for one in mine)) for key in ("exception", "not_run")),
        ))  # fmt: skip
    return measure.markdown(head, rows)


PREFACE = """\
# Libraries of models

Written by `python -m benchmarks.libraries`, with {versions}: models as each library builds them, with random weights
and norm statistics, by `structrep.plan(model, example).apply()`, in float64 where a model runs so. Convolutions and
norms (with fixed statistics) are those that one forward runs. *behind a layer* counts norms that alone read what a
convolution or Linear gives. The library's own conversion is `fuse()` of ultralytics, and `switch_to_deploy` and
`fuse_conv_bn` of OpenMMLab's. Errors are the largest of all outputs, relative to the largest value of each.

"""


def page(lines: list[dict[str, Any]]) -> str:
    known = {"mmseg": "mmsegmentation"}
    found = measure.machine(*(known.get(name, name) for name in LIBRARIES))
    versions = ", ".join(f"{name} {found[known.get(name, name)]}" for name in LIBRARIES if found[known.get(name, name)])
    unable = [f"* {line['model']}: {line['not_run']}" for line in lines if "not_run" in line]
    text = PREFACE.format(versions=versions) + summary(lines) + "\n\n" + table(lines) + "\n"
    return text + ("\nWhat could not be built or run here:\n\n" + "\n".join(unable) + "\n" if unable else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chosen", nargs="*")
    parser.add_argument("--at", nargs="*", default=[], metavar="FOLDER")
    arguments = parser.parse_args()
    sys.path += arguments.at
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {line["model"] for line in lines}
    with RESULTS.open("a") as out:
        for title, library in LIBRARIES.items():
            asked = [one for one in arguments.chosen if one.partition(":")[0] == title]
            if (arguments.chosen and not asked) or not there(library, title):
                continue
            for name in library.names():
                model = f"{title}:{name}"
                if model in done or (asked and not model.startswith(tuple(asked))):
                    continue
                lines.append({"model": model, **convert(library, name)})
                out.write(json.dumps(lines[-1]) + "\n")
                out.flush()
                print(*lines[-1].values(), sep=" | ", flush=True)
    PAGE.write_text(page(lines))


if __name__ == "__main__":
    main()
