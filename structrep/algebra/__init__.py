"""Affine maps that commute with translation, closed under `+`, `>>`, `*` and `concat`.

Knows tensors and no modules. Read `convmap` first.

That a norm folds into a convolution, branches add, convolutions compose and outputs stack is DBB's transforms I to IV,
arXiv:2103.13425, section 3; here they hold for any stride, dilation, groups and border, or are refused.

In shapes, N is the batch, I and O are input and output channels, K the taps per spatial dim. Sizes, strides, pads,
dilations and overhangs are in pixels. Coefficients are float64, on the CPU.
"""

from structrep.algebra.border import CANCELLATION, ROUNDING
from structrep.algebra.convmap import ConvMap, concat
from structrep.algebra.geometry import CONV, CONV_TRANSPOSE, Border, Geometry, Ints, Pads, Strictness
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
    "Strictness",
    "concat",
    "swapped",
]
