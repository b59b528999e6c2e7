"""RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition. Ding et al.,
arXiv:2105.01883; RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality. Ding et al., CVPR 2022,
arXiv:2112.11081.

Training time: all numbers of a piece of the image given to one fully-connected layer with a norm, and convolutions of
the piece, each with a norm, added. On a fixed size a convolution is a matrix too (section 3.3), with each row of
numbers that it gives to one impulse.
"""

from structrep.algebra import ConvMap
from structrep.blocks import RepMLP2d
from structrep.pattern import Affine, Conv, Many, Optional, Seq, Sum, Unrolled, pointwise
from structrep.registry import rule


@rule(
    Sum(
        Seq(Conv(pointwise), Optional(Affine())).named("whole"),
        Many(Seq(Unrolled(), Optional(Affine()))).named("local"),
    ),
    source="RepMLP, arXiv:2105.01883, section 3.3",
    example=lambda: RepMLP2d(8, (4, 4), sets=4),
    example_shape=(2, 8, 8, 12),
    counter_examples=[("", lambda: RepMLP2d(8, (4, 4), sets=4, kernels=()))],
    published="The authors' (DingXiaoH/RepMLP at 3eff13f) stops with an error on models in float64.",
)
def repmlp(whole: ConvMap, local: list[ConvMap]) -> ConvMap:
    return whole + sum(local)
