"""Models that can be converted at all."""

from __future__ import annotations

from torch import nn

from structrep.errors import BadInput, Sharded, TrainingMode, Uninitialized


def check_ready(model: nn.Module) -> None:
    """Raise unless norms have fixed statistics and all parameters have values, here.

    Raises:
        BadInput: a module is its own descendant.
        TrainingMode, Uninitialized, Sharded: norms or parameters are not ready.
    """
    try:
        _check_tree(model, "", ())
        list(model.modules())
    except TypeError as error:
        raise BadInput(
            f"the parts of {type(model).__name__} cannot be told apart ({error}): torch's own modules() does not run "
            f"either. A class that has an __eq__ needs a __hash__ too: __hash__ = nn.Module.__hash__"
        ) from error
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
            raise TrainingMode(
                f"{path or 'the model'} ({type(module).__name__}) is in training mode, so it has no fixed scale: "
                f"call model.eval() first{_counted(path, module)}"
            )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and hasattr(tensor, "full_tensor"):
                raise Sharded(
                    f"{path + '.' if path else ''}{name} is a {type(tensor).__name__} of shape {tuple(tensor.shape)}, "
                    f"spread over processes: load the full state dict into an unsharded model, and reparameterize that"
                )
            if tensor is not None and tensor.is_meta:
                raise Uninitialized(
                    f"{path + '.' if path else ''}{name} of {type(module).__name__} is on the meta device, which holds "
                    f"no values: load the weights first"
                )
            if tensor is not None and nn.parameter.is_lazy(tensor):
                raise Uninitialized(
                    f"{path + '.' if path else ''}{name} of {type(module).__name__} has no shape yet: "
                    f"run the model once on a batch, then try again"
                )


def _counted(path: str, norm: nn.Module) -> str:
    """What the counter of a norm in training mode says of its statistics."""
    count = norm._buffers.get("num_batches_tracked")
    if count is None or count.is_meta or hasattr(count, "full_tensor") or not int(count):
        return ""
    return (
        f". Every forward in this mode changes the statistics, and {path + '.' if path else ''}num_batches_tracked has "
        f"counted {int(count):,}: if these were not all of its training (a converted model counts from 0), load or "
        f"convert the weights anew"
    )


def _check_tree(module: nn.Module, path: str, around: tuple[nn.Module, ...]) -> None:
    if module in around:
        raise BadInput(
            f"{path} is a module that holds it, so the model has no end, and torch's own eval(), to() and state_dict() "
            f"do not return: keep such a reference out of the modules, self.__dict__['{path.rpartition('.')[2]}'] = ..."
        )
    for name, child in module._modules.items():
        if child is not None and (child in around or child._modules):
            _check_tree(child, f"{path}.{name}" if path else name, (*around, module))
