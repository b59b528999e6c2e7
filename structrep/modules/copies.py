"""Copies of a model: of its modules alone, of all that it holds, in another dtype."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from structrep.errors import BadInput, Untraceable, said
from structrep.modules import parametrized
from structrep.modules.source import is_full


def shallow_copy(model: nn.Module) -> nn.Module:
    """A copy with its own modules, attributes and buffers, whose parameters share the storage of the original's.

    Raises:
        BadInput: the model holds something that cannot be copied.
    """
    modules = list(model.modules())
    return _copied(modules, {id(tensor): _alias(tensor) for module in modules for tensor in tensors_of(module)})


def own_copy(model: nn.Module) -> nn.Module:
    """A deep copy; tensors that torch cannot deep-copy (computed ones, as in old-style weight norm) are copied by
    value.

    Raises:
        BadInput: the model holds something that cannot be copied.
    """
    modules = list(model.modules())
    computed = (tensor for module in modules for tensor in tensors_of(module) if not tensor.is_leaf)
    return _copied(modules, {id(tensor): tensor.detach().clone() for tensor in computed})


def _copied(modules: list[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """A copy of the first of some modules, below which are the others, with what `memo` has for parts by their id."""
    groups = (getattr(module, "process_group", None) for module in modules)  # of SyncBatchNorm: one for all
    memo |= {id(group): group for group in groups if group is not None}
    try:
        if not all(map(_copies_plainly, set(map(parametrized.own_class, modules)))):
            copied: nn.Module = copy.deepcopy(modules[0], memo)
            _set_modes(copied, modules[0])
        else:
            twins = [type(module).__new__(type(module)) for module in modules]
            memo |= {id(module): twin for module, twin in zip(modules, twins, strict=True)}
            for module, twin in zip(modules, twins, strict=True):
                vars(twin).update(_copied_items(vars(module), memo))
            copied = twins[0]
        make_eager(copied, memo)
    except Exception as error:
        raise BadInput(f"the model cannot be copied: {said(error)}") from error
    return copied


def _set_modes(twin: nn.Module, original: nn.Module) -> None:
    """Put a copy in the modes of what it was made of: a class that copies itself may leave it in another."""
    modes = {path: getattr(part, "training", None) for path, part in original.named_modules()}  # frozen scripts: none
    if modes[""] is not None and twin.training != modes[""]:
        with contextlib.suppress(NotImplementedError):  # of exported programs, which have no modes
            twin.train(modes[""])  # which may do more: torchvision's feature extractors have a graph for each
    for path, part in twin.named_modules():
        if (mode := modes.get(path)) is not None:
            part.training = mode


def make_eager(model: nn.Module, twins: Mapping[int, Any]) -> None:
    """Undo what `Module.compile()` has done in place, and hand on to copies what functions among the attributes hold of
    the originals: a copy would run the model that it was made of.

    Args:
        twins: copies by the ids of the originals; of a model that is no copy, its own modules.
    """
    for module in model.modules():
        held = vars(module)
        held.pop("_compiled_call_impl", None)
        if is_compiled(module):
            continue  # it compiles anew what has changed
        for name, value in [(name, value) for name, value in held.items() if isinstance(value, _CALLED)]:
            own = _rebound(value, twins)
            if own is not value:
                held[name] = own
                if own == MethodType(getattr(type(module), name, own), module):
                    del held[name]  # its class says so too


_CALLED = (FunctionType, MethodType, functools.partial)


def _rebound(value: Any, twins: Mapping[int, Any]) -> Any:
    """A function that holds copies where it held their originals, and is not compiled where it was a method of one;
    anything else as it is."""
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, MethodType):
        owner, function = _rebound(value.__self__, twins), _rebound(value.__func__, twins)
        same = owner is value.__self__ and function is value.__func__
        return value if same else MethodType(function, owner)
    if isinstance(value, functools.partial):
        function, args = _rebound(value.func, twins), tuple(_rebound(one, twins) for one in value.args)
        same = function is value.func and all(map(operator.is_, args, value.args))
        return value if same else functools.partial(function, *args, **value.keywords)
    if not isinstance(value, FunctionType):
        return value
    eager: Any = value
    while isinstance(eager, FunctionType) and hasattr(eager, "__wrapped__") and _is_compiler(eager):
        eager = eager.__wrapped__
    if eager is not value and _holds(eager, twins):
        return _rebound(eager, twins)
    cells = value.__closure__ or ()
    own = [_rebound(cell.cell_contents, twins) if is_full(cell) else None for cell in cells]
    given, named = value.__defaults__ or (), value.__kwdefaults__ or {}
    defaults = tuple(_rebound(one, twins) for one in given)
    keywords = {name: _rebound(one, twins) for name, one in named.items()}
    kept = all(map(operator.is_, (*given, *named.values()), (*defaults, *keywords.values())))
    if kept and all(not is_full(cell) or one is cell.cell_contents for one, cell in zip(own, cells, strict=True)):
        return value
    closure = tuple(CellType(one) if is_full(cell) else cell for one, cell in zip(own, cells, strict=True))
    twin = FunctionType(value.__code__, value.__globals__, value.__name__, defaults or None, closure)
    twin.__kwdefaults__ = keywords or None
    vars(twin).update({name: _rebound(one, twins) for name, one in vars(value).items()})
    return twin


def _is_compiler(function: FunctionType) -> bool:
    return str(function.__globals__.get("__name__")).startswith("torch._dynamo.")


def _holds(value: Any, originals: Mapping[int, Any]) -> bool:
    """Whether a function is, or goes by, a method of a module that was copied."""
    if isinstance(value, FunctionType):
        return any(is_full(cell) and _holds(cell.cell_contents, originals) for cell in value.__closure__ or ())
    return id(value.__self__ if isinstance(value, MethodType) else value) in originals


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, as `shallow_copy` gives it."""
    twin = shallow_copy(model)
    with contextlib.suppress(NotImplementedError):  # of exported programs, which have no modes
        twin.eval()  # not every class's gives the model back
    return twin


def moved_copy(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy somewhere, in some dtype or in its own, as `shallow_copy` gives it."""
    twin = shallow_copy(model)
    try:
        twin.to(device, dtype)
    except TypeError:  # a method of its own takes less
        nn.Module.to(twin, device, dtype)
    return twin


ATOMS = {bool, int, float, str, type(None), torch.dtype, torch.device, FunctionType, type}


def _copied_items(items: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """As copy.deepcopy does, which asks of every object how it is to be copied; most of a module's are plain."""
    return {key: one if type(one) in ATOMS else copied_value(one, memo) for key, one in items.items()}


def copied_value(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    kind: Any = type(value)
    if kind in (tuple, set) and all(type(item) in ATOMS for item in value):
        return value if kind is tuple else memo.setdefault(id(value), set(value))
    if kind in (dict, OrderedDict) and all(type(key) is str for key in value):
        copied = memo[id(value)] = kind()
        copied.update(_copied_items(value, memo))
        return copied
    return copy.deepcopy(value, memo)


def _copies_plainly(cls: type[nn.Module]) -> bool:
    """Whether modules of a class are copied attribute by attribute, as torch's own are."""
    own = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__", "__slots__")
    # what convolutions do with a state is to fill in what old versions of torch had not
    plain = {nn.Module, object, nn.modules.conv._ConvNd}
    special = any(name in vars(base) for base in set(cls.__mro__) - plain for name in own)
    return not special and not issubclass(cls, torch.jit.ScriptModule)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))


def _alias(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor.detach().clone()
    if tensor.is_inference():  # made in inference mode, outside of which it takes no gradient
        return nn.Parameter(tensor.clone().detach(), requires_grad=tensor.requires_grad)
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` has put around another."""
    return "_orig_mod" in module._modules  # its class's import would load the whole compiler


def scripted(module: nn.Module) -> Untraceable:
    name = getattr(module, "original_name", type(module).__name__)
    return Untraceable(
        f"{name} is TorchScript, whose code is fixed: put the module that it was made of there, and script what comes "
        f"back"
    )


def demand_python(model: nn.Module) -> None:
    """Raise where a model is none, or its code no longer Python's.

    Raises:
        BadInput: it is no module, or TorchScript.
    """
    if not isinstance(model, nn.Module):
        what = model.__name__ if isinstance(model, type) else type(model).__name__
        raise BadInput(f"{what} is no torch.nn.Module instance: give the model itself")
    if isinstance(model, torch.jit.ScriptModule):
        name = getattr(model, "original_name", type(model).__name__)
        raise BadInput(
            f"{name} is TorchScript, whose code is fixed: give the module that it was made of, and script what comes "
            f"back"
        )
