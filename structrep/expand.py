"""Training-time blocks in the place of a model's convolutions and Linears, and back.

model = structrep.expand(model, "repvgg")              # before training: computes what it did
...
model = structrep.reparameterize(model, norms="keep")  # after it: the modules, keys and shapes that there were
"""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from structrep import blocks, search
from structrep.algebra import ConvMap
from structrep.blocks.places import NormInBlock
from structrep.errors import BadInput
from structrep.pattern import Conv, Norm, Seq
from structrep.readers import hooks
from structrep.registry import Registry
from structrep.trace import demand_python, eval_copy, own_copy

log = logging.getLogger("structrep")

Where = str | type[nn.Module] | Callable[[str, nn.Module], bool]
# what wrappers that say how a module is run put into names, wherever they wrap
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
EXPANDED = "expanded"  # what marks a block that stands in the place of a layer

_CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _small(conv: Any) -> bool:
    return set(conv.kernel_size) == {3}


def _spatial(conv: Any) -> bool:
    return bool(max(conv.kernel_size) > 1)


def _large_depthwise(conv: Any) -> bool:
    return bool(min(conv.kernel_size) >= 7 and conv.groups == conv.in_channels > 1)


@dataclass(frozen=True)
class _Family:
    """Blocks by what they replace, and which convolutions the paper would replace."""

    of: dict[type[nn.Module], type[nn.Module]]
    chooses: Callable[[Any], bool] = _small
    options: tuple[tuple[str, Any], ...] = ()


def _dims(*kinds: type[nn.Module] | None) -> dict[type[nn.Module], type[nn.Module]]:
    return {conv: kind for conv, kind in zip(_CONVS, kinds, strict=True) if kind is not None}


def _any(layer: Any) -> bool:
    return True


FAMILIES = {
    "repvgg": _Family(_dims(blocks.RepVGGBlock1d, blocks.RepVGGBlock2d, blocks.RepVGGBlock3d)),
    "acb": _Family(_dims(None, blocks.ACBlock2d, None)),
    "dbb": _Family(_dims(blocks.DiverseBranchBlock1d, blocks.DiverseBranchBlock2d, blocks.DiverseBranchBlock3d)),
    "mobileone": _Family(_dims(blocks.MobileOneBlock1d, blocks.MobileOneBlock2d, blocks.MobileOneBlock3d)),
    "replknet": _Family(_dims(None, blocks.LargeKernelBlock2d, None), _large_depthwise),
    "diracnet": _Family(_dims(blocks.DiracConv1d, blocks.DiracConv2d, blocks.DiracConv3d)),
    "doconv": _Family(_dims(blocks.DOConv1d, blocks.DOConv2d, blocks.DOConv3d), _spatial),
    "expandnet": _Family(
        _dims(blocks.ExpandConv1d, blocks.ExpandConv2d, blocks.ExpandConv3d), _spatial, (("online", True),)
    ),
    "expandnet_linear": _Family({nn.Linear: blocks.ExpandLinear}, _any),
    "orepa": _Family(_dims(None, blocks.OREPA2d, None)),
    "conv3xc": _Family(_dims(None, blocks.Conv3XC2d, None)),
    "ecbsr": _Family(_dims(None, blocks.EdgeBlock2d, None)),
    "lora": _Family({nn.Linear: blocks.LoRALinear}, _any),
}


def expand(
    model: nn.Module,
    block: str = "repvgg",
    *,
    where: Where | Iterable[Where] | None = None,
    init: Literal["preserve", "paper"] = "preserve",
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """The model with training-time blocks in the place of chosen layers. Make the optimizer after that.

    `structrep.reparameterize(model, norms="keep")` gives the model back: its class, its module names, the keys and
    shapes of its state dict. Without `norms="keep"` it gives what it would have made of the model itself.

    Args:
        block: "repvgg", "acb", "dbb", "mobileone", "replknet", "diracnet",
            "doconv", "expandnet", "expandnet_linear", "orepa", "conv3xc", "ecbsr" or "lora".
        where: names, globs, types, or predicates of a name and a layer: all layers that any of them chooses and that
            the block can stand for; one that is named must be such a layer. By default what the paper would choose:
            3x3 convolutions but the first (depthwise ones of 7x7 and more for "replknet", all larger than 1x1 for
            "doconv" and "expandnet"), Linears for "lora" and "expandnet_linear".
        init: "preserve" starts the blocks so that the model computes what it did, up to rounding, trained weights and
            all; "paper" as the paper does.
        inplace: change the model itself instead of a copy.
        options: of the block: `branches=2` for "mobileone", `rate=2` for "expandnet", and so on.

    Logs, at level INFO to the logger "structrep", what was chosen.

    Raises:
        BadInput: there is no such block; nothing is chosen; a name is that of no layer, or of one that the block cannot
            stand for, with why.
        Uninitialized: the model is on the meta device, or a lazy parameter has no value yet.
    """
    if block not in FAMILIES:
        raise BadInput(f"no block is named {block!r}: there are {', '.join(FAMILIES)}")
    if init not in ("preserve", "paper"):
        raise BadInput(f"init={init!r}: give 'preserve' or 'paper'")
    family = FAMILIES[block]
    demand_python(model)
    layers, norms = dict(model.named_modules()), _norms_behind(model)
    made: dict[str, nn.Module] = {}
    for path in _chosen(model, family, block, where, norms):
        norm = layers[norms[path]] if path in norms else None
        try:
            made[path] = _block(layers[path], norm, family, init, options)
        except (TypeError, ValueError) as reason:
            if path in _asked(where):
                raise BadInput(f"{path} cannot become a {block} block: {reason}") from reason
    new = dict(made)
    for path, one in made.items():
        one.__dict__[EXPANDED] = True
        if path in norms and getattr(one, "own_norms", False):
            new[norms[path]] = NormInBlock(layers[norms[path]], norms[path], path, layers[path].bias is not None)
    if not made:
        raise BadInput(
            f"there is no layer in {type(model).__name__} that a {block} block can stand for"
            + ("" if where else ", of those that the paper would choose: name some, where=...")
        )
    whole = model if inplace else own_copy(model)
    _exchange(whole, new)
    kinds = len([one for one in layers.values() if type(one) in family.of])
    log.info("%s stands in the place of %d of %d layers: %s", block, len(made), kinds, ", ".join(made))
    return whole


def give_norms_back(deploy: nn.Module) -> None:
    """Put norms back where blocks took them in, in a model whose blocks are merged."""
    norms: dict[str, nn.Module] = {}
    convs = {plain_name(path): layer for path, layer in deploy.named_modules() if type(layer) in _CONVS}
    for path, place in deploy.named_modules():
        if isinstance(place, NormInBlock) and (block := place.block(plain_name(path))) in convs:
            norms[path] = place.norm_of(convs[block])
    _exchange(deploy, norms)


def plain_name(path: str) -> str:
    """A name without what wrappers around modules add to it."""
    for wrapper in WRAPPERS:
        path = path.replace(wrapper, "")
    return path


def forget_norms(deploy: nn.Module) -> None:
    """Leave nothing where blocks took norms in, of which the merged layers do the work."""
    places = [path for path, place in deploy.named_modules() if isinstance(place, NormInBlock)]
    _exchange(deploy, {path: nn.Identity() for path in places})


def expand_layers(model: nn.Module) -> list[str]:
    """The names of the blocks that `expand` has put into a model, or into parts of it."""
    return [path for path, module in model.named_modules() if EXPANDED in module.__dict__]


def _chosen(
    model: nn.Module, family: _Family, block: str, where: Where | Iterable[Where] | None, norms: dict[str, str]
) -> Iterator[str]:
    """The names of the layers to replace.

    Raises:
        BadInput: a name of `where` is none, or that of a layer that no block of the family stands for.
    """
    layers = [(path, layer) for path, layer in model.named_modules() if path]
    able = {path for path, layer in layers if type(layer) in family.of}
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    if where is None:
        first = next((path for path, layer in layers if type(layer) in _CONVS), "")
        needs_norm = any(getattr(kind, "own_norms", False) for kind in family.of.values())
        for path, layer in layers:
            takes = path in able and family.chooses(layer) and (path != first or type(layer) not in _CONVS)
            if takes and (path in norms or not needs_norm) and not _held_back(layer, held):
                yield path
        return
    wanted = _asked(where)
    for one in wanted:
        if isinstance(one, str) and not fnmatch.filter([path for path, _ in layers], one):
            raise BadInput(f"the model has no module named {one!r}")
    for path, layer in layers:
        named = path in wanted
        if not named and not any(_matches(one, path, layer) for one in wanted):
            continue
        reason = "" if path in able else f"it is a {type(layer).__name__}, in whose place no {block} block can stand"
        reason = reason or _held_back(layer, held)
        if named and reason:
            raise BadInput(f"{path} cannot become a {block} block: {reason}")
        if not reason:
            yield path


def _asked(where: Where | Iterable[Where] | None) -> list[Where]:
    if where is None:
        return []
    return [where] if isinstance(where, (str, type)) or callable(where) else list(where)


def _matches(one: Where, path: str, layer: nn.Module) -> bool:
    if isinstance(one, str):
        return fnmatch.fnmatchcase(path, one)
    return isinstance(layer, one) if isinstance(one, type) else bool(one(path, layer))


def _held_back(layer: nn.Module, held: Counter[int]) -> str:
    """Why a layer has to stay, if it has; `held` says how many modules hold a parameter."""
    if hooks(layer):
        return "it has a hook, which must go on seeing its own values"
    if any(held[id(parameter)] > 1 for parameter in layer.parameters()):
        return "another module holds its weight too"
    return ""


def _norms_behind(model: nn.Module) -> dict[str, str]:
    """For each convolution, the norm that is its alone, by names: what would merge with it and no other layer."""
    pair = Registry()
    pair.rule(Seq(Conv().named("conv"), Norm().named("norm")), source="a convolution and its norm")(_folded)
    pairs: dict[str, str] = {}
    for merge in search.find(eval_copy(model), None, pair).merges:
        called = [node for node in merge.nodes if node.op == "call_module"]
        kinds = [type(node.meta["call"].module) for node in called]
        if len(called) == len(merge.nodes) == 2 and kinds[0] in _CONVS and kinds[1] in _NORMS:
            pairs[str(called[0].target)] = str(called[1].target)
    return pairs


def _folded(conv: ConvMap, norm: ConvMap) -> ConvMap:
    return conv >> norm


def _block(layer: Any, norm: nn.Module | None, family: _Family, init: str, options: dict[str, Any]) -> nn.Module:
    """A block in the place of a layer.

    Raises:
        TypeError, ValueError: it has no such options, or cannot stand for that layer.
    """
    kind: Any = family.of[type(layer)]
    factory = {"device": layer.weight.device, "dtype": layer.weight.dtype, **dict(family.options), **options}
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        made = kind(layer.in_features, layer.out_features, bias, **factory)
    else:
        made = kind(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, bias, layer.padding_mode, **factory,
        )  # fmt: skip
    if getattr(kind, "own_norms", False) and norm is None:
        raise ValueError("its branches have norms, and no batch norm that is its alone stands behind it")
    if isinstance(made, blocks.EdgeBlock2d) and not bias:
        raise ValueError("an edge block has biases, and this convolution has none to become of them")
    if init == "preserve":
        made.start_as(layer.weight, layer.bias, norm)
    if isinstance(norm, nn.SyncBatchNorm):
        made = nn.SyncBatchNorm.convert_sync_batchnorm(made, norm.process_group)
    made.train(layer.training)
    made.requires_grad_(layer.weight.requires_grad)
    return made  # type: ignore[no-any-return]


def _exchange(model: nn.Module, new: dict[str, nn.Module]) -> None:
    """Put other modules into all places of those at some paths."""
    exchanged = {model.get_submodule(path): module for path, module in new.items()}
    for parent in list(model.modules()) if exchanged else ():
        for name, child in parent._modules.items():
            if child in exchanged:
                parent._modules[name] = exchanged[child]
