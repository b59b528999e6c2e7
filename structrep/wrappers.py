"""What stands around a model, or a part of it, and would not do what its methods say once layers are merged inside.

* What only says how a model is run (DataParallel, DistributedDataParallel, `torch.compile`) is seen through.
* A model that `peft` has adapted is given back without what adapts it, as peft's own `merge_and_unload` does: its
  `save_pretrained`, `disable_adapter` and so on would speak of adapters that are merged. Where a wrapper does more than
  to run the model inside (prompts, routed adapters), it stays, and so do its adapters.

peft is never imported here: who has such a model has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from structrep.errors import BadInput
from structrep.readers import hooks
from structrep.sources import words


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that are no part of what it computes.

    Raises:
        BadInput: it is no module.
    """
    while True:
        if not isinstance(model, nn.Module):
            what = model.__name__ if isinstance(model, type) else type(model).__name__
            raise BadInput(f"{what} is no torch.nn.Module instance: give the model itself")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # OptimizedModule, whose import would load the whole compiler
            model = model.get_submodule("_orig_mod")
        elif (inside := _adapted(model)) is not None:
            model = inside
        else:
            return model


def stands_in(module: nn.Module) -> bool:
    """Whether a module is a layer of peft's: one with adapters, in the place of a layer without."""
    return (peft := _peft()) is not None and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)


def settle(model: nn.Module, change: bool = True) -> bool:
    """Put in the place of each part that only wraps another that other one: adapted models inside a model, copies that
    peft trains beside a layer, layers of which no adapter is active.

    Args:
        model: is changed.
        change: whether to do it; or only to find out.

    Returns:
        Whether there are such parts.
    """
    places = [
        (parent, name, inside)
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child is not None and (inside := _settled(model, f"{path}.{name}" if path else name, child)) is not None
    ]
    for parent, name, inside in places if change else ():
        parent._modules[name] = inside
    if places and change:
        settle(model)  # what was inside
    return bool(places)


def kept(model: nn.Module) -> dict[str, str]:
    """Paths of layers that stay as they are, with what makes them: adapters that a wrapper switches, which stays too."""
    found: dict[str, str] = {}
    for path, module in model.named_modules() if _peft() is not None else ():
        if _is_wrapper(module):
            what = f"{path or 'the model'} ({type(module).__name__}) does more than to run what is inside"
            below = ((f"{path}.{name}".strip("."), part) for name, part in module.named_modules())
            found |= {name: f"{what}: its adapters stay its own" for name, part in below if stands_in(part)}
    return found


def finish(model: nn.Module) -> None:
    """Have a model without adapters say so."""
    if _peft() is None or not any(hasattr(model, name) for name in ("peft_config", "_hf_peft_config_loaded")):
        return
    if not any(map(stands_in, model.modules())):
        vars(model).pop("peft_config", None)
        vars(model).pop("_hf_peft_config_loaded", None)
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
        weights = [getattr(end, "weight", None) for end in ends]
        if None not in ends and weights[0] is not weights[1]:
            config.tie_word_embeddings = False  # or loading would make them one again


def _peft() -> Any:
    return sys.modules.get("peft")


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module is one of peft's around a model."""
    peft = _peft()
    plain = (peft.PeftModel, peft.PeftMixedModel, peft.tuners.tuners_utils.BaseTuner)
    return isinstance(module, plain) or type(module).__name__ == "AdaptionPromptModel"


def _adapted(model: nn.Module) -> nn.Module | None:
    """The model inside one of peft's, if that does no more than to run it."""
    if (peft := _peft()) is None or hooks(model):
        return None
    tuner: Any = model
    if isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        if not type(model).forward.__module__.startswith("peft."):
            return None
        tuner = model.base_model
    plain = peft.tuners.tuners_utils.BaseTuner
    if not isinstance(tuner, plain) or hooks(tuner):
        return None  # prompts, which stand before the input
    if type(tuner).forward not in (plain.forward, peft.AdaLoraModel.forward):  # the latter adds to a loss
        return None  # X-LoRA and others, which choose between adapters by the input
    if any(getattr(config, "alora_invocation_tokens", None) for config in tuner.peft_config.values()):
        return None  # adapters that begin at a token of the input
    inside: nn.Module = tuner.model
    return inside


def _settled(model: nn.Module, path: str, module: nn.Module) -> nn.Module | None:
    """What a part only wraps; None if it does more."""
    if (peft := _peft()) is None:
        return None
    if (inside := _adapted(module)) is not None:
        return None if _reached_into(model, path, module) else inside
    if isinstance(module, peft.utils.other.ModulesToSaveWrapper) and not hooks(module):
        off = module.disable_adapters or not module.active_adapters
        return module.original_module if off else module.modules_to_save[module.active_adapters[0]]
    return _idle(module) if stands_in(module) else None


def _idle(layer: Any) -> nn.Module | None:
    """The layer below a layer of peft's that runs nothing else; None if an adapter is at work."""
    if hooks(layer) or "base_layer" not in layer._modules or hasattr(layer, "unload_and_optionally_merge_module"):
        return None
    held = {name for names in layer.adapter_layer_names for name in getattr(layer, names, {})}
    works = not layer.merged and not layer.disable_adapters and not held.isdisjoint(layer.active_adapters)
    inside: nn.Module = layer.base_layer
    return None if works or (layer.merged and layer.disable_adapters) else inside


def _reached_into(model: nn.Module, path: str, wrapper: nn.Module) -> bool:
    """Whether code around an adapted model asks it for anything that the model inside has not."""
    own = {"base_model", "peft_config"}.union(*(vars(cls) for cls in type(wrapper).__mro__ if _is_pefts(cls)))
    own -= {"forward", "generate"} | {name for name in own if name.startswith("__")}
    return any(not own.isdisjoint(words(cls)) for cls in _around(model, path))


def _is_pefts(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "peft"


def _around(model: nn.Module, path: str) -> Iterator[type]:
    names = path.split(".")
    for depth in range(len(names)):
        yield type(model.get_submodule(".".join(names[:depth])))
