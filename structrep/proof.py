"""Proof that the value was put back rightly: regions one by one, and the whole model against the float64 truth.

There are no tolerances to choose. With a float64 copy of the training-time model as truth, the deploy model may err
about as much as the training-time model does by rounding alone in the same dtype: of its activations, and of each of
its weights once.
"""

from __future__ import annotations

import contextlib
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
from structrep.errors import BadInput, WrongMerge
from structrep.frames import frame, pieces
from structrep.observe import Observed
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
        at_truth, at_noise = (_regions(example_inputs, one, merges) for one in (exact, noisy))
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
    # Rounding does not get less on the way, as a measure of it in one layer may.
    regions, most = [], floor
    for where, right in at_truth.items():
        given = ours.watched.get(where)
        if given is not None and given.shape == right.shape and where in at_noise:
            most = max(most, relative_error(at_noise[where], right))
            error = relative_error(given, right)
            regions.append(RegionRecord(where=where, rules=merges[where].rules, error=error, noise=most))
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
        regions=tuple(regions),
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


def observe(model: nn.Module, example_inputs: Example, keep: Collection[str] = ()) -> Observed:
    """Run a copy of a model where it is, and note what it gives to each of its parts.

    Args:
        keep: paths of modules whose arguments, at their first call, are kept as they are.

    Raises:
        BadInput: the model rejects the inputs.
    """
    how = How.of(model)
    twin = how.model(model)
    parts = {
        part: path for path, part in twin.named_modules() if "._orig_mod." not in f".{path}."
    }  # of what is compiled
    observed = Observed(parts, keep)
    args, kwargs = as_arguments(how.inputs(example_inputs))
    try:
        with how.running(), observed.watching():
            twin(*args, **kwargs)
    except Exception:  # the model's own, or one of code that does not bear to be watched
        _Run(model, example_inputs, how)
        return Observed(keep=keep)
    return observed


def _regions(example_inputs: Example, how: How, merges: Mapping[str, Merge]) -> dict[str, Tensor]:
    """What the stretches that were merged give as the training-time model runs, by where they were merged, in order:
    the plan's own graph is run; none where it was made of other inputs than these."""
    alone = {where: merge for where, merge in merges.items() if not any(one.beside for one in merge.absorbed)}
    roots = {merge.root: where for where, merge in alone.items() if not merge.trace.path}
    nodes = next((merge.trace.nodes for merge in merges.values() if merge.root in roots), [])
    given = [leaf for leaf in pytree.tree_leaves(as_arguments(how.inputs(example_inputs))) if isinstance(leaf, Tensor)]
    places = [node for node in nodes if node.op == "placeholder"]
    alike = (one.shape[1:] == place.meta.get("shape", one.shape)[1:] for place, one in zip(places, given, strict=False))
    if not roots or len(places) != len(given) or not all(alike):
        return {}
    values: dict[fx.Node, Any] = dict(zip(places, given, strict=True))
    modules: dict[nn.Module, nn.Module] = {}
    found: dict[str, Tensor] = {}

    def load(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        one = held(node) if "value" in node.meta else node.meta["held"]
        floats = isinstance(one, Tensor) and one.is_floating_point()
        return one.detach().to(how.device, how.dtype) if floats else one

    with how.running(), contextlib.suppress(Exception):  # a graph may hold for one size of batch alone
        for node in nodes:
            if node.op not in ("placeholder", "get_attr", "output") and "value" not in node.meta:
                module = node.meta["call"].module if node.op == "call_module" else None
                if module is not None and module not in modules:
                    modules[module] = how.model(module)
                values[node] = computed(node, load, None if module is None else modules[module])
                if node in roots:
                    value = values[node].detach()
                    scaled = _scaled(value, _behind(merges[roots[node]]))
                    found[roots[node]] = scaled.to(value, copy=True)
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
    return next((t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.float32)


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
        weights = (leaf.weight for leaf in merge.term.leaves())
        there = next((weight.device for weight in weights if weight is not None), map_.kernel.device)
        self.device = precision.exact(there)
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
            for shape in shapes:
                x = torch.randn(shape, dtype=torch.float64, generator=self.generator, device="cpu").to(self.device)
                try:
                    before = self.region(x)
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
    """The nodes of a merge, as a function in float64."""

    def __init__(self, merge: Merge, device: torch.device) -> None:
        self.merge, self.device = merge, device
        self.nodes = sorted(merge.nodes, key=lambda node: node.meta["index"])
        # scales that stand outside the region and are done in it
        self.absorbed = _absorbed(merge)
        self.modules: dict[nn.Module, nn.Module] = {}

    def __call__(self, x: Tensor) -> Tensor:
        carried = self.merge.carried
        rest = x
        if carried is not None and not carried.first:
            x, rest = x[:, : -carried.channels], x[:, -carried.channels :]
        values: dict[fx.Node, Any] = {self.merge.base: x}
        if carried is not None and carried.last:
            values[carried.base] = _apart(rest, carried.stride)

        def load(node: fx.Node) -> Any:
            if "value" in node.meta:
                return precision.doubled(held(node))
            if node not in values and counts_sizes(node):
                values[node] = computed(node, load)
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
                return held(node)
            return values[node] if node in values else numbers.reshape(-1, *pieces(node))

        for node in sorted(one.through, key=lambda node: node.meta["index"]):
            folded = bool(frame(node))  # the pieces back into their places
            values[node] = load(node.all_input_nodes[0]) if folded else computed(node, load, self._module(node))
        found: Tensor = sum(sign * values[part].flatten(1) for part, sign in one.added)
        return found.reshape(*places.shape[:-1], -1).movedim(-1, 1)

    def _module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, in float64."""
        if node.op != "call_module":
            return None
        module = node.meta["call"].module
        if module not in self.modules:
            self.modules[module] = shallow_copy(module).to(self.device, torch.float64)
        return self.modules[module]


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
        x = scale.load(x.shape[1], x.ndim - 2)(x) if scale.dims != 0 else scale.load(x.shape[-1], 0)(x)
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
