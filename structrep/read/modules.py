"""What modules do, by their class."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from structrep.algebra import Border, ConvMap, precision
from structrep.deployed.layers import Shift
from structrep.errors import InvalidReader, Unreadable
from structrep.modules.source import written_in
from structrep.modules.wrappers import stands_in
from structrep.terms.layer import Formula, Layer
from structrep.terms.layers import (
    conv_layer,
    conv_transpose_layer,
    diagonal_layer,
    kernel_layer,
    linear_layer,
    norm_layer,
    pad_layer,
    scale_layer,
    table_layer,
)

_MODULES: dict[type[nn.Module], Callable[[Any], Layer | None]] = {}
PROBED = "structrep_probed"  # where a traced module keeps the map that it was found to be
IDENTITIES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


def _reads(*types: type[nn.Module]) -> Callable[[Callable[[Any], Layer | None]], Callable[[Any], Layer | None]]:
    def register(reader: Callable[[Any], Layer | None]) -> Callable[[Any], Layer | None]:
        for type_ in types:
            _MODULES[type_] = reader
        return reader

    return register


def _reader(module: nn.Module) -> Callable[[Any], Layer | None] | None:
    """The reader written for the forward that this module really runs."""
    if PROBED in module.__dict__:
        return _read_probed
    if "forward" in module.__dict__:
        return None
    for base in type(module).__mro__:
        if base in _MODULES or base in IDENTITIES:
            runs_it = all(
                getattr(type(module), name, None) is getattr(base, name, None)
                for name in ("forward", "_conv_forward", "__call__")
            )
            return _MODULES.get(base, lambda _: None) if runs_it else None
    return None


def _read_probed(module: nn.Module) -> Layer:
    layer = replace(map_layer(module, module.__dict__[PROBED]), probed=True)
    if not stands_in(module):
        return layer
    # what peft's layers compute of their adapters they compute at every call
    return replace(layer, formula=Formula(frozenset({"adapters"}), tuple(module.parameters())))


def reader(*types: type[nn.Module]) -> Callable[[Callable[[Any], ConvMap]], Callable[[Any], ConvMap]]:
    """Decorator: a function that says which map a layer of these types is.

    The layer's code is not looked at any more: the tracer keeps it whole. A subclass with a forward of its own is not
    read so.

    Examples:
        >>> @structrep.reader(MyConv)
        ... def my_conv(layer):
        ...     return ConvMap(layer.weight * layer.gain, layer.bias, pad=layer.padding)

    Raises:
        InvalidReader: there are no types, something is no module type, or a type is read already.
    """
    for type_ in types:
        if not (isinstance(type_, type) and issubclass(type_, nn.Module)):  # type: ignore[redundant-expr]
            raise InvalidReader(f"{type_!r} is no module type: give classes, as in @structrep.reader(MyConv)")
        if type_ in _MODULES or type_ in IDENTITIES:
            raise InvalidReader(f"{written_in(type_)}.{type_.__qualname__} is read already: one type, one reader")
    if not types:
        raise InvalidReader("a reader of nothing: give the module types that it reads, @structrep.reader(MyConv)")

    def register(read: Callable[[Any], ConvMap]) -> Callable[[Any], ConvMap]:
        _reads(*types)(lambda module: map_layer(module, read))
        return read

    return register


def map_layer(module: nn.Module, read: Callable[[Any], ConvMap] | ConvMap) -> Layer:
    """A layer that is a given map, or one that a function makes of it.

    Raises:
        Unreadable: the function gave something else.
    """

    def found() -> ConvMap:
        map_ = read if isinstance(read, ConvMap) else read(_doubled(module))
        if not isinstance(map_, ConvMap):
            raise Unreadable(f"the reader of {type(module).__name__} gave a {type(map_).__name__}, not a ConvMap")
        return map_

    map_ = found()
    g = map_.geometry
    stored = sum(p.numel() for p in module.parameters())
    if g.diagonal:
        return diagonal_layer("affine", lambda c, d: found(), g.in_channels, g.dims, stored)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    weight = map_.kernel.to(like.device, like.dtype)
    layer = kernel_layer("conv" if g.dims else "linear", g, lambda c, d: found(), weight, map_.bias)
    return replace(layer, parameters=stored)


def _doubled(module: nn.Module) -> nn.Module:
    """A copy of a layer in float64, in which what is computed of its numbers is the truth that merges are proved by."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return copy.deepcopy(module).to(precision.exact(like.device), torch.float64)


def knows(module: nn.Module) -> bool:
    """Whether a module is read as a whole."""
    return _reader(module) is not None


def settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a layer: its mode, sizes, eps."""
    return {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, str))}


def generated(module: nn.Module) -> bool:
    """Whether a module's forward was written by an earlier `reparameterize`."""
    return hasattr(type(module), "__structrep_methods__")


def read_module(module: nn.Module) -> Layer | None:
    """A module as a map; None if it is none.

    Raises:
        Unreadable: a norm that has no fixed scale.
    """
    reader = _reader(module)
    return reader(module) if reader else None


@_reads(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _(conv: nn.Conv2d) -> Layer:
    border: Border = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return conv_layer(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, border)


@_reads(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _(conv: nn.ConvTranspose2d) -> Layer:
    return conv_transpose_layer(
        conv.weight, conv.bias, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
    )


@_reads(nn.Linear)
def _(linear: nn.Linear) -> Layer:
    return linear_layer(linear.weight, linear.bias)


@_reads(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def _(norm: nn.BatchNorm2d) -> Layer:
    dims = next((d for d, type_ in ((2, nn.BatchNorm2d), (3, nn.BatchNorm3d)) if isinstance(norm, type_)), None)
    return norm_layer(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, norm.training, dims)


@_reads(nn.Embedding)
def _(table: nn.Embedding) -> Layer | None:
    return table_layer(table.weight) if table.max_norm is None else None  # rows are scaled as they are looked up


POOLS: dict[type[nn.Module], int] = {
    nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3,
    nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3,
}  # fmt: skip


@_reads(*POOLS)
def _(pool: nn.Module) -> None:
    return None  # what it is may depend on its input's size: see `_read_pool`


@_reads(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def _(pad: nn.ConstantPad2d) -> Layer:
    return pad_layer(pad.padding, "constant", pad.value)


@_reads(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
def _(pad: nn.ReflectionPad2d) -> Layer:
    return pad_layer(pad.padding, "reflect")


@_reads(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)
def _(pad: nn.ReplicationPad2d) -> Layer:
    return pad_layer(pad.padding, "replicate")


@_reads(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
def _(pad: nn.CircularPad2d) -> Layer:
    return pad_layer(pad.padding, "circular")


@_reads(nn.LeakyReLU)
def _(curve: nn.LeakyReLU) -> Layer | None:
    return scale_layer(1.0) if curve.negative_slope == 1 else None  # VanillaNet's, at the end of its training


@_reads(nn.PReLU)
def _(curve: nn.PReLU) -> Layer | None:
    return scale_layer(1.0) if bool((curve.weight == 1).all()) else None


@_reads(Shift)
def _(shift: Shift) -> Layer | None:
    return scale_layer(1.0, shift.get_buffer("shift"))


def padding_of(map_: ConvMap) -> tuple[int, ...] | str | None:
    """What a convolution's `padding` says of a map's pads; None if no convolution pads so."""
    g = map_.geometry
    if bool(map_.fill.any()):
        return None
    if g.transposed:
        fits = all(
            lo >= 0 <= lo - hi < max(step, dilation)
            for (lo, hi), step, dilation in zip(g.pad, g.stride, g.dilation, strict=True)
        )
        return tuple(lo for lo, _ in g.pad) if fits else None
    if all(lo == hi >= 0 for lo, hi in g.pad):
        return tuple(lo for lo, _ in g.pad)
    same = tuple((r // 2, r - r // 2) for r in g.reach)
    return "same" if g.pad == same and set(g.stride) == {1} else None
