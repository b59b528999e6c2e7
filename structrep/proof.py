"""Proof that the value was put back rightly: regions one by one, and the whole model against the float64 truth.

There are no tolerances to choose. With what the training-time model computes in float64 as truth, the deploy model may
err about as much as the training-time model does by rounding alone in the same dtype: of its activations, and of each
of its weights once. Where that is so much that it shows little (a choice that rounding changes), both run in float64.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from structrep import precision
from structrep.absorb import Absorption
from structrep.algebra import ConvMap
from structrep.errors import BadInput, VerificationError, WrongMerge, said
from structrep.frames import frame, pieces
from structrep.pattern import geometry
from structrep.ranks import rank, spatial_size
from structrep.readers import Layer, counts_sizes, held, lower, only_asserted
from structrep.registry import COEFFICIENT_ROUNDING
from structrep.report import BorderRecord, OutputRecord, RegionRecord, Verification
from structrep.search import Merge
from structrep.trace import Example, as_arguments, computed, shallow_copy

SLACK = 8.0  # rounding errors of two equal models are alike, not equal


def verify(
    reference: nn.Module,
    deploy: nn.Module,
    example_inputs: Example,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    tf32: bool = False,
    seed: int = 0,
    merges: Mapping[str, Merge] | None = None,
) -> Verification:
    """Compare a deploy model with its training-time model; neither is changed.

    Args:
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        device: where to run both; CUDA when there is one, else CPU.
        dtype: what to run both in; the reference's own by default. The truth is float64: what the reference computes
            but for its roundings and casts (`structrep.precision.Shadows`). Where it does not run so, the record says
            why, and the truth is its own run.
        autocast: run both under autocast to this dtype.
        channels_last: run both in that memory format.
        tf32: let CUDA multiply float32 in TensorFloat-32.
        seed: of what a model draws as it runs.
        merges: by the path of each merged layer; `Plan.verify` gives those of the plan. Each is compared too.

    Returns:
        Errors of all outputs, relative to each output's largest value; `.ok` says whether they are rounding.

    Raises:
        BadInput: the reference rejects the inputs, or the two models' outputs differ in structure or shape.
        VerificationError: the deploy model does not run on inputs that the reference takes.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    own = dtype_of(reference)
    how = How(device, dtype or own, autocast, channels_last, seed, cast=dtype not in (None, own))
    merges = merges or {}
    # Weights that were cast to float32 when they were merged cannot be nearer the truth than that.
    coarsest = max(how.dtype, dtype_of(deploy), autocast or how.dtype, key=_eps)
    noisy = replace(how, dtype=max(how.dtype, dtype_of(deploy), key=_eps))
    floor = 2 * _eps(coarsest)  # one small sum may happen to be exact
    lost, choices = "", tuple[OutputRecord, ...]()
    with precision.whole(tf32=tf32):
        truth, failed = _truth(reference, example_inputs, noisy)
        if truth.draws:  # other numbers in every dtype: only runs of one dtype can be compared
            how = noisy
        ours = _deployed(deploy, example_inputs, how, merges)
        # Merged weights are rounded once when they are stored. What that does to the original counts as its noise too.
        rounded = _rounded(reference, noisy, _eps(coarsest))
        theirs = _Run(rounded, example_inputs, noisy)
        stretches = _regions(example_inputs, noisy, merges)
        outputs = _outputs(truth.exact, ours.outputs, (truth.outputs, theirs.outputs), floor)
        noise = max(one.noise for one in outputs)
        coarser = truth.shadows is not None and any(_eps(one) > _eps(coarsest) for one in truth.shadows.dtypes)
        drowned = noise > (floor if coarser else math.sqrt(_eps(coarsest)))
        off = any(one.error > SLACK * one.noise for one in outputs)
        if not failed and (drowned or (off and truth.chooses)):
            exactly = _Exactly(reference, deploy, rounded, example_inputs, noisy, merges, floor)
            if drowned or exactly.otherwise:
                lost = exactly.reason(how.dtype, noise)
            if lost and exactly.held:
                outputs, ours, choices = exactly.outputs, exactly.ours, exactly.choices
    # Rounding does not get less on the way, as a measure of it in one layer may.
    regions, most = [], floor
    for where, (value, right) in stretches.items():
        given = ours.watched.get(where)
        if given is not None and given.shape == right.shape:
            most = max(most, relative_error(value, right))
            error = relative_error(given, right)
            regions.append(RegionRecord(where=where, rules=merges[where].rules, error=error, noise=most))
    return Verification(
        device=_device_name(device),
        dtype=_name(how.dtype),
        autocast=_name(autocast) if autocast else None,
        channels_last=channels_last,
        tf32=tf32,
        cudnn=_cudnn(device),
        seed=seed,
        torch=torch.__version__,
        slack=SLACK,
        truth=_name(how.dtype) if failed else "float64",
        failed=failed,
        alone=truth.shadows.alone if truth.shadows else {},
        lost=lost,
        outputs=outputs,
        choices=choices,
        regions=tuple(regions),
    )


def _truth(reference: nn.Module, example_inputs: Example, how: How) -> tuple[_Run, str]:
    """The training-time model in its dtype and in float64 beside it; where that cannot be, in its dtype, and why.

    Raises:
        BadInput: the model rejects the inputs, or gives nothing to compare.
    """
    failed = ""
    try:
        truth = _Run(reference, example_inputs, how, shadows=precision.Shadows())
    except Exception as error:
        truth = _accepted(reference, example_inputs, how)
        failed = f"the training-time model does not run in float64: {said(error)}"
    if not truth.outputs:
        raise BadInput(f"{type(reference).__name__} gives no tensor that could be compared")
    return truth, failed


def _accepted(model: nn.Module, example_inputs: Example, how: How) -> _Run:
    """A run of a model that was given.

    Raises:
        BadInput: it rejects the inputs.
    """
    try:
        return _Run(model, example_inputs, how)
    except Exception as error:
        leaves = pytree.tree_leaves(as_arguments(example_inputs))
        shapes = [tuple(x.shape) for x in leaves if isinstance(x, Tensor)]
        cannot = f"cannot run in {_name(how.dtype)}, with" if how.cast else "does not accept"
        raise BadInput(f"{type(model).__name__} {cannot} inputs of shape {shapes}: {error}") from error


def _deployed(deploy: nn.Module, example_inputs: Example, how: How, watch: Iterable[str]) -> _Run:
    """A run of a deploy model, on inputs that the training-time model takes.

    Raises:
        VerificationError: it fails.
    """
    try:
        return _Run(deploy, example_inputs, how, watch)
    except Exception as error:
        raise VerificationError(
            f"the deploy model cannot run on inputs that the training-time model takes: {said(error)}"
        ) from error


def _outputs(
    right: list[Tensor], mine: list[Tensor], theirs: Iterable[list[Tensor]], floor: float
) -> tuple[OutputRecord, ...]:
    """The deploy model's outputs against the truth; what it is compared with are other runs of the training-time one.

    Raises:
        BadInput: outputs differ in structure or shape.
    """
    if len(right) != len(mine):
        raise BadInput(f"the training-time model gives {len(right)} tensors, the deploy model {len(mine)}")
    records = []
    for index, (one, other, *noisy) in enumerate(zip(right, mine, *theirs, strict=True)):
        if one.shape != other.shape:
            raise BadInput(f"output {index} has shape {tuple(one.shape)} before and {tuple(other.shape)} after")
        noise = max(floor, *(relative_error(value, one) for value in noisy))
        records.append(
            OutputRecord(name=f"{index}", shape=tuple(one.shape), error=relative_error(other, one), noise=noise)
        )
    return tuple(records)


class _Exactly:
    """Both models in float64, with the training-time model's choices: where rounding takes other ones (of two equal
    scores, which is the first), outputs may be anything, and it is what they are chosen by that is compared."""

    def __init__(
        self,
        reference: nn.Module,
        deploy: nn.Module,
        rounded: nn.Module,
        example_inputs: Example,
        how: How,
        watch: Iterable[str],
        floor: float,
    ) -> None:
        free = precision.Shadows(recorded=True)
        one, theirs = precision.Shadows(held=free.choices), precision.Shadows(held=free.choices)
        truth = _Run(reference, example_inputs, how, shadows=free)
        self.ours = _Run(deploy, example_inputs, how, watch, one)
        noisy = _Run(rounded, example_inputs, how, shadows=theirs)
        self.outputs = _outputs(truth.exact, self.ours.exact, (noisy.exact,), floor)
        self.ours.watched = self.ours.watched_exact
        self.dtypes = free.dtypes
        same = len(one.choices) == len(theirs.choices) == len(free.choices)
        self.held = self.ours.exactly and same and not one.astray | theirs.astray
        choices = list(zip(free.choices, one.choices, theirs.choices, strict=False))
        self.otherwise = dict.fromkeys(right.name for right, *others in choices if any(it.otherwise for it in others))
        self.choices = tuple(self._records(choices, floor))

    def _records(self, choices: Iterable[tuple[precision.Choice, ...]], floor: float) -> Iterator[OutputRecord]:
        """What the deploy model chose otherwise by, as far off as it is."""
        most = floor
        for right, mine, theirs in choices:
            pairs = list(zip(right.by, mine.by, theirs.by, strict=True))
            most = max(most, *(relative_error(other, one) for one, _, other in pairs))
            if mine.otherwise:
                error = max(relative_error(other, one) for one, other, _ in pairs)
                yield OutputRecord(name=right.name, shape=tuple(right.by[0].shape), error=error, noise=most)

    def reason(self, dtype: torch.dtype, noise: float) -> str:
        """Why a comparison in a dtype shows nothing."""
        coarser = [_name(one) for one in self.dtypes if _eps(one) > _eps(dtype)]
        why = "it amplifies rounding"
        if self.otherwise:
            why = f"rounding changes what it chooses by {', '.join(self.otherwise)}"
        elif coarser:
            why = f"it computes in {', '.join(coarser)} too"
        then = "both were run in float64" if self.held else "the deploy model cannot be run in float64 with its choices"
        return (
            f"in {_name(dtype)} the comparison shows little, for the training-time model is off by {noise:.1e} itself: "
            f"{why}; {then}"
        )


def _rounded(model: nn.Module, how: How, eps: float) -> nn.Module:
    """The model with every number off by one rounding, up or down."""
    twin = how.model(model)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*twin.parameters(), *twin.buffers()):
        if tensor.is_floating_point():
            signs = torch.randint(0, 2, tensor.shape, generator=generator, device="cpu").to(tensor) * 2 - 1
            tensor.data = tensor.data * (1 + eps * signs)
    return twin


@dataclass(frozen=True)
class How:
    """How a model is run."""

    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    channels_last: bool = False
    seed: int = 0
    cast: bool = False  # also what is in another dtype than the most of its model: a part in float32, say

    @classmethod
    def of(cls, model: nn.Module) -> How:
        """Where a model is, and in its dtype."""
        return cls(next((t.device for t in model.parameters()), torch.device("cpu")), dtype_of(model))

    def model(self, model: nn.Module, shadows: precision.Shadows | None = None) -> nn.Module:
        """A copy of a model, to run so; what a cast rounds is kept in the shadows."""
        twin = shallow_copy(model).to(self.device, self._to(model))
        held, given = ((*one.parameters(), *one.buffers()) for one in (model, twin))
        for tensor, other in zip(held, given, strict=True):
            if self.channels_last:
                other.data = self.laid_out(other.data)
            if shadows is not None and tensor.dtype != other.dtype:
                shadows.give(other, self.laid_out(precision.doubled(tensor).to(self.device)))
        return twin

    def _to(self, model: nn.Module) -> torch.dtype | None:
        """What the floats of a model and its inputs are cast to, if they are."""
        return None if not self.cast and self.dtype in _dtypes(model) else self.dtype

    def laid_out(self, tensor: Tensor) -> Tensor:
        """A tensor with its channels last, if it has spatial dims of which torch knows such a format."""
        memory = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
        return tensor.contiguous(memory_format=memory) if memory and self.channels_last else tensor

    def inputs(self, example_inputs: Example, model: nn.Module, shadows: precision.Shadows | None = None) -> Any:
        """Copies of the inputs, for a model may write to them; floats in a dtype that the model has."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            stays = not leaf.is_floating_point() or (not self.cast and leaf.dtype in _dtypes(model))
            one = self.laid_out(leaf.detach().to(self.device, None if stays else self.dtype, copy=True))
            if shadows is not None and one.dtype != leaf.dtype:
                shadows.give(one, self.laid_out(precision.doubled(leaf).to(self.device)))
            return one

        return pytree.tree_map(moved, example_inputs)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        cast = torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with torch.no_grad(), torch.random.fork_rng(), cast:
            torch.manual_seed(self.seed)
            yield


class _Run:
    """All tensors that a copy of a model gives, and what some of its modules gave at their first call, also in float64
    with shadows; the model itself is left alone."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Example,
        how: How,
        watch: Iterable[str] = (),
        shadows: precision.Shadows | None = None,
    ) -> None:
        args, kwargs = as_arguments(how.inputs(example_inputs, model, shadows))
        twin = how.model(model, shadows)
        self.shadows = shadows
        self.watched: dict[str, Tensor] = {}
        self.watched_exact: dict[str, Tensor] = {}
        for path in watch:
            twin.get_submodule("" if path == "(root)" else path).register_forward_hook(self._watch(path))
        with how.running():
            drawn = torch.get_rng_state()
            with shadows or contextlib.nullcontext():
                result = twin(*args, **kwargs)
            self.draws = not torch.equal(drawn, torch.get_rng_state())  # random numbers
        self.outputs = list(tensors(result))
        self.chooses = shadows is not None and shadows.chooses
        self.exact = [self._exactly(one) for one in self.outputs]
        # not where another runtime than torch has computed them
        self.exactly = any(not torch.equal(one, two) for one, two in zip(self.outputs, self.exact, strict=True))

    def _exactly(self, tensor: Tensor) -> Tensor:
        return tensor if self.shadows is None else self.shadows.of(tensor)

    def _watch(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if path not in self.watched and isinstance(output, Tensor):
                self.watched[path] = output.detach().clone()  # what comes next may write to it
                self.watched_exact[path] = self._exactly(output).detach().clone()

        return hook


def accepts(model: nn.Module, example_inputs: Example) -> Any:
    """Run a copy of a model where it is; the inputs as it was given them.

    Raises:
        BadInput: the model rejects the inputs.
    """
    how = How.of(model)
    _accepted(model, example_inputs, how)
    return how.inputs(example_inputs, model)


def inputs_of(model: nn.Module, example_inputs: Example, paths: Collection[str]) -> Iterator[tuple[str, Any]]:
    """What some modules are given at their first call, for the example inputs."""
    how = How.of(model)
    twin = how.model(model)
    seen: dict[str, Any] = {}
    for path in paths:

        def note(module: nn.Module, args: Any, path: str = path) -> None:
            seen.setdefault(path, args[0] if len(args) == 1 else None)

        twin.get_submodule(path).register_forward_pre_hook(note)
    args, kwargs = as_arguments(how.inputs(example_inputs, model))
    with how.running():
        twin(*args, **kwargs)
    yield from seen.items()


def _regions(example_inputs: Example, how: How, merges: Mapping[str, Merge]) -> dict[str, tuple[Tensor, Tensor]]:
    """What the stretches that were merged give as the training-time model runs, and in float64, by where they were
    merged, in order: the plan's own graph is run; none where it was made of other inputs than these."""
    alone = {where: merge for where, merge in merges.items() if not any(one.beside for one in merge.absorbed)}
    roots = {merge.root: where for where, merge in alone.items() if not merge.trace.path}
    trace = next((merge.trace for merge in merges.values() if merge.root in roots), None)
    if trace is None:
        return {}
    shadows, model = precision.Shadows(), trace.root.module
    inputs = pytree.tree_leaves(as_arguments(how.inputs(example_inputs, model, shadows)))
    given = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
    places = [node for node in trace.nodes if node.op == "placeholder"]
    alike = (one.shape[1:] == place.meta.get("shape", one.shape)[1:] for place, one in zip(places, given, strict=False))
    if len(places) != len(given) or not all(alike):
        return {}
    values: dict[fx.Node, Any] = dict(zip(places, given, strict=True))
    modules: dict[nn.Module, nn.Module] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def load(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        one = node.meta["value"] if "value" in node.meta else node.meta["held"]
        if not (isinstance(one, Tensor) and one.is_floating_point()):
            return one
        twin = one.detach().to(how.device, how.dtype if how.cast else None, copy=True)
        shadows.give(twin, precision.doubled(held(node)).to(how.device))
        return twin

    with how.running(), contextlib.suppress(Exception):  # a graph may hold for one size of batch alone
        for node in trace.nodes:
            if node.op not in ("placeholder", "get_attr", "output") and "value" not in node.meta:
                module = node.meta["call"].module if node.op == "call_module" else None
                if module is not None and module not in modules:
                    modules[module] = how.model(module, shadows)
                with shadows:
                    values[node] = computed(node, load, None if module is None else modules[module])
                if node in roots:
                    scales = _behind(merges[roots[node]])
                    both = (_scaled(one.detach(), scales) for one in (values[node], shadows.of(values[node])))
                    value, exact = (one.to(how.device, copy=True) for one in both)
                    found[roots[node]] = value, exact
            for used in node.all_input_nodes:
                if list(used.users)[-1] is node:
                    values.pop(used, None)
    return found


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a model's output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors(getattr(value, name))


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the truth's largest value; infinite where only one of them is finite."""
    value, truth = (torch.view_as_real(one) if one.is_complex() else one for one in (value, truth))
    value, truth = value.detach().double(), truth.detach().double()
    both = torch.isfinite(value) & torch.isfinite(truth)
    if not torch.equal(torch.where(both, 0.0, value).nan_to_num(0.5), torch.where(both, 0.0, truth).nan_to_num(0.5)):
        return float("inf")
    gap = torch.where(both, value - truth, 0.0).abs()
    peak = torch.where(both, truth, 0.0).abs()
    if not gap.numel() or not gap.any():
        return 0.0
    return float(gap.max() / peak.max()) if peak.any() else float("inf")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating-point dtype of a model's parameters; float32 if it has none."""
    return next(iter(_dtypes(model)), torch.float32)


def _dtypes(model: nn.Module) -> dict[torch.dtype, None]:
    """The floating-point dtypes of what a model holds, the first one first."""
    return {t.dtype: None for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


# --- regions --------------------------------------------------------------------------------------


def prove(merge: Merge) -> None:
    """Run the stretch of the traced graph and the merged layer on random float64 input of odd and tiny sizes.

    The layer that is run is the one that would be written, its pads as a module has them. Where the user allowed
    another border, only output pixels are compared that are made of nothing outside the input.

    Raises:
        WrongMerge: they differ, or there was no size that the stretch itself accepts.
    """
    map_ = merge.value()
    both = _Both(merge, map_)
    found: list[tuple[tuple[int, ...], Tensor, Tensor]] = []
    for size in _sizes(merge, map_):
        compared = both(size)
        if compared is None:
            continue  # too small for the layers as they were
        before, after = compared
        if before.shape != after.shape:
            raise WrongMerge(
                f"on an input of {size} pixels the layers give {tuple(before.shape)}, merged {tuple(after.shape)}"
            )
        if merge.fit.rigour == "inside":
            before, after = (map_.geometry.inside(value, size, _room(merge)) for value in (before, after))
        if before.numel():
            found.append((size, before, after))
    # An output of the smallest size may be made of pads alone, and be 0: rounding is relative to all there is.
    peak = max((float(before.abs().max()) for _, before, _ in found), default=0.0)
    for size, before, after in found:
        error = float((after - before).abs().max()) / peak if peak else relative_error(after, before)
        if not error <= COEFFICIENT_ROUNDING:
            raise WrongMerge(
                f"on an input of {size} pixels the merged layer is off by {error:.1e}, relative to the largest output"
            )
    if not found:
        sizes = " or ".join(map(str, _sizes(merge, map_)))
        raise WrongMerge(f"the layers take no input of {sizes} pixels to be compared on")


def border(merge: Merge) -> BorderRecord:
    """How far a merge is off where it reads outside its input, on random input of the example's size, or one of 32."""
    map_ = merge.value()
    size = spatial_size(merge.base) or tuple(max(32, n) for n in _sizes(merge, map_)[-1])
    compared = _Both(merge, map_)(size)
    if compared is None:
        raise BadInput(f"{merge.term} takes no input of {size} pixels, so its border cannot be looked at")
    before, after = compared
    peak = before.abs().max()
    off = ((after - before).abs() > COEFFICIENT_ROUNDING * peak).flatten(0, 1).any(0)
    return BorderRecord(
        size=size, pixels=int(off.sum()), of=off.numel(), error=float((after - before).abs().max() / peak)
    )


def _room(merge: Merge) -> tuple[int, ...]:
    """How far from the border of its input something that a merge reads or crops may reach, per dim."""
    dims = geometry(merge.term).dims
    shapes = [layer.shape(layer.in_channels or 1, dims) for layer in merge.term.leaves()]
    step = math.prod(max(shape.stride, default=1) for shape in shapes)
    return tuple(step * sum(max(map(abs, shape.pad[dim])) for shape in shapes) for dim in range(dims))


class _Both:
    """The stretch of the graph and the merged layer, on the same random input of some spatial size."""

    def __init__(self, merge: Merge, map_: ConvMap) -> None:
        weights = [leaf.weight for leaf in merge.term.leaves() if leaf.weight is not None]
        self.device = precision.exact(next((weight.device for weight in weights), map_.kernel.device))
        known = merge.base.meta.get("dtype")
        self.dtypes = dict.fromkeys([known] if known else [*(weight.dtype for weight in weights), torch.float32])
        self.region, self.layer = _Region(merge, self.device), lower(map_, map_.kernel.to(self.device))
        self.map = map_
        self.rank = rank(merge.base)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, size: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """Both outputs; None if the stretch takes no input of that size.

        Raises:
            WrongMerge: the merged layer takes none.
        """
        channels = self.map.geometry.in_channels
        # a Linear's input has any number of dims before the last
        ranks = [self.rank] if self.rank is not None else [2, 3, 4]
        shapes = [(2, channels, *size)] if size else [(*range(2, max(2, r) + 1), channels) for r in ranks]
        with torch.no_grad():
            for dtype, shape in itertools.product(self.dtypes, shapes):
                x = torch.randn(shape, dtype=torch.float64, generator=self.generator, device="cpu").to(self.device)
                try:
                    before = self.region(x, dtype)
                except (RuntimeError, ValueError, IndexError):
                    continue
                try:
                    return before, self.layer(x)
                except RuntimeError as reason:
                    raise WrongMerge(f"the merged layer does not take an input of {size} pixels: {reason}") from reason
        return None


def _sizes(merge: Merge, map_: ConvMap) -> list[tuple[int, ...]]:
    """The smallest input with an output, and an odd larger one, different in every dim; or what a merge holds for."""
    g = map_.geometry
    if not g.dims:
        return [()]
    copied = map_.border != "constant"
    least = [
        1 + max(0, -(-over // step)) if g.transposed else max(1, 1 - over, (max(pad) + 1) * copied)
        for over, pad, step in zip(g.overhang, g.pad, g.stride, strict=True)
    ]
    if merge.sizes is not None:
        known, period = merge.sizes
        if not all(period):
            return [known]
        return [known, tuple(n + step for n, step in zip(known, period, strict=True))]
    room = _room(merge) if merge.fit.rigour == "inside" else (0,) * g.dims
    return [
        tuple(least),
        tuple(n + 4 + index + 2 * far for index, (n, far) in enumerate(zip(least, room, strict=True))),
    ]


class _Region:
    """The nodes of a merge, as a function in float64: they run in the dtypes that they have in the model, and in
    float64 beside these."""

    def __init__(self, merge: Merge, device: torch.device) -> None:
        self.merge, self.device = merge, device
        self.nodes = sorted(merge.nodes, key=lambda node: node.meta["index"])
        # scales that stand outside the region and are done in it
        self.absorbed = _absorbed(merge)
        self.modules: dict[nn.Module, nn.Module] = {}

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        with precision.Shadows() as shadows:
            found = self._run(x.to(dtype))
        return shadows.of(found)

    def _run(self, x: Tensor) -> Tensor:
        carried = self.merge.carried
        rest = x
        if carried is not None and not carried.first:
            x, rest = x[:, : -carried.channels], x[:, -carried.channels :]
        values: dict[fx.Node, Any] = {self.merge.base: x}
        if carried is not None and carried.last:
            values[carried.base] = _apart(rest, carried.stride)

        def load(node: fx.Node) -> Any:
            if "value" in node.meta:
                return precision.as_stored(held(node), node.meta["value"])
            if node not in values and counts_sizes(node):
                values[node] = computed(node, load)
            if node not in values and _kind_alone(node, self.merge):
                return x.new_empty(0, dtype=node.meta.get("dtype", x.dtype))
            if node not in values:
                raise WrongMerge(f"it goes by {node.name}, which is no part of it, so it cannot be run apart")
            return values[node]

        for node in self.nodes:
            if only_asserted(node):
                continue
            source = node.all_input_nodes[0] if node.all_input_nodes else None
            scales = [one.before[node] for one in self.absorbed if node in one.before]

            def first_scaled(one: fx.Node, source: Any = source, scales: list[Layer] = scales) -> Any:
                return _scaled(load(one), scales) if one is source else load(one)

            values[node] = computed(node, first_scaled, self._module(node))
            for one in self.absorbed:
                if node in one.behind:
                    values[node] = _scaled(values[node], [one.behind[node]])
                elif node in one.beside and source is not None:
                    values[node] = values[node] + self._beside(one, load(source))
        result: Tensor = values[self.merge.root]
        if carried is not None and not carried.last:
            step = geometry(self.merge.term).stride
            result = torch.cat([result, rest[_every(step)]], 1)
        return result

    def _beside(self, one: Absorption, x: Tensor) -> Tensor:
        """What is added beside a layer given x, all numbers of a piece at each place: (N, C, ...) -> (N, C', ...)."""
        values: dict[fx.Node, Any] = {}
        places = x.movedim(1, -1)
        numbers = places.reshape(-1, places.shape[-1])

        def load(node: fx.Node) -> Any:
            if "value" in node.meta:
                return precision.as_stored(held(node), node.meta["value"])
            return values[node] if node in values else numbers.reshape(-1, *pieces(node))

        for node in sorted(one.through, key=lambda node: node.meta["index"]):
            folded = bool(frame(node))  # the pieces back into their places
            values[node] = load(node.all_input_nodes[0]) if folded else computed(node, load, self._module(node))
        found: Tensor = sum(sign * values[part].flatten(1) for part, sign in one.added)
        return found.reshape(*places.shape[:-1], -1).movedim(-1, 1)

    def _module(self, node: fx.Node) -> nn.Module | None:
        """A copy of the module that a node calls."""
        if node.op != "call_module":
            return None
        module = node.meta["call"].module
        if module not in self.modules:
            self.modules[module] = shallow_copy(module).to(self.device)
        return self.modules[module]


def _kind_alone(node: fx.Node, merge: Merge) -> bool:
    """Whether a merge asks a value for no more than its dtype."""
    users = node.users.keys() & set(merge.nodes)
    return bool(users) and all(one.target == "type_as" and one.args[0] is not node for one in users)


def _apart(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Pixels with as many others between them as a stride has left out."""
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *size)
    wide[_every(stride)] = x
    return wide


def _every(stride: tuple[int, ...]) -> tuple[slice, ...]:
    """An index of the pixels that a stride leaves."""
    return slice(None), slice(None), *(slice(None, None, step) for step in stride)


def _behind(merge: Merge) -> list[Layer]:
    """The scales behind the root of a merge that it does too, in order."""
    return [one.behind[merge.root] for one in _absorbed(merge) if merge.root in one.behind]


def _absorbed(merge: Merge) -> list[Absorption]:
    """The scales that a merge does a part of, as they stand in the graph."""
    return sorted(merge.absorbed, key=lambda one: one.node.meta["index"])


def _scaled(x: Any, scales: list[Layer]) -> Any:
    for scale in scales:
        scaled = scale.load(x.shape[1], x.ndim - 2)(x) if scale.dims != 0 else scale.load(x.shape[-1], 0)(x)
        x = scaled.to(x.dtype)
    return x


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cudnn(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    cudnn = torch.backends.cudnn
    version = cudnn.version()
    return f"cuDNN {version}{', benchmark' * cudnn.benchmark}{', deterministic' * cudnn.deterministic}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
