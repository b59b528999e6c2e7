"""What a merge costs and saves, and how its map fits into one layer: of which dtype, with which border."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from structrep.algebra import ConvMap, Strictness
from structrep.errors import Costlier, Incompatible, Inexact, Overflow, Shared, Unreadable
from structrep.graph.calls import Trace, Traced
from structrep.graph.facts import CALL
from structrep.graph.names import path_of
from structrep.match.stretch import Segment, Stretch
from structrep.read.lower import remedy
from structrep.terms import cost
from structrep.terms.cost import Cost
from structrep.terms.layer import Layer
from structrep.terms.layers import numbers_in
from structrep.terms.term import Term, geometry
from structrep.terms.value import sized, value


@dataclass(frozen=True)
class Fit:
    """How a merged map fits into a layer of the dtype that it will have."""

    costs: tuple[Cost, Cost]  # before and after, but for what the border takes
    strictness: Strictness
    remedy: str  # what a layer of its own does for the border
    largest: tuple[float, float]  # largest coefficient of a kernel before, of any after
    notes: tuple[str, ...]  # what is to be told of the numbers


def price(stretch: Stretch, trace: Trace, traced: Traced) -> tuple[Cost, Cost]:
    """Cost before and after.

    Args:
        trace: that the stretch is of, one of those in `traced`.

    Raises:
        Costlier: more multiply-adds or more stored numbers after than before.
        Shared: it is one layer for inputs of some sizes only, and may be given others.
    """
    term = stretch.term
    if not any(layer.weight is not None for layer in term.leaves()):
        raise Costlier(f"{term} holds no convolution or Linear: as one it would take more work than it does")
    if any(layer.resized for layer in term.leaves()):
        _check_resized(term)
    if sized(term) != "any":
        _check_sizes(stretch, trace, traced)
    tables = [layer for layer in term.leaves() if layer.kind == "table"]
    if tables:
        _check_tables(term, tables, traced)
    shifts = any(layer.shifts for layer in term.leaves())
    before, after = cost.of_term(term), cost.of_table(geometry(term)) if tables else cost.of_map(geometry(term), shifts)
    if after.multiply_adds > before.multiply_adds:
        raise Costlier(
            f"{term} takes {before.multiply_adds:,.0f} multiply-adds per output pixel, as one layer it would take "
            f"{after.multiply_adds:,.0f}"
        )
    kernels = cost.of_term(term, kernels_alone=True).multiply_adds
    if after.multiply_adds > kernels:  # norms can go into the layers beside them without that
        raise Costlier(
            f"the convolutions of {term} take {kernels:,.0f} multiply-adds per output pixel, norms folded; as one "
            f"layer it would take {after.multiply_adds:,.0f}"
        )
    if after.parameters > before.held + geometry(term).out_channels:  # a bias more is no reason
        raise Costlier(f"{term} stores {before.parameters:,} numbers, as one layer it would store {after.parameters:,}")
    return before, after


LARGEST = 1 << 27  # numbers of a table: 1 GiB in float64


def _check_tables(term: Term, tables: list[Layer], traced: Traced) -> None:
    """Raise unless all that a term does with what it is given is to look up rows, in tables that nobody else has."""
    if not _looks_up(term):
        raise Incompatible(f"{term} looks up rows by numbers that it also computes with")
    if numbers := next((n for n in map(numbers_in, (one.weight for one in tables)) if n > LARGEST), 0):
        raise Costlier(f"a table of {numbers:,} numbers takes more room in float64 than is taken for a merge")
    held = Counter(id(parameter) for _, parameter in traced.model.named_parameters(remove_duplicate=False))
    for one in tables:
        if any(held[id(tensor)] > 1 for tensor in (one.weight, *(one.formula.tensors if one.formula else ()))):
            raise Shared(f"the table of {term} is tied to another layer, which would keep it beside the merged one")


def _looks_up(term: Term) -> bool:
    """Whether a term begins with a table on all of its paths, and has no others."""
    if term.op == "leaf":
        return term.layer is not None and term.layer.kind == "table"
    if term.op == "seq":
        return _looks_up(term.parts[0]) and not any(
            layer.kind == "table" for part in term.parts[1:] for layer in part.leaves()
        )
    return bool(term.parts) and all(map(_looks_up, term.parts))


def _check_resized(term: Term) -> None:
    """Raise unless all that is done beside a layer that is told its output size is to scale."""
    (layer, *more) = (layer for layer in term.leaves() if not layer.scales)
    shape = geometry(term)
    if more or layer.shape(shape.in_channels, shape.dims) != shape:
        raise Unreadable(f"{term} holds a {layer} that is told its output's size, which none but scales can go into")


def _check_sizes(stretch: Stretch, trace: Trace, traced: Traced) -> None:
    """Raise if a stretch that is one layer for inputs of some sizes may be given others, or is not worth a guard."""
    term = stretch.term
    if trace.root.module is not traced.model:
        raise Shared(
            f"{term} holds for inputs of some sizes only, and code that cannot be followed calls {trace.path}: it may "
            f"give it others"
        )
    if not any(segment.term.op in ("sum", "concat") for segment in stretch.segments):
        raise Costlier(f"{term} would hold for inputs of some sizes only, and spares no branch")
    for call in CALL.of(stretch.root).chain():
        if len(traced.calls[call.module, call.method]) > 1:
            raise Shared(f"{call.path} is called more than once, and {term} holds for inputs of some sizes only")


def fit(
    map_: ConvMap,
    stretch: Stretch,
    costs: tuple[Cost, Cost],
    strictness: Strictness = "exact",
    at_any_price: bool = False,
) -> Fit:
    """How a map fits into a layer in the place of a stretch.

    Raises:
        Overflow: a coefficient does not fit the dtype of the layers it replaces.
        Unreadable: no layer pads so.
        Costlier: what stays a layer of its own for the border takes what the merge would save.
    """
    term = stretch.term
    leaves = list(term.leaves())
    kernels = [layer.weight for layer in leaves if layer.weight is not None]
    dtype = kernels[0].dtype
    if dtype.itemsize == 1:  # torch itself has no layer that runs in it
        raise Overflow(
            f"a merged kernel would be rounded to {str(dtype).removeprefix('torch.')}, which keeps "
            f"{1 - round(math.log2(torch.finfo(dtype).eps))} bits: cast the model to float32 or bfloat16 first"
        )
    if map_.magnitude > torch.finfo(dtype).max:
        raise Overflow(
            f"a merged coefficient of {map_.magnitude:.3g} does not fit {str(dtype).removeprefix('torch.')}, whose "
            f"largest value is {torch.finfo(dtype).max:.3g}: reparameterize the model in float32, or use bfloat16"
        )
    apart = remedy(map_)
    before, after = costs
    if apart or (map_.border != "constant" and term.op != "leaf"):  # which has it already
        after += cost.of_border(map_)
    saved = before.multiply_adds - after.multiply_adds + before.held - after.parameters
    if not at_any_price and (saved < 0 or (not saved and before.operations <= after.operations)):
        border = apart or ("a copy of pixels" if map_.border != "constant" else "")
        raise Costlier(f"{term} saves nothing" + (f": what its border takes, {border}, would stay" if border else ""))
    largest = max(float(kernel.detach().abs().max()) for kernel in kernels), map_.magnitude
    return Fit(costs, strictness, apart, largest, tuple(_notes(map_, leaves, dtype)))


def fit_value(stretch: Stretch, costs: tuple[Cost, Cost], inexact_borders: Iterable[str]) -> tuple[ConvMap, Fit]:
    """A stretch's value and how it fits; where its border forbids one plain layer, with the remedy that helps.

    Args:
        inexact_borders: globs of layers whose merges may differ at the border.

    Raises:
        Refusal: it does not, whatever is done about the border.
    """
    forbidden: Inexact | None = None
    for strictness in _strictnesses(stretch, inexact_borders):
        try:
            map_ = value(stretch.term, strictness=strictness)
            return map_, fit(map_, stretch, costs, strictness)
        except Inexact as reason:
            forbidden = forbidden or reason
    assert forbidden is not None
    raise forbidden


def _strictnesses(stretch: Stretch, inexact_borders: Iterable[str]) -> Iterator[Strictness]:
    """How a border may be treated, best first."""
    yield "exact"
    if len(stretch.segments) > 1 and _has_kernel(stretch.segments[0]):
        yield "padded"  # what a border takes is a pass over the input, and has to save a convolution
    paths = {path for node in stretch.nodes for path in (path_of(node),) if path}
    if any(fnmatch.fnmatchcase(path, glob) for path in paths for glob in inexact_borders):
        yield "inside"


def _has_kernel(segment: Segment) -> bool:
    return any(layer.weight is not None for layer in segment.term.leaves())


def _notes(map_: ConvMap, leaves: Iterable[Layer], dtype: torch.dtype) -> Iterator[str]:
    """What half precision, or a norm that saw no variance, does to the numbers of a merge."""
    if dtype == torch.float16:
        tiny = torch.finfo(dtype).smallest_normal
        lost = sum(int(((t != 0) & (t.abs() < tiny)).sum()) for t in (map_.kernel, map_.bias))
        if lost:
            numbers = map_.kernel.numel() + len(map_.bias)
            yield f"{lost} of {numbers} merged numbers are below float16's normal range, {tiny:.1e}"
    for layer in leaves:
        if layer.probed:
            yield f"{path_of(layer.node) if layer.node else 'a layer'} was probed, not read"
        if dead := layer.dead():
            norm = path_of(layer.node) if layer.node else "a norm"
            yield f"{norm}: {dead} of its channels have a variance below eps, dead in training and scaled by eps alone"
