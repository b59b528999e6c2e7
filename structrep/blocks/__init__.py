"""Training-time modules of the five families, made as the `nn.Conv{n}d` or `nn.Linear` they replace.

There is no merge code here: `structrep.reparameterize` reads these modules as it reads anybody's.
"""

from torch import nn

from structrep.blocks._geometry import ConvBlock
from structrep.blocks.acb import ACBlock2d
from structrep.blocks.diracnet import DiracConv1d, DiracConv2d, DiracConv3d
from structrep.blocks.doconv import DOConv1d, DOConv2d, DOConv3d
from structrep.blocks.expandnet import ExpandConv1d, ExpandConv2d, ExpandConv3d, ExpandLinear
from structrep.blocks.repvgg import RepVGGBlock1d, RepVGGBlock2d, RepVGGBlock3d

# What stands in the place of one plain layer, and gives it back when merged.
STAND_INS: tuple[type[nn.Module], ...] = (ConvBlock, ExpandLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

__all__ = [
    "ACBlock2d",
    "DOConv1d",
    "DOConv2d",
    "DOConv3d",
    "DiracConv1d",
    "DiracConv2d",
    "DiracConv3d",
    "ExpandConv1d",
    "ExpandConv2d",
    "ExpandConv3d",
    "ExpandLinear",
    "RepVGGBlock1d",
    "RepVGGBlock2d",
    "RepVGGBlock3d",
]
