"""RepVGG: Making VGG-style ConvNets Great Again. Ding et al., CVPR 2021, arXiv:2101.03697.

Training time: BN(kxk conv) + BN(1x1 conv) + BN where the block keeps its shape. Each branch is one kxk convolution (the
1x1 is a kxk with one tap, the identity a 1x1 of Dirac kernels), so their sum is one (section 3.3, figure 4).
"""

from structrep.algebra import ConvMap
from structrep.blocks import RepVGGBlock2d
from structrep.pattern import Affine, Identity, Optional, Pad, Seq, Sum, conv_norm, pointwise, spatial
from structrep.registry import rule


@rule(
    Sum(
        conv_norm(spatial).named("dense"),
        conv_norm(pointwise).named("pointwise"),
        Optional(Seq(Optional(Pad()), Affine() | Identity()).named("identity")),
    ),
    source="RepVGG, arXiv:2101.03697, section 3.3",
    example=lambda: RepVGGBlock2d(8, 8, 3, padding=1),
)
def repvgg(dense: ConvMap, pointwise: ConvMap, identity: ConvMap) -> ConvMap:
    return dense + pointwise + identity
