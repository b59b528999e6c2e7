"""The idea of the project: affine maps that commute with translation, closed under sum and composition.

A convolution, a batch norm, a skip, an average pool, a channel scale, a Linear are all one kind of thing, a `ConvMap`:

    y[o, p] = bias[o] + sum_{i, t} kernel[o, i, t] * x[i, stride * p + dilation * t - lo]

where t goes over the taps and p over the output pixels of each dim, lo is the padding in front (hi that behind), and x
reads its `border` outside: a constant `fill` (0 unless said), or reflect, replicate, circular. A transposed
convolution is the adjoint, of the same coefficients: input pixel p adds kernel[o, i, t] * x[i, p] to output pixel
stride * p + dilation * t - lo. A training-time block is an expression over such maps and its deploy-time convolution
is the value:

    f + g            both on the same input, outputs added
    f >> g           g after f
    f * s            outputs scaled, by a number or per channel
    concat([f, g])   both on the same input, outputs stacked on the channels
    f.distance(g)    largest difference of coefficients

So a 3x3 and a 1x1 beside it are one 3x3:

    >>> ConvMap(torch.randn(4, 3, 3, 3), pad=1) + ConvMap(torch.randn(4, 3, 1, 1))
    ConvMap(3 -> 4, 3x3, pad ((1, 1), (1, 1)))

Everything is float64 and exact up to rounding, or raises a `Refusal` that says why. Two facts carry the geometry:

*Overhang.* lo + hi - dilation * (k - 1), for k taps, decides the output size, so maps of equal stride and overhang give
equal sizes on every input, and only those can be added.

*Border law.* f >> g is one map iff g reads nothing outside f's output, or f evaluated outside its input gives exactly
what g reads there. So a 1x1 with a bias before a zero-padded 3x3 is not one convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import get_args

import torch
from torch import Tensor

from structrep.algebra.border import common_border, composed_fill
from structrep.algebra.evaluation import evaluate
from structrep.algebra.geometry import Border, Geometry, Ints, Strictness
from structrep.algebra.kernels import channel_mix, check_finite, compose_kernels, peak, place
from structrep.errors import Incompatible, Inexact, Unreadable


class ConvMap:
    """An affine, translation-invariant map with finite float64 coefficients, its own copies, on the CPU; immutable.

    Args:
        kernel: (O, I / groups, *K); (O, I) for a Linear.
        bias: (O,), or None for zeros.
        stride, dilation: per spatial dim, or one int for all.
        pad: (lo, hi) per spatial dim, or one int for all sides; negative pads crop.
        transposed: the adjoint; pads then crop the output. `hi` is torch's padding less its output_padding.
        groups: as in `torch.nn.Conv2d`.
        fill: (I,) or a number: what x reads outside, for a constant border.
        border: what x reads outside: "constant" (fill), "reflect", "replicate" or "circular".

    Raises:
        ValueError: shapes that do not fit each other, or a border of another name.
        Unreadable: the kernel is complex, or has no coefficients.
        Inexact: a coefficient is NaN or infinite, or has outgrown float64.
    """

    def __init__(
        self,
        kernel: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int | Sequence[int] = 1,
        pad: int | Sequence[tuple[int, int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        fill: Tensor | float = 0.0,
        border: Border = "constant",
        transposed: bool = False,
    ) -> None:
        if not 2 <= kernel.ndim <= 5:
            raise ValueError(f"a kernel of shape {tuple(kernel.shape)}: (O, I / groups, *K) has 0 to 3 spatial dims")
        if border not in get_args(Border):
            raise ValueError(f"border {border!r} is none of {', '.join(get_args(Border))}; zeros are a constant border")
        if kernel.is_complex():
            raise Unreadable(f"a kernel of {kernel.dtype}: the coefficients of a map are real, so it stays as it is")
        if 0 in kernel.shape[:2]:
            raise Unreadable(f"a kernel of shape {tuple(kernel.shape)} is empty, so there is nothing to merge")
        geometry = Geometry.of(kernel.shape, stride, dilation, pad, groups, transposed)
        if bias is not None and bias.shape != (geometry.out_channels,):
            raise ValueError(f"a bias of shape {tuple(bias.shape)} for {geometry.out_channels} output channels")
        if isinstance(fill, Tensor) and fill.shape not in ((), (geometry.in_channels,)):
            raise ValueError(f"a fill of shape {tuple(fill.shape)} for {geometry.in_channels} input channels")
        kernel = kernel.detach().to("cpu", torch.float64, copy=True)
        self._hold(geometry, kernel, None if bias is None else bias.detach().to(kernel, copy=True), fill, border)

    def _hold(
        self, geometry: Geometry, kernel: Tensor, bias: Tensor | None, fill: Tensor | float, border: Border
    ) -> None:
        """Take coefficients that are nobody else's to change."""
        self.geometry, self.kernel = geometry, kernel
        self.bias = kernel.new_zeros(geometry.out_channels) if bias is None else bias
        # A map that reads nothing outside has no border to speak of.
        self.border: Border = border if geometry.pads else "constant"
        self.fill = kernel.new_zeros(geometry.in_channels)
        if geometry.pads and border == "constant":
            self.fill += torch.as_tensor(fill, dtype=torch.float64, device=kernel.device).detach()
        check_finite(self, kernel=self.kernel, bias=self.bias, fill=self.fill)

    @classmethod
    def _of(cls, geometry: Geometry, kernel: Tensor, bias: Tensor, fill: Tensor, border: Border) -> ConvMap:
        """The map of new coefficients, float64, which it keeps without a copy."""
        made = cls.__new__(cls)
        made._hold(geometry, kernel.detach(), bias.detach(), fill, border)
        return made

    @classmethod
    def of(
        cls, geometry: Geometry, kernel: Tensor, bias: Tensor | None = None, *, like: ConvMap | None = None
    ) -> ConvMap:
        """The map of that geometry; its border is that of `like`. Raises as `ConvMap` does."""
        return cls(
            kernel,
            bias,
            stride=geometry.stride,
            pad=geometry.pad,
            dilation=geometry.dilation,
            groups=geometry.groups,
            fill=0.0 if like is None else like.fill,
            border="constant" if like is None else like.border,
            transposed=geometry.transposed,
        )

    @classmethod
    def identity(cls, channels: int, dims: int = 2) -> ConvMap:
        """x itself, of C channels and so many spatial dims: the 1 of `>>`. Raises as `ConvMap` does."""
        return cls.scale(torch.ones(channels, dtype=torch.float64), dims=dims)

    @classmethod
    def scale(cls, scale: Tensor, shift: Tensor | None = None, *, dims: int = 2) -> ConvMap:
        """scale * x + shift per channel, both (C,): what a batch norm in eval mode is. Raises as `ConvMap` does."""
        return cls(scale.reshape(-1, 1, *[1] * dims), shift, groups=scale.numel())

    # --- the algebra -------------------------------------------------------------------------------------------------

    def __add__(self, other: ConvMap | int) -> ConvMap:
        """Additivity: W1 x + b1 + W2 x + b2 = (W1 + W2) x + (b1 + b2), taps aligned by offset from the output pixel.

        Raises:
            Incompatible: channels, stride or output sizes differ.
            Inexact: both read outside the input, and differently; or a coefficient outgrows float64.
        """
        if isinstance(other, int) and other == 0:
            return self
        if not isinstance(other, ConvMap):
            return NotImplemented
        frame = self.geometry + other.geometry
        outside = common_border(self, other)
        kernel = place(self.kernel, self.geometry, frame) + place(other.kernel, other.geometry, frame)
        return ConvMap._of(frame, kernel, self.bias + other.bias, outside.fill, outside.border)

    __radd__ = __add__

    def __rshift__(self, other: ConvMap | int) -> ConvMap:
        """Associativity: W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2), subject to the border law.

        Raises:
            Incompatible: channels or spatial dims do not fit.
            Inexact: `other` reads outside what this map would not give there; or a coefficient outgrows float64.
        """
        if isinstance(other, int) and other == 1:
            return self
        if not isinstance(other, ConvMap):
            return NotImplemented
        return self.then(other)

    def then(self, other: ConvMap, strictness: Strictness = "exact") -> ConvMap:
        """`self >> other`, and what to do where the border law forbids it.

        Args:
            strictness: "exact" raises. "padded" looks for a constant per input channel that this map turns into what
                `other` reads outside, W fill + b = other.fill, and has the result pad with it. "inside" lets the result
                differ where `other` reads outside its input, if what is there is constant.

        Raises:
            Incompatible: channels or spatial dims do not fit.
            Inexact: the border law forbids it, and there is no such constant, or none that float64 can tell; or a
                coefficient outgrows float64.
            ValueError: a strictness of another name.
        """
        geometry = self.geometry >> other.geometry
        fill = composed_fill(self, other, strictness)
        kernel = compose_kernels(self.kernel, other.kernel, self.geometry, other.geometry, geometry)
        bias = other.bias + channel_mix(other.kernel, self.bias, other.geometry.groups)
        return ConvMap._of(geometry, kernel, bias, fill, (self if self.geometry.pads else other).border)

    def __rrshift__(self, other: int) -> ConvMap:
        return self if other == 1 else NotImplemented

    def __mul__(self, factor: float | Tensor) -> ConvMap:
        """Outputs scaled by a number, or per output channel by a tensor (O,).

        Raises:
            ValueError: the factors are neither one nor (O,).
            Inexact: a factor is NaN or infinite, or a coefficient outgrows float64.
        """
        factor = torch.as_tensor(factor, dtype=torch.float64, device=self.kernel.device)
        if factor.shape not in ((), (self.out_channels,)):
            raise ValueError(f"factors of shape {tuple(factor.shape)} for {self.out_channels} output channels")
        rows = factor if factor.ndim == 0 else factor.reshape(-1, *[1] * (self.kernel.ndim - 1))
        return ConvMap._of(self.geometry, self.kernel * rows, self.bias * factor, self.fill, self.border)

    __rmul__ = __mul__

    def __neg__(self) -> ConvMap:
        return self * -1.0

    def __sub__(self, other: ConvMap | int) -> ConvMap:
        return self + (-other)

    def __rsub__(self, other: int) -> ConvMap:
        return -self + other

    def distance(self, other: ConvMap) -> float:
        """Largest absolute difference of kernel and bias coefficients; infinite where no frame or border is common."""
        try:
            frame = self.geometry + other.geometry
            common_border(self, other)
        except (Incompatible, Inexact):
            return math.inf
        kernels = place(self.kernel, self.geometry, frame) - place(other.kernel, other.geometry, frame)
        return max(peak(kernels), peak(self.bias - other.bias))

    @property
    def out_channels(self) -> int:
        """Channels of what it gives."""
        return self.geometry.out_channels

    @property
    def magnitude(self) -> float:
        """Largest absolute coefficient."""
        return max(peak(self.kernel), peak(self.bias))

    # --- the same map, written otherwise -----------------------------------------------------------------------------

    def regrouped(self, groups: int) -> ConvMap:
        """The same map in fewer groups: zeros between what were separate groups.

        Raises:
            Incompatible: the present number of groups is no multiple of `groups`.
        """
        if groups < 1 or self.geometry.groups % groups:
            raise Incompatible(f"{self.geometry.groups} groups cannot be written as {groups}, only as a divisor")
        return self.framed(replace(self.geometry, groups=groups))

    def framed(self, frame: Geometry) -> ConvMap:
        """The same map with its taps placed in a larger kernel, a finer lattice or fewer groups; new taps are zero.

        Raises:
            Incompatible: the frame does not hold this map.
        """
        if self.geometry + frame != frame:
            raise Incompatible(f"the frame {frame} does not hold {self.geometry}; their sum would")
        return ConvMap._of(frame, place(self.kernel, self.geometry, frame), self.bias, self.fill, self.border)

    def widened(self, overhang: Ints) -> ConvMap:
        """The same taps with more padding behind them, up to that overhang; raises as `Geometry.widened` does."""
        return ConvMap._of(self.geometry.widened(overhang), self.kernel, self.bias, self.fill, self.border)

    def shifted(self, shift: Tensor) -> ConvMap:
        """The map that makes of x - shift what this one makes of x; `shift` is (I,), float64, for a constant border."""
        bias = self.bias + channel_mix(self.kernel, shift, self.geometry.groups)
        return ConvMap._of(self.geometry, self.kernel, bias, self.fill - shift, self.border)

    def unrolled(self, size: Sequence[int]) -> ConvMap:
        """The map of inputs of one spatial size, as a Linear on all their numbers: (N, I * size) -> (N, O * out).

        Of maps of one size, sums and compositions unroll to such. Raises where torch does: no output pixel.
        """
        g, dims = self.geometry, self.geometry.dims
        each = g.in_channels // g.groups
        impulses = torch.eye(each * math.prod(size)).to(self.kernel).reshape(-1, each, *size)
        still = self(self.kernel.new_zeros(1, g.in_channels, *size))
        response = self(impulses.repeat(1, g.groups, *[1] * dims)) - still
        return ConvMap(response.flatten(1).T, still.flatten(), groups=g.groups)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to x: (N, I, *spatial) -> (N, O, *out); without spatial dims (..., I) -> (..., O). Computed in
        float64, on the CPU, and given back where x is; raises where torch does: no output pixel, or a reflect or
        circular pad wider than x."""
        value = evaluate(x.to(self.kernel), self.geometry, self.kernel, self.bias, self.border, self.fill)
        return value.to(x.device)

    def __repr__(self) -> str:
        border = f", {self.border}" if self.border != "constant" else ""
        return f"ConvMap({self.geometry.summary}{border})"


def concat(maps: Iterable[ConvMap]) -> ConvMap:
    """All on the same input, outputs stacked on the channels in the order given.

    Raises:
        Incompatible: input channels, stride or output sizes differ.
        Inexact: two read outside the input, and differently.
        ValueError: there are none.
    """
    maps = tuple(maps)
    if not maps:
        raise ValueError("nothing to stack: concat needs at least one map")

    def pair(first: ConvMap, second: ConvMap) -> ConvMap:
        frame = first.geometry.concat(second.geometry)
        kernels = [
            place(m.kernel, m.geometry, replace(frame, out_channels=m.geometry.out_channels)) for m in (first, second)
        ]
        outside = common_border(first, second)
        bias = torch.cat([first.bias, second.bias])
        return ConvMap._of(frame, torch.cat(kernels), bias, outside.fill, outside.border)

    return reduce(pair, maps)
