"""Proof that the value was put back rightly: regions one by one, and the whole model against the float64 truth.

There are no tolerances to choose. With a float64 copy of the training-time model as truth, the deploy model may err
about as much as the training-time model does by rounding alone in the same dtype: of its activations, and of each of
its weights once.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from structrep import precision
from structrep.algebra import ConvMap
from structrep.errors import BadInput, WrongMerge, listed, said
from structrep.ranks import spatial_size
from structrep.readers import held, lower
from structrep.regions import Region, Shapes, Trials, Values, given_as_traced, read_as_traced, room
from structrep.registry import COEFFICIENT_ROUNDING
from structrep.report import BorderRecord, OutputRecord, RegionRecord, Verification
from structrep.search import Merge, together
from structrep.trace import Example, as_arguments, shallow_copy

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
        dtype: what to run both in; the reference's own by default. The truth is float64 always.
        autocast: run both under autocast to this dtype.
        channels_last: run both in that memory format.
        tf32: let CUDA multiply float32 in TensorFloat-32.
        seed: of what a model draws as it runs.
        merges: by the path of each merged layer; `Plan.verify` gives those of the plan. Each is compared too.

    Returns:
        Errors of all outputs, relative to each output's largest value; `.ok` says whether they are rounding.

    Raises:
        BadInput: a model rejects the inputs, or the two models' outputs differ in structure or shape.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or dtype_of(reference)
    merges = merges or {}
    # Weights that were cast to float32 when they were merged cannot be nearer the truth than that.
    coarsest = max(dtype, dtype_of(deploy), autocast or dtype, key=lambda d: torch.finfo(d).eps)
    how = How(device, dtype, autocast, channels_last, seed)
    noisy = replace(how, dtype=max(dtype, dtype_of(deploy), key=lambda d: torch.finfo(d).eps))
    exact = How(device, torch.float64, None, False, seed)
    with precision.whole(tf32=tf32):
        truth = _Run(reference, example_inputs, exact)
        if truth.draws:  # other numbers in every dtype: only runs of one dtype can be compared
            how, noisy, dtype, autocast = exact, exact, torch.float64, None
        ours = _Run(deploy, example_inputs, how, watch=merges)
        # Merged weights are rounded once when they are stored. What that does to the original counts as its noise too.
        theirs = [_Run(_rounded(reference, coarsest), example_inputs, noisy)]
        if noisy != exact:
            theirs.append(_Run(reference, example_inputs, noisy))
        passing = _Passing(merges, device)
        at_truth, at_noise = (passing.run(example_inputs, one) for one in (exact, noisy))
    if not truth.outputs:
        raise BadInput(f"{type(reference).__name__} gives no tensor that could be compared")
    if len(truth.outputs) != len(ours.outputs):
        raise BadInput(
            f"the training-time model gives {len(truth.outputs)} tensors, the deploy model {len(ours.outputs)}"
        )
    floor = 2 * torch.finfo(coarsest).eps  # one small sum may happen to be exact
    outputs = []
    for index, (right, mine) in enumerate(zip(truth.outputs, ours.outputs, strict=True)):
        if right.shape != mine.shape:
            raise BadInput(f"output {index} has shape {tuple(right.shape)} before and {tuple(mine.shape)} after")
        noise = max(floor, *(relative_error(one.outputs[index], right) for one in theirs))
        outputs.append(
            OutputRecord(name=f"{index}", shape=tuple(right.shape), error=relative_error(mine, right), noise=noise)
        )
    return Verification(
        device=_device_name(device),
        dtype=_name(dtype),
        autocast=_name(autocast) if autocast else None,
        channels_last=channels_last,
        tf32=tf32,
        cudnn=_cudnn(device),
        seed=seed,
        torch=torch.__version__,
        slack=SLACK,
        outputs=tuple(outputs),
        regions=tuple(passing.records(ours.watched, at_truth, at_noise, floor)),
    )


def _rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with every number off by one rounding in that dtype, up or down."""
    there = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    twin = shallow_copy(model).to(precision.exact(there), torch.float64)
    eps = torch.finfo(dtype).eps
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

    @classmethod
    def of(cls, model: nn.Module) -> How:
        """Where a model is, and in its dtype."""
        return cls(next((t.device for t in model.parameters()), torch.device("cpu")), dtype_of(model))

    def model(self, model: nn.Module) -> nn.Module:
        """A copy of a model, to run so."""
        twin = shallow_copy(model).to(self.device, self.dtype)
        for tensor in (*twin.parameters(), *twin.buffers()) if self.channels_last else ():
            tensor.data = self.laid_out(tensor.data)
        return twin

    def laid_out(self, tensor: Tensor) -> Tensor:
        """A tensor with its channels last, if it has spatial dims of which torch knows such a format."""
        memory = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
        return tensor.contiguous(memory_format=memory) if memory and self.channels_last else tensor

    def inputs(self, example_inputs: Example) -> Any:
        """Copies of the inputs, for a model may write to them."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            one = leaf.detach().to(self.device, self.dtype if leaf.is_floating_point() else None, copy=True)
            return self.laid_out(one)

        return pytree.tree_map(moved, example_inputs)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        cast = torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with torch.no_grad(), torch.random.fork_rng(), cast:
            torch.manual_seed(self.seed)
            yield


class _Run:
    """All tensors that a copy of a model gives, and what some of its modules gave at their first call; the model itself
    is left alone.

    Raises:
        BadInput: the model rejects the inputs.
    """

    def __init__(self, model: nn.Module, example_inputs: Example, how: How, watch: Iterable[str] = ()) -> None:
        args, kwargs = as_arguments(how.inputs(example_inputs))
        twin = how.model(model)
        self.watched: dict[str, Tensor] = {}
        for path in watch:
            twin.get_submodule("" if path == "(root)" else path).register_forward_hook(self._watch(path))
        try:
            with how.running():
                drawn = torch.get_rng_state()
                result = twin(*args, **kwargs)
                self.draws = not torch.equal(drawn, torch.get_rng_state())  # random numbers
        except Exception as error:
            shapes = [tuple(x.shape) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            raise BadInput(f"{type(model).__name__} does not accept inputs of shape {shapes}: {error}") from error
        self.outputs = list(tensors(result))

    def _watch(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if path not in self.watched and isinstance(output, Tensor):
                self.watched[path] = output.detach().clone()  # what comes next may write to it

        return hook


def accepts(model: nn.Module, example_inputs: Example) -> None:
    """Run a copy of a model where it is.

    Raises:
        BadInput: the model rejects the inputs.
    """
    _Run(model, example_inputs, How.of(model))


def inputs_of(model: nn.Module, example_inputs: Example, paths: Collection[str]) -> Iterator[tuple[str, Any]]:
    """What some modules are given at their first call, for the example inputs."""
    how = How.of(model)
    twin = how.model(model)
    seen: dict[str, Any] = {}
    for path in paths:

        def note(module: nn.Module, args: Any, path: str = path) -> None:
            seen.setdefault(path, args[0] if len(args) == 1 else None)

        twin.get_submodule(path).register_forward_pre_hook(note)
    args, kwargs = as_arguments(how.inputs(example_inputs))
    with how.running():
        twin(*args, **kwargs)
    yield from seen.items()


class _Passing:
    """What the parts of the training-time model that merges change give as it runs, where the deploy model can be
    compared: the plan's own graph is run, as it was traced; nothing where it was made of other inputs than these."""

    def __init__(self, merges: Mapping[str, Merge], device: torch.device) -> None:
        main = [merge for merge in merges.values() if not merge.trace.path]
        regions = [Region(group, device) for group in together(main)]
        self.nodes = main[0].trace.nodes if main else []
        self.regions = {merge: region for region in regions for merge in region.merges.values()}
        ordered = sorted(merges.items(), key=lambda item: int(item[1].root.meta["index"]))
        self.where = {merge: where for where, merge in ordered if merge in self.regions}
        # what a value that the deploy model gives somewhere is added to, or stacked with, on its way out of a part
        self.wanted = {node for region in regions for node in (*region.outputs, *region.needs(region.merges))}

    def run(self, example_inputs: Example, how: How) -> dict[fx.Node, Tensor]:
        """The values that are wanted, in order."""
        inputs = pytree.tree_leaves(as_arguments(how.inputs(example_inputs)))
        given = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        places = [node for node in self.nodes if node.op == "placeholder"]
        alike = (
            one.shape[1:] == place.meta.get("shape", one.shape)[1:] for place, one in zip(places, given, strict=False)
        )
        if not self.wanted or len(places) != len(given) or not all(alike):
            return {}
        values: dict[fx.Node, Any] = dict(zip(places, given, strict=True))
        modules: dict[nn.Module, nn.Module] = {}
        found: dict[fx.Node, Tensor] = {}
        uses = Counter(one for node in self.nodes for one in read_as_traced(node))

        def load(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            one = held(node) if "value" in node.meta else node.meta["held"]
            floats = isinstance(one, Tensor) and one.is_floating_point()
            return one.detach().to(how.device, how.dtype) if floats else one

        with how.running(), contextlib.suppress(Exception):  # a graph may hold for one size of batch alone
            for node in self.nodes:
                if node.op not in ("placeholder", "get_attr", "output") and "value" not in node.meta:
                    module = node.meta["call"].module if node.op == "call_module" else None
                    if module is not None and module not in modules:
                        modules[module] = how.model(module)
                    values[node] = given_as_traced(node, load, None if module is None else modules[module])
                if node in self.wanted and isinstance(values.get(node), Tensor):
                    found[node] = values[node].detach().clone()
                uses.subtract(read := read_as_traced(node))
                for used in read:
                    if not uses[used]:
                        values.pop(used, None)
        return found

    def records(
        self, watched: Mapping[str, Tensor], truth: Values, noisy: Values, floor: float
    ) -> Iterator[RegionRecord]:
        """Each merged layer, in order: by what it gives in the deploy model the outputs of its part are made anew."""
        most = floor  # rounding does not get less on the way, as a measure of it in one layer may
        for merge, where in self.where.items():
            region = self.regions[merge]
            below = [node for node in region.below(merge) if node in truth and node in noisy]
            given = {
                root: precision.doubled(watched[self.where[one]])
                for root, one in region.merges.items()
                if self.where[one] in watched
            }
            try:
                ours = region.after(
                    {**{node: truth[node] for node in region.inputs if node in truth}, **given}, {}, below
                )
            except (WrongMerge, RuntimeError):
                continue  # of another shape, or never run
            pairs = [(ours[node].to(truth[node]), truth[node], noisy[node]) for node in below]
            if pairs and all(mine.shape == right.shape for mine, right, _ in pairs):
                most = max(most, *(relative_error(other, right) for _, right, other in pairs))
                error = max(relative_error(mine, right) for mine, right, _ in pairs)
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
    return next((t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.float32)


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
        weights = (leaf.weight for merge in merges for leaf in merge.term.leaves())
        there = next((weight.device for weight in weights if weight is not None), torch.device("cpu"))
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
            try:
                given = self.trials.given(shapes, self.layers, self.generator)
                before = self.region.before(given)
            except (RuntimeError, ValueError, IndexError):
                return None
            try:
                after = self.region.after(given, self.layers)
            except (RuntimeError, ValueError, IndexError) as reason:
                raise WrongMerge(f"merged it does not take an input of shape {what}: {said(reason)}") from reason
        return {node: (value, after[node]) for node, value in before.items()}


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
