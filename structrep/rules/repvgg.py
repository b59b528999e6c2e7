"""RepVGG: Making VGG-style ConvNets Great Again. Ding et al., CVPR 2021, arXiv:2101.03697.

Training time: BN(kxk conv) + BN(1x1 conv) + BN where the block keeps its shape. Each branch is one kxk convolution (the
1x1 is a kxk with one tap, the identity a 1x1 of Dirac kernels), so their sum is one (section 3.3, figure 4).
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, RepVGGBlock2d
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
    counter_examples=[
        ("", lambda: Branches(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), nn.Conv2d(8, 8, 1))),
        (
            "Inexact",
            lambda: Branches(nn.Conv2d(8, 8, 3, padding=2), nn.Conv2d(8, 8, 1, padding=1, padding_mode="circular")),
        ),
    ],
    published="YOLOv7's (WongKinYiu/yolov7 at a207844, fuse_repvgg_block) is off by 100 % where the block has "
    "groups and an identity: the kernel of that is filled along the diagonal of (C, C / groups). "
    "mmpretrain's drops a squeeze-excite layer between the sum and the activation: off by 100 to 220 %. "
    "RT-DETR's keeps both branches beside the merged layer.",
)
def repvgg(dense: ConvMap, pointwise: ConvMap, identity: ConvMap) -> ConvMap:
    """The sum of the branches that are there: an identity that is not is 0, one that is a norm or a plain skip."""
    return dense + pointwise + identity
