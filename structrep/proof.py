"""Proof that the value was put back rightly: regions one by one, and the whole model against the float64 truth.

There are no tolerances to choose. With what the training-time model computes in float64 as truth, the deploy model may
err about as much as the training-time model does by rounding alone in the same dtype: of its activations, and of each
of its weights once. Where that is so much that it shows little (a choice that rounding changes), both run in float64.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from structrep import process
from structrep.algebra import ConvMap, precision
from structrep.algebra.shadows import Choice, Shadows
from structrep.errors import BadInput, VerificationError, WrongMerge, listed, said
from structrep.graph.constants import held
from structrep.graph.observed import Observed
from structrep.graph.shapes import spatial_size
from structrep.modules import parametrized
from structrep.modules.arguments import Example, as_arguments
from structrep.modules.copies import moved_copy
from structrep.modules.parametrized import uncached
from structrep.read.lower import lower
from structrep.regions import Region, Shapes, Trials, given_as_traced, read_as_traced, room
from structrep.registry import COEFFICIENT_ROUNDING
from structrep.report import BorderRecord, OutputRecord, RegionRecord, Verification
from structrep.search import Merge, together

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
    cast = _dtypes(deploy).keys() - _dtypes(reference)
    coarsest = max(how.dtype, dtype_of(deploy), autocast or how.dtype, *cast, key=_eps)
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
        passing = _Passing(merges, device)
        stretches = passing.run(example_inputs, noisy)
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
        regions = tuple(passing.records(ours.watched, stretches, how.dtype, floor))
    blank = not any(bool(torch.isfinite(one).any()) for one in truth.exact)
    if blank:
        lost = "the training-time model gives no finite number here, so merged layers are all that could be compared"
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
        blank=blank,
        outputs=outputs,
        choices=choices,
        regions=regions,
    )


def _truth(reference: nn.Module, example_inputs: Example, how: How) -> tuple[_Run, str]:
    """The training-time model in its dtype and in float64 beside it; where that cannot be, in its dtype, and why.

    Raises:
        BadInput: the model rejects the inputs, or gives nothing to compare.
    """
    failed = ""
    try:
        truth = _Run(reference, example_inputs, how, shadows=Shadows())
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
        free = Shadows(recorded=True)
        one, theirs = Shadows(held=free.choices), Shadows(held=free.choices)
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

    def _records(self, choices: Iterable[tuple[Choice, ...]], floor: float) -> Iterator[OutputRecord]:
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
        elif math.isinf(noise):
            why = "it overflows there, or rounding makes numbers infinite"
        then = "both were run in float64" if self.held else "the deploy model cannot be run in float64 with its choices"
        return (
            f"in {_name(dtype)} the comparison shows little, for the training-time model is off by {noise:.1e} itself: "
            f"{why}; {then}"
        )


def _rounded(model: nn.Module, how: How, eps: float) -> nn.Module:
    """The model with every number off by one rounding, up or down, those that it computes of others as it computes
    them."""
    twin = how.model(model)
    for module in [one for one in twin.modules() if parametrized.computed(one)]:
        still = parametrized.plain(module, parametrized.compute(module))
        module.__class__, module.__dict__ = type(still), vars(still)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*twin.parameters(), *twin.buffers()):
        if (
            tensor.is_floating_point() and tensor.itemsize > 1
        ):  # float8 is coarser than that, and is not calculated with
            signs = torch.randint(0, 2, tensor.shape, generator=generator, device="cpu").to(tensor) * 2 - 1
            tensor.data = tensor.data * (1 + eps * signs)
    return twin


_T = TypeVar("_T")


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

    def model(self, model: nn.Module, shadows: Shadows | None = None) -> nn.Module:
        """A copy of a model, to run so; what a cast rounds is kept in the shadows."""
        twin = moved_copy(model, self.device, self._to(model))
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

    def inputs(self, example_inputs: Example, model: nn.Module, shadows: Shadows | None = None) -> Any:
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
    def running(self, gradients: bool = False) -> Iterator[None]:
        cast = torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with torch.set_grad_enabled(gradients), process.same_chance(cuda=True), uncached(), cast:
            torch.manual_seed(self.seed)
            yield

    def run(self, call: Callable[[], _T]) -> _T:
        """What a call gives; with gradients if it needs them, as forces that are the gradient of an energy do."""
        try:
            with self.running():
                return call()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
        with self.running(gradients=True):
            return call()


class _Run:
    """All tensors that a copy of a model gives, and what some of its modules gave at their first call, also in float64
    with shadows; the model itself is left alone."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Example,
        how: How,
        watch: Iterable[str] = (),
        shadows: Shadows | None = None,
    ) -> None:
        args, kwargs = as_arguments(how.inputs(example_inputs, model, shadows))
        twin = how.model(model, shadows)
        self.shadows = shadows
        self.watched: dict[str, Tensor] = {}
        self.watched_exact: dict[str, Tensor] = {}
        for path in watch:
            twin.get_submodule("" if path == "(root)" else path).register_forward_hook(self._watch(path))

        def run() -> Any:
            self.watched.clear()
            drawn = torch.get_rng_state()
            with shadows or contextlib.nullcontext():
                result = twin(*args, **kwargs)
            self.draws = not torch.equal(drawn, torch.get_rng_state())  # random numbers
            return result

        self.outputs = list(tensors(how.run(run)))
        self.chooses = shadows is not None and shadows.chooses
        self.exact = [self._exactly(one) for one in self.outputs]
        # not where another runtime than torch has computed them
        self.exactly = shadows is not None and any(map(shadows.followed, self.outputs))
        self.outputs = [one.detach() if one.requires_grad else one for one in self.outputs]

    def _exactly(self, tensor: Tensor) -> Tensor:
        found = tensor if self.shadows is None else self.shadows.of(tensor)
        return found.detach() if found.requires_grad else found

    def _watch(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if path not in self.watched and isinstance(output, Tensor):
                self.watched[path] = output.detach().clone()  # what comes next may write to it
                self.watched_exact[path] = self._exactly(output).detach().clone()

        return hook


def observe(model: nn.Module, example_inputs: Example, keep: Collection[str] = ()) -> Observed:
    """Run a copy of a model where it is, and note what it gives to each of its parts.

    Args:
        keep: paths of modules whose arguments, at their first call, are kept as they are.

    Raises:
        BadInput: the model rejects the inputs.
    """
    how = How.of(model)
    twin = how.model(model)
    known = twin.named_modules()
    parts = {part: path for path, part in known if "._orig_mod." not in f".{path}."}  # not of what is compiled
    observed = Observed(parts, keep, inputs=how.inputs(example_inputs, model))
    args, kwargs = as_arguments(how.inputs(example_inputs, model))
    try:
        with observed.watching():
            how.run(lambda: twin(*args, **kwargs))
    except Exception:  # the model's own, or one of code that does not bear to be watched
        _accepted(model, example_inputs, how)
        return Observed(keep=keep, inputs=observed.inputs)
    return observed


class _Passing:
    """What the parts of the training-time model that merges change give as it runs, where the deploy model can be
    compared: the plan's own graph is run, as it was traced; nothing where it was made of other inputs than these."""

    def __init__(self, merges: Mapping[str, Merge], device: torch.device) -> None:
        main = [merge for merge in merges.values() if not merge.trace.path]
        regions = [Region(group, device) for group in together(main)]
        self.trace = main[0].trace if main else None
        self.regions = {merge: region for region in regions for merge in region.merges.values()}
        ordered = sorted(merges.items(), key=lambda item: int(item[1].root.meta["index"]))
        self.where = {merge: where for where, merge in ordered if merge in self.regions}
        # what a value that the deploy model gives somewhere is added to, or stacked with, on its way out of a part
        self.wanted = {node for region in regions for node in (*region.outputs, *region.needs(region.merges))}

    def run(self, example_inputs: Example, how: How) -> dict[fx.Node, tuple[Tensor, Tensor]]:
        """The values that are wanted, and in float64, in order."""
        if self.trace is None or not self.wanted:
            return {}
        shadows, model, nodes = Shadows(), self.trace.root.module, self.trace.nodes
        inputs = pytree.tree_leaves(as_arguments(how.inputs(example_inputs, model, shadows)))
        given = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        places = [node for node in nodes if node.op == "placeholder"]
        alike = (
            one.shape[1:] == place.meta.get("shape", one.shape)[1:] for place, one in zip(places, given, strict=False)
        )
        if len(places) != len(given) or not all(alike):
            return {}
        values: dict[fx.Node, Any] = dict(zip(places, given, strict=True))
        modules: dict[nn.Module, nn.Module] = {}
        found: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        uses = Counter(one for node in nodes for one in read_as_traced(node))

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
            for node in nodes:
                if node.op not in ("placeholder", "get_attr", "output") and "value" not in node.meta:
                    module = node.meta["call"].module if node.op == "call_module" else None
                    if module is not None and module not in modules:
                        modules[module] = how.model(module, shadows)
                    with shadows:
                        values[node] = given_as_traced(node, load, None if module is None else modules[module])
                if node in self.wanted and isinstance(values.get(node), Tensor):
                    value, exact = values[node].detach(), shadows.of(values[node]).detach()
                    found[node] = value.clone(), exact.clone()
                uses.subtract(read := read_as_traced(node))
                for used in read:
                    if not uses[used]:
                        values.pop(used, None)
        return found

    def records(
        self,
        watched: Mapping[str, Tensor],
        found: Mapping[fx.Node, tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        floor: float,
    ) -> Iterator[RegionRecord]:
        """Each merged layer, in order: by what it gives in the deploy model the outputs of its part are made anew."""
        most = floor  # rounding does not get less on the way, as a measure of it in one layer may
        truth = {node: exact for node, (_, exact) in found.items()}
        for merge, where in self.where.items():
            region = self.regions[merge]
            below = [node for node in region.below(merge) if node in truth]
            given = {
                root: precision.doubled(watched[self.where[one]])
                for root, one in region.merges.items()
                if self.where[one] in watched
            }
            try:
                known = {node: truth[node] for node in region.inputs if node in truth}
                ours = region.after({**known, **given}, {}, dtype, below)
            except (WrongMerge, RuntimeError):
                continue  # of another shape, or never run
            pairs = [(ours[node].to(truth[node]), *found[node]) for node in below]
            if pairs and all(mine.shape == right.shape for mine, _, right in pairs):
                most = max(most, *(relative_error(other, right) for _, other, right in pairs))
                error = max(relative_error(mine, right) for mine, _, right in pairs)
                yield RegionRecord(where=where, rules=merge.rules, error=error, noise=most)


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


def prove(merges: Sequence[Merge]) -> None:
    """Run the part of a graph that some merges change as it was traced, and as it will be written, on random float64
    values of tiny and odd sizes.

    The layers that are run are those that would be written, their pads as modules have them. Where the user allowed
    another border, only what is made of nothing outside the input is compared.

    Args:
        merges: one, or all that have something in common (`search.together`).

    Raises:
        WrongMerge: the two differ, or there were no sizes that the part itself accepts.
    """
    both = _Both(merges)
    open_ = any(merge.fit.rigour == "inside" for merge in merges)
    found: list[tuple[str, fx.Node, Tensor, Tensor]] = []
    tried: dict[str, None] = {}

    def take_first(shapes: Iterable[Shapes]) -> None:
        for one in shapes:
            what = " and ".join(dict.fromkeys(map(str, one.values())))
            tried[what] = None
            if (compared := both(one, what)) is None:
                continue  # too small for the layers as they were, or of other dims
            for node, (before, after) in compared.items():
                if before.shape != after.shape:
                    shapes_ = f"the layers give {tuple(before.shape)}, merged {tuple(after.shape)}"
                    raise WrongMerge(f"on an input of shape {what} {shapes_}")
                inside = ~torch.isnan(after) if open_ else torch.ones_like(after, dtype=torch.bool)
                found.append((what, node, before[inside], after[inside]))
            return

    for shapes in both.trials.usual():
        take_first(shapes)
    if not found:
        take_first(both.trials.rest())
    # An output of the smallest size may be made of pads alone, and be 0: rounding is relative to all there is.
    peaks: dict[fx.Node, float] = {}
    found = [one for one in found if one[2].numel()]
    for _, node, before, _ in found:
        peaks[node] = max(peaks.get(node, 0.0), float(before.abs().max()))
    for what, node, before, after in found:
        error = float((after - before).abs().max()) / peaks[node] if peaks[node] else relative_error(after, before)
        if not error <= COEFFICIENT_ROUNDING:
            raise WrongMerge(
                f"on an input of shape {what} what is merged is off by {error:.1e}, relative to the largest output"
            )
    if not found:
        known = all("shape" in node.meta for node in both.region.inputs)
        raise WrongMerge(
            f"the layers take no input of shape {listed(tried)}, so nothing can be compared"
            + ("" if known else ": pass example_inputs, which tell what they take")
        )


def border(merge: Merge, merges: Sequence[Merge]) -> BorderRecord:
    """How far a merge is off where it reads outside its input, on random input of the example's size, or one of 32.

    Args:
        merges: all that it has something in common with, itself among them.
    """
    both = _Both(merges, everywhere=True)
    base, size = merge.base, spatial_size(merge.base)
    if both.region.inputs == [base]:
        least = next(both.trials.of((5, 6, 7), spare=True))[base][2:]
        trials = both.trials.at(base, size or tuple(max(32, n) for n in least))
    else:
        trials = itertools.chain(both.trials.example(), both.trials.of((32, 33, 34), spare=True))
    for shapes in trials:
        if (compared := both(shapes, str(shapes))) is not None:
            before, after = compared[both.region.below(merge)[0]]
            peak = before.abs().max()
            off = ((after - before).abs() > COEFFICIENT_ROUNDING * peak).flatten(0, 1).any(0)
            return BorderRecord(
                size=shapes.get(base, before.shape)[2:],
                pixels=int(off.sum()),
                of=off.numel(),
                error=float((after - before).abs().max() / peak),
            )
    raise BadInput(f"{merge.term} takes no input of {size or 32} pixels, so its border cannot be looked at")


class _Both:
    """The part of a graph that some merges change, as it was and as it will be, on the same random values.

    Args:
        everywhere: give also what is made of something outside the input, where that may differ, instead of NaN.
    """

    def __init__(self, merges: Sequence[Merge], everywhere: bool = False) -> None:
        maps = {merge: merge.value() for merge in merges}
        weights = [leaf.weight for merge in merges for leaf in merge.term.leaves() if leaf.weight is not None]
        there = next((weight.device for weight in weights), torch.device("cpu"))
        # of what the model is given no dtype is known: that of its weights, or one that it writes down
        self.dtypes = dict.fromkeys([*(weight.dtype for weight in weights), torch.float32])
        self.region = Region(merges, precision.exact(there))
        self.layers = {merge: self._layer(merge, map_, everywhere) for merge, map_ in maps.items()}
        self.trials = Trials(self.region, maps)
        self.generator = torch.Generator().manual_seed(0)

    def _layer(self, merge: Merge, map_: ConvMap, everywhere: bool) -> Callable[[Tensor], Tensor]:
        layer = lower(map_, map_.kernel.to(self.region.device))
        if everywhere or merge.fit.rigour != "inside":
            return layer

        def inside(x: Tensor) -> Tensor:
            found: Tensor = layer(x)
            masked = torch.full_like(found, torch.nan)
            whole, some = (map_.geometry.inside(one, x.shape[2:], room(merge)) for one in (found, masked))
            some.copy_(whole)
            return masked

        return inside

    def __call__(self, shapes: Shapes, what: str) -> dict[fx.Node, tuple[Tensor, Tensor]] | None:
        """Each output, before and after; None if the part takes no values of these shapes.

        Raises:
            WrongMerge: merged it takes none.
        """
        with torch.no_grad():
            for dtype in self.dtypes:
                try:
                    given = self.trials.given(shapes, self.layers, dtype, self.generator)
                    before = self.region.before(given, dtype)
                except (RuntimeError, ValueError, IndexError):
                    continue
                try:
                    after = self.region.after(given, self.layers, dtype)
                except (RuntimeError, ValueError, IndexError) as reason:
                    raise WrongMerge(f"merged it does not take an input of shape {what}: {said(reason)}") from reason
                return {node: (value, after[node]) for node, value in before.items()}
        return None


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
