"""What a term may look like. With `registry` and `algebra.ConvMap` it is all that a rule needs."""

from structrep.pattern.base import Captures, Either, Pattern
from structrep.pattern.captured import arguments
from structrep.pattern.combinators import Concat, Many, Optional, Seq, Sum, conv_norm
from structrep.pattern.leaves import (
    Affine,
    Anything,
    Conv,
    Identity,
    Kernel,
    Leaf,
    Norm,
    Pad,
    Pool,
    Scalar,
    Unrolled,
    View,
    large,
    line,
    pointwise,
    spatial,
    square,
)

__all__ = [
    "Affine",
    "Anything",
    "Captures",
    "Concat",
    "Conv",
    "Either",
    "Identity",
    "Kernel",
    "Leaf",
    "Many",
    "Norm",
    "Optional",
    "Pad",
    "Pattern",
    "Pool",
    "Scalar",
    "Seq",
    "Sum",
    "Unrolled",
    "View",
    "arguments",
    "conv_norm",
    "large",
    "line",
    "pointwise",
    "spatial",
    "square",
]
