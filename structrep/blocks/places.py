"""What stands where a batch norm stood that a block has taken in."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn


class NormInBlock(nn.Sequential):
    """Stands where a norm was that is in a block now, and runs what that norm had as parts, its activation; knows what
    to put there again when the block is one conv.

    Args:
        norm: the norm that was there, which computes what a plain one does and then its parts in turn.
        at: its name.
        of: the name of the conv that it stood behind, where the block is.
        bias: whether that conv had a bias.
    """

    def __init__(self, norm: nn.Module, at: str, of: str, bias: bool) -> None:
        super().__init__(OrderedDict(norm.named_children()))
        known: Any = norm
        self.kind: type[nn.Module] = type(norm)
        held = ("_parameters", "_buffers", "_modules")
        self.settings = {name: value for name, value in vars(norm).items() if name not in held}
        self.features, self.eps, self.affine = known.num_features, known.eps, known.affine
        self.at, self.of, self.bias = at, of, bias
        self.process_group = getattr(norm, "process_group", None)  # of a SyncBatchNorm

    def block(self, path: str) -> str:
        """The name of the block, in a model that may hold what was expanded as a part; `path` is the norm's there."""
        return path.removesuffix(self.at) + self.of

    def norm_of(self, conv: nn.Module) -> nn.Module:
        """The norm that does what the conv's bias does, which it takes from it; the conv keeps one, of zeros, if it had
        one before."""
        layer: Any = conv
        trained = layer.weight.requires_grad
        zeros = layer.weight.new_zeros(self.features)
        shift = zeros if layer.bias is None else layer.bias.detach()
        variance = zeros + (1 - self.eps)  # then the scale is 1
        made: Any = self.kind.__new__(self.kind)
        hooks = {name: value.copy() for name, value in self.settings.items() if isinstance(value, dict)}
        vars(made).update({**self.settings, **hooks})
        affine = {"weight": zeros + 1, "bias": shift.clone()} if self.affine else {}
        made._parameters = {"weight": None, "bias": None}
        made._parameters |= {name: nn.Parameter(value, trained) for name, value in affine.items()}
        made._buffers = {
            "running_mean": zeros.clone() if self.affine else -shift,
            "running_var": variance,
            "num_batches_tracked": torch.zeros((), dtype=torch.long, device=zeros.device),
        }
        made._modules = dict(self._modules)
        made.training = layer.training
        layer.bias = nn.Parameter(zeros.clone(), trained) if self.bias else None
        return made  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.kind.__name__}({self.features}) of {self.of}"


# what wrappers that say how a module is run put into names, wherever they wrap
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
EXPANDED = "expanded"  # what marks a block that stands in the place of a layer
CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def plain_name(path: str) -> str:
    """A name without what wrappers around modules add to it."""
    for wrapper in WRAPPERS:
        path = path.replace(wrapper, "")
    return path


def expand_layers(model: nn.Module) -> list[str]:
    """The names of the blocks that `structrep.expand` has put into a model, or into parts of it, as and in the order in
    which `named_modules()` has them; [] if there are none."""
    return [path for path, module in model.named_modules() if EXPANDED in module.__dict__]
