"""Reasons of refusals, put to the test: what a reason names is taken away in a copy, and then the merge has to be made.

    python -m benchmarks.reasons                 one model a family of timm's, and the implementations in tests/foreign
    python -m benchmarks.reasons convnext levit  those models of timm's

A norm that has nothing beside it gets a layer; a merge that costs too much gets a price of nothing; one whose border
differs may differ there. Reasons of other kinds name a line or a part, which is looked for, and are listed as not
tried. One JSON line a refusal goes to benchmarks/results/reasons.jsonl. For each shape of a reason (its numbers left
out) three are tried in a model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import structrep
from benchmarks import measure
from structrep.match import fit
from structrep.records.plan import RefusalRecord
from structrep.terms.cost import Cost
from tests.foreign.cases import BLOCKS, NETWORKS
from tests.support.models import settled
from tests.support.vision import import_torchvision

RESULTS = measure.RESULTS / "reasons.jsonl"
EACH = 3  # of one shape in a model
LARGEST = 12_000_000  # parameters
_vision = import_torchvision()


def models(chosen: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Small ones first: families of timm's by their smallest model, and what is published."""
    import timm

    smallest: dict[str, str] = {}
    for name in timm.list_models():
        family = str(timm.models.model_entrypoint(name).__module__)
        if family not in smallest or len(name) < len(smallest[family]):
            smallest[family] = name
    for name in chosen or smallest.values():
        with contextlib.suppress(Exception), torch.device("meta"):
            if sum(one.numel() for one in timm.create_model(name).parameters()) > LARGEST:
                continue
        with contextlib.suppress(Exception):
            yield f"timm:{name}", timm.create_model(name)
    for case in () if chosen else (*BLOCKS, *NETWORKS):
        yield f"foreign:{case}", case.make()


def names_a_place(reason: str, model: nn.Module, layers: tuple[str, ...]) -> bool:
    """Whether a refusal names a part that there is, or a line of a file that there is."""
    parts = {path for path, _ in model.named_modules()}
    lines = re.findall(r"([^\s()]+\.py):(\d+)", reason)
    there = all(Path(file).exists() and len(Path(file).read_text().splitlines()) >= int(line) for file, line in lines)
    return there and (bool(lines) or (bool(layers) and parts.issuperset(layers)))


def put_beside(model: nn.Module, path: str) -> bool:
    """Give a norm a layer before it, or behind it if it takes its statistics from each value; False if it has no
    numbers to give that."""
    parent, _, name = path.rpartition(".")
    norm: Any = model.get_submodule(path)
    weight = norm.weight
    if weight is None or weight.ndim != 1:
        return False
    last = isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and "2d" not in type(norm).__name__
    flat = last or isinstance(norm, nn.BatchNorm1d)
    layer = nn.Linear(len(weight), len(weight)) if flat else nn.Conv2d(len(weight), len(weight), 1)
    each = getattr(norm, "running_mean", None) is None
    setattr(model.get_submodule(parent), name, nn.Sequential(*((norm, layer) if each else (layer, norm))))
    return True


def isolated(model: nn.Module, refusals: list[RefusalRecord]) -> dict[RefusalRecord, str]:
    """What became of norms when each had a layer beside it."""
    changed = copy.deepcopy(model)
    given = [one for one in refusals if len(one.layers) == 1 and put_beside(changed, one.layers[0])]
    merges = structrep.plan(changed.eval()).merges if given else ()
    found = {one for one in given if any(merge.where.startswith(f"{one.layers[0]}.") for merge in merges)}
    return {one: "merges" if one in found else "stays" if one in given else "not tried" for one in refusals}


def costlier(model: nn.Module, refusals: list[RefusalRecord]) -> dict[RefusalRecord, str]:
    """The same where a merged layer costs nothing."""
    tried = {one for one in refusals if "holds no" not in one.reason and "some sizes" not in one.reason}
    with mock.patch.object(fit.cost, "of_map", return_value=Cost(0, 0, 0)):
        left = {(one.kind, one.layers) for one in structrep.plan(model).refusals} if tried else set()
    stays = {one for one in tried if (one.kind, one.layers) in left}
    return {one: "stays" if one in stays else "merges" if one in tried else "not tried" for one in refusals}


def inexact(model: nn.Module, refusals: list[RefusalRecord]) -> dict[RefusalRecord, str]:
    """The same where a border may differ."""
    layers = sorted({layer for one in refusals for layer in one.layers})
    left = {(one.kind, one.layers) for one in structrep.plan(model, inexact_borders=layers).refusals}
    return {one: "stays" if (one.kind, one.layers) in left else "merges" for one in refusals}


TAKEN_AWAY = {"Isolated": isolated, "Costlier": costlier, "Inexact": inexact}


def tried(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Each shape of a reason of a model, some times."""
    seen: Counter[str] = Counter()
    chosen: dict[str, list[RefusalRecord]] = {}
    for refusal in structrep.plan(model).refusals:
        shape = f"{refusal.kind}: {re.sub(r'[0-9]+', '#', refusal.reason)}"
        seen[shape] += 1
        if seen[shape] <= EACH:
            chosen.setdefault(refusal.kind, []).append(refusal)
    for kind, refusals in chosen.items():
        became = TAKEN_AWAY[kind](model, refusals) if kind in TAKEN_AWAY else dict.fromkeys(refusals, "not tried")
        for one in refusals:
            placed = names_a_place(one.reason, model, tuple(one.layers))
            yield {"kind": kind, "layers": list(one.layers), "reason": one.reason, "names a place": placed,
                   "taken away": became[one]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chosen", nargs="*", help="names of models of timm's")
    chosen = parser.parse_args().chosen
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[tuple[str, str]] = Counter()
    with RESULTS.open("w") as out:
        for name, model in models(chosen):
            try:
                lines = [{"model": name, **line} for line in tried(settled(model))]
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}"[:200], flush=True)
                continue
            for line in lines:
                counts[line["kind"], line["taken away"]] += 1
                counts["all", "names a place" if line["names a place"] else "names none"] += 1
                out.write(json.dumps(line) + "\n")
            out.flush()
            print(name, len(lines), dict(Counter(one["taken away"] for one in lines)), flush=True)
    for (kind, became), count in sorted(counts.items()):
        print(f"{count:5}  {kind}: {became}")


if __name__ == "__main__":
    main()
