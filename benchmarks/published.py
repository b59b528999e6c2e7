"""Published implementations of re-parameterization, from their own repositories, beside their own conversions.

    python -m benchmarks.published --at FOLDER            clones of the repositories lie in this folder
    python -m benchmarks.published --at FOLDER QARepVGG   models whose names start with one of these

Weights are random, norms have random statistics. Counted are the convolutions and the norms with fixed statistics that
one forward runs: of the model, of what the repository's own conversion leaves, and of `structrep.plan(...).apply()`,
with and without example inputs. Each model has a process of its own, since repositories have modules of the same
names. One JSON line a model goes to benchmarks/results/published.jsonl, and docs/published.md is made from those lines.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import structrep
from benchmarks import measure
from benchmarks.libraries import Executed, error_of, settled
from benchmarks.library_models import stand_in
from benchmarks.published_models import PUBLISHED, Published
from tests.support.vision import import_torchvision

RESULTS = measure.RESULTS / "published.jsonl"
PAGE = measure.ROOT / "docs" / "published.md"
LONGEST = 600  # seconds for one model
_vision = import_torchvision()


class _Registry:
    """In the place of basicsr's, whose package asks for compiled operations."""

    def register(self, *_: Any) -> Any:
        return lambda cls: cls


def _ready(case: Published, folder: Path) -> None:
    """Stand where the repository's code expects to."""
    where = folder / case.folder
    sys.path[:0] = [str(where), str(folder / Path(case.folder).parts[0])]
    os.chdir(where)
    for name in case.absent:
        stand_in(name)
    if (registry := sys.modules.get("basicsr.utils.registry")) is not None:
        vars(registry)["ARCH_REGISTRY"] = _Registry()


def _counted(model: nn.Module, x: Tensor, before: Executed) -> dict[str, Any]:
    after = Executed(model, x)
    return {**after.counts, "error": error_of(after.outputs, before.outputs)}


def _theirs(case: Published, model: nn.Module, x: Tensor, before: Executed) -> dict[str, Any]:
    """What their own conversion leaves: in float64, or in float32 where it asks for that."""
    assert case.theirs is not None
    for dtype in (x.dtype, torch.float32):
        try:
            own = copy.deepcopy(model).to(dtype)
            made = case.theirs(own)
            return _counted((made if isinstance(made, nn.Module) else own).to(dtype).eval(), x.to(dtype), before)
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"[:100]
    return {"exception": raised}


def convert(name: str, folder: Path) -> dict[str, Any]:
    """One model, and what came of it."""
    case, line = PUBLISHED[name], {"model": name, "theirs": {}}
    try:
        _ready(case, folder)
        torch.manual_seed(0)
        model = settled(case.make())
        x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
        try:
            model, x = model.double(), x.double()
            before = Executed(copy.deepcopy(model), x)
        except Exception:  # code that says float32
            model, x = model.float(), x.float()
            before = Executed(copy.deepcopy(model), x)
        line |= {"dtype": str(x.dtype).removeprefix("torch."), "before": before.counts}
        if case.theirs is not None:
            line["theirs"] = _theirs(case, model, x, before)
        line["without"] = _counted(structrep.plan(model).apply(), x, before)
        plan = structrep.plan(model, x)
        line["with"] = _counted(plan.apply(), x, before)
        line["refusals"] = sorted({f"{one.kind}: {one.reason.splitlines()[0]}"[:200] for one in plan.refusals})[:5]
    except Exception as error:
        line["exception"] = f"{type(error).__name__}: {error}"[:200]
    return line


def _pair(counts: dict[str, Any]) -> str:
    return f"{counts['convs']}, {counts['norms']}" if "convs" in counts else str(counts.get("exception", ""))


PREFACE = """\
# Published implementations

Written by `python -m benchmarks.published`: the repositories of papers as they are, with random weights and norm
statistics. Convolutions and norms (with fixed statistics) that one forward runs, of the model, of what its own
conversion leaves, and of what structrep does, without and with example inputs; the largest error of an output.

"""


def page(lines: list[dict[str, Any]]) -> str:
    head = ("model", "before", "its own conversion", "without inputs", "with inputs", "error", "its own error")
    rows = []
    for line in sorted((one for one in lines if "with" in one), key=lambda one: str(one["model"])):
        error = max(line["with"]["error"], line["without"]["error"])
        own = f"{line['theirs']['error']:.0e}" if "error" in line["theirs"] else ""
        rows.append((line["model"], *(_pair(line[key]) for key in ("before", "theirs", "without", "with")),
                     f"{error:.0e} ({line['dtype']})", own))  # fmt: skip
    return PREFACE + measure.markdown(head, rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chosen", nargs="*")
    parser.add_argument("--at", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    lines = {line["model"]: line for line in known}
    apart = multiprocessing.get_context("fork")
    for name in PUBLISHED:
        if arguments.chosen and not name.startswith(tuple(arguments.chosen)):
            continue
        with apart.Pool(1) as pool:
            try:
                lines[name] = pool.apply_async(convert, (name, arguments.at.resolve())).get(LONGEST)
            except multiprocessing.TimeoutError:
                lines[name] = {"model": name, "exception": f"took more than {LONGEST} s"}
        print(*lines[name].values(), sep=" | ", flush=True)
        RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    PAGE.write_text(page(list(lines.values())))


if __name__ == "__main__":
    main()
