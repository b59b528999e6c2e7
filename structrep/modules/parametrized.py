"""Layers that compute their numbers of others before every call: by torch's parametrizations, or by the hooks that its
weight norm, spectral norm and pruning were before there were any.

Such a layer is a plain one whose numbers are constants: it is read, proved and written as the plain layer is.
"""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# The hooks, and how the names end of what they keep beside the tensor that they set.
_HOOK_TENSORS: dict[type, tuple[str, ...]] = {
    WeightNorm: ("_g", "_v"), SpectralNorm: ("_orig", "_u", "_v"), BasePruningMethod: ("_orig", "_mask"),
}  # fmt: skip
_REMOVERS = {WeightNorm: "remove_weight_norm", SpectralNorm: "remove_spectral_norm", BasePruningMethod: "prune.remove"}
_TRANSLATE = {"torch.nn.utils.parametrizations", "torch.nn.utils.spectral_norm"}  # whose hooks translate state dicts
_HELD = ("weight", "bias", "running_mean", "running_var")
_RUNS = ("forward", "_conv_forward", "__call__")


def _hook_class(hook: Any) -> type | None:
    """Which of torch's hooks one is that set a tensor of their module and see no values; None for any other."""
    return next((cls for cls in _HOOK_TENSORS if isinstance(hook, cls) and type(hook).__call__ is cls.__call__), None)


def _hook_tensors(hook: Any) -> tuple[str, ...]:
    cls = _hook_class(hook)
    return _HOOK_TENSORS[cls] if cls else ()


def _sets(hook: Any) -> str:
    """The name of the tensor that a hook sets."""
    return str(getattr(hook, "name", getattr(hook, "_tensor_name", "")))


def computed(module: nn.Module) -> tuple[str, ...]:
    """The names of the tensors that a module computes before every call, or when its forward, torch's own, asks."""
    by_hooks = (_sets(hook) for hook in module._forward_pre_hooks.values() if _hook_class(hook))
    return tuple(dict.fromkeys((*_lists(module), *by_hooks, *by_properties(module))))


def by_properties(module: nn.Module) -> list[str]:
    """The names of those that the module's own class has as properties."""
    cls, base = own_class(module), torch_class(module)
    return [name for name in _HELD if base not in (None, cls) and isinstance(getattr(cls, name, None), property)]


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without what torch's parametrizations make of it."""
    return type(module).__bases__[0] if _lists(module) else type(module)


def torch_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch's whose forward a module runs; None for a module that does more than that."""
    homes = ((base, getattr(base, "__module__", None) or "") for base in type(module).__mro__)
    base = next((base for base, home in homes if home.startswith("torch.nn.modules.")), None)
    same = all(getattr(type(module), name, None) is getattr(base, name, None) for name in _RUNS)
    return base if same and "forward" not in module.__dict__ else None


def _lists(module: nn.Module) -> dict[str, nn.Module | None]:
    """The parametrizations of a module, by the tensors that they compute."""
    lists = dict(module._modules.items()).get("parametrizations")  # a scripted module's are no dict
    return dict(lists._modules) if isinstance(lists, nn.ModuleDict) else {}


def compute(module: nn.Module) -> dict[str, Tensor]:
    """Those tensors, computed as a call does it."""
    for hook in module._forward_pre_hooks.values():
        if _hook_class(hook):
            hook(module, ())
    return {name: getattr(module, name) for name in computed(module)}


def made_of(module: nn.Module) -> set[str]:
    """The names of the parameters and buffers that a module computes tensors of."""
    ends = {_sets(hook) + end for hook in module._forward_pre_hooks.values() for end in _hook_tensors(hook)}
    held = (*module.named_parameters(), *module.named_buffers())
    return {name for name, _ in held if name in ends or name.startswith("parametrizations.")}


def hooks(module: nn.Module) -> bool:
    """Whether something watches or changes what goes in or out of a module, or the gradients of that."""
    watched = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(watched) or not all(map(_hook_class, module._forward_pre_hooks.values()))


def about_hooks(module: nn.Module) -> str:
    """What the hook of a module is, and what to do about it."""
    after = next(iter(module._forward_hooks.values()), None)
    before = next((hook for hook in module._forward_pre_hooks.values() if not _hook_class(hook)), None)
    of_gradients = next(iter((*module._backward_hooks.values(), *module._backward_pre_hooks.values())), None)
    kind, does = (
        ("forward hook", "must go on seeing its own values")
        if after is not None
        else ("forward pre-hook", "may change what it is given or its weights")
        if before is not None
        else ("backward hook", "must go on seeing its own gradients")
    )
    return (
        f"{type(module).__name__} has a {kind}, {_named(after or before or of_gradients)}, which {does}: remove it "
        f"before converting if it is only for training"
    )


def attribute_setter(module: nn.Module) -> str:
    """A pre-hook that may give a module new attributes before each call, by its code; "" if there is none."""
    for hook in module._forward_pre_hooks.values():
        function = getattr(hook, "__func__", getattr(hook, "func", hook))
        code = getattr(function, "__code__", getattr(type(hook).__call__, "__code__", None))
        if not _hook_class(hook) and (code is None or _stores(code)):
            return f"the forward pre-hook {_named(hook)}"
    return ""


def _stores(code: CodeType) -> bool:
    """Whether code sets attributes or writes in place."""
    writes = (name in ("setattr", "data") or name.endswith("_") for name in code.co_names)
    return any(writes) or any(step.opname == "STORE_ATTR" for step in dis.get_instructions(code))


def removals(module: nn.Module, path: str) -> str:
    """What makes constants of the tensors that a module computes, as calls of torch's functions."""
    at = f"model.get_submodule({path!r})" if path else "model"
    calls = [f"parametrize.remove_parametrizations({at}, {name!r})" for name in _lists(module)]
    classes = ((hook, _hook_class(hook)) for hook in module._forward_pre_hooks.values())
    calls += [f"{_REMOVERS[cls]}({at}, {_sets(hook)!r})" for hook, cls in classes if cls]
    return " and ".join(f"torch.nn.utils.{call}" for call in calls)


def _named(hook: Any) -> str:
    what = hook if hasattr(hook, "__qualname__") else type(hook)
    return f"{what.__qualname__} from {what.__module__}"


def plain(module: nn.Module, numbers: Mapping[str, Tensor]) -> nn.Module:
    """A layer as it would be if it held some numbers that it computes, all that it computes; it shares the rest."""
    cls = type(module)
    twin = cls.__new__(cls)
    # An attribute that is a dict is one of torch's tables: hooks, parameters, children.
    twin.__dict__.update((key, dict(one) if isinstance(one, dict) else one) for key, one in vars(module).items())
    buffers = _buffered(module)
    settle(twin)
    if by_properties(twin):
        twin.__class__ = torch_class(twin) or cls
    for name, number in numbers.items():
        if name in buffers:
            twin._buffers[name] = number
        else:
            twin._parameters[name] = nn.Parameter(number, requires_grad=False)
    return twin


def _buffered(module: nn.Module) -> set[str]:
    """Which of the computed tensors are no parameters."""
    of_buffers = {name for name, one in _lists(module).items() if one is not None and not one._parameters}
    return of_buffers | {"running_mean", "running_var"}


def settle(module: nn.Module) -> None:
    """Take from a module all that it computes tensors with, but properties, and these: they are for the caller to put
    in."""
    names = computed(module)
    if _lists(module):
        module.__class__ = own_class(module)
        del module._modules["parametrizations"]
    for key, hook in list(module._forward_pre_hooks.items()):
        if _hook_class(hook):
            del module._forward_pre_hooks[key]
            _forget(module, {_sets(hook) + end for end in _hook_tensors(hook)})
    for table in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(table.items()):
            if getattr(getattr(hook, "hook", hook), "__module__", "") in _TRANSLATE:
                del table[key]
    for name in names:
        module.__dict__.pop(name, None)


def _forget(module: nn.Module, names: set[str]) -> None:
    for table in (module._parameters, module._buffers):
        for name in names & table.keys():
            del table[name]


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """What `torch.nn.utils.parametrize.cached` keeps is not looked at: copies of a module share it, in any dtype."""
    state: Any = parametrize
    before = state._cache_enabled, state._cache
    state._cache_enabled, state._cache = 0, {}
    try:
        yield
    finally:
        state._cache_enabled, state._cache = before
