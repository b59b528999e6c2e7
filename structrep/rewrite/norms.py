"""Norms of each value without their weight and bias, and norms that blocks have taken in."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Iterator

from torch import nn

from structrep.blocks.places import CONVOLUTIONS, NormInBlock, plain_name
from structrep.modules.parametrized import computed, settle


def end(norm: nn.Module) -> None:
    """Take from a norm of each value its weight and bias."""
    with shown_still(norm):
        names = computed(norm)
        settle(norm)
        norm._parameters |= dict.fromkeys((*norm._parameters, *names))
        vars(norm).update(dict.fromkeys(vars(norm).keys() & {"affine", "elementwise_affine"}, False))


@contextlib.contextmanager
def shown_still(module: nn.Module) -> Iterator[None]:
    """Take tensors from a module whose text may be about them, as that of transformers' LlamaRMSNorm."""
    shown = module.extra_repr()
    yield
    try:
        module.extra_repr()
    except Exception:  # asked None for its shape
        vars(module)["extra_repr"] = functools.partial(str, shown)


def give_norms_back(deploy: nn.Module) -> None:
    """Put norms back where blocks took them in, in a model whose blocks are merged."""
    norms: dict[str, nn.Module] = {}
    convs = {plain_name(path): layer for path, layer in deploy.named_modules() if type(layer) in CONVOLUTIONS}
    for path, place in deploy.named_modules():
        if isinstance(place, NormInBlock) and (block := place.block(plain_name(path))) in convs:
            norms[path] = place.norm_of(convs[block])
    exchange(deploy, norms)


def forget_norms(deploy: nn.Module) -> None:
    """Leave nothing but their parts where blocks took norms in, of which the merged layers do the work."""
    places = {path: place for path, place in deploy.named_modules() if isinstance(place, NormInBlock)}
    parts = {path: OrderedDict(place.named_children()) for path, place in places.items()}
    exchange(deploy, {path: nn.Sequential(parts[path]) if parts[path] else nn.Identity() for path in places})


def exchange(model: nn.Module, new: dict[str, nn.Module]) -> None:
    """Put other modules into all places of those at some paths."""
    exchanged = {model.get_submodule(path): module for path, module in new.items()}
    for parent in list(model.modules()) if exchanged else ():
        for name, child in parent._modules.items():
            if child in exchanged:
                parent._modules[name] = exchanged[child]
