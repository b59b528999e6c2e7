"""Training-time blocks in the place of a model's convolutions and Linears, and back.

model = structrep.expand(model, "repvgg")              # before training: computes what it did
...
model = structrep.reparameterize(model, norms="keep")  # after it: the modules, keys and shapes that there were
"""

from __future__ import annotations

import fnmatch
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from structrep import blocks
from structrep.algebra import ConvMap
from structrep.blocks.places import CONVOLUTIONS, EXPANDED, NormInBlock, expand_layers
from structrep.errors import BadInput, listed
from structrep.graph.facts import CALL
from structrep.guard.ready import check_ready
from structrep.match.find import find
from structrep.modules.copies import demand_python, eval_copy, own_copy
from structrep.modules.parametrized import computed, hooks
from structrep.pattern import Conv, Norm, Seq
from structrep.registry import Registry
from structrep.rewrite.norms import exchange
from structrep.train.norms import is_plain, runs_parts_alone, runs_parts_in_turn, why_not

log = logging.getLogger("structrep")
Where = str | type[nn.Module] | Callable[[str, nn.Module], bool]


def _small(conv: Any) -> str:
    """Why the papers would not choose a convolution; "" if they would. So do those below."""
    return "" if set(conv.kernel_size) == {3} else "it is not 3x3"


def _small_or_pointwise(conv: Any) -> str:
    return "" if set(conv.kernel_size) in ({1}, {3}) else "it is neither 3x3 nor pointwise"


def _spatial(conv: Any) -> str:
    return "" if max(conv.kernel_size) > 1 else "it is pointwise"


def _large_depthwise(conv: Any) -> str:
    depthwise = conv.groups == conv.in_channels > 1
    return "" if depthwise and min(conv.kernel_size) >= 7 else "it is not depthwise and 7x7 or larger"


def _pointwise(conv: Any) -> str:
    return "" if set(conv.kernel_size) == {1} else "it is not pointwise"


def _ungrouped(conv: Any) -> str:
    return "" if conv.groups == 1 else "it has groups"


def _any(layer: Any) -> str:
    return ""


@dataclass(frozen=True)
class _Family:
    """Blocks by what they replace, and which convolutions the paper would replace."""

    of: dict[type[nn.Module], type[nn.Module]]
    spares: Callable[[Any], str] = _small
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def known_options(self) -> list[str]:
        (one, *_) = self.of.values()
        parameters = inspect.signature(one).parameters.values()
        return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]

    @property
    def own_norms(self) -> bool:
        return any(getattr(kind, "own_norms", False) for kind in self.of.values())


def _dims(*kinds: type[nn.Module] | None) -> dict[type[nn.Module], type[nn.Module]]:
    return {conv: kind for conv, kind in zip(CONVOLUTIONS, kinds, strict=True) if kind is not None}


FAMILIES = {
    "repvgg": _Family(_dims(blocks.RepVGGBlock1d, blocks.RepVGGBlock2d, blocks.RepVGGBlock3d)),
    "acb": _Family(_dims(None, blocks.ACBlock2d, None)),
    "dbb": _Family(_dims(blocks.DiverseBranchBlock1d, blocks.DiverseBranchBlock2d, blocks.DiverseBranchBlock3d)),
    "mobileone": _Family(
        _dims(blocks.MobileOneBlock1d, blocks.MobileOneBlock2d, blocks.MobileOneBlock3d), _small_or_pointwise
    ),
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
    "edbb": _Family(_dims(None, blocks.EdgeBlock2d, None), options=(("point", True),)),
    "rrrb": _Family(_dims(None, blocks.ResidualRepBlock2d, None)),
    "deconv": _Family(_dims(None, blocks.DEConv2d, None)),
    "csla": _Family(_dims(blocks.CSLABlock1d, blocks.CSLABlock2d, blocks.CSLABlock3d)),
    "resrep": _Family(_dims(blocks.CompactorBlock1d, blocks.CompactorBlock2d, blocks.CompactorBlock3d), _ungrouped),
    "yolor": _Family(_dims(None, blocks.ImplicitConv2d, None), _pointwise),
    "lora": _Family({nn.Linear: blocks.LoRALinear}, _any),
    "conv_lora": _Family(_dims(None, blocks.LoRAConv2d, None), _spatial),
    "repadapter": _Family({nn.Linear: blocks.RepAdapterLinear}, _any),
}


def expand(
    model: nn.Module,
    block: str = "repvgg",
    *,
    where: Where | Iterable[Where] | None = None,
    init: Literal["preserve", "paper"] = "preserve",
    inplace: bool = False,
    again: bool = False,
    **options: Any,
) -> nn.Module:
    """The model with training-time blocks in the place of chosen layers. Make the optimizer after that.

    `structrep.reparameterize(model, norms="keep")` gives the model back: its class, its module names, the keys and
    shapes of its state dict. Without `norms="keep"` it gives what it would have made of the model itself.

    Example:
        >>> to_train = structrep.expand(model, "mobileone", where="layer1.*")

    Args:
        block: "repvgg", "acb", "dbb", "mobileone", "replknet", "diracnet", "doconv", "expandnet",
            "expandnet_linear", "orepa", "conv3xc", "ecbsr", "edbb", "rrrb", "deconv", "csla", "resrep", "yolor",
            "lora", "conv_lora" or "repadapter".
        where: names, globs, types, or predicates of a name and a layer: all layers that any of them chooses and that
            the block can stand for; one that is named must be such a layer. By default what the paper would choose:
            3x3 convolutions but the first (pointwise ones too for "mobileone", depthwise ones of 7x7 and more for
            "replknet", all larger than 1x1 for "doconv", "expandnet" and "conv_lora", pointwise ones for "yolor", all
            without groups for "resrep"), Linears for "lora", "repadapter" and "expandnet_linear".
            What a norm does besides, as the activation of timm's norms, stays where the norm was.
        init: "preserve" starts the blocks so that the model computes what it did, up to rounding, trained weights and
            all; "paper" as the paper does.
        inplace: change the model itself instead of a copy.
        again: whether layers inside the blocks of an earlier `expand` may be chosen too.
        options: of the block: `online` for "repvgg", `branches` and `online` for "mobileone", `branches` for
            "replknet", `D_mul` for "doconv", `rate`, `mode` and `online` for "expandnet", `rate` for
            "expandnet_linear", `gain` for "conv3xc", `depth` and `point` for "ecbsr" and "edbb", `ratio` for "rrrb",
            `rank` and `alpha` for "lora" and "conv_lora", `rank`, `groups` and `scale` for "repadapter". Its class says
            what they are.

    Logs, at level INFO to the logger "structrep", what was chosen, and of norms that do more than normalize, as timm's
    do, how they are made those of several processes.

    Raises:
        BadInput: there is no such block, or option of it; nothing is chosen, with why; a name is that of no layer, or
            of one that the block cannot stand for; what is chosen is in a block already.
        Uninitialized: the model is on the meta device, or a lazy parameter has no value yet.
    """
    if block not in FAMILIES:
        raise BadInput(f"no block is named {block!r}: there are {', '.join(FAMILIES)}")
    if init not in ("preserve", "paper"):
        raise BadInput(f"init={init!r}: give 'preserve' or 'paper'")
    family = FAMILIES[block]
    demand_python(model)
    if unknown := [name for name in options if name not in family.known_options]:
        there = f"there is {', '.join(family.known_options)}" if family.known_options else "it has none"
        raise BadInput(f"{block} blocks have no option {unknown[0]!r}: {there}")
    layers, norms, blocks_there = dict(model.named_modules()), _norms_behind(model), expand_layers(model)
    made: dict[str, nn.Module] = {}
    spared: Counter[str] = Counter()
    for path, reason in _considered(model, family, block, where, norms):
        if not reason and not again and path.startswith(tuple(f"{there}." for there in blocks_there)):
            raise BadInput(f"{path} is in a block: {_expanded(model, blocks_there)}")
        norm = layers[norms[path]] if path in norms else None
        try:
            if not reason:
                made[path] = _block(layers[path], norm, family, init, options)
        except (TypeError, ValueError) as error:
            reason = str(error)
        if reason and path in _asked(where):
            there = f": {_expanded(model, blocks_there)}" if path in blocks_there else ""
            raise BadInput(f"{path} cannot become a {block} block: {reason}{there}")
        spared[reason] += bool(reason)
    for one in made.values():
        one.__dict__[EXPANDED] = True
    kinds = len([one for one in layers.values() if type(one) in family.of])
    if not made:
        raise BadInput(
            f"there is no layer in {type(model).__name__} that a {block} block can stand for"
            + ("" if where else ", of those that the paper would choose: name some, where=...")
            + "".join(f"\n  {count} of {spared.total()}: {reason}" for reason, count in spared.most_common() if reason)
            + ("" if kinds else f"\n  it has no {' or '.join(kind.__name__ for kind in family.of)}")
            + (f"\n  {_expanded(model, blocks_there)}" if blocks_there and not again else "")
        )
    whole = model if inplace else own_copy(model)
    new = dict(made)
    for path in made.keys() & norms.keys():
        if getattr(made[path], "own_norms", False):
            norm = whole.get_submodule(norms[path])
            new[norms[path]] = NormInBlock(norm, norms[path], path, layers[path].bias is not None)
    exchange(whole, new)
    log.info("%s stands in the place of %d of %d layers: %s", block, len(made), kinds, ", ".join(made))
    if more := _more_than_norms(model):
        log.info(
            "%s do more than normalize, which nn.SyncBatchNorm.convert_sync_batchnorm would drop: on several processes "
            "use that of timm.layers, for timm's",
            more,
        )
    return whole


def _expanded(model: nn.Module, there: list[str]) -> str:
    return (
        f"{type(model).__name__} is expanded already, {listed(there)}: expand a new one, name other layers, where=..., "
        f"or say again=True to have blocks in blocks"
    )


def _more_than_norms(model: nn.Module) -> str:
    """The classes of batch norms with a forward of their own, and how many there are of each."""
    norms = (one for one in model.modules() if isinstance(one, _BatchNorm) and not isinstance(one, nn.SyncBatchNorm))
    own = Counter(type(one).__name__ for one in norms if type(one).forward is not _BatchNorm.forward)
    return ", ".join(f"{count} {name}" for name, count in own.items())


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer]) -> None:
    """Raise if an optimizer would not train the blocks of `expand`: as one that was made before them.

    The callbacks of `structrep.integrations` call it when training starts.

    Examples:
        >>> model = structrep.expand(model, "repvgg")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> structrep.check_optimizer(model, optimizer)

    Args:
        model: expanded or not; parameters that need no gradient are not asked for.
        optimizer: one, or all that train the model together.

    Raises:
        BadInput: none of the model's parameters is in it, or not all of those of the blocks are, with how many; what
            is given is no optimizer.
    """
    optimizers = [optimizer] if hasattr(optimizer, "param_groups") or not isinstance(optimizer, Iterable) else optimizer
    optimizers = list(optimizers)
    if strange := [type(each).__name__ for each in optimizers if not hasattr(each, "param_groups")]:
        raise BadInput(f"{strange[0]} is no optimizer, it has no param_groups: give the optimizer itself, or several")
    held = {id(one) for each in optimizers for group in each.param_groups for one in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    blocks_there = tuple(f"{path}." for path in expand_layers(model))
    of_blocks = [name for name in trained if name.startswith(blocks_there)]
    lost = [name for name in of_blocks if name in missing]
    remedy = "make it of model.parameters() after structrep.expand"
    if trained and len(missing) == len(trained):
        raise BadInput(f"the optimizer has none of the {len(trained)} parameters of {type(model).__name__}: {remedy}")
    if lost:
        raise BadInput(
            f"the optimizer has {len(of_blocks) - len(lost)} of the {len(of_blocks)} parameters of the blocks in "
            f"{type(model).__name__}, not {listed(lost)}: {remedy}, or say requires_grad_(False) of what is not trained"
        )


def _considered(
    model: nn.Module, family: _Family, block: str, where: Where | Iterable[Where] | None, norms: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """The names of the layers that may be replaced, each with why it is not to be, or "".

    Raises:
        BadInput: a name of `where` is none, or that of a layer that no block of the family stands for.
    """
    layers = [(path, layer) for path, layer in model.named_modules() if path]
    able = {path for path, layer in layers if type(layer) in family.of}
    without_norm = _without_norm(model, family, norms)
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    if where is None:
        first = next((path for path, layer in layers if type(layer) in CONVOLUTIONS), "")
        for path, layer in layers:
            if path in able:
                reason = "it is the first convolution" if path == first else family.spares(layer)
                yield path, reason or ("" if path in norms else without_norm) or _held_back(layer, held)
        return
    wanted = _asked(where)
    for one in wanted:
        if isinstance(one, str) and not fnmatch.filter([path for path, _ in layers], one):
            raise BadInput(f"the model has no module named {one!r}")
    for path, layer in layers:
        if path in wanted or (path in able and any(_matches(one, path, layer) for one in wanted)):
            other = "" if path in able else f"it is a {type(layer).__name__}, in whose place no {block} block can stand"
            yield path, other or _held_back(layer, held) or ("" if path in norms else without_norm)


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
    if names := computed(layer):
        return f"its {' and '.join(names)} is computed before every call"
    if any(held[id(parameter)] > 1 for parameter in layer.parameters()):
        return "another module holds its weight too"
    return ""


def _without_norm(model: nn.Module, family: _Family, norms: dict[str, str]) -> str:
    """Why a layer has to stay that has no norm behind it, if the family's branches have norms."""
    if not family.own_norms:
        return ""
    taken = set(norms.values())
    left = ((path, one) for path, one in model.named_modules() if isinstance(one, _BatchNorm) and path not in taken)
    others = {type(one): one for _, one in left if not is_plain(one)}
    but = f": {', '.join(map(why_not, others.values()))}" if others else ""
    return f"its branches have norms, and no batch norm that is its alone stands behind it{but}"


def _norms_behind(model: nn.Module) -> dict[str, str]:
    """For each convolution, the norm that is its alone, by names: what would merge with it and no other layer."""
    pair = Registry()
    pair.rule(Seq(Conv().named("conv"), Norm().named("norm")), source="a convolution and its norm")(_folded)
    pairs: dict[str, str] = {}
    ready = eval_copy(model)
    check_ready(ready)
    found = find(ready, None, pair)
    asked = found.traced.introspections.keys() | {path.rpartition(".")[0] for path in found.traced.reached}
    for merge in found.merges:
        conv, *others = (CALL.of(node) for node in merge.nodes)
        if len(others) != 1 or type(conv.module) not in CONVOLUTIONS:
            continue
        norm = others[0].module
        if not isinstance(norm, _BatchNorm) or others[0].path in asked:  # by code that goes on asking
            continue
        if is_plain(norm) or (runs_parts_alone(others[0]) and runs_parts_in_turn(norm)):
            pairs[conv.path] = others[0].path
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
    if isinstance(made, (blocks.EdgeBlock2d, blocks.ResidualRepBlock2d)) and not bias:
        raise ValueError("its block has biases, and this convolution has none to become of them")
    if init == "preserve":
        made.start_as(layer.weight, layer.bias, norm)
    if isinstance(norm, nn.SyncBatchNorm):
        made = nn.SyncBatchNorm.convert_sync_batchnorm(made, norm.process_group)
    made.train(layer.training)
    made.requires_grad_(layer.weight.requires_grad)
    return made  # type: ignore[no-any-return]
