"""What stands where a batch norm stood that a block has taken in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class NormInBlock(nn.Identity):
    """Stands where a norm was that is in a block now; knows what to put there again when the block is one conv.

    Args:
        norm: the norm that was there.
        at: its name.
        of: the name of the conv that it stood behind, where the block is.
        bias: whether that conv had a bias.
    """

    def __init__(self, norm: nn.Module, at: str, of: str, bias: bool) -> None:
        super().__init__()
        known: Any = norm
        self.kind: type[nn.Module] = type(norm)
        self.features, self.eps, self.momentum = known.num_features, known.eps, known.momentum
        self.affine, self.at, self.of, self.bias = known.affine, at, of, bias
        self.process_group = getattr(norm, "process_group", None)  # of a SyncBatchNorm

    def block(self, path: str) -> str:
        """The name of the block, in a model that may hold what was expanded as a part; `path` is the norm's there."""
        return path.removesuffix(self.at) + self.of

    def norm_of(self, conv: nn.Module) -> nn.Module:
        """The norm that does what the conv's bias does, which it takes from it; the conv keeps one, of zeros, if it had
        one before."""
        layer: Any = conv
        weight, shift = layer.weight, layer.bias
        made: Any = self.kind(self.features, self.eps, self.momentum, self.affine)
        made = made.to(weight.device, weight.dtype).train(layer.training)
        if self.process_group is not None:
            made.process_group = self.process_group
        with torch.no_grad():
            made.running_var.fill_(1 - self.eps)  # then the scale is 1
            if shift is not None:
                made.bias.copy_(shift) if self.affine else made.running_mean.copy_(-shift)
        for parameter in made.parameters():
            parameter.requires_grad_(weight.requires_grad)
        layer.bias = nn.Parameter(torch.zeros_like(made.running_mean), weight.requires_grad) if self.bias else None
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
