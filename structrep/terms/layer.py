"""What one operation of a model does, as a map: a layer, a sum, a concatenation, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx, nn

from structrep.algebra import ConvMap, Geometry

SCALES = ("norm", "affine")
PRODUCTS = {"matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "linear", "kron", "outer",
            *(f"conv{transposed}{dims}d" for transposed in ("", "_transpose") for dims in (1, 2, 3))}  # fmt: skip
KINDS = ("conv", "linear", "table", *SCALES, "pool", "pad", "slice", "view", "unrolled")


@dataclass(frozen=True)
class Formula:
    """How a kernel is computed: the torch functions called, and the parameters and constants they were called on."""

    calls: frozenset[str]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, formulas: Iterable[Formula]) -> Formula:
        """One for what several tensors are computed of."""
        parts = list(formulas)
        tensors = {id(tensor): tensor for part in parts for tensor in part.tensors}
        return cls(frozenset().union(*(part.calls for part in parts)), tuple(tensors.values()))

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.tensors if isinstance(tensor, nn.Parameter))


@dataclass(frozen=True, eq=False)
class Computed:
    """A tensor that a layer computes before every call: as it is in the layer's dtype, how, and in float64."""

    value: Tensor
    formula: Formula
    exact: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """A map of one input.

    Args:
        kind: one of `KINDS`.
        load: the map itself, given the channel count of its input and the number of spatial dims.
        shape: its geometry, given the same; touches no weight.
        in_channels, out_channels, dims: None where open.
        parameters: how many numbers the layer stores.
        shifts: whether it can add a constant.
        weight: the kernel tensor of a convolution or Linear.
        formula: how that kernel was computed, if it is no parameter itself.
        source, node: in a graph, the node that feeds it and the node that it is.
        through: nodes between the two.
        sized: whether it is that map for inputs of any size, for those that differ from the example by multiples of its
            stride, or for the example's alone.
        work: multiply-adds per output pixel, where these are not its kernel's.
        resized: whether it is told at each call how large its output is to be; coefficients are the same for all sizes.
        probed: whether it was found out by what it does, not read.
        moves: whether it moves, drops and pads numbers, and computes none.
        adds: whether adding a constant is all that it does.
        keeps_channels: whether it gives as many channels as it is given, where that is open.
        dead: counts channels of a norm whose variance is lost in its eps, whose scale says nothing of the data.
    """

    kind: str
    load: Callable[[int, int], ConvMap]
    shape: Callable[[int, int], Geometry]
    in_channels: int | None = None
    out_channels: int | None = None
    dims: int | None = None
    parameters: int = 0
    shifts: bool = False
    weight: Tensor | None = None
    formula: Formula | None = None
    source: fx.Node | None = None
    node: fx.Node | None = None
    through: tuple[fx.Node, ...] = ()
    sized: Literal["any", "period", "size"] = "any"
    work: float | None = None
    resized: bool = False
    probed: bool = False
    moves: bool = False
    adds: bool = False
    keeps_channels: bool = True
    dead: Callable[[], int] = lambda: 0

    @property
    def scales(self) -> bool:
        """Whether it is a scale and a shift per channel, and nothing else."""
        return self.kind in SCALES

    @property
    def computes(self) -> bool:
        """Whether its kernel is computed of parameters, and no mere view of one."""
        if self.formula is None or self.weight is None or len(self.formula.tensors) != 1:
            return self.formula is not None
        (tensor,) = self.formula.tensors
        shared = tensor.untyped_storage().data_ptr() == self.weight.untyped_storage().data_ptr()
        return not shared or tensor.numel() != self.weight.numel()

    @property
    def composes(self) -> bool:
        """Whether its kernel is a product of parameters, multiplied out at every call."""
        return self.computes and self.formula is not None and not self.formula.calls.isdisjoint(PRODUCTS)

    def __str__(self) -> str:
        if self.weight is None:
            return self.kind
        taps = "x".join(map(str, self.weight.shape[2:]))
        return f"{self.kind} {taps}" if taps else self.kind


@dataclass(frozen=True)
class Sum:
    """A signed sum: ((input, coefficient), ...), perhaps by way of other nodes."""

    parts: tuple[tuple[fx.Node, float], ...]
    through: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Blend:
    """A sum of inputs, each scaled per channel, and perhaps shifted: ((input, scale), ...)."""

    parts: tuple[tuple[fx.Node, Layer], ...]


@dataclass(frozen=True)
class Concat:
    """Inputs concatenated along dimension `dim`."""

    parts: tuple[fx.Node, ...]
    dim: int


@dataclass(frozen=True)
class Identity:
    """The input itself."""

    source: fx.Node


Reading = Layer | Sum | Blend | Concat | Identity
Readings = Mapping[fx.Node, Reading]  # what the nodes of a graph are
