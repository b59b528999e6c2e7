"""Affine maps that commute with translation, closed under `+`, `>>`, `*` and `concat`.

Knows tensors and no modules. Read `convmap` first."""

from structrep.algebra.border import CANCELLATION, ROUNDING
from structrep.algebra.convmap import ConvMap, concat
from structrep.algebra.geometry import CONV, CONV_TRANSPOSE, Border, Geometry, Ints, Pads, Rigour
from structrep.algebra.kernels import swapped

__all__ = [
    "CANCELLATION",
    "CONV",
    "CONV_TRANSPOSE",
    "ROUNDING",
    "Border",
    "ConvMap",
    "Geometry",
    "Ints",
    "Pads",
    "Rigour",
    "concat",
    "swapped",
]
