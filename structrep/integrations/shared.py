"""What the callbacks of all trainers do: the deploy model of a module that goes on training."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from structrep.blocks.places import expand_layers
from structrep.convert.calls import plan
from structrep.errors import BadInput
from structrep.modules.copies import own_copy


def trained_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode: what a trained module computes, apart from the module.

    Raises:
        BadInput: the module holds something that cannot be copied.
    """
    twin = own_copy(module)
    twin.eval()  # not every class's gives the module back
    return twin


def merge(trained: nn.Module, norms: Literal["keep", "fold"] = "keep", **options: Any) -> None:
    """Merge a module in eval mode in place, as `structrep.reparameterize` does, or say why it stays as it is.

    Args:
        norms, options: as for `structrep.plan`.

    Raises:
        BadInput: nothing would be merged.
        Unmerged: with norms="keep", some block would not be.
        TrainingMode, Uninitialized, Sharded, UnknownRule: as for `structrep.plan`.
    """
    name = type(trained).__name__
    if norms == "keep" and not expand_layers(trained):
        raise BadInput(
            f"norms='keep' merges blocks of structrep.expand, and {name} has none: put them in before the optimizer is "
            "made, model = structrep.expand(model, 'repvgg')"
        )
    planned = plan(trained, norms=norms, **options).proved()
    if norms == "fold" and not planned.merges:
        raise BadInput(planned.record.nothing)
    planned.reparameterize(inplace=True)
