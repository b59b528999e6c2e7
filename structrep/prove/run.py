"""How a model is run, and how far two results differ."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from structrep import process
from structrep.algebra import precision
from structrep.algebra.shadows import Shadows
from structrep.errors import BadInput
from structrep.graph.observed import Observed
from structrep.modules.arguments import Example, as_arguments
from structrep.modules.copies import moved_copy
from structrep.modules.parametrized import uncached


def accepted(model: nn.Module, example_inputs: Example, how: How) -> Run:
    """A run of a model that was given.

    Raises:
        BadInput: it rejects the inputs.
    """
    try:
        return Run(model, example_inputs, how)
    except Exception as error:
        leaves = pytree.tree_leaves(as_arguments(example_inputs))
        shapes = [tuple(x.shape) for x in leaves if isinstance(x, Tensor)]
        cannot = f"cannot run in {name_of_dtype(how.dtype)}, with" if how.cast else "does not accept"
        raise BadInput(f"{type(model).__name__} {cannot} inputs of shape {shapes}: {error}") from error


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
        return None if not self.cast and self.dtype in dtypes_of(model) else self.dtype

    def laid_out(self, tensor: Tensor) -> Tensor:
        """A tensor with its channels last, if it has spatial dims of which torch knows such a format."""
        memory = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
        return tensor.contiguous(memory_format=memory) if memory and self.channels_last else tensor

    def inputs(self, example_inputs: Example, model: nn.Module, shadows: Shadows | None = None) -> Any:
        """Copies of the inputs, for a model may write to them; floats in a dtype that the model has."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            stays = not leaf.is_floating_point() or (not self.cast and leaf.dtype in dtypes_of(model))
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


class Run:
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


def observe(model: nn.Module, example_inputs: Example, capture: Collection[str] = ()) -> Observed:
    """Run a copy of a model where it is, and note what it gives to each of its parts.

    Args:
        capture: paths of modules whose arguments, at their first call, are captured as they are.

    Raises:
        BadInput: the model rejects the inputs.
    """
    how = How.of(model)
    twin = how.model(model)
    known = twin.named_modules()
    parts = {part: path for path, part in known if "._orig_mod." not in f".{path}."}  # not of what is compiled
    observed = Observed(parts, capture, inputs=how.inputs(example_inputs, model))
    args, kwargs = as_arguments(how.inputs(example_inputs, model))
    try:
        with observed.watching():
            how.run(lambda: twin(*args, **kwargs))
    except Exception:  # the model's own, or one of code that does not bear to be watched
        accepted(model, example_inputs, how)
        return Observed(capture=capture, inputs=observed.inputs)
    return observed


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
    return next(iter(dtypes_of(model)), torch.float32)


def dtypes_of(model: nn.Module) -> dict[torch.dtype, None]:
    """The floating-point dtypes of what a model holds, the first one first."""
    return {t.dtype: None for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cudnn_of(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    cudnn = torch.backends.cudnn
    version = cudnn.version()
    return f"cuDNN {version}{', benchmark' * cudnn.benchmark}{', deterministic' * cudnn.deterministic}"


def device_named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
