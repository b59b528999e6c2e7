"""Sizes: what + and >> of maps look like and cost before a weight is read, and the overhang."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from structrep.errors import Incompatible

Border = Literal["constant", "reflect", "replicate", "circular"]
Strictness = Literal["exact", "padded", "inside"]  # how the border law is kept, see `ConvMap.then`
Ints = tuple[int, ...]  # one for each spatial dim
Pads = tuple[tuple[int, int], ...]  # (lo, hi) for each spatial dim, in pixels; negative ones crop
CONV = (None, F.conv1d, F.conv2d, F.conv3d)  # by the number of spatial dims
CONV_TRANSPOSE = (None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)  # likewise


@dataclass(frozen=True)
class Geometry:
    """All of a map but its coefficients. `+` and `>>` here decide what `+` and `>>` of maps look like, and what they
    cost, before a weight is touched.

    Args:
        in_channels, out_channels: I and O.
        kernel: taps per spatial dim; () is a Linear.
        stride, dilation: per spatial dim; () for ones. The dilation of one tap is 1, whatever is given.
        pad: (lo, hi) per spatial dim, negative ones crop; () for none.
        groups: as in `torch.nn.Conv2d`.
        transposed: the adjoint; pads then crop the output, and negative ones pad it.

    Raises:
        ValueError: the spatial dims differ, a number of taps, a stride, a dilation or the groups are below 1, or the
            groups do not divide the channels.

    Example:
        >>> (Geometry(3, 8, (3, 3)) >> Geometry(8, 4, (5, 5), stride=(2, 2))).summary
        '3 -> 4, 7x7, stride (2, 2)'
    """

    in_channels: int
    out_channels: int
    kernel: Ints = ()
    stride: Ints = ()
    dilation: Ints = ()
    pad: Pads = ()
    groups: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        dims = len(self.kernel)
        stride, dilation, pad = self.stride or (1,) * dims, self.dilation or (1,) * dims, self.pad or ((0, 0),) * dims
        if not len(stride) == len(dilation) == len(pad) == dims:
            raise ValueError(
                f"kernel {self.kernel}, stride {stride}, dilation {dilation} and pad {pad} differ in spatial dims"
            )
        if min((self.groups, *self.kernel, *stride, *dilation)) < 1:
            raise ValueError(
                f"kernel {self.kernel}, stride {stride}, dilation {dilation} and groups {self.groups} start at 1"
            )
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"{self.in_channels} -> {self.out_channels} channels do not divide into {self.groups} groups"
            )
        dilation = tuple(1 if k == 1 else d for k, d in zip(self.kernel, dilation, strict=True))  # of one tap: none
        for name, value in (("stride", stride), ("dilation", dilation), ("pad", pad)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        stride: int | Sequence[int],
        dilation: int | Sequence[int],
        pad: int | Sequence[tuple[int, int]],
        groups: int,
        transposed: bool,
    ) -> Geometry:
        """The geometry of a kernel, (O, I / groups, *K); one number stands for all dims. Raises as `Geometry` does."""
        out, inner, *taps = shape

        def each(value: int | Sequence[int]) -> Ints:
            return (value,) * len(taps) if isinstance(value, int) else tuple(value)

        pads = ((pad, pad),) * len(taps) if isinstance(pad, int) else tuple((int(lo), int(hi)) for lo, hi in pad)
        return cls(inner * groups, out, tuple(taps), each(stride), each(dilation), pads, groups, transposed)

    @property
    def summary(self) -> str:
        """Channels and taps, and what else is not as usual."""
        words = [f"{self.in_channels} -> {self.out_channels}, {'x'.join(map(str, self.kernel)) or 'linear'}"]
        words += [f"stride {self.stride}"] if set(self.stride) - {1} else []
        words += [f"pad {self.pad}"] if any(side for sides in self.pad for side in sides) else []
        words += [f"dilation {self.dilation}"] if set(self.dilation) - {1} else []
        words += [f"groups {self.groups}"] if self.groups > 1 else []
        words += ["transposed"] if self.transposed else []
        return ", ".join(words)

    @property
    def dims(self) -> int:
        """How many spatial dims there are: 0 for a Linear."""
        return len(self.kernel)

    @property
    def reach(self) -> Ints:
        """Distance from the first to the last tap, per dim: dilation * (k - 1)."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def overhang(self) -> Ints:
        """lo + hi - reach, per dim: with the stride, it decides the output size for every input size."""
        return tuple(lo + hi - r for (lo, hi), r in zip(self.pad, self.reach, strict=True))

    @property
    def pads(self) -> bool:
        """Whether the map reads anything outside its input."""
        return not self.transposed and any(side > 0 for sides in self.pad for side in sides)

    @property
    def nearest(self) -> Ints:
        """Per dim, how close to its first pixel the pixels come that are read before it; 0 where none are read."""
        return tuple(
            min(((lo - d * t - 1) % s + 1 for t in range(k) if d * t < lo), default=0)
            for k, s, d, (lo, _) in zip(self.kernel, self.stride, self.dilation, self.pad, strict=True)
        )

    @property
    def moves(self) -> tuple[bool, ...]:
        """Per dim, whether an output pixel is made of anything but the input pixel at its own place."""
        return tuple((k, s, p) != (1, 1, (0, 0)) for k, s, p in zip(self.kernel, self.stride, self.pad, strict=True))

    @property
    def pointwise(self) -> bool:
        """One tap, on the input pixel itself."""
        return not any(self.moves)

    @property
    def diagonal(self) -> bool:
        """A scale and shift per channel: what batch norms, identities and layer scales are."""
        return self.pointwise and self.groups == self.in_channels == self.out_channels

    def output_size(self, size: Sequence[int]) -> Ints:
        """Output size per spatial dim, for an input of that size; 0 where the input is too small.

        Raises:
            ValueError: the size has more or fewer dims.
        """
        if self.transposed:
            return tuple(max(0, (n - 1) * s - o + 1) for n, o, s in zip(size, self.overhang, self.stride, strict=True))
        return tuple(max(0, (n + o - 1) // s + 1) for n, o, s in zip(size, self.overhang, self.stride, strict=True))

    def inside(self, values: Tensor, size: Sequence[int], room: Sequence[int] | None = None) -> Tensor:
        """Of outputs (N, O, *out) for inputs of a size, the pixels that are made of nothing outside the input, nor of
        what lies nearer to its border than `room`; perhaps none.

        Raises:
            ValueError: the size or the room has more or fewer dims.
        """
        rooms = room or (0,) * self.dims
        for dim, (n, (lo, _), step, reach, far) in enumerate(
            zip(size, self.pad, self.stride, self.reach, rooms, strict=True), 2
        ):
            first, stop = -(-max(0, lo + far) // step), max(0, (n - 1 - reach + lo - far) // step + 1)
            values = values.narrow(dim, min(first, stop), max(0, min(stop, values.shape[dim]) - first))
        return values

    def __add__(self, other: Geometry) -> Geometry:
        """The smallest frame that holds both maps' taps, on the coarsest lattice common to both.

        Raises:
            Incompatible: channels, spatial dims, stride or overhang differ, or one alone is transposed.
        """
        for what, mine, theirs, remedy in (
            ("spatial dims", self.dims, other.dims, "both must be on the same input"),
            ("input channels", self.in_channels, other.in_channels, "both must be on the same input"),
            ("output channels", self.out_channels, other.out_channels, "stack them with concat, or give both as many"),
            ("strides", self.stride, other.stride, "give both the same"),
            ("directions, transposed or not,", self.transposed, other.transposed, "give both the same"),
            (
                "overhangs, pad + pad - dilation * (kernel - 1),", self.overhang, other.overhang,
                "pad so that these are equal, or the output sizes of some inputs differ",
            ),
        ):  # fmt: skip
            if mine != theirs:
                raise Incompatible(f"the {what} of two parallel maps differ: {mine} and {theirs}; {remedy}")
        kernel, dilation, pad = [], [], []
        for (lo1, _), (lo2, _), d1, d2, r1, r2, over in zip(
            self.pad, other.pad, self.dilation, other.dilation, self.reach, other.reach, self.overhang, strict=True
        ):
            lo = max(lo1, lo2)
            reach = lo + max(r1 - lo1, r2 - lo2)
            step = math.gcd(d1 if r1 else 0, d2 if r2 else 0, lo1 - lo2) or 1
            kernel.append(reach // step + 1)
            dilation.append(step)
            pad.append((lo, over + reach - lo))
        return replace(
            self,
            kernel=tuple(kernel),
            dilation=tuple(dilation),
            pad=tuple(pad),
            groups=math.gcd(self.groups, other.groups),
        )

    def __rshift__(self, other: Geometry) -> Geometry:
        """Strides multiply, reaches add, groups meet at their gcd.

        Raises:
            Incompatible: channels or spatial dims do not fit, or one is transposed and neither is pointwise.
        """
        if self.dims != other.dims:
            raise Incompatible(f"a map of {self.dims} spatial dims feeds one of {other.dims}; they must be equal")
        if self.out_channels != other.in_channels:
            raise Incompatible(
                f"a map with {self.out_channels} output channels feeds one with {other.in_channels} input channels; "
                f"they must be equal"
            )
        if self.transposed or other.transposed:
            if not (self.pointwise or other.pointwise):
                raise Incompatible(
                    f"a transposed convolution is one map with what is pointwise before or behind it, and these are "
                    f"{self.kernel} and {other.kernel}"
                )
            return replace(
                self if self.transposed else other,
                in_channels=self.in_channels,
                out_channels=other.out_channels,
                groups=math.gcd(self.groups, other.groups),
            )
        kernel, dilation, pad = [], [], []
        for (lo1, _), (lo2, _), s1, d1, d2, r1, r2, o1, o2 in zip(
            self.pad, other.pad, self.stride, self.dilation, other.dilation, self.reach, other.reach, self.overhang,
            other.overhang, strict=True,
        ):  # fmt: skip
            lo, reach = lo1 + s1 * lo2, r1 + s1 * r2
            step = math.gcd(d1 if r1 else 0, s1 * d2 if r2 else 0) or 1
            kernel.append(reach // step + 1)
            dilation.append(step)
            pad.append((lo, o1 + s1 * o2 + reach - lo))
        return Geometry(
            self.in_channels,
            other.out_channels,
            tuple(kernel),
            tuple(s1 * s2 for s1, s2 in zip(self.stride, other.stride, strict=True)),
            tuple(dilation),
            tuple(pad),
            math.gcd(self.groups, other.groups),
        )

    def widened(self, overhang: Ints) -> Geometry:
        """The same taps with more padding behind them, up to that overhang: the same on all inputs where that gives no
        more output pixels.

        Raises:
            ValueError: the overhang has more or fewer dims.
        """
        pad = tuple((lo, hi + new - old) for (lo, hi), new, old in zip(self.pad, overhang, self.overhang, strict=True))
        return replace(self, pad=pad)

    def concat(self, other: Geometry) -> Geometry:
        """Outputs stacked: the frame of a sum; dense, for stacked groups are no groups.

        Raises:
            Incompatible: input channels, spatial dims, stride or overhang differ.
        """
        frame = replace(self, out_channels=1, groups=1) + replace(other, out_channels=1, groups=1)
        return replace(frame, out_channels=self.out_channels + other.out_channels)
