"""Training-time modules of the published families, made as the `nn.Conv{n}d` or `nn.Linear` they replace.

There is no merge code here: `structrep.reparameterize` reads these modules as it reads anybody's. A block takes the
arguments of the layer whose place it takes:

    >>> nn.Conv2d(8, 16, 3, padding=1)
    >>> RepVGGBlock2d(8, 16, 3, padding=1)

In shapes, N is the batch, I and O are the channels of input and output, K the taps per spatial dim. Sizes, strides,
pads and dilations are in pixels.
"""

from torch import nn

from structrep.blocks._geometry import ConvBlock
from structrep.blocks.acb import ACBlock2d
from structrep.blocks.branches import Branches, LearnableAffine
from structrep.blocks.dbb import DiverseBranchBlock1d, DiverseBranchBlock2d, DiverseBranchBlock3d
from structrep.blocks.deanet import DEConv2d
from structrep.blocks.diracnet import DiracConv1d, DiracConv2d, DiracConv3d
from structrep.blocks.doconv import DOConv1d, DOConv2d, DOConv3d
from structrep.blocks.ecbsr import EdgeBlock2d
from structrep.blocks.expandnet import ExpandConv1d, ExpandConv2d, ExpandConv3d, ExpandLinear
from structrep.blocks.fmen import ResidualRepBlock2d
from structrep.blocks.lora import LoRAConv2d, LoRALinear
from structrep.blocks.mobileone import MobileOneBlock1d, MobileOneBlock2d, MobileOneBlock3d
from structrep.blocks.orepa import OREPA2d
from structrep.blocks.qarepvgg import QARepVGGBlock1d, QARepVGGBlock2d, QARepVGGBlock3d
from structrep.blocks.repadapter import RepAdapterLinear
from structrep.blocks.replknet import LargeKernelBlock2d
from structrep.blocks.repmixer import RepMixer2d
from structrep.blocks.repmlp import RepMLP2d
from structrep.blocks.repoptimizer import CSLABlock1d, CSLABlock2d, CSLABlock3d
from structrep.blocks.repvgg import RepVGGBlock1d, RepVGGBlock2d, RepVGGBlock3d
from structrep.blocks.resrep import CompactorBlock1d, CompactorBlock2d, CompactorBlock3d
from structrep.blocks.span import Conv3XC2d
from structrep.blocks.yolor import ImplicitConv2d

# What stands in the place of one plain layer, and gives it back when merged.
REPLACE_A_LAYER: tuple[type[nn.Module], ...] = (
    ConvBlock,
    ExpandLinear,
    LoRALinear,
    RepAdapterLinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
)

__all__ = [
    "ACBlock2d",
    "Branches",
    "CSLABlock1d",
    "CSLABlock2d",
    "CSLABlock3d",
    "CompactorBlock1d",
    "CompactorBlock2d",
    "CompactorBlock3d",
    "Conv3XC2d",
    "DEConv2d",
    "DOConv1d",
    "DOConv2d",
    "DOConv3d",
    "DiracConv1d",
    "DiracConv2d",
    "DiracConv3d",
    "DiverseBranchBlock1d",
    "DiverseBranchBlock2d",
    "DiverseBranchBlock3d",
    "EdgeBlock2d",
    "ExpandConv1d",
    "ExpandConv2d",
    "ExpandConv3d",
    "ExpandLinear",
    "ImplicitConv2d",
    "LargeKernelBlock2d",
    "LearnableAffine",
    "LoRAConv2d",
    "LoRALinear",
    "MobileOneBlock1d",
    "MobileOneBlock2d",
    "MobileOneBlock3d",
    "OREPA2d",
    "QARepVGGBlock1d",
    "QARepVGGBlock2d",
    "QARepVGGBlock3d",
    "RepAdapterLinear",
    "RepMLP2d",
    "RepMixer2d",
    "RepVGGBlock1d",
    "RepVGGBlock2d",
    "RepVGGBlock3d",
    "ResidualRepBlock2d",
]
