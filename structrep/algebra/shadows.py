"""Shadow execution: float64 beside what computes in a dtype of its own by its own words."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from structrep.algebra.precision import WIDER, doubled, is_inexact, wider
from structrep.errors import said

# What is a function of floats with steps: past one, float64 may be elsewhere than the model itself.
STEPS = {
    *("round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside", "floor_divide"),
    *("fake_quantize_per_tensor_affine_cachemask", "fake_quantize_per_channel_affine_cachemask"),
    *("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "_fake_quantize_learnable_per_tensor_affine"),
    *("_fake_quantize_learnable_per_channel_affine", "_fused_moving_avg_obs_fq_helper"),
}
# What gives bytes that a kernel keeps for its own backward: cuDNN's batch norm, which keeps none in evaluation.
WORKSPACES = {"cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "_cudnn_rnn"}


@dataclass(eq=False)
class Choice:
    """What an operator decided by floats: an index, a mask, a step."""

    name: str
    by: tuple[Tensor, ...]  # the floats, in float64
    results: tuple[Any, ...]
    otherwise: bool = False  # whether the run that was held to another one's choice would have made another


class Shadows(TorchDispatchMode):
    """Shadow execution: all that torch computes while it is entered is computed in float64 beside it.

    Every operator runs as it is, and once more on the float64 values of what it is given. Casts, factories, constants
    and autocast do not touch these, so they are what the code computes but for its roundings; and the code sees nothing
    of them: dtypes, branches and random numbers are its own. What is no float (an index, a mask), and what is a step
    (`round`), is its own too. An operator without a float64 kernel runs on the float64 values rounded to its dtype, and
    is named in `alone`, with what it said.

    Args:
        recorded: keep the choices that are made, as `choices`.
        held: the choices of another run, to be made in this one too; `astray` says that there was no such choice.
    """

    supports_higher_order_operators = True  # what `torch.cond` and its like call is not looked into

    def __init__(self, recorded: bool = False, held: list[Choice] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alone: dict[str, str] = {}
        self.dtypes: set[torch.dtype] = set()  # of what was computed
        self.chooses = False  # whether there was any choice
        self.choices: list[Choice] = []
        self.astray = False
        self._recorded, self._held = recorded, held
        self._exact = WeakTensorKeyDictionary()

    def __enter__(self) -> Shadows:
        self._eager = contextlib.ExitStack()
        self._eager.enter_context(_uncompiled())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._eager.close()

    def give(self, tensor: Tensor, value: Tensor) -> None:
        """Take a float64 value for that of a tensor."""
        self._exact[tensor] = value

    def of(self, tensor: Tensor) -> Tensor:
        """The float64 value of a tensor; itself where it holds no floats."""
        if not is_inexact(tensor):
            return tensor
        known: Tensor | None = self._exact.get(tensor)
        if known is None or known.shape != tensor.shape:
            known = tensor.detach().to(wider(tensor.dtype))
            if known.dtype != tensor.dtype:
                self._exact[tensor] = known  # what is written to a view of it is written to it
        return known

    def followed(self, tensor: Tensor) -> bool:
        """Whether the float64 value of a tensor is known, or what it was chosen by."""
        return (tensor.dtype not in WIDER or tensor in self._exact) if is_inexact(tensor) else self.chooses

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors(args)
        if kwargs:
            given += _tensors(kwargs)
        floats = [one for one in given if is_inexact(one)]
        if not floats:
            return func(*args, **kwargs)
        traits = _traits(func)
        if not any(one.dtype in WIDER or one in self._exact for one in floats):
            return self._first(func, traits, args, kwargs)
        written = _tensors(traits.written(args, kwargs)) if traits.positions else []
        shadows = {id(one): self.of(one) for one in floats}
        by = tuple(shadows[id(one)].clone() for one in floats) if self._recorded or self._held is not None else ()
        state = _drawn(given) if traits.draws else None
        real = func(*args, **kwargs)
        results = _tensors(real)
        if traits.steps or not all(map(is_inexact, results)) or not isinstance(real, (Tensor, list, tuple, type(None))):
            real = self._choose(traits.name, by, real, given)
            results = _tensors(real)
        if not any(map(is_inexact, (*results, *written))):
            return real
        drew = state is not None and not all(map(torch.equal, state, _drawn(given)))
        shadow = None if drew or traits.steps else self._shadow(func, traits, args, kwargs, shadows, written)
        if shadow is None:
            for one in written:
                shadows[id(one)].copy_(one) if id(one) in shadows else None
            return real
        for one, value in zip(results, _tensors(shadow), strict=False):
            if is_inexact(one) and not any(one is other for other in given) and one.shape == value.shape:
                if not traits.view and one.stride() != value.stride():
                    value = torch.empty_like(one, dtype=value.dtype).copy_(value)  # its views are to be alike too
                self._exact[one] = value
                self.dtypes.add(one.dtype if one.is_floating_point() else one.real.dtype)
        return real

    def _first(self, func: Any, traits: _Traits, args: Any, kwargs: Any) -> Any:
        """What an operator gives of float64 values alone; its own rounding, if it is a cast, is kept out of the way."""
        real = func(*args, **kwargs)
        rounded = [one for one in _tensors(real) if one.dtype in WIDER]
        if rounded and not traits.draws:
            shadow = self._shadow(func, traits, args, kwargs, {}, [])
            for one, value in zip(rounded, _tensors(shadow), strict=False):
                self._exact[one] = value
        return real

    def _shadow(
        self, func: Any, traits: _Traits, args: Any, kwargs: Any, shadows: dict[int, Tensor], written: list[Tensor]
    ) -> Any:
        """What an operator makes of float64 values; None if it cannot."""

        def wide(one: Tensor) -> Tensor:
            if id(one) in shadows:
                return shadows[id(one)]
            return one.clone() if any(one is other for other in written) else one

        def rounded(one: Tensor) -> Tensor:
            return shadows[id(one)].to(one.dtype) if id(one) in shadows else one

        try:
            return func(*_mapped(traits.plain(args), wide, wider), **_mapped(kwargs, wide, wider))
        except Exception as error:  # there is no such kernel
            self.alone.setdefault(traits.name, said(error))
        if written:
            return None
        with contextlib.suppress(Exception):
            found = func(*_mapped(args, rounded, None), **_mapped(kwargs, rounded, None))
            return _mapped(found, doubled, None)
        return None

    def _choose(self, name: str, by: tuple[Tensor, ...], real: Any, given: list[Tensor]) -> Any:
        """What was chosen, or what another run chose there."""
        parts = list(real) if isinstance(real, (list, tuple)) else [real]
        chosen = [one for one in parts if not isinstance(one, Tensor) or _decides(name, one)]
        if not chosen:
            return real
        self.chooses = True
        if not by:
            return real
        otherwise = False
        if self._held is not None and not self.astray:
            place = len(self.choices)
            other = self._held[place] if place < len(self._held) else None
            if other is None or other.name != name or not all(map(_alike, other.results, chosen)):
                self.astray = True
            else:
                otherwise = not all(map(_same, other.results, chosen))
                held = iter(other.results)
                for index, one in enumerate(parts):
                    if any(one is part for part in chosen):
                        value = next(held)
                        if isinstance(one, Tensor):
                            value = one.copy_(value) if any(one is it for it in given) else value.clone()
                        parts[index] = value
                real = parts[0] if not isinstance(real, (list, tuple)) else type(real)(parts)
        kept = tuple(one.clone() if isinstance(one, Tensor) else one for one in chosen)
        self.choices.append(Choice(name, by, kept, otherwise))
        return real


class Doubled(contextlib.AbstractContextManager[None]):
    """In the place of `Shadows`, where all floats are float64 themselves."""

    def __exit__(self, *raised: Any) -> None:
        pass

    def give(self, tensor: Tensor, value: Tensor) -> None:
        """Take a float64 value for that of a tensor, which has it."""

    def of(self, tensor: Tensor) -> Tensor:
        """The float64 value of a tensor."""
        return tensor


_lock, _stance, _entered = threading.Lock(), contextlib.ExitStack(), 0  # one stance for all threads


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Nothing compiled: under a mode torch's compiler skips code, and goes on skipping it ever after."""
    global _entered
    loaded = "torch._dynamo" in sys.modules
    with _lock:
        if loaded and not _entered:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _entered += 1
    try:
        yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                _stance.close()
        if not loaded and "torch._dynamo" in sys.modules:  # by what has run
            sys.modules["torch._dynamo"].reset()


@dataclass(frozen=True)
class _Traits:
    """What an operator's schema says."""

    name: str
    positions: tuple[tuple[int, str], ...]  # of the arguments that it writes to
    view: bool
    draws: bool
    steps: bool
    halves: bool  # whether it says apart that half precision is to become float32

    def written(self, args: Any, kwargs: Any) -> list[Any]:
        return [args[at] if at < len(args) else kwargs.get(name) for at, name in self.positions]

    def plain(self, args: Any) -> Any:
        return (*args[:2], False) if self.halves else args


@functools.cache
def _traits(func: Any) -> _Traits:
    schema = getattr(func, "_schema", None)
    if schema is None:  # an operator of higher order
        return _Traits(str(func), (), False, True, False, False)
    name = schema.name.removeprefix("aten::")
    return _Traits(
        name,
        tuple((i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write),
        any(one.alias_info for one in schema.returns),
        torch.Tag.nondeterministic_seeded in func.tags,
        name in STEPS or name.removesuffix("_") in STEPS,
        name in ("_softmax", "_log_softmax"),
    )


def _tensors(value: Any) -> list[Tensor]:
    """All tensors among an operator's arguments, or in what it gives."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += _tensors(one)
    return found


def _mapped(value: Any, tensor: Callable[[Tensor], Any], dtype: Callable[[torch.dtype], Any] | None) -> Any:
    """Arguments of an operator, or what it gives, with other tensors and dtypes."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(one, tensor, dtype) for one in value)
    if isinstance(value, dict):
        return {key: _mapped(one, tensor, dtype) for key, one in value.items()}
    return dtype(value) if dtype is not None and isinstance(value, torch.dtype) else value


def _decides(name: str, result: Tensor) -> bool:
    """Whether a result says what an operator decided."""
    if not result.numel() or name in WORKSPACES:
        return False
    return not is_inexact(result) or name in STEPS


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype
    return type(one) is type(other)


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _drawn(given: list[Tensor]) -> list[Tensor]:
    """The states of the generators that random numbers come from."""
    cuda = {one.device for one in given if one.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda)]
