"""What stands around a model, or a part of it, and would not do what its methods say once layers are merged inside.

* What only says how a model is run (DataParallel, DistributedDataParallel, `torch.compile`) is seen through.
* A model that `peft` has adapted is given back without what adapts it, as peft's own `merge_and_unload` does: its
  `save_pretrained`, `disable_adapter` and so on would speak of adapters that are merged. Where a wrapper does more than
  to run the model inside (prompts, routed adapters), it stays, and so do its adapters.

peft is never imported here: who has such a model has done so.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from structrep.modules.copies import demand_python, is_compiled, own_copy
from structrep.modules.parametrized import hooks
from structrep.modules.source import words, written_in


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that are no part of what it computes.

    Raises:
        BadInput: it is no module, or TorchScript.
    """
    if isinstance(model, ExportedProgram):
        model = own_copy(model.module())  # whose weights the program would share
    while True:
        demand_python(model)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif is_compiled(model):
            model = model.get_submodule("_orig_mod")
        elif (inside := _adapted(model)) is not None:
            model = inside
        else:
            return model


def adapting(model: nn.Module) -> str:
    """The class of peft's that a model is in which is seen through; "" if there is none."""
    return type(model).__name__ if _adapted(model) is not None else ""


def stands_in(module: nn.Module) -> bool:
    """Whether a module is a layer of peft's: one with adapters, in the place of a layer without."""
    return (peft := _peft()) is not None and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)


def is_own(layer: nn.Module) -> bool:
    """Whether a layer with adapters runs code of peft's alone."""
    return _is_pefts(written_in(type(layer))) and "forward" not in vars(layer)


def base_of(layer: nn.Module) -> Any:
    """The layer without adapters in one of peft's; None of any other."""
    return layer.get_base_layer() if stands_in(layer) else None  # type: ignore[operator]


def as_before(module: nn.Module, layer: nn.Module) -> nn.Module:
    """A merged layer for the place of a module: where that is one of peft's around transformers' `Conv1D`, whose weight
    is (in, out), such a one, so that what is saved can be loaded."""
    base = base_of(module)
    if not isinstance(layer, nn.Linear) or type(base).__name__ != "Conv1D" or not hasattr(base, "nf"):
        return layer
    weight = nn.Parameter(layer.weight.detach().t().contiguous(), layer.weight.requires_grad)
    given: Any = layer.bias  # None, perhaps
    bias = nn.Parameter(weight.new_zeros(base.nf), weight.requires_grad) if given is None else given
    made: nn.Module = copy.copy(base)
    made._parameters = {"weight": weight, "bias": bias}
    return made


def settle(model: nn.Module, change: bool = True) -> bool:
    """Put in the place of each part that only wraps another that other one: adapted models inside a model, copies that
    peft trains in the place of a layer, layers of which no adapter is active.

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


def excluded(model: nn.Module) -> dict[str, str]:
    """Paths of layers that stay as they are, with what makes them, adapters of a wrapper that stays; and of the models
    in such wrappers, which would not be themselves if anything outside were merged into them."""
    found: dict[str, str] = {}
    for path, module in model.named_modules() if _peft() is not None else ():
        if _is_wrapper(module):
            reason = _stays(module) or f"code around it asks for its {_asked_for(model, path, module)}"
            what = f"{path or 'the model'} ({type(module).__name__}) stays, and so do its adapters: {reason}"
            tuner = _tuner(module)
            inside = tuner.model if _is_wrapper(tuner) else tuner
            below = ((f"{path}.{name}".strip("."), part) for name, part in module.named_modules())
            found = {name: what for name, part in below if stands_in(part) or part is inside} | found
    return found


def adapters(model: nn.Module) -> int:
    """How many layers of peft's a model has."""
    return sum(map(stands_in, model.modules()))


def finish(model: nn.Module, had: int) -> None:
    """Have a model say that it has no adapters of which it could be asked to let go: those that stay are a part of it.

    Args:
        had: how many layers of peft's it had before merges were made.
    """
    if _peft() is None or vars(model).keys().isdisjoint(("peft_config", "_hf_peft_config_loaded")):
        return  # it never had any; of transformers' classes each has the second name
    if (left := adapters(model)) == 0 or left < had:
        vars(model).pop("peft_config", None)
        vars(model).pop("_hf_peft_config_loaded", None)
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        try:
            ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
        except (AttributeError, NotImplementedError):  # it has none; transformers' own method raises
            return
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
    if _peft() is None or not _is_wrapper(model) or _stays(model):
        return None
    inside: nn.Module = _tuner(model).model
    return inside


def _tuner(wrapper: Any) -> Any:
    peft = _peft()
    return wrapper.base_model if isinstance(wrapper, (peft.PeftModel, peft.PeftMixedModel)) else wrapper


def _stays(wrapper: nn.Module) -> str:
    """Why one of peft's around a model is more than a wrapper; "" if it is not."""
    peft, tuner = _peft(), _tuner(wrapper)
    plain = peft.tuners.tuners_utils.BaseTuner
    if hooks(wrapper) or hooks(tuner):
        return "it has a forward hook"
    if not isinstance(tuner, plain):
        return "it changes what the model inside is given"  # prompts
    if wrapper is not tuner and not _is_pefts(getattr(type(wrapper).forward, "__module__", "")):
        return "it has a forward of its own"
    if type(tuner).forward not in (plain.forward, peft.AdaLoraModel.forward):  # the latter adds to a loss
        return "it chooses between them by the input"
    if any(getattr(config, "alora_invocation_tokens", None) for config in tuner.peft_config.values()):
        return "they begin at a token of the input"
    return ""


def _settled(model: nn.Module, path: str, module: nn.Module) -> nn.Module | None:
    """What a part only wraps; None if it does more."""
    if (peft := _peft()) is None:
        return None
    if (inside := _adapted(module)) is not None:
        return None if _asked_for(model, path, module) else inside
    if isinstance(module, peft.utils.other.ModulesToSaveWrapper) and not hooks(module):
        off = module.disable_adapters or not module.active_adapters
        whole: nn.Module = module.original_module if off else module.modules_to_save[module.active_adapters[0]]
        return whole
    return _idle(module) if stands_in(module) else None


def _idle(layer: Any) -> nn.Module | None:
    """The layer below a layer of peft's that runs nothing else; None if an adapter is at work."""
    if hooks(layer) or "base_layer" not in layer._modules or hasattr(layer, "unload_and_optionally_merge_module"):
        return None
    if layer.merged and layer.disable_adapters:
        return None  # at its next call it changes its weights
    held = {name for names in layer.adapter_layer_names for name in getattr(layer, names, {})}
    inside: nn.Module | None = layer.base_layer
    if not layer.merged and not layer.disable_adapters and not held.isdisjoint(layer.active_adapters):
        whole = getattr(layer, "ln_tuning_layers", {})  # which take the place of the layer itself
        inside = whole[layer.active_adapters[0]] if len(layer.active_adapters) == 1 == len(held & {*whole}) else None
    return inside


def _asked_for(model: nn.Module, path: str, wrapper: nn.Module) -> str:
    """What the code around an adapted model asks it for that is not asked of the model inside; "" if nothing."""
    own = {"base_model", "peft_config"}.union(
        *(vars(cls) for cls in type(wrapper).__mro__ if _is_pefts(written_in(cls)))
    )
    own -= {"forward", "generate"} | {name for name in own if name.startswith("__")}
    names = path.split(".")
    around = {type(model.get_submodule(".".join(names[:depth]))) for depth in range(len(names))}
    return next((name for cls in around for name in sorted(own & words(cls))), "")


def _is_pefts(module: str) -> bool:
    return module.partition(".")[0] == "peft"
