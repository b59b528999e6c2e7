"""The kernel of a merge, branch by branch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from structrep.algebra import ConvMap
from structrep.graph.facts import CALL
from structrep.match.merge import Merge
from structrep.records.kernels import BranchRecord, KernelRecord
from structrep.terms.term import Term, seq, signed
from structrep.terms.value import value

LEVELS = 127  # of a sign, in symmetric int8
DEAD = 1e-3  # the norm of a dead branch's kernel, relative to the merged one's


def kernel(where: str, merge: Merge, dead: float = DEAD) -> KernelRecord:
    """A merged kernel as the weights are now; `where` is the name of its layer."""
    whole = merge.value()
    return KernelRecord(
        where=where,
        rules=merge.rules,
        shape=tuple(whole.kernel.shape),
        norm=float(whole.kernel.norm()),
        low=float(whole.kernel.min()),
        high=float(whole.kernel.max()),
        int8_error=_rounding(whole.kernel, whole.kernel.abs().max()),
        int8_error_per_channel=_rounding(whole.kernel, whole.kernel.abs().flatten(1).amax(1)),
        branches=tuple(_branches(merge.term, whole, dead)),
    )


def _rounding(kernel: Tensor, largest: Tensor) -> float:
    """What symmetric int8 with these ranges, one or one for each output channel, makes of a kernel: the norm of the
    difference, relative to the kernel's."""
    step = (largest / LEVELS).reshape(-1, *(1,) * (kernel.dim() - 1)).clamp(min=torch.finfo(kernel.dtype).tiny)
    norm = float(kernel.norm())
    return float(((kernel / step).round() * step - kernel).norm()) / norm if norm else 0.0


def _branches(term: Term, whole: ConvMap, dead: float) -> Iterator[BranchRecord]:
    """The branches of every sum of a term, each as the kernel that the term would be with it alone."""
    parts = term.parts if term.op == "seq" else (term,)
    for index, part in enumerate(parts):
        if part.op != "sum":
            continue
        for name, branch in zip(_names(part), part.parts, strict=True):
            # the others stay, as zeros: so the kernel has the taps and groups of the whole
            alone = replace(part, parts=tuple(one if one is branch else signed(one, 0.0) for one in part.parts))
            kernel = value(seq([*parts[:index], alone, *parts[index + 1 :]]), strictness="inside").kernel
            norm = float(whole.kernel.norm()) or 1.0
            size = float(kernel.norm()) / norm
            share = float((kernel * whole.kernel).sum()) / norm**2
            yield BranchRecord(name=name, share=share, norm=size, dead=size < dead)


def _names(total: Term) -> list[str]:
    """What the branches of a sum are called in the model's own code, from the module that holds them all."""
    paths = [[_path(layer.node) for layer in branch.leaves() if layer.node] for branch in total.parts]
    block = _common([path for found in paths for path in found])
    names = []
    for branch, found in zip(total.parts, paths, strict=True):
        own = _common(found).removeprefix(block).strip(".")
        children = dict.fromkeys(path.removeprefix(block).strip(".").split(".")[0] for path in found)
        names.append(own or "+".join(filter(None, children)) or str(branch))
    counts = Counter(names)
    return [f"{name} {index}" if counts[name] > 1 else name for index, name in enumerate(names)]


def _path(node: torch.fx.Node) -> str:
    return str(CALL.of(node).path)


def _common(paths: list[str]) -> str:
    """The module that all paths lead through."""
    steps = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(step[0] for step in itertools.takewhile(lambda step: len(set(step)) == 1, steps))
